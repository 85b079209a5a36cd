"""The experts layer in Triton: the launches of one forward and one backward, in order.

Forward saves GU (S, 2I), the scaled X Aᵀ and h A₂ᵀ (S, r), and lora_B in expert-major order; h and
the per-slot outputs are not saved. Nothing reads a device value on the host.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from . import experts_products_cuda as products
from . import experts_small_triton as small
from .experts_plan import Plan, Tiles, plan_for
from .experts_problem import Gradients, Needs, Problem
from .experts_products_triton import product_kernel, up_kernel
from .experts_routing_triton import Routing, route
from .launch import CompileSpec, cdiv, is_recording, launch, next_power

INTERPRETED: bool = not isinstance(product_kernel, triton.runtime.JITFunction)


class Run:
    """One call's tensors in the compute dtype, its plan and routing; methods are its launches."""

    def __init__(self, problem: Problem, plan: Plan, routing: Routing) -> None:
        self.p, self.plan, self.routing = problem, plan, routing
        kind = problem.dtype
        self.hidden = problem.hidden.to(kind).contiguous()
        self.gate_up = problem.gate_up.to(kind).contiguous()
        self.down = problem.down.to(kind).contiguous()
        self.a_up = _operand(problem.lora.gate_up_a, kind)
        self.a_down = _operand(problem.lora.down_a, kind)
        self.rp_up, self.rp_down = _padded(problem.rank_up), _padded(problem.rank_down)
        self.maps: dict[str, Any] = {
            "tile_expert": routing.tile_expert,
            "tile_row": routing.tile_row,
            "offsets": routing.offsets,
        }
        self.chunks: dict[str, Any] = {
            "chunk_expert": routing.chunk_expert,
            "chunk_row": routing.chunk_row,
            "offsets": routing.offsets,
        }

    @property
    def tiles(self) -> int:
        """Entries of the tile map, used or not."""
        return self.routing.tile_expert.shape[0]

    @property
    def chunk_count(self) -> int:
        """Entries of the chunk map, used or not."""
        return self.routing.chunk_expert.shape[0]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor on the call's device, of the compute dtype by default."""
        return self.hidden.new_empty(shape, dtype=dtype or self.p.dtype)

    def descriptor(self, tensor: Tensor, block: list[int]) -> Any:
        """A host-side tensor descriptor, or None where the plan or the layout has none."""
        if not self.plan.descriptors or not tensor.numel():
            return None
        from triton.tools.tensor_descriptor import TensorDescriptor

        if tensor.data_ptr() % 16:
            return None
        shape, strides = list(tensor.shape), list(tensor.stride())
        return TensorDescriptor(tensor, shape, strides, block)

    def swap_b(self, b: Tensor | None, rank: int, padded: int) -> Tensor | None:
        """lora_B (out, r * E) as (E, out, padded rank)."""
        if b is None:
            return None
        rows, experts = b.shape[0], self.p.experts
        out = self.empty(experts, rows, padded)
        launch(
            small.swap_kernel,
            (cdiv(rows * padded, 64), cdiv(experts, 64)),
            source=b.contiguous(),
            target=out,
            RANK=rank,
            EXPERTS=experts,
            ROWS=rows,
            RP=padded,
            BX=64,
            BE=64,
            warps=4,
            stages=1,
        )
        return out

    def skinny(
        self,
        a: Tensor,
        factor: Tensor,
        rank: int,
        scale: float,
        *,
        gather: bool,
        by_rank: bool,
    ) -> Tensor:
        """scale * A[row] F[e] of every row, (S, padded rank)."""
        plan, padded = self.plan, _padded(rank)
        out = self.empty(self.p.slots, padded)
        launch(
            small.skinny_kernel,
            (self.tiles * (plan.rows // plan.skinny_rows),),
            a=a,
            order=self.routing.order,
            factor=factor,
            out=out,
            scale=float(scale),
            **self.maps,
            K=a.shape[1],
            TOP_K=self.p.top_k,
            RANK=rank,
            RP=padded,
            GATHER=gather,
            BY_RANK=by_rank,
            TILE=plan.rows,
            BM=plan.skinny_rows,
            BK=plan.skinny_bk,
            warps=4,
            stages=plan.skinny_stages,
        )
        return out

    def up(self, xa: Tensor | None, b_up: Tensor | None) -> tuple[Tensor, Tensor]:
        """GU (S, 2I) and h (S, I)."""
        p, plan, tiles = self.p, self.plan, self.plan.up
        gate_up, h = self.empty(p.slots, 2 * p.inner), self.empty(p.slots, p.inner)
        if plan.native is not None:
            products.up(self, xa, b_up, gate_up, h)
            return gate_up, h
        rest = p.inner % tiles.bn
        half = 0 < rest <= tiles.bn // 2 and tiles.bn >= 32
        weight = self.gate_up.view(2 * p.experts, p.inner, p.width)
        launch(
            up_kernel,
            (self.tiles * cdiv(p.inner, tiles.bn),),
            x=self.hidden,
            order=self.routing.order,
            w=weight,
            w_desc=self.descriptor(weight, [2, tiles.bn, tiles.bk]),
            w_half_desc=self.descriptor(weight, [2, tiles.bn // 2, tiles.bk]) if half else None,
            xa=xa,
            b=b_up,
            gate_up=gate_up,
            h=h,
            **self.maps,
            tiles=self.tiles,
            H=p.width,
            INNER=p.inner,
            TOP_K=p.top_k,
            RP=self.rp_up,
            ACT=p.act,
            BM=plan.rows,
            BN=tiles.bn,
            BK=tiles.bk,
            GROUP=plan.group,
            HALF_ROWS=plan.half_rows,
            HALF_COLUMNS=half,
            warps=tiles.warps,
            stages=tiles.stages,
        )
        return gate_up, h

    def product(
        self,
        tiles: Tiles,
        a: Tensor,
        w: Tensor,
        out: Tensor,
        *,
        gather: bool,
        transposed: bool,
        left: Tensor | None,
        right: Tensor | None,
        rank: int,
        weights: Tensor | None = None,
        first_block: int = 0,
        blocks: int | None = None,
    ) -> None:
        """out = A W + left right for ``blocks`` column blocks; ``transposed``: w is (E, K, N)."""
        plan = self.plan
        if plan.native is not None:
            products.product(
                self, a, w, out, gather=gather, transposed=transposed, left=left, right=right,
                padded=_padded(rank), weighted=weights is not None,
                first_block=first_block, blocks=blocks,
            )  # fmt: skip
            return
        inner, columns = a.shape[1], w.shape[2] if transposed else w.shape[1]
        blocks = cdiv(columns, tiles.bn) if blocks is None else blocks
        box = [1, tiles.bk, tiles.bn] if transposed else [1, tiles.bn, tiles.bk]
        a_desc = None if gather else self.descriptor(a, [plan.rows, tiles.bk])
        a_half = None if gather else self.descriptor(a, [plan.rows // 2, tiles.bk])
        launch(
            product_kernel,
            (self.tiles * blocks,),
            a=a,
            a_desc=a_desc,
            a_half_desc=a_half,
            order=self.routing.order,
            w=w,
            w_desc=self.descriptor(w, box),
            small=left,
            wide=right,
            weights=weights,
            out=out,
            **self.maps,
            tiles=self.tiles,
            first_block=first_block,
            blocks=blocks,
            K=inner,
            N=columns,
            OUT_STRIDE=out.stride(0),
            TOP_K=self.p.top_k,
            RANK=rank,
            RP=_padded(rank),
            GATHER=gather,
            KN=transposed,
            BM=plan.rows,
            BN=tiles.bn,
            BK=tiles.bk,
            GROUP=plan.group,
            HALF_ROWS=plan.half_rows,
            warps=tiles.warps,
            stages=tiles.stages,
        )

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """out[t] = the sum of the token's rows; ``out`` may be a slice of columns."""
        width = out.shape[1]
        block = min(1024, next_power(width, 16))
        launch(
            small.combine_kernel,
            (self.p.tokens, cdiv(width, block)),
            rows_in=rows,
            position=self.routing.position,
            out=out,
            width=width,
            in_stride=rows.stride(0),
            out_stride=out.stride(0),
            TOP_K=self.p.top_k,
            BLOCK=block,
            warps=4,
            stages=1,
        )


def _operand(tensor: Tensor | None, kind: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(kind).contiguous()


def _padded(rank: int) -> int:
    """Ranks fill a matrix tile of at least 16; 0 stays 0."""
    return next_power(rank, 16) if rank else 0


def through_float32(problem: Problem) -> Problem:
    """The interpreter gets bfloat16 wrong (`kernels.md` §9): round, then compute in float32."""
    p, lora = problem, problem.lora

    def wide(tensor: Any) -> Any:
        return None if tensor is None else tensor.to(p.dtype).float()

    factors = replace(
        lora,
        gate_up_a=wide(lora.gate_up_a),
        gate_up_b=wide(lora.gate_up_b),
        down_a=wide(lora.down_a),
        down_b=wide(lora.down_b),
    )
    return replace(
        p,
        hidden=wide(p.hidden),
        weights=p.weights.float(),
        gate_up=wide(p.gate_up),
        down=wide(p.down),
        lora=factors,
        dtype=torch.float32,
    )


def forward(problem: Problem, plan: Plan | None = None) -> tuple[Tensor, list[Any]]:
    """Return the output ``(T, H)`` in the dtype of hidden, and what backward needs."""
    kind = problem.hidden.dtype
    if not problem.slots:
        return problem.hidden.new_zeros((problem.tokens, problem.width)), []
    if INTERPRETED and problem.dtype == torch.bfloat16:
        problem = through_float32(problem)
    plan = plan or plan_for(problem, interpreted=INTERPRETED)
    if problem.hidden.is_cuda and not is_recording():
        from . import experts_compile_triton

        experts_compile_triton.compile_once(problem, plan)
    p, lora = problem, problem.lora
    cluster = 1 if plan.native is None else plan.native.cluster
    index, weights = p.index.contiguous(), p.weights.contiguous()
    routing = route(index, weights, p.experts, plan.rows, plan.chunk, cluster=cluster)
    run = Run(p, plan, routing)
    b_up = run.swap_b(lora.gate_up_b, p.rank_up, run.rp_up)
    b_down = run.swap_b(lora.down_b, p.rank_down, run.rp_down)
    xa = ha = None
    if run.a_up is not None:
        scale = lora.gate_up_scale
        xa = run.skinny(run.hidden, run.a_up, p.rank_up, scale, gather=True, by_rank=True)
    gate_up, h = run.up(xa, b_up)
    if run.a_down is not None:
        ha = run.skinny(h, run.a_down, p.rank_down, lora.down_scale, gather=False, by_rank=True)
    y = run.empty(p.slots, p.width)
    run.product(
        plan.down, h, run.down, y, gather=False, transposed=False,
        left=ha, right=b_down, rank=p.rank_down, weights=routing.weights,
    )  # fmt: skip
    out = run.empty(p.tokens, p.width, dtype=kind)
    run.combine(y, out)
    if not plan.keep_factors:
        b_up = b_down = None
    kept = [gate_up, xa, ha, b_up, b_down]
    return out, kept + routing.tensors()


def backward(
    problem: Problem,
    saved: list[Tensor],
    grad: Tensor,
    needs: Needs,
    plan: Plan | None = None,
) -> Gradients:
    """Gradients of every needed input, in the dtype of their parameter."""
    from . import experts_triton_backward

    return experts_triton_backward.backward(problem, saved, grad, needs, plan)


def unpack(saved: list[Any]) -> tuple[list[Tensor | None], Routing]:
    """What `forward` saved: [GU, XA, HA, B, B₂], None for what there is not, and the routing."""
    return saved[:5], Routing(*saved[5:])


def compile_specs() -> list[CompileSpec]:
    """Every kernel of a forward and backward, see `experts_compile_triton`."""
    from . import experts_compile_triton

    return experts_compile_triton.specs()
