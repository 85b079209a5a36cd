"""The backward launches of the experts layer in Triton.

One buffer D (S, 2I) first holds dh in its left half, then dGU. dX goes through one buffer in column
parts: through the storage of the saved GU, which nothing reads any more, unless this backward may
be run again. The gradient of A comes last, when D is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import experts_sums_triton as sums
from . import graph
from .experts_middle_triton import middle_kernel
from .experts_plan import Plan, plan_for
from .experts_problem import Gradients, Needs, Problem
from .experts_routing_triton import Routing
from .experts_triton import INTERPRETED, Run, through_float32, unpack
from .launch import cdiv, launch, next_power

_FLOAT = torch.float32


def backward(
    problem: Problem, saved: list[Any], grad: Tensor, needs: Needs, plan: Plan | None
) -> Gradients:
    """See `experts_triton.backward`."""
    given = problem
    if not given.slots:
        return _nothing(given, needs)
    if INTERPRETED and problem.dtype == torch.bfloat16:
        problem = through_float32(problem)
    plan = plan or plan_for(problem, interpreted=INTERPRETED)
    parts, routing = unpack(saved)
    return _Backward(given, problem, plan, routing, parts, grad, needs).gradients()


def _nothing(p: Problem, needs: Needs) -> Gradients:
    """The gradients of a call without slots: zeros."""
    tensors = {
        "hidden": p.hidden,
        "weights": p.weights,
        "gate_up": p.gate_up,
        "down": p.down,
        "gate_up_a": p.lora.gate_up_a,
        "gate_up_b": p.lora.gate_up_b,
        "down_a": p.lora.down_a,
        "down_b": p.lora.down_b,
    }
    zeros = {
        name: torch.zeros_like(t)
        for name, t in tensors.items()
        if t is not None and getattr(needs, name)
    }
    return Gradients(**zeros)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class _Backward:
    """One backward: `given` has the caller's dtypes, `run` the compute dtype."""

    def __init__(
        self,
        given: Problem,
        problem: Problem,
        plan: Plan,
        routing: Routing,
        parts: list[Tensor | None],
        grad: Tensor,
        needs: Needs,
    ) -> None:
        self.given, self.p, self.plan, self.needs = given, problem, plan, needs
        self.run = Run(problem, plan, routing)
        gate_up, self.xa, self.ha, self.b_up, self.b_down = parts
        assert gate_up is not None
        self.gate_up = gate_up
        if not plan.keep_factors:
            self.b_down = self.run.swap_b(given.lora.down_b, problem.rank_down, self.run.rp_down)
            self.b_up = self.run.swap_b(given.lora.gate_up_b, problem.rank_up, self.run.rp_up)
        self.grad = grad.to(given.dtype).to(problem.dtype).contiguous()
        self.pb_up: Tensor | None = None

    def gradients(self) -> Gradients:
        """Launch what the needed gradients take."""
        run, needs, out = self.run, self.needs, Gradients()
        pb_down = self._output_side(out)
        self.d = run.empty(self.p.slots, 2 * self.p.inner)
        run.product(
            self.plan.d_hidden, self.grad, run.down, self.d, gather=True, transposed=True,
            left=pb_down, right=run.a_down, rank=self.p.rank_down,
        )  # fmt: skip
        self._middle(pb_down, out)
        self.b_up = self.b_down = None
        if needs.gate_up:
            out.gate_up = self._weight_gradient(self.d, run.hidden, self.given.gate_up, False)
        if needs.hidden:
            out.hidden = self._input_gradient()
        del self.d
        if needs.gate_up_a and self.pb_up is not None:
            out.gate_up_a = self._input_sum()
        return out

    def _output_side(self, out: Gradients) -> Tensor | None:
        """s₂ dO B₂ (S, r) of every row, and the gradient of B₂ in the same pass over dO."""
        p, run, plan, lora = self.p, self.run, self.plan, self.given.lora
        if self.b_down is None or self.ha is None or lora.down_b is None:
            return None
        if not self.needs.down_b:
            scale = lora.down_scale
            return run.skinny(
                self.grad, self.b_down, p.rank_down, scale, gather=True, by_rank=False
            )
        groups = cdiv(p.width, plan.output_columns)
        p_parts = run.empty(groups, p.slots, run.rp_down, dtype=_FLOAT)
        parts = run.empty(run.chunk_count, p.width, run.rp_down, dtype=_FLOAT)
        launch(
            sums.output_sum_kernel,
            (run.chunk_count, groups),
            grad=self.grad,
            small=self.ha,
            order=run.routing.order,
            weights=run.routing.weights,
            b=self.b_down,
            p_parts=p_parts,
            parts=parts,
            **run.chunks,
            slots=p.slots,
            chunk_rows=plan.chunk,
            WIDTH=p.width,
            TOP_K=p.top_k,
            RP=run.rp_down,
            BR=plan.output_rows,
            BC=plan.output_columns,
            warps=plan.output_warps,
            stages=plan.output_stages,
        )
        out.down_b = self._add_b(parts, lora.down_b, p.rank_down)
        pb = run.empty(p.slots, run.rp_down)
        self._finish_rows(p_parts, None, groups, pb, None, lora.down_scale)
        return pb

    def _middle(self, pb_down: Tensor | None, out: Gradients) -> None:
        """dGU and s dGU B, and the gradients of B, A₂, the routing weights and down."""
        p, run, plan, lora, needs = self.p, self.run, self.plan, self.given.lora, self.needs
        blocks = cdiv(p.inner, plan.middle_columns)
        per_group = cdiv(blocks, plan.column_groups)
        groups = cdiv(blocks, per_group)
        d_b = d_a = p_parts = h = None
        if run.rp_up:
            d_b = run.empty(run.chunk_count, 2 * p.inner, run.rp_up, dtype=_FLOAT)
            if plan.rank_in_middle:
                p_parts = run.empty(groups, p.slots, run.rp_up, dtype=_FLOAT)
                self.pb_up = run.empty(p.slots, run.rp_up)
        if lora.down_a is not None:
            d_a = run.empty(run.chunk_count, run.rp_down, p.inner, dtype=_FLOAT)
            out.down_a = _like(lora.down_a)
        if needs.down:
            h = run.empty(p.slots, p.inner)
        w_parts = run.empty(groups, p.slots, dtype=_FLOAT)
        results = {"d_b": d_b, "d_a": d_a, "direct": out.down_a, "h": h}
        self._launch_middle(per_group, groups, pb_down, p_parts, w_parts, results)
        if self.b_up is not None and not plan.rank_in_middle:
            scale = lora.gate_up_scale
            self.pb_up = run.skinny(
                self.d, self.b_up, p.rank_up, scale, gather=False, by_rank=False
            )
        out.weights = torch.zeros_like(self.given.weights) if needs.weights else None
        scale = lora.gate_up_scale
        self._finish_rows(p_parts, w_parts, groups, self.pb_up, out.weights, scale)
        if d_b is not None and needs.gate_up_b and lora.gate_up_b is not None:
            out.gate_up_b = self._add_b(d_b, lora.gate_up_b, p.rank_up)
        if d_a is not None and out.down_a is not None:
            self._add_a(d_a, out.down_a, p.rank_down)
        if h is not None:
            out.down = self._weight_gradient(self.grad, h, self.given.down, True)

    def _launch_middle(
        self,
        per_group: int,
        groups: int,
        pb_down: Tensor | None,
        p_parts: Tensor | None,
        w_parts: Tensor,
        results: dict[str, Any],
    ) -> None:
        p, run, plan = self.p, self.run, self.plan
        launch(
            middle_kernel,
            (run.chunk_count, groups),
            gate_up=self.gate_up,
            d=self.d,
            weights=run.routing.weights,
            xa=self.xa,
            pb=pb_down,
            b=self.b_up,
            p_parts=p_parts,
            w_parts=w_parts,
            **results,
            **run.chunks,
            chunk_first=run.routing.chunk_first,
            slots=p.slots,
            chunk_rows=plan.chunk,
            INNER=p.inner,
            RANK_DOWN=p.rank_down,
            RP_UP=run.rp_up,
            RP_DOWN=run.rp_down,
            ACT=p.act,
            COLUMN_BLOCKS=per_group,
            BR=plan.middle_rows,
            BC=plan.middle_columns,
            warps=plan.middle_warps,
            stages=plan.middle_stages,
            registers=plan.middle_registers,
        )

    def _finish_rows(
        self,
        p_parts: Tensor | None,
        w_parts: Tensor | None,
        groups: int,
        pb: Tensor | None,
        d_weights: Tensor | None,
        scale: float,
    ) -> None:
        """Add the column groups' parts: pb (S, r) = scale * their sum, d_weights, where given."""
        p, run = self.p, self.run
        if p_parts is None and d_weights is None:
            return
        launch(
            sums.finish_rows_kernel,
            (cdiv(p.slots, 64),),
            p_parts=p_parts,
            w_parts=w_parts,
            order=run.routing.order,
            pb=pb,
            d_weights=d_weights,
            offsets=run.routing.offsets,
            scale=float(scale),
            slots=p.slots,
            EXPERTS=p.experts,
            GROUPS=groups,
            RP=0 if p_parts is None else p_parts.shape[2],
            BLOCK=64,
            warps=4,
            stages=1,
        )

    def _input_gradient(self) -> Tensor:
        """dX (T, H), one column part after the other through one buffer of rows."""
        p, run, tiles = self.p, self.run, self.plan.d_input
        out = _like(self.given.hidden)
        total = cdiv(p.width, tiles.bn)
        half = cdiv(total, 2)
        size = p.slots * min(half * tiles.bn, p.width)
        if size <= self.gate_up.numel() and not graph.is_kept():
            blocks, buffer = half, self.gate_up.view(-1)[:size].view(p.slots, -1)
        else:
            blocks = self.plan.input_blocks or half
            buffer = run.empty(p.slots, min(blocks * tiles.bn, p.width))
        for first in range(0, total, blocks):
            count = min(blocks, total - first)
            run.product(
                tiles, self.d, run.gate_up, buffer, gather=False, transposed=True,
                left=self.pb_up, right=run.a_up, rank=p.rank_up,
                first_block=first, blocks=count,
            )  # fmt: skip
            run.combine(buffer, out[:, first * tiles.bn : (first + count) * tiles.bn])
        return out

    def _input_sum(self) -> Tensor:
        """The gradient of gate_up's lora_A."""
        p, run, plan, like = self.p, self.run, self.plan, self.given.lora.gate_up_a
        assert like is not None and self.pb_up is not None
        out = _like(like)
        parts = run.empty(run.chunk_count, run.rp_up, p.width, dtype=_FLOAT)
        launch(
            sums.input_sum_kernel,
            (run.chunk_count, cdiv(p.width, plan.sum_columns)),
            a=run.hidden,
            small=self.pb_up,
            order=run.routing.order,
            parts=parts,
            direct=out,
            **run.chunks,
            chunk_first=run.routing.chunk_first,
            chunk_rows=plan.chunk,
            WIDTH=p.width,
            TOP_K=p.top_k,
            RANK=p.rank_up,
            RP=run.rp_up,
            BR=plan.sum_rows,
            BC=plan.sum_columns,
            warps=plan.sum_warps,
            stages=plan.sum_stages,
        )
        self._add_a(parts, out, p.rank_up)
        return out

    def _add_a(self, parts: Tensor, out: Tensor, rank: int) -> None:
        """Complete the gradient of a lora_A from its chunks (chunks, RP, in)."""
        width, block = parts.shape[2], 4096
        launch(
            sums.sum_chunks_kernel,
            (cdiv(rank * width, block), self.p.experts),
            parts=parts,
            out=out,
            chunk_first=self.run.routing.chunk_first,
            RANK=rank,
            RP=parts.shape[1],
            WIDTH=width,
            BLOCK=block,
            warps=4,
            stages=1,
        )

    def _add_b(self, parts: Tensor, like: Tensor, rank: int) -> Tensor:
        """The gradient of a lora_B from its chunks (chunks, out, RP)."""
        width, padded, experts = parts.shape[1], parts.shape[2], self.p.experts
        out = _like(like)
        launch(
            sums.sum_chunks_swap_kernel,
            (cdiv(width * padded, 64), cdiv(experts, 64)),
            parts=parts,
            out=out,
            chunk_first=self.run.routing.chunk_first,
            EXPERTS=experts,
            RANK=rank,
            RP=padded,
            WIDTH=width,
            BX=64,
            BE=min(64, next_power(experts)),
            warps=4,
            stages=1,
        )
        return out

    def _weight_gradient(
        self, left: Tensor, right: Tensor, like: Tensor, gather_left: bool
    ) -> Tensor:
        """The gradient of an expert weight; ``gather_left`` for down, else right is gathered."""
        run, block = self.run, 128 if self.p.dtype != _FLOAT else 64
        out = _like(like)
        rows, columns = left.shape[1], right.shape[1]
        block = min(block, next_power(min(rows, columns), 16))
        launch(
            sums.weight_gradient_kernel,
            (cdiv(columns, block), cdiv(rows, block), self.p.experts),
            left=left,
            right=right,
            order=run.routing.order,
            weights=run.routing.weights,
            out=out,
            offsets=run.routing.offsets,
            M=rows,
            N=columns,
            TOP_K=self.p.top_k,
            GATHER_LEFT=gather_left,
            BM=block,
            BN=block,
            BR=min(64, block),
            warps=8 if block == 128 else 4,
            stages=3,
        )
        return out
