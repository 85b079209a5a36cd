"""4-bit base weights under adapters: what is packed, what it computes, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from conformance.case import Case
from conformance.check import check
from conformance.lora import adapted_modules
from conformance.numerics import assert_close, assert_close_step, assert_differs, assert_equal
from conformance.oracles.four_bit import expanded, packed_bytes
from conformance.subject import Subject
from conformance.tolerances import tolerance
from conformance.weights import canonical_name

Measured = dict[str, float]
QLORA: dict[str, Any] = {
    "settings": ("qlora",),
    "models": ("gemma4-moe", "gemma4-dense", "gemma3-text", "qwen3_5_moe-text", "mixtral"),
    "marks": ("quantization",),
}
FEW: dict[str, Any] = {**QLORA, "models": ("gemma4-moe", "gemma4-dense", "mixtral")}


def required(unavailable: Any) -> None:
    """Decline where bitsandbytes is missing or broken."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        unavailable(f"bitsandbytes: {type(error).__name__}: {error}")


def packed(model: nn.Module) -> set[str]:
    """Canonical names of the weights that are held as bytes."""
    return {canonical_name(n) for n, p in model.named_parameters() if p.dtype == torch.uint8}


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating base weights by canonical name."""
    return {
        canonical_name(n): p
        for n, p in model.named_parameters()
        if "lora_" not in n and p.is_floating_point()
    }


def twin(subject: Subject, model: nn.Module) -> nn.Module:
    """The same adapters over a base whose packed weights are written out by the oracle."""
    for tuning in ("lora", "lora-experts") if "moe" in subject.model_spec.traits else ("lora",):
        plain = subject.model(tuning=tuning)
        if adapted_modules(plain) == adapted_modules(model):
            break
    names = packed(model)
    with torch.no_grad():
        for name, parameter in weights(plain).items():
            if name in names:
                parameter.copy_(expanded(parameter))
    return plain


@check("Q01", needs=("plan", "build", "prepare"), **QLORA)
def test_bytes_are_within_the_budget(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """Dense and expert weights of the decoder layers are held in four bits, scales included.

    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849
    """
    required(unavailable)
    model = subject.model()
    stock = subject.stock("float32")
    layers = subject.model_spec.layers + "."
    meant = {
        canonical_name(name): p.numel()
        for name, p in stock.named_parameters()
        if name.startswith(layers)
        and (p.dim() == 3 and "experts" in name or p.dim() == 2 and name.endswith("_proj.weight"))
    }
    names = packed(model)
    assert names, f"{case.id}: nothing is packed"
    left = {n: c for n, c in meant.items() if n not in names}
    measured["packed share"] = 1 - sum(left.values()) / sum(meant.values())
    assert measured["packed share"] > 0.98, f"{case.id}: not packed: {sorted(left)[:3]}"
    got = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    want = sum(packed_bytes(p.numel()) for n, p in weights(stock).items() if n in names)
    measured["bytes of budget"] = got / want
    assert got <= want, f"{case.id}: {got} bytes are packed, the budget is {want:.0f}"


@check("P12", needs=("plan", "build", "prepare"), **QLORA)
def test_forward_is_that_of_the_expanded_weights(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """Logits of a 4-bit model equal those of its weights, explicitly quantised and expanded.

    https://github.com/axolotl-ai-cloud/axolotl/issues/3799
    """
    required(unavailable)
    model = subject.model()
    batch = subject.batch("text")
    got = subject.eval_logits(model, batch)
    want = subject.eval_logits(twin(subject, model), batch)
    whole = subject.eval_logits(subject.model(tuning="lora"), batch)
    assert_differs(case.id, "quantisation", got, whole, {})
    assert_close(case.id, "logits", got, want, tolerance("logits/four bits"), measured)


@check("Q02", needs=("plan", "build", "prepare", "loss"), **QLORA)
def test_adapters_learn_as_over_the_expanded_weights(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """Loss and every adapter gradient equal those over the explicitly expanded base.

    https://github.com/axolotl-ai-cloud/axolotl/issues/3771
    """
    required(unavailable)
    model = subject.model()
    batch = subject.batch("text")
    got = subject.step(model, batch)
    want = subject.step(twin(subject, model), batch)
    stray = [n for n in got.gradients if "lora_" not in n]
    assert got.gradients and not stray, f"{case.id}: gradients of the base: {stray[:2]}"
    limit = tolerance("gradients/four bits", subject.model_spec.traits)
    assert_close_step(case.id, got, want, limit, measured)


@check("Q03", needs=("plan", "build", "prepare", "save", "load"), **FEW)
def test_adapters_come_back(
    case: Case, subject: Subject, measured: Measured, unavailable: Any, tmp_path: Path
) -> None:
    """Adapters saved over 4-bit weights and loaded into a fresh 4-bit model give equal logits.

    https://github.com/axolotl-ai-cloud/axolotl/issues/3771
    """
    required(unavailable)
    model = subject.model()
    batch = subject.batch("text")
    want = subject.eval_logits(model, batch)
    subject.impl.save(model, tmp_path)
    plan = subject.plan()
    fresh = subject.built(plan, case.setting)
    assert_differs(case.id, "adapters", subject.eval_logits(fresh, batch), want, {})
    again = subject.impl.load(fresh, tmp_path)
    assert_equal(case.id, "logits", subject.eval_logits(again, batch), want, measured)


@check("Q04", needs=("plan", "build", "prepare", "merge"), **FEW)
def test_merging_expands_first(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """Merging folds the adapters into expanded weights: its logits are those before it.

    https://github.com/axolotl-ai-cloud/axolotl/issues/3771
    """
    required(unavailable)
    model = subject.model()
    batch = subject.batch("text")
    want = subject.eval_logits(model, batch)
    merged = subject.impl.merge(model)
    left = [n for n, p in merged.named_parameters() if "lora_" in n or p.dtype == torch.uint8]
    assert not left, f"{case.id}: still adapted or packed: {left[:2]}"
    got = subject.eval_logits(merged, batch)
    assert_close(case.id, "logits", got, want, tolerance("logits/merged"), measured)
