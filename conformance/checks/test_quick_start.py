"""The settings of the VLM quick start, each by what goes wrong without it, and a wrong one."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

from conformance import batches, captioning, processors
from conformance.case import Case
from conformance.check import check
from conformance.checks import conversations
from conformance.numerics import relative_error
from conformance.subject import Subject

Measured = dict[str, float]
IMAGES: dict[str, Any] = {
    "needs": ("plan",),
    "models": captioning.LEARNERS,
    "settings": ("images",),
    "marks": ("vision",),
}


def value(subject: Subject, name: str) -> Any:
    """What the plan says, None where it says nothing."""
    decision = subject.plan().decisions.get(name)
    return None if decision is None else decision.value


def columns(model: nn.Module, remove: bool) -> set[str]:
    """What a collator of HF Trainer is given of raw samples, under `remove_unused_columns`."""
    from transformers import Trainer, TrainingArguments  # seconds, which collection would pay

    seen: set[str] = set()

    def collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.update(rows[0])
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, remove_unused_columns=remove, use_cpu=True, report_to=[]
        )
        rows = [{"input_ids": [3], "messages": "two red shapes", "images": ["a picture"]}]
        trainer = Trainer(model, arguments, collator, train_dataset=rows)  # type: ignore[arg-type]
        next(iter(trainer.get_train_dataloader()))
    return seen


@check("V17", **IMAGES)
def test_pictures_reach_the_collator(case: Case, subject: Subject, measured: Measured) -> None:
    """`remove_unused_columns` is off: Trainer would drop pictures before the collator sees them.

    model_architectures.md, VLM quick start
    """
    stock = subject.stock("float32")
    assert "images" not in columns(stock, True), f"{case.id}: Trainer keeps the pictures anyway"
    planned = value(subject, "remove_unused_columns")
    kept = columns(stock, True if planned is None else bool(planned))
    measured["columns"] = len(kept)
    assert "images" in kept, f"{case.id}: with {planned} the collator sees {sorted(kept)} alone"


@check("V18", **IMAGES)
def test_pictures_are_not_packed(case: Case, subject: Subject, measured: Measured) -> None:
    """Packing is off for images: right where the stock class leaks, merely cautious elsewhere.

    Measured with eager attention: qwen3_5 leaks (0.83 of the logits), gemma3 and gemma4 do not.
    model_architectures.md, VLM quick start
    """
    stock = subject.stock("float32")
    samples = captioning.task(subject.model_spec, 2).train
    alone = subject.eval_logits(stock, subject.to(batches.stack(samples[1:]), "float32"))[0]
    together = subject.to(batches.pack(samples), "float32")
    try:
        packed = subject.eval_logits(stock, together)[0, len(samples[0]["labels"]) :]
        measured["logits"] = relative_error(packed, alone).frobenius
    except (ValueError, RuntimeError, IndexError):
        measured["logits"] = 1.0  # the stock class does not even run
    planned = value(subject, "sample_packing")
    assert not planned, (
        f"{case.id}: packing is {planned}; packed logits are off by {measured['logits']:.3g}"
    )


@check("V19", **IMAGES)
def test_the_processor_prepares(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """`skip_prepare_dataset` is on: rows tokenized before the processor have one placeholder.

    model_architectures.md, VLM quick start
    """
    processor, here = processors.processor(image_kit), conversations.pictured(subject)
    messages = processors.with_pictures("odd", turns=1)
    how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    late = processor.apply_chat_template(messages, **how)
    stock = here.stock("float32")
    here.eval_logits(stock, here.to(late, "float32"))
    text = processor.apply_chat_template(messages, tokenize=False)
    early = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    features = {k: v for k, v in late.items() if k.startswith(("pixel", "image"))}
    place = processors.tokenizer_of(processor).image_token_id
    counts = [int((ids == place).sum()) for ids in (early["input_ids"], late["input_ids"])]
    measured["placeholders"], measured["tokens"] = counts
    assert counts[0] < counts[1], f"{case.id}: the tokenizer alone expands the placeholder"
    types = {k: (early["input_ids"] == place).long() for k in late if "type_ids" in k}
    try:
        rows = {"input_ids": early["input_ids"], **types, **features}
        here.eval_logits(stock, here.to(rows, "float32"))
    except (ValueError, RuntimeError, IndexError, StopIteration):
        planned = value(subject, "skip_prepare_dataset")
        assert planned, f"{case.id}: skip_prepare_dataset is {planned}, and such rows fail"
        return
    raise AssertionError(f"{case.id}: {counts[0]} placeholder for {counts[1]} was accepted")


@check("V20", **IMAGES)
def test_the_processor_is_named(case: Case, subject: Subject, measured: Measured) -> None:
    """`processor_type` is set: by a tokenizer alone, two pictures give one and the same loss.

    model_architectures.md, VLM quick start
    """
    stock = subject.stock("float32")
    rows = captioning.task(subject.model_spec, 2).train
    first, second = (
        subject.to(batches.stack(r[:1]), "float32") for r in (rows, captioning.swapped(rows))
    )
    pixels = {"pixel_values", "image_position_ids", "image_grid_thw"}
    seen = (subject.eval_logits(stock, first) - subject.eval_logits(stock, second)).abs().max()
    measured["moved by the picture"] = float(seen)
    assert seen > 0, f"{case.id}: another picture moves nothing"
    text = [{k: v for k, v in b.items() if k not in pixels} for b in (first, second)]
    assert all(torch.equal(text[0][k], text[1][k]) for k in text[0]), f"{case.id}: other text"
    planned = value(subject, "processor_type")
    assert planned, f"{case.id}: processor_type is {planned}: the batches have no pixels"


@check(
    "P16",
    needs=("plan",),
    models=captioning.LEARNERS,
    settings=("lora",),
    marks=("vision",),
)
def test_adapting_every_linear_layer_is_wrong(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """LoRA on every linear layer adapts towers, without a gradient on text, and leaves experts out.

    model_architectures.md, Common Issues
    """
    from peft import LoraConfig, get_peft_model

    frozen = set(subject.model_spec.freeze)
    model: Any = get_peft_model(
        subject.stock("float32"), LoraConfig(r=2, target_modules="all-linear")
    )
    subject.plan()
    batch = subject.to(batches.stack(batches.samples(subject.model_spec, "text")), "float32")
    model.eval()  # transformers 5.5 trains no text without type ids; nothing drops out here
    model(**batch, use_cache=False).loss.backward()
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    idle = [n for n, p in lora.items() if p.grad is None]
    measured["adapters"], measured["without a gradient"] = len(lora), len(idle)
    measured["on experts"] = sum("experts" in n and "shared" not in n for n in lora)
    assert idle and all(frozen & set(n.split(".")) for n in idle), f"{case.id}: idle: {idle[:2]}"
    assert not measured["on experts"], f"{case.id}: all-linear reaches the experts here"
    planned = value(subject, "lora_target_linear")
    assert not planned, f"{case.id}: lora_target_linear is {planned}: {len(idle)} idle adapters"
