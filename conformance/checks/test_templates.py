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
def test_template_renders_as_committed(case: Case, measured: Measured, kit: str) -> None:
    """The rendered template and the hash of its token ids are those committed.

    https://github.com/axolotl-ai-cloud/axolotl/issues/1806
    """
    own = processors.KITS[kit]
    want = golden(own.layout)["pictures" if own.image else "text"]
    got = record(kit)
    measured["characters"] = len(got["text"])
    assert got["text"] == want["text"], f"{case.id}: renders {got['text']!r}, not {want['text']!r}"
    assert got["ids"] == want["ids"], f"{case.id}: other token ids for the committed text"


@check("T02", needs=("plan", "chat"), **LAYOUTS)
def test_what_trains_is_the_assistants(
    case: Case, subject: Subject, measured: Measured, kit: str
) -> None:
    """Labels are the assistant's turns with their stop tokens, and nothing else, to the token.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3756
    """
    rows = [said(kit, index=i, turns=1 + i, plain=i == 1) for i in range(3)]
    batch = chat(subject, kit, rows)
    stop = processors.turns(processors.KITS[kit].layout).stop
    tokenizer = processors.tokenizer_of(processors.processor(kit))
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    for row, messages in enumerate(rows):
        ids, labels = expected(kit, messages)
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
def test_special_ids_are_the_models(case: Case, measured: Measured, kit: str) -> None:
    """Special, pad and begin ids are those committed and those of the model's config, each once.

    https://github.com/hiyouga/LLaMA-Factory/issues/10389
    """
    from conformance.checkpoint import build_config

    assert case.model is not None
    got = record(kit)["special"]
    want = golden(processors.KITS[kit].layout)["pictures"]["special"]
    assert got == want, f"{case.id}: special ids are {got}, committed are {want}"
    config = build_config(case.model)
    for token, number in got.items():
        for field in (f"{token}_token_id", f"{token}_token_index"):
            named = getattr(config, field, number)
            assert named in (number, None), f"{case.id}: {token} is {number}, {field} is {named}"
    tokenizer = processors.tokenizer_of(processors.processor(kit))
    stop = tokenizer.convert_tokens_to_ids(processors.turns(processors.KITS[kit].layout).stop)
    assert len(set(got.values())) == len(got), f"{case.id}: two special tokens have one id: {got}"
    assert tokenizer.pad_token_id != stop, f"{case.id}: padding is the stop token"
    ids = processors.processor(kit).apply_chat_template(
        processors.conversation(), tokenize=True, return_dict=True
    )["input_ids"]
    flat = ids[0] if isinstance(ids[0], list) else ids
    measured["begins"] = flat.count(got["bos"]) if "bos" in got else 0
    assert measured["begins"] == ("bos" in got), f"{case.id}: {measured['begins']} begin tokens"


@check("T05", **LAYOUTS)
def test_a_beginning_renders_to_a_beginning(case: Case, measured: Measured, kit: str) -> None:
    """Each beginning of a conversation, and the prompt for its answer, renders to a beginning.

    An invariant kept without a thread: a template that rewrites earlier turns moves every label.
    """
    parts = [{"type": "image", "image": None}] if processors.KITS[kit].image else []
    messages = processors.conversation(parts, turns=3)
    tokenizer = processors.tokenizer_of(processors.processor(kit))
    whole = rendered(kit, messages)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for end in range(2, len(messages)):
        answered = messages[end]["role"] == "assistant"
        begun = rendered(kit, messages[:end], add_generation_prompt=answered)
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
def test_a_template_without_marks_is_refused(case: Case, subject: Subject, kit: str) -> None:
    """A template that marks no assistant's turn is one clear error, not a batch without labels.

    https://github.com/huggingface/trl/issues/6577
    """
    rows = [said(kit, index=i) for i in range(2)]
    processor = retold(kit, unmarked)
    assert_names_its_sample(case, subject, rows, 0, "generation", processor=processor)


@check("T07", needs=("plan", "chat"), **LAYOUTS)
def test_the_stop_token_trains(case: Case, subject: Subject, measured: Measured, kit: str) -> None:
    """The stop token trains also where the template's mark ends before it, or it is never learnt.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3756
    """
    stop = processors.turns(processors.KITS[kit].layout).stop

    def outside(template: str) -> str:
        marked = f" + '{stop}' -}}}}{{%- endgeneration -%}}"
        return template.replace(marked, f" -}}}}{{%- endgeneration -%}}{{{{- '{stop}' -}}}}")

    rows = [said(kit, index=i, turns=2) for i in range(2)]
    batch = subject.impl.chat(rows, retold(kit, outside), plan_of(subject))
    tokenizer = processors.tokenizer_of(processors.processor(kit))
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    turns = int((batch["input_ids"] == stop_id).sum())
    measured["stop tokens that train"] = int((batch["labels"] == stop_id).sum())
    assert turns == 8 + 2 * processors.turns(processors.KITS[kit].layout).system
    trained = measured["stop tokens that train"]
    assert trained == 4, f"{case.id}: {trained} of the assistant's 4 stop tokens train"


RULES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"train_on_inputs": True}, {"roles": ("system", "user", "assistant")}),
    ({"roles_to_train": ["user"]}, {"roles": ("user",)}),
    ({"roles_to_train": ["system", "assistant"]}, {"roles": ("system", "assistant")}),
    ({"train_on_eos": "all"}, {"stops": "all"}),
    ({"train_on_eos": "last"}, {"stops": "last"}),
    ({"train_on_eos": "none"}, {"stops": "none"}),
)


@check("T09", needs=("plan", "chat"), **LAYOUTS)
def test_the_roles_that_are_asked_for_train(
    case: Case, subject: Subject, measured: Measured, kit: str
) -> None:
    """train_on_inputs, roles_to_train and train_on_eos label exactly the turns and stops they name.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3625, families.md §7
    """
    messages = said(kit, turns=2)
    ids, usual = expected(kit, messages)
    for options, rules in RULES:
        _, labels = expected(kit, messages, **rules)
        assert labels != usual, f"{case.id}: {options} changes nothing"
        plan = subject.plan(plan_of(subject).setting, options=options)
        batch = subject.impl.chat([messages], processors.processor(kit), plan)
        assert batch["input_ids"][0].tolist() == ids, f"{case.id}: other tokens"
        got = torch.as_tensor(batch["labels"])[0].tolist()
        wrong = [i for i, label in enumerate(labels) if got[i] != label]
        measured["wrong labels"] = measured.get("wrong labels", 0) + len(wrong)
        where = wrong[0] if wrong else None
        assert not wrong, f"{case.id}: {options}: {len(wrong)} labels are wrong, first at {where}"


@check(
    "T08",
    needs=("plan", "chat"),
    models=processors.WITH_PICTURES,
    settings=("images",),
    marks=("training",),
)
def test_media_never_train(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """Padding, pictures, sounds and what begins and ends them are never labelled, anywhere.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3625
    """
    rows = [said(image_kit, index=i, turns=1 + i) for i in range(2)]
    # an assistant that answers with a picture
    answer = [
        {"type": "text", "text": "a disc"},
        {"type": "image", "image": processors.blank(20, 24)},
    ]
    rows[0].append({"role": "assistant", "content": answer})
    if image_kit in processors.WITH_SOUND:
        rows[1][1]["content"].append({"type": "audio", "audio": processors.sound(3000)})
    batch = chat(subject, image_kit, rows)
    ids, labels = batch["input_ids"], batch["labels"]
    media = special(image_kit, "pad", *MEDIA)
    seen = {t for t, i in media.items() if bool((ids == i).any())}
    assert {"pad", "image"} < seen, f"{case.id}: the batch has only {sorted(seen)}"
    trained = {t: int((labels == i).sum()) for t, i in media.items()}
    measured["media that train"] = sum(trained.values())
    wrong = {t: n for t, n in trained.items() if n}
    assert not wrong, f"{case.id}: labelled are {wrong}; tolerance 0"
    own, _ = expected(image_kit, rows[0])
    assert (labels[0, : len(own)] != IGNORE).sum() > 5, f"{case.id}: nothing else trains either"
