"""The experts layer in grouped plain torch: any device, any floating dtype, no Triton.

Forward and backward are written out so that both paths save and recompute the same things. On a GPU
the group sizes are read by the host once; the Triton path has no such synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .experts_problem import Gradients, Needs, Problem


@dataclass(frozen=True)
class _Group:
    """The routed slots of one expert, in slot order, and its factors in the compute dtype."""

    expert: int
    slots: Tensor  # (n,) slot = token * K + k
    tokens: Tensor  # (n,)
    up_a: Tensor | None  # (r, H)
    up_b: Tensor | None  # (2I, r)
    down_a: Tensor | None  # (r, I)
    down_b: Tensor | None  # (H, r)


def _groups(problem: Problem) -> list[_Group]:
    """Split the slots by expert; sentinels fall out. Experts without slots give no group."""
    p, lora = problem, problem.lora
    flat = p.index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inside = torch.where((flat >= 0) & (flat < p.experts), flat, p.experts)
    counts = torch.bincount(inside, minlength=p.experts + 1)[: p.experts].tolist()
    order = order[int((flat < 0).sum()) :]
    groups, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            slots = order[start : start + count]
            groups.append(
                _Group(
                    expert,
                    slots,
                    slots // p.top_k,
                    _factor_a(lora.gate_up_a, expert, p),
                    _factor_b(lora.gate_up_b, expert, p),
                    _factor_a(lora.down_a, expert, p),
                    _factor_b(lora.down_b, expert, p),
                )
            )
        start += count
    return groups


def _factor_a(a: Tensor | None, expert: int, problem: Problem) -> Tensor | None:
    if a is None:
        return None
    return a.view(problem.experts, -1, a.shape[1])[expert].to(problem.dtype)


def _factor_b(b: Tensor | None, expert: int, problem: Problem) -> Tensor | None:
    if b is None:
        return None
    return b.view(b.shape[0], -1, problem.experts)[:, :, expert].to(problem.dtype)


def _linear(
    x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """``x Wᵀ + scale (x Aᵀ) Bᵀ`` and the scaled ``x Aᵀ``; the small term enters as the addend."""
    if a is None or b is None:
        return x @ weight.T, None
    xa = (x @ a.T) * scale
    return torch.addmm(xa @ b.T, x, weight.T), xa


def gate_and_slope(gate: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The activation of ``gate`` and its derivative, in the dtype of ``gate``."""
    if act == "silu":
        s = torch.sigmoid(gate)
        return gate * s, s * (1 + gate * (1 - s))
    c, k = 0.7978845608028654, 0.044715
    t = torch.tanh(c * (gate + k * gate**3))
    slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * c * (1 + 3 * k * gate**2)
    return F.gelu(gate, approximate="tanh"), slope


def forward(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """Return the output ``(T, H)`` in hidden's dtype, and what backward needs: GU ``(S, 2I)``."""
    p, lora, wide = problem, problem.lora, problem.sum_dtype
    hidden = p.hidden.to(p.dtype)
    gate_up = hidden.new_zeros((p.slots, 2 * p.inner))
    per_slot = hidden.new_zeros((p.slots, p.width), dtype=wide)
    for g in _groups(p):
        x = hidden[g.tokens]
        gu, _ = _linear(x, p.gate_up[g.expert].to(p.dtype), g.up_a, g.up_b, lora.gate_up_scale)
        gate_up[g.slots] = gu
        h = _hidden_of(gu, p)[0].to(p.dtype)
        y, _ = _linear(h, p.down[g.expert].to(p.dtype), g.down_a, g.down_b, lora.down_scale)
        per_slot[g.slots] = y.to(wide) * p.weights.reshape(-1)[g.slots, None].to(wide)
    out = per_slot.view(p.tokens, p.top_k, p.width).sum(1)
    return out.to(p.hidden.dtype), [gate_up]


def _hidden_of(gu: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, the activated gate, its slope and up, all in the wide dtype."""
    gate, up = gu.to(problem.sum_dtype).chunk(2, dim=-1)
    value, slope = gate_and_slope(gate, problem.act)
    return value * up, value, slope, up


def backward(problem: Problem, saved: list[Tensor], grad: Tensor, needs: Needs) -> Gradients:
    """Gradients of every needed input; sums in the wide dtype, results in the parameter's dtype."""
    p, wide = problem, problem.sum_dtype
    out = _empty_gradients(p, needs)
    (gate_up,) = saved
    hidden, grad = p.hidden.to(p.dtype), grad.to(p.dtype)
    per_slot = hidden.new_zeros((p.slots, p.width), dtype=wide) if needs.hidden else None
    for g in _groups(p):
        x, d_out, gu = hidden[g.tokens], grad[g.tokens], gate_up[g.slots]
        w = p.weights.reshape(-1)[g.slots, None].to(wide)
        d_gu = _backward_down(p, g, d_out, gu, w, out)
        d_x = _backward_up(p, g, x, d_gu, out)
        if per_slot is not None:
            per_slot[g.slots] = d_x.to(wide)
    if per_slot is not None:
        total = per_slot.view(p.tokens, p.top_k, p.width).sum(1)
        out.hidden = total.to(p.hidden.dtype)
    return _in_parameter_dtype(p, out)


def _backward_down(
    p: Problem, g: _Group, d_out: Tensor, gu: Tensor, w: Tensor, out: Gradients
) -> Tensor:
    """Through the down product and the gate: fill weights, down, its factors; return dGU."""
    s = p.lora.down_scale
    h_wide, value, slope, up = _hidden_of(gu, p)
    h = h_wide.to(p.dtype)
    weight = p.down[g.expert].to(p.dtype)
    d_y = (d_out.to(w.dtype) * w).to(p.dtype)
    if g.down_a is not None and g.down_b is not None:
        pb = (d_out @ g.down_b) * s
        d_h = torch.addmm(pb @ g.down_a, d_out, weight)
        if out.down_a is not None:
            wide_pb = (pb.to(w.dtype) * w).to(p.dtype)
            _slice_a(out.down_a, g, p).copy_(wide_pb.T @ h)
        if out.down_b is not None:
            _slice_b(out.down_b, g, p).copy_(d_y.T @ ((h @ g.down_a.T) * s))
    else:
        d_h = d_out @ weight
    if out.down is not None:
        out.down[g.expert] = d_y.T @ h
    if out.weights is not None:
        out.weights.view(-1)[g.slots] = (h_wide * d_h.to(w.dtype)).sum(1)
    d_hw = d_h.to(w.dtype) * w
    return torch.cat([d_hw * up * slope, d_hw * value], dim=1).to(p.dtype)


def _backward_up(p: Problem, g: _Group, x: Tensor, d_gu: Tensor, out: Gradients) -> Tensor:
    """Through the gate_up product: fill it and its factors; return dX of the slots."""
    s = p.lora.gate_up_scale
    weight = p.gate_up[g.expert].to(p.dtype)
    if out.gate_up is not None:
        out.gate_up[g.expert] = d_gu.T @ x
    if g.up_a is None or g.up_b is None:
        return d_gu @ weight
    pb = (d_gu @ g.up_b) * s
    if out.gate_up_a is not None:
        _slice_a(out.gate_up_a, g, p).copy_(pb.T @ x)
    if out.gate_up_b is not None:
        _slice_b(out.gate_up_b, g, p).copy_(d_gu.T @ ((x @ g.up_a.T) * s))
    return torch.addmm(pb @ g.up_a, d_gu, weight)


def _slice_a(grad: Tensor, g: _Group, p: Problem) -> Tensor:
    return grad.view(p.experts, -1, grad.shape[1])[g.expert]


def _slice_b(grad: Tensor, g: _Group, p: Problem) -> Tensor:
    return grad.view(grad.shape[0], -1, p.experts)[:, :, g.expert]


def _empty_gradients(p: Problem, needs: Needs) -> Gradients:
    """Zeros where a gradient is needed: what no slot reaches must be exactly 0."""

    def zeros(needed: bool, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if not needed or like is None:
            return None
        return torch.zeros(like.shape, dtype=dtype, device=like.device)

    wide, lora = p.sum_dtype, p.lora
    return Gradients(
        weights=zeros(needs.weights, p.weights, wide),
        gate_up=zeros(needs.gate_up, p.gate_up, p.gate_up.dtype),
        down=zeros(needs.down, p.down, p.down.dtype),
        gate_up_a=zeros(needs.gate_up_a, lora.gate_up_a, wide),
        gate_up_b=zeros(needs.gate_up_b, lora.gate_up_b, wide),
        down_a=zeros(needs.down_a, lora.down_a, wide),
        down_b=zeros(needs.down_b, lora.down_b, wide),
        hidden=zeros(needs.hidden, p.hidden, p.hidden.dtype),
    )


def _in_parameter_dtype(p: Problem, out: Gradients) -> Gradients:
    """Cast the small gradients to the dtype of what they belong to."""
    pairs = (
        ("weights", p.weights),
        ("gate_up_a", p.lora.gate_up_a),
        ("gate_up_b", p.lora.gate_up_b),
        ("down_a", p.lora.down_a),
        ("down_b", p.lora.down_b),
    )
    for name, like in pairs:
        value = getattr(out, name)
        if value is not None and like is not None:
            setattr(out, name, value.to(like.dtype))
    return out
