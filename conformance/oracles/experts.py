"""Gated experts with LoRA, one token and one slot at a time (contract: `kernels.md` §3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Lora(NamedTuple):
    """a (r·E, in) expert-major; b (out, r·E) rank-major; scaling alpha/r (or alpha/√r)."""

    a: Tensor
    b: Tensor
    scaling: float


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh}


def lora_of_expert(lora: Lora, expert: int, experts: int) -> tuple[Tensor, Tensor]:
    """A_e (r, in) and B_e (out, r): expert e owns rows e·r … of A, and columns e, e+E, … of B."""
    rank = lora.a.shape[0] // experts
    rows = [lora.a[expert * rank + i] for i in range(rank)]
    columns = [lora.b[:, i * experts + expert] for i in range(rank)]
    return torch.stack(rows), torch.stack(columns, dim=1)


def experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    lora_gate_up: Lora | None = None,
    lora_down: Lora | None = None,
) -> Tensor:
    """Σ_k w[t,k] · expert_{index[t,k]}(x[t]), unfolded LoRA included.

    hidden (T, H); indices (T, K) int64, where index == E means "not here" and adds nothing; weights
    (T, K), used as given; gate_up (E, 2I, H), gate rows first; down (E, H, I). Returns (T, H).
    Raises IndexError for any other index outside 0 … E.
    """
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    rows = []
    for token in range(hidden.shape[0]):
        total = torch.zeros_like(hidden[token])
        for slot in range(indices.shape[1]):
            expert = int(indices[token, slot])
            if expert == count:
                continue
            if not 0 <= expert < count:
                raise IndexError(f"expert index {expert} of token {token} is outside 0…{count}")
            both = _linear(hidden[token], gate_up[expert], lora_gate_up, expert, count)
            inner = activation(both[:width]) * both[width:]
            outer = _linear(inner, down[expert], lora_down, expert, count)
            total = total + weights[token, slot] * outer
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros_like(hidden)


def _linear(x: Tensor, weight: Tensor, lora: Lora | None, expert: int, count: int) -> Tensor:
    plain = weight @ x
    if lora is None:
        return plain
    a, b = lora_of_expert(lora, expert, count)
    return plain + lora.scaling * (b @ (a @ x))
