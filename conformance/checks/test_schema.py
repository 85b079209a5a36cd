"""What a version is: its schema against a committed snapshot, and the fingerprint of its numbers.

A fingerprint judges nothing here; a comparison of two reports shows when it moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import Measured
from conformance.observe import Step
from conformance.processors import KITS
from conformance.schema_snapshot import part_differences
from conformance.subject import Subject
from conformance.weights import canonical_name

Decline = Callable[[str], None]
SCHEMA: dict[str, Any] = {"marks": ("schema",), "correctness": False}
FINGERPRINTED = (
    "fp64",
    "fp64+lora",
    "fp64+lora-experts",
    "fp64+ckpt-nonreentrant",
    "fp64+padded",
    "fp64+packed",
    "fp64+images",
)


def _same(case: Case, parts: tuple[str, ...], unsupported: Decline) -> None:
    assert case.model is not None
    found = part_differences(case.model, parts)
    if found is None:
        unsupported(
            "no snapshot of this transformers is committed (fixtures/schema/make.py), or it cannot"
            " be taken here"
        )
        return
    assert not found, f"{case.id}: {len(found)} differences, tolerance 0: {found[0]}"


@check("X01", **SCHEMA)
def test_config_fields(case: Case, unsupported: Decline) -> None:
    """The config classes' fields and defaults are those of the committed snapshot.

    https://github.com/huggingface/transformers/pull/45354
    """
    _same(case, ("config",), unsupported)


@check("X02", **SCHEMA)
def test_forward_signature(case: Case, unsupported: Decline) -> None:
    """The forward's parameters and defaults are those of the committed snapshot.

    https://github.com/modelscope/ms-swift/issues/8237
    """
    _same(case, ("forward",), unsupported)


@check("X03", **SCHEMA)
def test_module_tree(case: Case, unsupported: Decline) -> None:
    """Module classes, unsplittable modules, tied keys and plans are those of the snapshot.

    https://github.com/huggingface/peft/pull/3009
    """
    _same(case, ("modules", "no_split", "tied", "plans"), unsupported)


@check("X04", **SCHEMA)
def test_keys_in_memory(case: Case, unsupported: Decline) -> None:
    """Parameter names and shapes in memory are those of the committed snapshot.

    https://github.com/huggingface/transformers/issues/46265
    """
    _same(case, ("parameters",), unsupported)


@check("X05", **SCHEMA)
def test_keys_on_disk(case: Case, unsupported: Decline) -> None:
    """Parameter names, shapes and dtypes on disk are those of the committed snapshot.

    https://github.com/huggingface/transformers/issues/46650
    """
    _same(case, ("disk",), unsupported)


@check("X14", models=tuple(KITS), **SCHEMA)
def test_conversations(case: Case, unsupported: Decline) -> None:
    """Rendered conversations, their marks, processors' defaults and token counts are committed.

    https://github.com/axolotl-ai-cloud/axolotl/issues/1806
    """
    _same(case, ("conversation", "processor"), unsupported)


@check("X20", needs=("prepare", "loss"), settings=FINGERPRINTED, **SCHEMA)
def test_fingerprint(case: Case, subject: Subject, measured: Measured) -> None:
    """The float64 loss, gradient norms by module group and probed logits are recorded.

    https://github.com/huggingface/trl/issues/3910
    """
    model, batch = subject.model(), subject.batch()
    step = subject.step(model, batch)
    assert step.loss is not None and math.isfinite(step.loss), f"{case.id}: loss {step.loss}"
    measured["fingerprint.loss"] = step.loss
    for group, norm in gradient_norms(step).items():
        measured[f"fingerprint.gradient.{group}"] = norm
    logits = subject.eval_logits(model, batch)[0]
    for name, row in (("first", logits[0]), ("last", logits[-1])):
        measured[f"fingerprint.logits.{name}"] = float(torch.linalg.vector_norm(row))
    assert all(map(math.isfinite, measured.values())), f"{case.id}: {measured}"


def gradient_norms(step: Step) -> dict[str, float]:
    """Gradient norms by module group, which every release names alike."""
    squares: dict[str, float] = {}
    for name, gradient in step.gradients.items():
        group = group_of(canonical_name(name))
        squares[group] = squares.get(group, 0.0) + float(gradient.double().square().sum())
    return {group: math.sqrt(square) for group, square in sorted(squares.items())}


def group_of(name: str) -> str:
    """The module group of a parameter: its part of the decoder, or its tower."""
    for word in ("vision", "audio", "projector", "visual"):
        if word in name:
            return "towers"
    for word in ("experts", "router", "self_attn", "linear_attn", "mlp", "norm", "embed"):
        if word in name:
            return word
    return "rest"
