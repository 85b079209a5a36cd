"""What checks of processors and templates share: the batch, the oracle's labels, loud refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance import processors
from conformance.case import Case
from conformance.oracles import turns
from conformance.processors import Conversation
from conformance.subject import Subject

Batch = dict[str, Any]
IGNORE = -100
ROWS = (("wide", "tall", "odd", "grey"), (), ("clear",))  # four pictures, none, one


class _Enough(Exception):
    """The first decoder layer was reached."""


def pictured(subject: Subject) -> Subject:
    """The subject on the model that has room for its processor's pictures."""
    model = processors.pictured(subject.model_spec)
    return replace(subject, case=replace(subject.case, model=model))


def plan_of(subject: Subject, batch: str = "images") -> Any:
    """The plan of a setting with pictures where the model takes them."""
    taken = "vision" in subject.model_spec.traits
    return subject.plan(subject.setting(batch=batch if taken else "padded"))


def chat(subject: Subject, name: str, conversations: Sequence[Conversation]) -> Batch:
    """The implementation's batch of conversations, in the setting's dtype."""
    processor = processors.processor(name)
    batch = subject.impl.chat(conversations, processor, plan_of(subject))
    return subject.to(dict(batch), subject.case.setting.dtype)


def rows_of_pictures(*rows: tuple[str, ...]) -> list[processors.Conversation]:
    """Conversations about so many committed pictures each, one turn long."""
    return [
        processors.with_pictures(*row, index=i, turns=1, system=False)
        for i, row in enumerate(rows or ROWS)
    ]


def special(name: str, *tokens: str) -> dict[str, int]:
    """Ids of a kit's named special tokens (`boi`, `image`, ...); those that it has."""
    tokenizer = processors.tokenizer_of(processors.processor(name))
    found = {t: getattr(tokenizer, f"{t}_token_id", None) for t in tokens}
    return {t: int(i) for t, i in found.items() if i is not None}


def medium(name: str) -> Callable[[Mapping[str, Any]], str]:
    """What the oracle writes for a picture, as the family documents it."""
    kit = processors.KITS[name]
    tokenizer = processors.tokenizer_of(processors.processor(name))

    def text(part: Mapping[str, Any]) -> str:
        assert kit.count is not None
        soft = tokenizer.image_token * kit.count(part["image"].height, part["image"].width)
        if hasattr(tokenizer, "vision_start_token"):
            return f"{tokenizer.vision_start_token}{soft}{tokenizer.vision_end_token}"
        around = processors.turns(kit.layout).around
        return f"{around}{tokenizer.boi_token}{soft}{tokenizer.eoi_token}{around}"

    return text


def expected(name: str, conversation: Conversation, **rules: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation by the oracle, -100 where nothing is trained; `rules` as of
    `oracles.turns.pieces`."""
    tokenizer = processors.tokenizer_of(processors.processor(name))
    how = processors.turns(processors.KITS[name].layout)
    written = turns.pieces(conversation, how, medium(name), **rules)
    found = turns.tokens(
        written, lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
    )
    return [i for i, _ in found], [i if trained else IGNORE for i, trained in found]


def embeddings(model: Any, batch: Batch) -> Tensor:
    """What the decoder's first layer is given (B, S, H); nothing behind it runs."""
    caught: list[Tensor] = []

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught.append(kwargs.get("hidden_states", args[0] if args else None))
        raise _Enough

    layer = next(m for n, m in model.named_modules() if n.endswith("language_model.layers.0"))
    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    try:
        with torch.no_grad(), suppress(_Enough):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def runs(flags: Sequence[bool]) -> list[list[int]]:
    """Positions of each unbroken run of True."""
    found: list[list[int]] = []
    for place, flag in enumerate(flags):
        if flag and (place == 0 or not flags[place - 1]):
            found.append([])
        if flag:
            found[-1].append(place)
    return found


def assert_names_its_sample(
    case: Case,
    subject: Subject,
    conversations: Sequence[Conversation],
    at: int,
    hint: str,
    processor: Any = None,
) -> None:
    """`chat` makes a batch of all conversations but number `at`, and none with it: the error is one
    line and names that conversation, or has `hint` in it.

    processor: in place of the kit's own, for the second attempt.
    """
    sound = processors.processor(subject.model_spec.name)
    plan = plan_of(subject)
    good = [c for i, c in enumerate(conversations) if i != at]
    assert subject.impl.chat(good, sound, plan), f"{case.id}: nothing is made of good samples"
    try:
        batch = subject.impl.chat(conversations, processor or sound, plan)
    except subject.declines(ValueError, OSError, RuntimeError) as error:
        text = str(error).strip()
    else:
        labels = int((torch.as_tensor(batch["labels"]) != IGNORE).sum())
        raise AssertionError(f"{case.id}: a batch of {labels} labels was made of it")
    named = re.search(rf"(conversation|sample|row|example|index)\W*{at}\b", text)
    assert named or (hint and hint in text), f"{case.id}: which sample it is is not said: {text}"
    assert "\n" not in text, f"{case.id}: the message has several lines: {text}"
