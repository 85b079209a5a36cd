"""A conversation written out turn by turn, with what is trained: no template, no masks, no offsets.

Every piece of text between special tokens is tokenized by itself; what a medium is replaced with is
given. An assistant's turn is trained from its first word to its stop token, media apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Piece = tuple[str, bool]  # text, and whether it is trained


@dataclass(frozen=True)
class Turns:
    """How a family writes turns.

    begin: before all of it. header: before a turn, with `{role}`; stop: the token that ends it;
    after: what follows the stop token. model: the assistant's name. system: whether it has turns of
    its own; otherwise its text and `gap` go before the first question. around: what stands before
    and behind a picture.
    """

    begin: str
    header: str
    stop: str
    after: str
    model: str
    system: bool
    gap: str = "\n\n"
    around: str = ""


def pieces(
    messages: Sequence[Mapping[str, Any]],
    how: Turns,
    medium: Callable[[Mapping[str, Any]], str],
    roles: Sequence[str] = ("assistant",),
    stops: str = "turn",
) -> list[Piece]:
    """The conversation as (text, trained); `medium(part)` is a picture's or sound's own text.

    roles: whose turns train. stops: which stop tokens do: "turn" (those turns'), "all", "last",
    "none".
    """
    found: list[Piece] = [(how.begin, False)]
    ahead = ""
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role == "system" and not how.system:
            ahead = "".join(part["text"] for part in parts)
            continue
        trained, name = role in roles, how.model if role == "assistant" else role
        found.append((how.header.format(role=name), False))
        if ahead:
            found += [(ahead, "system" in roles), (how.gap, False)]
        ahead = ""
        for part in parts:
            words = part["type"] == "text"
            found.append((part["text"] if words else medium(part), trained and words))
        last = number == len(messages) - 1
        stop = {"turn": trained, "all": True, "last": last, "none": False}[stops]
        found += [(how.stop, stop), (how.after, False)]
    return found


def tokens(found: Sequence[Piece], encode: Callable[[str], list[int]]) -> list[tuple[int, bool]]:
    """(id, trained) of every token; neighbouring pieces of one kind are tokenized as one text."""
    joined: list[Piece] = []
    for text, trained in found:
        if joined and joined[-1][1] == trained:
            joined[-1] = (joined[-1][0] + text, trained)
        else:
            joined.append((text, trained))
    return [(token, trained) for text, trained in joined for token in encode(text)]
