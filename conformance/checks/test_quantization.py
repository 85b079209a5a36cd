"""4-bit base weights under adapters: what is packed, what it computes, what is saved."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conformance.case import Case
from conformance.check import check
from conformance.lora import adapted_modules
from conformance.numerics import (
    assert_close,
    assert_close_step,
    assert_differs,
    assert_equal,
    relative_error,
)
from conformance.oracles.four_bit import packed_bytes, rounded, scales, unpacked
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


def meant(subject: Subject) -> dict[str, int]:
    """Elements of each weight that is to be packed: the decoder layers' projections and experts."""
    layers = subject.model_spec.layers + "."
    return {
        canonical_name(name): p.numel()
        for name, p in subject.stock("float32").named_parameters()
        if name.startswith(layers)
        and ("experts" in name if p.dim() == 3 else p.dim() == 2 and name.endswith("_proj.weight"))
    }


def held(model: nn.Module) -> list[Tensor]:
    """The packed bytes and the scales of their blocks, wherever they are kept."""
    found: list[Tensor] = [p for p in model.parameters() if p.dtype == torch.uint8]
    found += [b for name, b in model.named_buffers() if name.endswith("absmax")]
    for parameter in model.parameters():  # not by module: an adapter shows its base's weight again
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # scales may be quantised in their turn
            found.append(state.absmax)
            state = getattr(state, "state2", None)
    return found


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating base weights by canonical name."""
    return {
        canonical_name(n): p
        for n, p in model.named_parameters()
        if "lora_" not in n and p.is_floating_point()
    }


def expansions(model: nn.Module) -> dict[str, Tensor]:
    """Flat values of every packed weight, read off its bytes and scales by the oracle."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8:
            state = getattr(parameter, "quant_state", None)
            if state is None:  # a parametrization keeps the scales beside the bytes
                state = model.get_submodule(f"{name.rpartition('.')[0]}.0")
            found[canonical_name(name)] = unpacked(parameter, scales(state))
    return found


def twin(subject: Subject, model: nn.Module) -> nn.Module:
    """The same adapters over a base whose packed weights are written out by the oracle."""
    for tuning in ("lora", "lora-experts") if "moe" in subject.model_spec.traits else ("lora",):
        plain = subject.model(tuning=tuning)
        if adapted_modules(plain) == adapted_modules(model):
            break
    values = expansions(model)
    with torch.no_grad():
        for name, parameter in weights(plain).items():
            if name in values:
                new = values[name].reshape(parameter.shape)
                error = relative_error(new, rounded(parameter)).frobenius
                assert error < 0.01, f"{name}: its bytes are {error:.3g} from four-bit rounding"
                parameter.copy_(new)
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
    numel, names = meant(subject), packed(model)
    assert names, f"{case.id}: nothing is packed"
    left = {n: c for n, c in numel.items() if n not in names}
    measured["packed share"] = 1 - sum(left.values()) / sum(numel.values())
    assert measured["packed share"] > 0.98, f"{case.id}: not packed: {sorted(left)[:3]}"
    got = sum(t.numel() * t.element_size() for t in held(model))
    stock = weights(subject.stock("float32"))
    want = sum(packed_bytes(p.numel()) for n, p in stock.items() if n in names)
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
    assert_close(case.id, "logits", got, want, tolerance("logits/same-model"), measured)


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
    limit = tolerance("loss/same-model")
    assert_close_step(case.id, got, want, limit, measured)


@check("Q03", needs=("plan", "build", "prepare", "save", "load"), **FEW)
def test_adapters_come_back(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """Adapters saved over 4-bit weights and loaded into a fresh 4-bit model give equal logits.

    https://github.com/axolotl-ai-cloud/axolotl/issues/3771
    """
    required(unavailable)
    model = subject.model()
    batch = subject.batch("text")
    want = subject.eval_logits(model, batch)
    fresh = subject.built(subject.plan(), case.setting)
    assert_differs(case.id, "adapters", subject.eval_logits(fresh, batch), want, {})
    with tempfile.TemporaryDirectory() as folder:
        subject.impl.save(model, Path(folder))
        again = subject.impl.load(fresh, Path(folder))
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
