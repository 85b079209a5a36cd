"""Cases of the linear cross-entropy, a float64 truth by autograd, and a judge.

`python -m tests.kernels.cross_entropy_cases MODE ...` prints the errors of every case and mode as
JSON: so the Triton rows are run in a process that has `TRITON_INTERPRET=1` from its start.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch

from impl.kernels.cross_entropy import linear_cross_entropy

TOKENS, VOCABULARY, DIM = 21, 1333, 24


@dataclass(frozen=True)
class Case:
    """One problem; `std` spreads the logits, `offset` lifts the later columns."""

    softcap: float | None = None
    bias: bool = False
    smoothing: float = 0.0
    z_loss: float = 0.0
    adapted: bool = False
    reduction: str = "mean"
    items: float | None = None
    trainable: bool = False
    std: float = 0.2
    offset: float = 0.0
    bias_trains: bool = True  # where the weight does
    keep: int = 3  # every third label is ignored; 1: all but one are


CASES: dict[str, Case] = {
    "plain": Case(),
    "flat": Case(std=1e-3),
    "softcap": Case(softcap=5.0, trainable=True),
    "saturated": Case(softcap=2.0, std=3.0),
    "extreme": Case(std=60.0),
    "moving maximum": Case(bias=True, offset=55.0),
    "moving maximum, trainable": Case(bias=True, offset=55.0, trainable=True),
    "moving maximum, weight": Case(bias=True, offset=55.0, trainable=True, bias_trains=False),
    "one token": Case(keep=1, trainable=True),
    "smoothing, z-loss": Case(softcap=5.0, smoothing=0.1, z_loss=1e-2, trainable=True),
    "bias": Case(bias=True, trainable=True),
    "items": Case(items=50.0),
    "unreduced": Case(reduction="none", softcap=5.0),
    "unreduced, trainable": Case(reduction="none", bias=True, trainable=True),
    "adapter": Case(adapted=True, softcap=5.0),
    "adapter, all": Case(adapted=True, bias=True, trainable=True, reduction="none"),
}
SCALE = 0.7


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Leaf tensors, rounded to `dtype`; the last label of the vocabulary is among the labels."""
    gen = torch.Generator().manual_seed(11)

    def leaf(*shape: int, std: float = 1.0, grad: bool = True) -> torch.Tensor:
        values = torch.randn(*shape, generator=gen) * std
        return values.to(dtype).requires_grad_(grad)

    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=gen)
    labels[:: case.keep] = -100
    labels[1 if case.keep > 1 else 0] = VOCABULARY - 1
    trains = case.trainable and case.bias_trains
    bias = torch.linspace(0, case.offset, VOCABULARY) + torch.randn(VOCABULARY, generator=gen)
    return {
        "hidden": leaf(TOKENS, DIM),
        "weight": leaf(VOCABULARY, DIM, std=case.std, grad=case.trainable),
        "bias": bias.to(dtype).requires_grad_(trains) if case.bias else None,
        "a": leaf(4, DIM) if case.adapted else None,
        "b": leaf(VOCABULARY, 4) if case.adapted else None,
        "labels": labels,
        "upstream": torch.randn(TOKENS, generator=gen),
    }


def formula(case: Case, x: dict[str, Any]) -> torch.Tensor:
    """The loss by plain torch from full logits."""
    z = x["hidden"] @ x["weight"].t()
    if x["a"] is not None:
        z = z + 0.5 * (x["hidden"] @ x["a"].t()) @ x["b"].t()
    z = (z if x["bias"] is None else z + x["bias"]) * SCALE
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    valid = x["labels"] != -100
    log_p, lse = z.log_softmax(1), z.logsumexp(1)
    nll = -log_p.gather(1, x["labels"].clamp_min(0)[:, None])[:, 0]
    loss = (1 - case.smoothing) * nll - case.smoothing * log_p.mean(1) + case.z_loss * lse**2
    loss = torch.where(valid, loss, 0.0)
    if case.reduction == "none":
        return loss
    return loss.sum() / (case.items or valid.sum())


def fused(case: Case, x: dict[str, Any], mode: str, budget: int | None) -> torch.Tensor:
    """The loss by the kernel."""
    return linear_cross_entropy(
        x["hidden"], x["weight"], x["labels"], bias=x["bias"], softcap=case.softcap,
        logit_scale=SCALE, reduction=case.reduction, num_items_in_batch=case.items,
        label_smoothing=case.smoothing, z_loss=case.z_loss, mode=mode, memory_budget=budget,
        lora=None if x["a"] is None else (x["a"], x["b"], 0.5),
    )  # fmt: skip


def gradients(x: dict[str, Any], loss: torch.Tensor, keep: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of every leaf that wants one, under unequal upstream gradients if unreduced."""
    leaves = {n: t for n, t in x.items() if torch.is_tensor(t) and t.requires_grad}
    upstream = x["upstream"].to(loss.dtype) if loss.dim() else torch.ones_like(loss)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream, retain_graph=keep)
    return dict(zip(leaves, grads, strict=True))


def distance(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    return float((got.double() - truth).norm() / truth.norm())


def judge(name: str, mode: str, dtype: torch.dtype, budget: int | None) -> dict[str, list[float]]:
    """For the loss and every gradient: our error, the error of full logits in the same dtype."""
    case = CASES[name]
    x = inputs(case, dtype)
    wide = {
        n: t.detach().double().requires_grad_(t.requires_grad)
        if torch.is_tensor(t) and t.is_floating_point() and n != "upstream" else t
        for n, t in x.items()
    }  # fmt: skip
    losses = formula(case, wide), fused(case, x, mode, budget), formula(case, x)
    truth = {"loss": losses[0].detach(), **gradients(wide, losses[0])}
    got = {"loss": losses[1].detach(), **gradients(x, losses[1], keep=True)}
    eager = {"loss": losses[2].detach(), **gradients(x, losses[2])}
    again = gradients(x, losses[1])
    for key, value in again.items():
        assert torch.equal(value, got[key]), f"{name}: second gradient of {key} differs"
    return {k: [distance(got[k], truth[k]), distance(eager[k], truth[k])] for k in truth}


def main() -> None:
    """Print {mode: {case: {tensor: [ours, eager]}}}."""
    small = {"auto": None}  # a small budget leaves no room for kept tiles
    table = {
        m: {n: judge(n, m, torch.float32, small.get(m, 1 << 20)) for n in CASES}
        for m in sys.argv[1:]
    }
    print(json.dumps(table))


if __name__ == "__main__":
    main()
