"""Chat templates: what they render, which tokens train, and that a beginning stays one."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch

from conformance import processors
from conformance.case import Case
from conformance.check import check
from conformance.checks.conversations import (
    IGNORE,
    assert_names_its_sample,
    chat,
    expected,
    plan_of,
    special,
)
from conformance.paths import fixtures
from conformance.subject import Subject

Measured = dict[str, float]
Decline = Callable[[str], None]
LAYOUTS: dict[str, Any] = {"models": processors.EACH_LAYOUT, "marks": ("training",)}
MEDIA = ("image", "boi", "eoi", "video", "audio", "boa", "eoa", "vision_start", "vision_end")


def said(name: str, **options: Any) -> processors.Conversation:
    """A conversation, about two pictures where the model's processor takes them here."""
    pictures = processors.missing(name, "image") is None and name in processors.WITH_PICTURES
    return processors.with_pictures(*(("wide", "odd") if pictures else ()), **options)


def rendered(name: str, messages: processors.Conversation, **options: Any) -> str:
    """The template's text."""
    text = processors.processor(name).apply_chat_template(
        copy.deepcopy(messages), tokenize=False, **options
    )
    assert isinstance(text, str)
    return text


def golden(layout: str) -> dict[str, Any]:
    """What is committed beside a layout's tokenizer."""
    data = json.loads((fixtures() / "tokenizers" / layout / "golden.json").read_text())
    assert isinstance(data, dict)
    return data


def record(name: str) -> dict[str, Any]:
    """What `golden.json` holds of a layout, as the installed versions give it."""
    parts = [{"type": "image", "image": None}] if processors.KITS[name].image else []
    text = rendered(name, processors.conversation(parts))
    tokenizer = processors.tokenizer_of(processors.processor(name))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    digest = hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
    tokens = ("pad", "bos", "eos", *MEDIA)
    return {"text": text, "ids": digest, "special": special(name, *tokens)}


@check("T01", **LAYOUTS)
def test_template_renders_as_committed(
    case: Case, measured: Measured, unavailable: Decline
) -> None:
    """The rendered template and the hash of its token ids are those committed.

    https://github.com/axolotl-ai-cloud/axolotl/issues/1806
    """
    assert case.model is not None
    if reason := processors.missing(case.model.name):
        return unavailable(reason)
    kit = processors.KITS[case.model.name]
    want = golden(kit.layout)["pictures" if kit.image else "text"]
    got = record(case.model.name)
    measured["characters"] = len(got["text"])
    assert got["text"] == want["text"], f"{case.id}: renders {got['text']!r}, not {want['text']!r}"
    assert got["ids"] == want["ids"], f"{case.id}: other token ids for the committed text"


@check("T02", needs=("plan", "chat"), **LAYOUTS)
def test_what_trains_is_the_assistants(
    case: Case, subject: Subject, measured: Measured, unavailable: Decline
) -> None:
    """Labels are the assistant's turns with their stop tokens, and nothing else, to the token.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3756
    """
    name = subject.model_spec.name
    if reason := processors.missing(name):
        return unavailable(reason)
    rows = [said(name, index=i, turns=1 + i, plain=i == 1) for i in range(3)]
    batch = chat(subject, name, rows)
    stop = processors.turns(processors.KITS[name].layout).stop
    tokenizer = processors.tokenizer_of(processors.processor(name))
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    for row, messages in enumerate(rows):
        ids, labels = expected(name, messages)
        assert labels.count(stop_id) == 1 + row, f"{case.id}: the oracle trains no stop token"
        got = batch["input_ids"][row, : len(ids)].tolist()
        assert got == ids, f"{case.id}: row {row} reads {tokenizer.decode(got)!r}"
        want = torch.tensor(labels + [IGNORE] * (batch["labels"].shape[1] - len(labels)))
        wrong = (batch["labels"][row].cpu() != want).nonzero().flatten().tolist()
        measured["wrong labels"] = measured.get("wrong labels", 0) + len(wrong)
        assert not wrong, (
            f"{case.id}: row {row}: {len(wrong)} labels are wrong, first at {wrong[0]}"
            f" ({tokenizer.convert_ids_to_tokens([ids[wrong[0]]])[0]!r}); tolerance 0"
        )


@check("T04", **LAYOUTS)
def test_special_ids_are_the_models(case: Case, measured: Measured, unavailable: Decline) -> None:
    """Special, pad and begin ids are those committed and those of the model's config, each once.

    https://github.com/hiyouga/LLaMA-Factory/issues/10389
    """
    from conformance.checkpoint import build_config

    assert case.model is not None
    name = case.model.name
    if reason := processors.missing(name):
        return unavailable(reason)
    got = record(name)["special"]
    want = golden(processors.KITS[name].layout)["pictures"]["special"]
    assert got == want, f"{case.id}: special ids are {got}, committed are {want}"
    config = build_config(case.model)
    for token, number in got.items():
        for field in (f"{token}_token_id", f"{token}_token_index"):
            named = getattr(config, field, number)
            assert named in (number, None), f"{case.id}: {token} is {number}, {field} is {named}"
    tokenizer = processors.tokenizer_of(processors.processor(name))
    stop = tokenizer.convert_tokens_to_ids(processors.turns(processors.KITS[name].layout).stop)
    assert len(set(got.values())) == len(got), f"{case.id}: two special tokens have one id: {got}"
    assert tokenizer.pad_token_id != stop, f"{case.id}: padding is the stop token"
    ids = processors.processor(name).apply_chat_template(
        processors.conversation(), tokenize=True, return_dict=True
    )["input_ids"]
    flat = ids[0] if isinstance(ids[0], list) else ids
    measured["begins"] = flat.count(got["bos"]) if "bos" in got else 0
    assert measured["begins"] == ("bos" in got), f"{case.id}: {measured['begins']} begin tokens"


@check("T05", **LAYOUTS)
def test_a_beginning_renders_to_a_beginning(
    case: Case, measured: Measured, unavailable: Decline
) -> None:
    """Each beginning of a conversation, and the prompt for its answer, renders to a beginning.

    An invariant kept without a thread: a template that rewrites earlier turns moves every label.
    """
    assert case.model is not None
    name = case.model.name
    if reason := processors.missing(name):
        return unavailable(reason)
    parts = [{"type": "image", "image": None}] if processors.KITS[name].image else []
    messages = processors.conversation(parts, turns=3)
    tokenizer = processors.tokenizer_of(processors.processor(name))
    whole = rendered(name, messages)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for end in range(2, len(messages)):
        answered = messages[end]["role"] == "assistant"
        begun = rendered(name, messages[:end], add_generation_prompt=answered)
        measured["beginnings"] = measured.get("beginnings", 0) + 1
        assert whole.startswith(begun), f"{case.id}: {end} turns render to {begun!r}"
        some = tokenizer(begun, add_special_tokens=False)["input_ids"]
        assert ids[: len(some)] == some, f"{case.id}: {end} turns have other token ids"
    assert measured.get("beginnings", 0) >= 5, f"{case.id}: too few turns"


def retold(name: str, change: Callable[[str], str]) -> Any:
    """A copy of the processor with another template."""
    processor = copy.copy(processors.processor(name))
    template = change(processor.chat_template)
    assert template != processor.chat_template, f"{name}: the template is as before"
    processor.chat_template = template
    return processor


def unmarked(template: str) -> str:
    """The template without its marks."""
    for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
        template = template.replace(mark, "")
    return template


@check("T06", needs=("plan", "chat"), **LAYOUTS)
def test_a_template_without_marks_is_refused(
    case: Case, subject: Subject, unavailable: Decline
) -> None:
    """A template that marks no assistant's turn is one clear error, not a batch without labels.

    https://github.com/huggingface/trl/issues/6577
    """
    name = subject.model_spec.name
    if reason := processors.missing(name):
        return unavailable(reason)
    rows = [said(name, index=i) for i in range(2)]
    processor = retold(name, unmarked)
    assert_names_its_sample(case, subject, rows, 0, "generation", processor=processor)


@check("T07", needs=("plan", "chat"), **LAYOUTS)
def test_the_stop_token_trains(
    case: Case, subject: Subject, measured: Measured, unavailable: Decline
) -> None:
    """The stop token trains also where the template's mark ends before it, or it is never learnt.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3756
    """
    name = subject.model_spec.name
    if reason := processors.missing(name):
        return unavailable(reason)
    stop = processors.turns(processors.KITS[name].layout).stop

    def outside(template: str) -> str:
        marked = f" + '{stop}' -}}}}{{%- endgeneration -%}}"
        return template.replace(marked, f" -}}}}{{%- endgeneration -%}}{{{{- '{stop}' -}}}}")

    rows = [said(name, index=i, turns=2) for i in range(2)]
    batch = subject.impl.chat(rows, retold(name, outside), plan_of(subject))
    tokenizer = processors.tokenizer_of(processors.processor(name))
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    turns = int((batch["input_ids"] == stop_id).sum())
    measured["stop tokens that train"] = int((batch["labels"] == stop_id).sum())
    assert turns == 8 + 2 * processors.turns(processors.KITS[name].layout).system
    trained = measured["stop tokens that train"]
    assert trained == 4, f"{case.id}: {trained} of the assistant's 4 stop tokens train"


@check(
    "T08",
    needs=("plan", "chat"),
    models=processors.WITH_PICTURES,
    settings=("images",),
    marks=("training",),
)
def test_media_never_train(
    case: Case, subject: Subject, measured: Measured, unavailable: Decline
) -> None:
    """Padding, pictures, sounds and what begins and ends them are never labelled, anywhere.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3625
    """
    name = subject.model_spec.name
    if reason := processors.missing(name, "image"):
        return unavailable(reason)
    rows = [said(name, index=i, turns=1 + i) for i in range(2)]
    # an assistant that answers with a picture
    answer = [
        {"type": "text", "text": "a disc"},
        {"type": "image", "image": processors.blank(20, 24)},
    ]
    rows[0].append({"role": "assistant", "content": answer})
    if name in processors.WITH_SOUND:
        rows[1][1]["content"].append({"type": "audio", "audio": processors.sound(3000)})
    batch = chat(subject, name, rows)
    ids, labels = batch["input_ids"], batch["labels"]
    media = special(name, "pad", *MEDIA)
    seen = {t for t, i in media.items() if bool((ids == i).any())}
    assert {"pad", "image"} < seen, f"{case.id}: the batch has only {sorted(seen)}"
    trained = {t: int((labels == i).sum()) for t, i in media.items()}
    measured["media that train"] = sum(trained.values())
    wrong = {t: n for t, n in trained.items() if n}
    assert not wrong, f"{case.id}: labelled are {wrong}; tolerance 0"
    own, _ = expected(name, rows[0])
    assert (labels[0, : len(own)] != IGNORE).sum() > 5, f"{case.id}: nothing else trains either"
