"""One call of the experts layer as data: its tensors and sizes, and what its backward returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class ExpertLora:
    """LoRA factors of one experts layer, in PEFT's layout; a pair is None where it has no adapter.

    ``*_a`` is ``(r * E, in)``, expert-major; ``*_b`` is ``(out, r * E)``, rank-major: the factors
    of expert ``e`` are ``a.view(E, r, in)[e]`` and ``b.view(out, r, E)[:, :, e]``. The delta of the
    weight is ``scale * B_e @ A_e``; ``scale`` is alpha / r, or alpha / sqrt(r) with rslora.
    The ranks of the two pairs may differ.
    """

    gate_up_a: Tensor | None = None
    gate_up_b: Tensor | None = None
    gate_up_scale: float = 1.0
    down_a: Tensor | None = None
    down_b: Tensor | None = None
    down_scale: float = 1.0


@dataclass(frozen=True)
class Problem:
    """Every input of one call, checked. ``dtype`` is the type in which products take operands."""

    hidden: Tensor  # (T, H)
    index: Tensor  # (T, K) int64; E marks a slot of another rank
    weights: Tensor  # (T, K)
    gate_up: Tensor  # (E, 2I, H), gate rows first
    down: Tensor  # (E, H, I)
    lora: ExpertLora
    act: str
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden.shape[0]

    @property
    def top_k(self) -> int:
        """K, the slots of a token."""
        return self.index.shape[1]

    @property
    def slots(self) -> int:
        """S = T K."""
        return self.index.numel()

    @property
    def experts(self) -> int:
        """E."""
        return self.gate_up.shape[0]

    @property
    def width(self) -> int:
        """H, the model width."""
        return self.gate_up.shape[2]

    @property
    def inner(self) -> int:
        """I, the width between the two products."""
        return self.down.shape[2]

    @property
    def rank_up(self) -> int:
        """Rank of the gate_up adapter, 0 without one."""
        return 0 if self.lora.gate_up_a is None else self.lora.gate_up_a.shape[0] // self.experts

    @property
    def rank_down(self) -> int:
        """Rank of the down adapter, 0 without one."""
        return 0 if self.lora.down_a is None else self.lora.down_a.shape[0] // self.experts

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type in which sums over slots, rows and ranks are kept: at least float32."""
        return torch.promote_types(torch.float32, self.dtype)


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for."""

    hidden: bool
    weights: bool
    gate_up: bool
    down: bool
    gate_up_a: bool
    gate_up_b: bool
    down_a: bool
    down_b: bool


@dataclass
class Gradients:
    """The gradients of one call, in the dtype of their parameter; None where not needed."""

    hidden: Tensor | None = None
    weights: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None
    gate_up_a: Tensor | None = None
    gate_up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None


def check(problem: Problem, *, check_index: bool) -> None:
    """Raise ValueError with one clear line if shapes, dtypes or (asked for) indices are off.

    ``check_index`` reads the indices on the host, which synchronises a GPU.
    """
    p = problem
    if p.act not in ACTIVATIONS:
        raise ValueError(f"activation {p.act!r} is not one of {', '.join(ACTIVATIONS)}")
    if p.hidden.dim() != 2 or p.gate_up.dim() != 3 or p.down.dim() != 3:
        raise ValueError("hidden must be (T, H), gate_up_proj (E, 2I, H), down_proj (E, H, I)")
    if p.index.shape != p.weights.shape or p.index.dim() != 2 or p.index.shape[0] != p.tokens:
        raise ValueError(
            f"top_k_index {tuple(p.index.shape)} and top_k_weights {tuple(p.weights.shape)} "
            f"must both be (T={p.tokens}, K)"
        )
    if p.index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"top_k_index must be int64 or int32, not {p.index.dtype}")
    up, down = tuple(p.gate_up.shape), tuple(p.down.shape)
    if p.hidden.shape[1] != p.width:
        raise ValueError(
            f"hidden has width {p.hidden.shape[1]}, gate_up_proj {up} expects {p.width}"
        )
    if up != (p.experts, 2 * p.inner, p.width) or down != (p.experts, p.width, p.inner):
        raise ValueError(f"gate_up_proj {up} and down_proj {down} are not (E, 2I, H) and (E, H, I)")
    if p.slots >= 2**31:
        raise ValueError(f"{p.slots} routed slots exceed the int32 slot numbers of this layer")
    _check_pair("gate_up", p.lora.gate_up_a, p.lora.gate_up_b, p.experts, p.width, 2 * p.inner)
    _check_pair("down", p.lora.down_a, p.lora.down_b, p.experts, p.inner, p.width)
    if check_index and p.slots:
        low, high = int(p.index.min()), int(p.index.max())
        if low < 0 or high > p.experts:
            raise ValueError(f"top_k_index spans [{low}, {high}], allowed is [0, {p.experts}]")


def _check_pair(
    name: str,
    a: Tensor | None,
    b: Tensor | None,
    experts: int,
    fan_in: int,
    fan_out: int,
) -> None:
    """Raise ValueError unless a pair of factors is absent, or fits its weight."""
    if (a is None) != (b is None):
        raise ValueError(f"lora of {name}: A and B must be given together")
    if a is None or b is None:
        return
    good = a.dim() == 2 and a.shape[0] % experts == 0 and a.shape[0] > 0
    if not good or tuple(a.shape[1:]) != (fan_in,) or tuple(b.shape) != (fan_out, a.shape[0]):
        raise ValueError(
            f"lora of {name}: A {tuple(a.shape)} and B {tuple(b.shape)} are not "
            f"(r*{experts}, {fan_in}) and ({fan_out}, r*{experts})"
        )
