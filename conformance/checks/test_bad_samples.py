"""Pictures that cannot be read or matched: one clear error that names the sample, and no step."""

from __future__ import annotations

import re
import tempfile
from typing import Any

import torch

from conformance import processors
from conformance.case import Case
from conformance.check import check
from conformance.checks.conversations import (
    assert_names_its_sample,
    pictured,
    plan_of,
    rows_of_pictures,
)
from conformance.subject import Subject

Measured = dict[str, float]
PICTURES: dict[str, Any] = {
    "models": processors.WITH_PICTURES,
    "settings": ("images",),
    "marks": ("vision",),
}


def bad_rows(kind: str) -> list[processors.Conversation]:
    """Three rows with a picture each, the last one's file bad."""
    rows = rows_of_pictures(("wide",), ("odd",), ("tall",))
    part = next(p for p in rows[2][0]["content"] if p["type"] == "image")
    del part["image"]
    part["path"] = processors.bad_picture(kind)
    return rows


@check("V23", needs=("plan", "chat"), **PICTURES)
def test_a_broken_picture_is_named(case: Case, subject: Subject, image_kit: str) -> None:
    """A file that is no picture is one clear error naming the sample, and no batch is made.

    issue 15: broken images
    """
    assert_names_its_sample(case, subject, bad_rows("broken"), 2, processors.BAD["broken"])


@check("V24", needs=("plan", "chat"), **PICTURES)
def test_a_truncated_picture_is_named(case: Case, subject: Subject, image_kit: str) -> None:
    """A picture whose file ends early is one clear error naming the sample, and no batch is made.

    issue 15: truncated files
    """
    assert_names_its_sample(case, subject, bad_rows("truncated"), 2, processors.BAD["truncated"])


@check("V25", needs=("plan", "chat"), **PICTURES)
def test_another_count_is_named(case: Case, subject: Subject, image_kit: str) -> None:
    """A placeholder written without a picture is one clear error naming the sample.

    https://github.com/huggingface/transformers/issues/35779
    """
    rows = rows_of_pictures(("wide",), ("odd",), ("tall",))
    stray = processors.processor(image_kit).image_token
    rows[2][0]["content"].append({"type": "text", "text": stray})
    assert_names_its_sample(case, subject, rows, 2, "")


@check(
    "V26",
    needs=("plan", "chat"),
    **{**PICTURES, "models": ("gemma4-dense", "gemma3-vlm", "qwen3_5")},
)
def test_a_bad_sample_takes_no_step(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """In HF Trainer's loop a bad second micro-batch ends the run before any parameter moved.

    issue 15: no partial step is taken
    """
    from transformers import Trainer, TrainingArguments

    here, name = pictured(subject), subject.model_spec.name
    model, rows = here.stock("float32").cpu(), bad_rows("truncated")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan, processor = plan_of(here), processors.processor(name)

    def collator(samples: list[Any]) -> Any:
        return subject.impl.chat([sample["messages"] for sample in samples], processor, plan)

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"per_device_train_batch_size": 1, "max_steps": 1, "seed": 0}
        arguments = TrainingArguments(
            folder, gradient_accumulation_steps=3, remove_unused_columns=False, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        data: Any = [{"messages": row} for row in rows]
        trainer = Trainer(model, arguments, collator, train_dataset=data)
        try:
            trainer.train()
        except subject.declines(ValueError, OSError):
            measured["steps"] = trainer.state.global_step
            moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
            assert not moved, f"{case.id}: {len(moved)} parameters moved, such as {moved[0]}"
            return
    raise AssertionError(f"{case.id}: the run went on with a truncated picture")


def bad_conversations(name: str) -> dict[str, tuple[list[processors.Conversation], Any]]:
    """Three rows of which the last is bad, and the processor that reads them, by what is wrong."""
    sound = processors.processor(name)
    stray = rows_of_pictures(("wide",), ("odd",), ("tall",))
    stray[2][0]["content"].append({"type": "text", "text": sound.image_token})
    found = {kind: (bad_rows(kind), sound) for kind in ("broken", "truncated")}
    return {**found, "another count": (stray, sound)}


@check(
    "V32",
    needs=("plan", "chat", "fit"),
    **{**PICTURES, "models": ("gemma3-vlm", "qwen3_5"), "marks": ("vision", "training")},
)
def test_the_loop_names_a_bad_sample(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """In the stack's own loop a bad conversation ends the run before a step, named by its number in
    the data set, not by its place in a micro-batch.

    issue 15: each one clear error naming the sample; no partial step is taken
    """
    here = pictured(subject)
    plan, options = plan_of(here), {"steps": 1, "batch_size": 1, "accumulation": 3}
    for what, (rows, processor) in bad_conversations(image_kit).items():
        model = here.model(plan=plan)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        try:
            subject.impl.fit(model, rows, plan, processor=processor, **options)
        except subject.declines(ValueError, OSError, RuntimeError) as error:
            text = str(error).strip()
        else:
            raise AssertionError(f"{case.id}: {what}: the run went on")
        measured[what] = len(text)
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert not moved, f"{case.id}: {what}: {len(moved)} parameters moved, such as {moved[0]}"
        assert "\n" not in text, f"{case.id}: {what}: the message has several lines: {text}"
        named = re.search(r"(conversation|sample|row|example|index)\W*2\b", text)
        assert named, f"{case.id}: {what}: which sample it is is not said: {text}"
