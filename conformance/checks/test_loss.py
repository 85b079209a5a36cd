"""The training loss: its value, its weighting by token, and what accumulation makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import (
    IGNORE,
    Measured,
    drawn,
    finite,
    head_evidence,
    labelled,
    sample_of,
    text_config,
    unwrapped,
)
from conformance.numerics import assert_close, assert_close_gradients, worst
from conformance.numerics import relative_error as error_of
from conformance.observe import Observation, observe
from conformance.oracles.cross_entropy import cross_entropy, linear_cross_entropy
from conformance.subject import Subject, gradients
from conformance.tolerances import tolerance
from conformance.weights import canonical_name

TRAINING = ("training",)


def fitted(subject: Subject, samples: list[Any], **options: Any) -> Observation:
    """What the implementation's own loop does with the samples, seen from outside."""
    model = subject.model()
    plan = subject.plan()
    with TemporaryDirectory() as path, observe(model) as seen:
        subject.impl.fit(model, samples, plan, output_dir=Path(path), lr=1e-4, **options)
    return seen


def by_name(tensors: Any) -> dict[str, torch.Tensor]:
    """The suite's canonical names, without nesting."""
    return {canonical_name(name): tensor for name, tensor in tensors.items()}


@check("L01", needs=("prepare", "collate", "loss"), settings=("-", "padded", "images", "kernels"))
def test_loss_is_cross_entropy(case: Case, subject: Subject, measured: Measured) -> None:
    """The loss and its gradient are those of a float64 cross-entropy on labels shifted once.

    https://github.com/huggingface/transformers/issues/45354
    """
    model, batch = subject.model(), subject.batch()
    labels, ids = batch["labels"], batch["input_ids"]
    kept = sum(int((s["labels"][1:] != IGNORE).sum()) for s in subject.samples())
    assert labelled(batch) == kept > 1, (
        f"{case.id}: {labelled(batch)} labels in the batch, the samples have {kept}: prompts, "
        "padding and images are not to be learnt"
    )
    assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE]), f"{case.id}: moved labels"
    oracle = cross_entropy(subject.eval_logits(model, batch), labels)
    cap = getattr(text_config(model), "final_logit_softcapping", None)
    for n in (None, 3 * kept):
        found = head_evidence(subject, model, batch, n)
        share = 1.0 if n is None else kept / n
        row = tolerance("loss/same-model")
        value = torch.tensor(found.loss)
        assert_close(case.id, f"loss, n={n}", value, oracle.value * share, row, measured)
        want = linear_cross_entropy(
            found.hidden[:, :-1].flatten(0, 1),
            found.weight,
            labels[:, 1:].flatten(),
            bias=found.bias,
            softcap=cap,
            num_items=n,
        )
        got = found.gradient[:, :-1].flatten(0, 1)
        row = tolerance("gradients/head")
        assert_close(case.id, f"gradient, n={n}", got, want.hidden, row, measured)
        assert not found.gradient[:, -1].any(), f"{case.id}: the last token has a gradient"


@check(
    "L10",
    needs=("prepare", "collate", "loss"),
    models=("gemma4-dense", "qwen3_5-text", "mixtral"),
    settings=("-", "kernels"),
)
def test_any_labels(case: Case, subject: Subject, measured: Measured) -> None:
    """Whichever tokens are labelled, the first of a row, the last, all, the loss is the oracle's.

    https://github.com/huggingface/transformers/issues/45354
    """
    model, plan = subject.model(), subject.plan()
    text = subject.samples("text", count=1)[0]["input_ids"]
    row, most = tolerance("loss/same-model"), []

    @drawn
    @given(st.lists(st.lists(st.booleans(), min_size=2, max_size=9), min_size=1, max_size=4))
    def compare(rows: list[list[bool]]) -> None:
        samples = [sample_of(text.roll(-i), kept) for i, kept in enumerate(rows)]
        batch = subject.to(subject.collate(samples, plan), "float32")
        kept = [label for sample in samples for label in sample["labels"][1:].tolist()]
        n = sum(label != IGNORE for label in kept)
        assume(n)  # none: L06
        most.append(n)
        assert labelled(batch) == n, f"{case.id}, {rows}: {labelled(batch)} labels of {n}"
        want = cross_entropy(
            subject.eval_logits(model, batch), batch["labels"], num_items=max(n, 1)
        )
        got = subject.loss(model, batch).detach()
        assert_close(f"{case.id}, {rows}", "loss", got, want.value, row, measured)

    compare()
    assert 1 in most and max(most) > 5, f"{case.id}: the examples have {most} labels"


@check(
    "L02",
    needs=("fit",),
    settings=("fp64", "fp64+images"),
    dealt=("fp64+lora",),
    marks=TRAINING,
)
def test_accumulation_equals_one_batch(case: Case, subject: Subject, measured: Measured) -> None:
    """Accumulating samples with unequal label counts gives the step of one batch of them all.

    live defect L2; https://github.com/huggingface/transformers/issues/34191
    """
    kind = "mixed" if case.setting.batch == "images" else "padded"
    samples = subject.samples(kind, count=4)
    counts = [int((s["labels"][1:] != IGNORE).sum()) for s in samples]
    assert len(set(counts)) > 2, f"{case.id}: label counts {counts} hide the weighting"
    one = fitted(subject, samples, steps=1, batch_size=4)
    four = fitted(subject, samples, steps=1, batch_size=1, accumulation=4)
    assert (one.last.backwards, four.last.backwards) == (1, 4), f"{case.id}: {four.last.backwards}"
    row = tolerance("gradients/float64", subject.numerics)
    assert_close_gradients(case.id, four.last.gradients, one.last.gradients, row, measured)
    errors = {
        name: error_of(p, one.last.parameters[name]).frobenius
        for name, p in four.last.parameters.items()
    }
    name, value = worst(errors)
    measured["parameters"] = value
    limit = tolerance("parameters/one step in float64", subject.numerics)
    assert value <= limit.limit, (
        f"{case.id}: after the step {name} is off by {value:.3g}, tolerance {limit.limit:g}"
    )
    # pixels stay float32, as a loop gets them: towers normalise before they cast
    batch = subject.to(subject.collate(samples, subject.plan(batch="padded")), "float32")
    truth = subject.step(subject.model(), batch, sum(counts))
    got = by_name(four.last.gradients)
    assert_close_gradients(case.id, got, by_name(truth.gradients), row, measured, "against loss()")


@check("L03", needs=("fit",), settings=("fp64",), marks=TRAINING)
def test_short_last_window(case: Case, subject: Subject, measured: Measured) -> None:
    """The last, shorter accumulation window is weighted by its own tokens.

    https://github.com/huggingface/transformers/issues/35207
    """
    samples = subject.samples("padded", count=3)
    seen = fitted(subject, samples, steps=2, batch_size=1, accumulation=2)
    measured["backward passes"] = seen.steps[1].backwards
    windows = [s.backwards for s in seen.steps]
    assert windows == [2, 1], f"{case.id}: backward passes by step {windows}, 3 batches are [2, 1]"
    model = subject.model()
    state = by_name(dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in by_name(seen.steps[0].parameters).items():
            state[name].copy_(parameter)
    plan = subject.plan(batch="text")
    for window, step in ((samples[2:], seen.steps[1]),):
        batch = subject.to(subject.collate(window, plan), "float64")
        want = subject.step(model, batch, labelled(batch))
        row = tolerance("gradients/float64", subject.numerics)
        got, truth = by_name(step.gradients), by_name(want.gradients)
        assert_close_gradients(case.id, got, truth, row, measured)


@check("L06", needs=("prepare", "loss"), dealt=("kernels", "lora"))
def test_no_label_at_all(case: Case, subject: Subject, measured: Measured) -> None:
    """A micro-batch without any label has loss 0 and finite gradients, with and without a count.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3033
    """
    batch = subject.batch("text")
    empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
    model = subject.model()
    full = subject.step(model, batch, 10)
    assert full.loss, f"{case.id}: the full batch has loss {full.loss}"
    for n in (10, None):
        step = subject.step(model, empty, n)
        measured[f"loss, n={n}"] = step.loss if step.loss is not None else math.nan
        assert finite(step), f"{case.id}: loss {step.loss} or a gradient is not finite, n={n}"
        assert step.loss == 0, f"{case.id}: loss {step.loss} without any label, n={n}"
        extra = [name for name, g in step.gradients.items() if g.any()]
        assert not extra, f"{case.id}: {len(extra)} gradients are not 0, such as {extra[0]}"


@check("L07", needs=("prepare", "loss"), dealt=("kernels",))
def test_item_count_of_any_type(case: Case, subject: Subject, measured: Measured) -> None:
    """The number of items may be an int, a float, or a tensor of any integer type or device.

    https://github.com/huggingface/transformers/issues/37766
    """
    batch, model = subject.batch("text"), subject.model()
    mean = subject.step(model, batch)
    items = labelled(batch)
    n = 4 * items + 1
    counts: dict[str, Any] = {
        "int": n,
        "float": float(n),
        "int64": torch.tensor(n, device=subject.device),
        "int32": torch.tensor(n, dtype=torch.int32, device=subject.device),
        "int64 on the CPU": torch.tensor(n),
    }
    assert mean.loss, f"{case.id}: the mean loss is {mean.loss}"
    for what, count in counts.items():
        step = subject.step(model, batch, count)
        got, want = torch.tensor(step.loss), torch.tensor(mean.loss * items / n)
        assert_close(case.id, f"loss, {what}", got, want, tolerance("loss/same-model"), measured)
        scaled = {name: g * items / n for name, g in mean.gradients.items()}
        row = tolerance("gradients/rescaled")
        assert_close_gradients(case.id, step.gradients, scaled, row, measured, f"gradients, {what}")


@check("L08", needs=("prepare", "collate", "fit"), settings=("fp64",), marks=TRAINING)
def test_label_smoothing(case: Case, subject: Subject, measured: Measured) -> None:
    """Label smoothing in the training loop gives the smoothed cross-entropy's gradients.

    https://github.com/huggingface/transformers/issues/37766
    """
    samples = subject.samples("padded", count=2)
    options = {"steps": 1, "batch_size": 2, "label_smoothing": 0.2}
    seen = fitted(subject, samples, **options)
    model = subject.model()
    plan = subject.plan(batch="padded")
    batch = subject.to(subject.collate(samples, plan), case.setting.dtype)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = unwrapped(model)(**inputs, use_cache=False).logits
    plain = cross_entropy(logits, batch["labels"])
    smooth = cross_entropy(logits, batch["labels"], label_smoothing=0.2)
    measured["effect"] = error_of(smooth.gradient, plain.gradient).frobenius
    assert measured["effect"] > 0.01, f"{case.id}: smoothing does not matter here"
    logits.backward(smooth.gradient.to(logits.dtype))
    got, want = by_name(seen.last.gradients), by_name(gradients(model))
    assert_close_gradients(
        case.id, got, want, tolerance("gradients/float64", subject.numerics), measured
    )
