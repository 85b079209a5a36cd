"""What a merged LoRA weight must be: W + s·B·A, for a linear layer and per expert."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_delta(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s·B·A (out, in) of a (r, in) and b (out, r)."""
    return scaling * torch.einsum("or,ri->oi", b, a)


def expert_delta(a: Tensor, b: Tensor, experts: int, scaling: float) -> Tensor:
    """s·B_e·A_e (E, out, in) of a (r·E, in), expert-major, and b (out, r·E), rank-major.

    Layout: `families.md` §6 and `kernels.md` §3 (the layout of `target_parameters` in PEFT).
    """
    rank = a.shape[0] // experts
    by_expert = a.reshape(experts, rank, a.shape[1])
    by_rank = b.reshape(b.shape[0], rank, experts)
    return scaling * torch.einsum("ore,eri->eoi", by_rank, by_expert)


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The weight with its adapter folded in; a rank-3 weight (E, out, in) is a stack of experts."""
    if weight.dim() == 3:
        return weight + expert_delta(a, b, weight.shape[0], scaling).to(weight.dtype)
    return weight + linear_delta(a, b, scaling).to(weight.dtype)


def scaling(alpha: float, rank: int, rslora: bool = False) -> float:
    """alpha / r, or alpha / √r with rank-stabilised LoRA."""
    return alpha / (rank**0.5 if rslora else rank)
