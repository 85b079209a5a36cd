"""Packed rows: documents do not see each other, and the loss is that of separate samples."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import (
    IGNORE,
    Batch,
    Measured,
    accumulated,
    assert_reach,
    changed,
    declined,
    documents_of,
    drawn,
    expected_reach,
    labelled,
    layer_types,
    sample_of,
)
from conformance.numerics import assert_close, assert_close_step, assert_differs
from conformance.oracles.masks import documents_of as documents_by_position
from conformance.subject import Subject
from conformance.tolerances import tolerance

PER_TOKEN = ("labels", "attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids")
ATTENTION_ONLY = ("linear_attention",)


def alone(subject: Subject, samples: list[Batch]) -> list[Batch]:
    """Each sample as a batch of its own, by the implementation's collation without packing."""
    plan = subject.plan(batch="text")
    dtype = subject.case.setting.dtype
    return [subject.to(subject.collate([sample], plan), dtype) for sample in samples]


def packed(subject: Subject, samples: list[Batch]) -> Batch:
    """The samples packed by the implementation."""
    return subject.to(subject.collate(samples, subject.plan()), subject.case.setting.dtype)


@check(
    "S01",
    needs=("prepare", "collate", "loss"),
    without=ATTENTION_ONLY,
    settings=("packed",),
    dealt=("lora+packed", "lora+ckpt-nonreentrant+packed", "packed+kernels"),
    marks=("packing",),
)
def test_packed_equals_separate(case: Case, subject: Subject, measured: Measured) -> None:
    """A packed row has the token-weighted sum of the losses and gradients of its samples.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3478
    """
    samples = subject.samples("packed", count=3)
    parts, whole = alone(subject, samples), packed(subject, samples)
    n = sum(labelled(part) for part in parts)
    counts = [labelled(part) for part in parts]
    assert len(set(counts)) > 1, f"{case.id}: equal label counts {counts} hide the weighting"
    want = accumulated(subject, subject.model(), parts, n)
    row = tolerance("gradients/accumulated", subject.numerics)
    model = subject.model()
    assert_close_step(case.id, subject.step(model, whole, n), want, row, measured)
    logits = torch.cat([subject.eval_logits(model, part) for part in parts], dim=1)
    got = subject.eval_logits(model, whole)
    assert_close(case.id, "eval logits", got, logits, tolerance("logits/padded"), measured)


@check(
    "S08",
    needs=("prepare", "collate", "loss"),
    models=("gemma4-e2b", "gemma3-text", "mixtral"),
    settings=("packed",),
    marks=("packing",),
)
def test_documents_of_any_length(case: Case, subject: Subject, measured: Measured) -> None:
    """Documents of any number and length, of one token too, packed equal themselves apart.

    https://github.com/huggingface/transformers/pull/31629
    """
    model = subject.model()
    row = tolerance("gradients/accumulated", subject.numerics)
    text = subject.samples("packed", count=1)[0]["input_ids"]
    counts = []

    @drawn
    @given(
        st.lists(st.lists(st.booleans(), min_size=1, max_size=len(text)), min_size=1, max_size=5)
    )
    def compare(documents: list[list[bool]]) -> None:
        samples = [sample_of(text.roll(i), kept) for i, kept in enumerate(documents)]
        parts, whole = alone(subject, samples), packed(subject, samples)
        n = sum(labelled(part) for part in parts)
        counts.append(n * (len(documents) > 1))
        want = accumulated(subject, model, parts, max(n, 1))
        got = subject.step(model, whole, max(n, 1))
        assert_close_step(f"{case.id}, {documents}", got, want, row, measured)

    compare()
    assert max(counts) > 5, f"{case.id}: no example packs several documents with labels"


@check(
    "S02",
    needs=("prepare", "collate"),
    without=ATTENTION_ONLY,
    settings=("packed",),
    marks=("packing",),
)
def test_documents_are_isolated(case: Case, subject: Subject, measured: Measured) -> None:
    """In a packed row every layer sees its own document only, by position ids and by a 4-D mask.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3796
    """
    spec, model = subject.model_spec, subject.model()
    batch = subject.batch()
    documents = torch.tensor(documents_of(batch)[0])
    assert int(documents.max()) > 0, f"{case.id}: one document only"
    base = subject.eval_logits(model, batch)
    moved = subject.eval_logits(model, changed(batch, 0, 2, spec))
    first = documents == 0
    assert_differs(case.id, "first document", moved[0, first], base[0, first], measured)
    row = tolerance("logits/regrouped" if "moe" in spec.traits else "exact")
    assert_close(case.id, "second document", moved[0, ~first], base[0, ~first], row, measured)
    kinds = layer_types(model, spec)
    assert_reach(case, model, batch, measured, kinds)
    tables = dict(zip(kinds, expected_reach(model, spec, batch), strict=True))
    lowest = torch.finfo(torch.float32).min
    additive = {
        kind: torch.zeros(table.shape).masked_fill(~table, lowest)[:, None].to(subject.device)
        for kind, table in tables.items()
    }
    mask: Any = additive if len(additive) > 1 else next(iter(additive.values()))
    if "sliding_window" in spec.traits and "vision" in spec.traits:
        return  # their multimodal forward takes no masks by layer type
    got = subject.eval_logits(model, {**batch, "attention_mask": mask})
    assert_close(case.id, "by 4-D mask", got, base, tolerance("logits/attention"), measured)


@check(
    "S03",
    needs=("prepare", "collate", "loss"),
    traits=("linear_attention",),
    settings=("packed",),
    dealt=("lora+packed",),
    marks=("packing",),
)
def test_recurrent_layers_isolate_or_raise(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """Packed documents do not leak through recurrent layers, or packing is declined loudly.

    live defect L4; https://github.com/huggingface/transformers/issues/44717
    """
    samples = subject.samples("packed", count=2)
    found: list[Batch] = []

    def attempt() -> None:
        found.append(packed(subject, samples))
        subject.loss(subject.model(), found[0])

    if declined(subject, attempt, measured):
        return
    parts = alone(subject, samples)
    n = sum(labelled(part) for part in parts)
    want = accumulated(subject, subject.model(), parts, n)
    got = subject.step(subject.model(), found[0], n)
    row = tolerance("gradients/accumulated", subject.numerics)
    assert_close_step(case.id, got, want, row, measured)
    other = [changed_sample(samples[0]), samples[1]]
    apart = accumulated(subject, subject.model(), alone(subject, other), n)
    moved = subject.step(subject.model(), packed(subject, other), n)
    assert moved.loss != got.loss, f"{case.id}: another first document changed nothing"
    assert_close_step(case.id, moved, apart, row, measured, "other first document")


def changed_sample(sample: Batch) -> Batch:
    """The sample with its tokens in reverse order."""
    return {**sample, "input_ids": sample["input_ids"].flip(0)}


@check(
    "S04",
    needs=("prepare", "collate", "loss"),
    without=ATTENTION_ONLY,
    settings=("packed",),
    dealt=("packed+kernels",),
    marks=("packing",),
)
def test_all_ones_mask_is_no_mask(case: Case, subject: Subject, measured: Measured) -> None:
    """An all-ones `attention_mask` beside packed position ids changes neither loss nor gradients.

    live defect L14; https://github.com/axolotl-ai-cloud/axolotl/pull/2449
    """
    batch = subject.batch()
    documents = documents_of(batch)[0]
    assert max(documents) > 0, f"{case.id}: one document only"
    batch.pop("attention_mask", None)
    batch["use_cache"] = False  # a cache joins the documents too, with the mask or without: S01
    want = subject.step(subject.model(), batch)
    ones = torch.ones_like(batch["input_ids"])
    if declined(subject, lambda: _loss_with(subject, batch, ones), measured):
        return
    got = subject.step(subject.model(), {**batch, "attention_mask": ones})
    row = tolerance("gradients/accumulated", subject.numerics)
    assert_close_step(case.id, got, want, row, measured)


def _loss_with(subject: Subject, batch: Batch, mask: torch.Tensor) -> None:
    subject.loss(subject.model(), {**batch, "attention_mask": mask})


@check("S05", needs=("collate",), settings=("packed",), marks=("packing",))
def test_no_label_crosses_a_boundary(case: Case, subject: Subject, measured: Measured) -> None:
    """The first token of a packed document is never predicted from the document before it.

    https://github.com/axolotl-ai-cloud/axolotl/pull/2495
    """
    samples = subject.samples("packed", count=3)
    for sample in samples:
        sample["labels"] = sample["input_ids"].clone()
    expected = sum(len(sample["input_ids"]) - 1 for sample in samples)
    found: list[Batch] = []
    if declined(subject, lambda: found.append(packed(subject, samples)), measured):
        return
    batch = found[0]
    measured["labels"] = labelled(batch)
    for documents, labels in zip(documents_of(batch), batch["labels"].tolist(), strict=True):
        starts = [i for i in range(1, len(documents)) if documents[i] != documents[i - 1]]
        crossing = [i for i in starts if labels[i] != IGNORE]
        assert not crossing, f"{case.id}: labels at document starts {crossing}"
    assert labelled(batch) == expected, (
        f"{case.id}: {labelled(batch)} labels, {expected} tokens have one before them"
    )


@check("S06", needs=("collate",), settings=("-", "padded", "packed", "images"), marks=("packing",))
def test_per_token_keys_have_one_length(case: Case, subject: Subject, measured: Measured) -> None:
    """Every per-token tensor of a batch is as long as `input_ids`, also padded to a multiple.

    https://github.com/hiyouga/LLaMA-Factory/issues/10736
    """
    samples, plan = subject.samples(count=3), subject.plan()
    collate = subject.impl.collate
    options: list[dict[str, int]] = [{}]
    if "pad_to_multiple_of" in inspect.signature(collate).parameters:
        options.append({"pad_to_multiple_of": 16})

    def attempt() -> None:
        for option in options:
            batch = collate(samples, plan, **option)
            length = batch["input_ids"].shape[-1]
            wanted = option.get("pad_to_multiple_of", 1)
            assert length % wanted == 0, f"{case.id}: {length} tokens are no multiple of {wanted}"
            lengths = {k: v.shape[-1] for k, v in batch.items() if k in PER_TOKEN}
            measured[f"tokens, multiple of {wanted}"] = length
            assert "labels" in lengths, f"{case.id}: the batch has no labels"
            wrong = {k: n for k, n in lengths.items() if n != length}
            assert not wrong, f"{case.id}: input_ids has {length} tokens, but {wrong}"

    declined(subject, attempt, measured)


@check(
    "S07",
    needs=("prepare", "collate", "loss"),
    traits=("vision",),
    settings=("packed",),
    marks=("packing", "vision"),
)
def test_packed_images_restart(case: Case, subject: Subject, measured: Measured) -> None:
    """Packed samples with images keep their image blocks and positions to themselves.

    families.md §8 (multimodal packing is isolated only with two-dimensional position ids)
    """
    samples = subject.samples("images", count=2)
    found: list[Batch] = []

    def attempt() -> None:
        found.append(packed(subject, samples))
        subject.loss(subject.model(), found[0])

    if declined(subject, attempt, measured):
        return
    whole, parts = found[0], alone(subject, samples)
    positions = whole["position_ids"]
    flat = positions[0] if positions.dim() == 3 else positions
    assert max(documents_by_position(flat.tolist())[0]) == 1, f"{case.id}: positions do not restart"
    assert any("pixel" in key for key in whole), f"{case.id}: the packed row has no image"
    n = sum(labelled(part) for part in parts)
    want = accumulated(subject, subject.model(), parts, n)
    model = subject.model()
    got = subject.step(model, whole, n)
    row = tolerance("gradients/accumulated", subject.numerics)
    assert_close_step(case.id, got, want, row, measured)
    assert_reach(case, model, whole, measured, ("sliding_attention", "full_attention"))
