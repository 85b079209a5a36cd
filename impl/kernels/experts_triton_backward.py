"""The backward launches of the experts layer in Triton.

dh overwrites nothing saved: one buffer D (S, 2I) first holds dh in its left half, then dGU. dX goes
through one buffer in column parts; the gradients of A and B₂, which need neither, come last.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import experts_small_triton as small
from .experts_plan import Plan, plan_for
from .experts_problem import Gradients, Needs, Problem
from .experts_routing_triton import Routing
from .experts_triton import INTERPRETED, Run, _through_float32, unpack
from .launch import launch, next_power


def backward(
    problem: Problem, saved: list[Tensor], grad: Tensor, needs: Needs, plan: Plan | None
) -> Gradients:
    """See `experts_triton.backward`."""
    given = problem
    if not given.slots:
        return _nothing(given, needs)
    if INTERPRETED and problem.dtype == torch.bfloat16:
        problem = _through_float32(problem)
    plan = plan or plan_for(problem, interpreted=INTERPRETED)
    parts, routing = unpack(problem, saved)
    return _Backward(given, problem, plan, routing, parts, grad).gradients(needs)


def _nothing(p: Problem, needs: Needs) -> Gradients:
    """The gradients of a call without slots: zeros."""
    lora = p.lora
    tensors = {
        "hidden": p.hidden,
        "weights": p.weights,
        "gate_up": p.gate_up,
        "down": p.down,
        "gate_up_a": lora.gate_up_a,
        "gate_up_b": lora.gate_up_b,
        "down_a": lora.down_a,
        "down_b": lora.down_b,
    }
    zeros = {
        name: torch.zeros_like(t)
        for name, t in tensors.items()
        if t is not None and getattr(needs, name)
    }
    return Gradients(**zeros)


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
    ) -> None:
        self.given, self.p, self.plan = given, problem, plan
        self.run = Run(problem, plan, routing)
        gate_up, self.xa, self.ha, self.b_up, self.b_down = parts
        assert gate_up is not None
        self.gate_up = gate_up
        self.pb_up: Tensor | None = None
        self.grad = grad.to(problem.dtype).contiguous()

    def gradients(self, needs: Needs) -> Gradients:
        """Launch what the needed gradients take."""
        out = Gradients()
        self._middle(needs, out)
        if needs.gate_up:
            out.gate_up = self._weight_gradient(self.d, self.run.hidden, self.given.gate_up, False)
        if needs.hidden:
            out.hidden = self._input_gradient()
        del self.d
        run, lora = self.run, self.given.lora
        if needs.gate_up_a and lora.gate_up_a is not None and self.pb_up is not None:
            chunks = self._gather_sum(run.hidden, self.pb_up, by_rank=True, weighted=False)
            out.gate_up_a = self._add_a(chunks, lora.gate_up_a, self.p.rank_up)
        if needs.down_b and lora.down_b is not None and self.ha is not None:
            chunks = self._gather_sum(self.grad, self.ha, by_rank=False, weighted=True)
            out.down_b = self._add_b(chunks, lora.down_b, self.p.rank_down)
        return out

    def _middle(self, needs: Needs, out: Gradients) -> None:
        """dh, then dGU, P = s dGU B, and the gradients of B, A₂, the routing weights and down."""
        p, run, plan, lora = self.p, self.run, self.plan, self.given.lora
        pb = None
        if self.b_down is not None:
            scale = lora.down_scale
            pb = run.skinny(self.grad, self.b_down, p.rank_down, scale, gather=True, by_rank=False)
        self.d = run.empty(p.slots, 2 * p.inner)
        run.product(
            plan.d_hidden, self.grad, run.down, self.d, gather=True, transposed=True,
            left=pb, right=run.a_down, rank=p.rank_down,
        )  # fmt: skip
        blocks = triton.cdiv(p.inner, plan.middle_columns)
        per_group = triton.cdiv(blocks, plan.column_groups)
        groups, wide = triton.cdiv(blocks, per_group), torch.float32
        d_b = d_a = p_parts = h = None
        if run.rp_up:
            d_b = run.empty(run.chunk_count, 2 * p.inner, run.rp_up, dtype=wide)
            if plan.rank_in_middle:
                p_parts = run.empty(groups, p.slots, run.rp_up, dtype=wide)
                self.pb_up = run.empty(p.slots, run.rp_up)
        if run.rp_down:
            d_a = run.empty(run.chunk_count, run.rp_down, p.inner, dtype=wide)
        if needs.down:
            h = run.empty(p.slots, p.inner)
        w_parts = run.empty(groups, p.slots, dtype=wide)
        self._launch_middle(per_group, groups, pb, d_b, d_a, p_parts, w_parts, h)
        if self.b_up is not None and not plan.rank_in_middle:
            scale = lora.gate_up_scale
            self.pb_up = run.skinny(
                self.d, self.b_up, p.rank_up, scale, gather=False, by_rank=False
            )
        out.weights = self._finish_rows(p_parts, w_parts, groups, needs)
        if d_b is not None and needs.gate_up_b and lora.gate_up_b is not None:
            out.gate_up_b = self._add_b(d_b, lora.gate_up_b, p.rank_up)
        if d_a is not None and needs.down_a and lora.down_a is not None:
            out.down_a = self._add_a(d_a, lora.down_a, p.rank_down)
        if h is not None:
            out.down = self._weight_gradient(self.grad, h, self.given.down, True)

    def _launch_middle(
        self,
        per_group: int,
        groups: int,
        pb: Tensor | None,
        d_b: Tensor | None,
        d_a: Tensor | None,
        p_parts: Tensor | None,
        w_parts: Tensor,
        h: Tensor | None,
    ) -> None:
        p, run, plan = self.p, self.run, self.plan
        launch(
            small.middle_kernel,
            (run.chunk_count, groups),
            gate_up=self.gate_up,
            d=self.d,
            weights=run.routing.weights,
            xa=self.xa,
            pb=pb,
            b=self.b_up,
            d_b=d_b,
            d_a=d_a,
            p_parts=p_parts,
            w_parts=w_parts,
            h=h,
            **run.chunks,
            slots=p.slots,
            chunk_rows=plan.chunk,
            INNER=p.inner,
            RP_UP=run.rp_up,
            RP_DOWN=run.rp_down,
            ACT=p.act,
            COLUMN_BLOCKS=per_group,
            BR=plan.middle_rows,
            BC=plan.middle_columns,
            warps=plan.middle_warps,
            stages=plan.middle_stages,
        )

    def _finish_rows(
        self, p_parts: Tensor | None, w_parts: Tensor, groups: int, needs: Needs
    ) -> Tensor | None:
        """Fill ``pb_up`` from its parts; return the gradient of the routing weights if needed."""
        p, run = self.p, self.run
        d_weights = torch.zeros_like(self.given.weights) if needs.weights else None
        if p_parts is None and d_weights is None:
            return None
        launch(
            small.finish_rows_kernel,
            (triton.cdiv(p.slots, 128),),
            p_parts=p_parts,
            w_parts=w_parts,
            order=run.routing.order,
            pb=self.pb_up,
            d_weights=d_weights,
            offsets=run.routing.offsets,
            scale=float(self.given.lora.gate_up_scale),
            slots=p.slots,
            EXPERTS=p.experts,
            GROUPS=groups,
            RP=run.rp_up,
            BLOCK=128,
            warps=4,
            stages=1,
        )
        return d_weights

    def _input_gradient(self) -> Tensor:
        """dX (T, H), one column part after the other through one buffer of rows."""
        p, run, tiles = self.p, self.run, self.plan.d_input
        out = torch.empty_like(self.given.hidden, memory_format=torch.contiguous_format)
        total = triton.cdiv(p.width, tiles.bn)
        blocks = triton.cdiv(total, self.plan.input_parts)
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

    def _gather_sum(self, a: Tensor, rows: Tensor, *, by_rank: bool, weighted: bool) -> Tensor:
        """By chunk: the sum over rows of a[token]ᵀ rows[row]."""
        run, plan = self.run, self.plan
        width, padded = a.shape[1], rows.shape[1]
        shape = (padded, width) if by_rank else (width, padded)
        out = run.empty(run.chunk_count, *shape, dtype=torch.float32)
        launch(
            small.gather_sum_kernel,
            (run.chunk_count, triton.cdiv(width, plan.sum_columns)),
            a=a,
            small=rows,
            order=run.routing.order,
            weights=run.routing.weights if weighted else None,
            out=out,
            **run.chunks,
            WIDTH=width,
            TOP_K=self.p.top_k,
            RP=padded,
            BY_RANK=by_rank,
            chunk_rows=plan.chunk,
            BR=plan.sum_rows,
            BC=plan.sum_columns,
            warps=plan.sum_warps,
            stages=plan.sum_stages,
        )
        return out

    def _add_a(self, parts: Tensor, like: Tensor, rank: int) -> Tensor:
        """The gradient of a lora_A from its chunks (chunks, RP, in)."""
        width, block = parts.shape[2], 1024
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        launch(
            small.sum_chunks_kernel,
            (triton.cdiv(rank * width, block), self.p.experts),
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
        return out

    def _add_b(self, parts: Tensor, like: Tensor, rank: int) -> Tensor:
        """The gradient of a lora_B from its chunks (chunks, out, RP)."""
        width, padded, experts = parts.shape[1], parts.shape[2], self.p.experts
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        launch(
            small.sum_chunks_swap_kernel,
            (triton.cdiv(width * padded, 64), triton.cdiv(experts, 64)),
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
        run, block = self.run, 128 if self.p.dtype != torch.float32 else 64
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        rows, columns = left.shape[1], right.shape[1]
        block = min(block, next_power(min(rows, columns), 16))
        launch(
            small.weight_gradient_kernel,
            (triton.cdiv(columns, block), triton.cdiv(rows, block), self.p.experts),
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


__all__ = ["backward"]
