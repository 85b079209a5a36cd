"""Where each turn lies in a rendered conversation: by the template's marks, or by asking it again.

A template marks the assistant's turns only. Where another turn's content lies is found by rendering
the conversation once more with that content exchanged: what differs is where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import Refused
from .label_rules import LabelRules

_STRANGER = "\ue000"  # a private-use character: in no conversation, in no template


@dataclass(frozen=True)
class Turn:
    """A turn's role, and where its content begins and ends: characters of the rendered text, or
    tokens."""

    role: str
    start: int
    end: int


def rendered(
    processor: Any, template: str, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, placeholders not expanded, and which characters the template marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = getattr(processor, "tokenizer", processor)
    texts, marks = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [(int(start), int(end)) for start, end in marks[0]]


def turns(
    processor: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    rules: LabelRules,
    index: int = 0,
) -> tuple[str, list[Turn]]:
    """The rendered text, and its turns in characters: the marked ones alone where the rules ask
    about no other. Refused, naming the conversation, where a turn that is to train is not written.
    """
    text, marks = rendered(processor, template, messages)
    found = [Turn("assistant", start, end) for start, end in marks]
    if rules.marks_suffice:
        return text, found
    for place, message in enumerate(messages):
        role = str(message["role"])
        if role == "assistant":
            continue
        turn = _exchanged(processor, template, messages, place, text)
        if turn is not None:
            found.append(turn)
        elif rules.trains(role):
            raise Refused(f"conversation {index}: the template writes no turn of its {role}")
    return text, sorted(found, key=lambda turn: turn.start)


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _exchanged(
    processor: Any, template: str, messages: Sequence[Mapping[str, Any]], place: int, text: str
) -> Turn | None:
    """The turn at a place, by what changes with its content; None where nothing does."""
    content = messages[place]["content"]
    other: Any = _STRANGER if isinstance(content, str) else [{"type": "text", "text": _STRANGER}]
    changed = [*messages[:place], {**messages[place], "content": other}, *messages[place + 1 :]]
    again, _ = rendered(processor, template, changed)
    if _STRANGER not in again:
        return None
    start = _alike(text, again)
    behind = _alike(text[start:][::-1], again[::-1])
    return Turn(str(messages[place]["role"]), start, len(text) - behind)
