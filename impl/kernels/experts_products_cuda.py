"""The four large products of the experts layer on Hopper: launches of `experts_cuda_source`.

They stand in for the two Triton kernels of `experts_products_triton` where the plan has a `Native`
part, and give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import experts_cuda_runtime as runtime
from . import launch
from .experts_problem import Problem
from .launch import cdiv, is_recording

if TYPE_CHECKING:
    from .experts_triton import Run

_PLAIN, _WEIGHTED, _SILU, _GELU = range(4)
_EPILOGUES = {"silu": _SILU, "gelu_tanh": _GELU}
_WIDEST = 256  # columns of a tile
_RANKS = 64  # one step of the inner loop
_LEAST = 256  # of both widths: the ring's stages are a part of one tile
_RECORDED: list[runtime.Constants] = []


def fits(problem: Problem) -> bool:
    """Whether the kernels take this problem."""
    p = problem
    return (
        p.dtype == torch.bfloat16
        and min(p.rank_up, p.rank_down) > 0
        and max(p.rank_up, p.rank_down) <= _RANKS
        and not (p.width % 64 or p.inner % 64)
        and min(p.width, p.inner) >= _LEAST
    )


def up(run: Run, xa: Tensor | None, b_up: Tensor | None, gate_up: Tensor, h: Tensor) -> None:
    """GU (S, 2I) and h (S, I) of the gathered rows."""
    p = run.p
    half = _columns(p.inner, True, 2) // 2
    _launch(
        run, run.hidden, run.gate_up, xa, b_up, gate_up, h,
        {"NT": 2 * half, "KN": 0, "GATHER": 1, "EPI": _EPILOGUES[p.act], "NDIM": p.inner,
         "RP": run.rp_up},
        0, cdiv(p.inner, half),
    )  # fmt: skip


def product(
    run: Run,
    a: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    gather: bool,
    transposed: bool,
    left: Tensor | None,
    right: Tensor | None,
    padded: int,
    weighted: bool,
    first_block: int,
    blocks: int | None,
) -> None:
    """out = A W + left right for ``blocks`` blocks of 256 columns, or for all columns."""
    columns = w.shape[2] if transposed else w.shape[1]
    width = _WIDEST if blocks is not None else _columns(columns, gather, 1)
    if right is not None and transposed:
        right = right.view(run.p.experts, -1, columns)
    _launch(
        run, a, w, left, right, out, None,
        {"NT": width, "KN": int(transposed), "GATHER": int(gather),
         "EPI": _WEIGHTED if weighted else _PLAIN, "NDIM": columns,
         "RP": padded if right is not None else 0},
        first_block, cdiv(columns, width) if blocks is None else blocks,
    )  # fmt: skip


def _columns(columns: int, gather: bool, parts: int) -> int:
    """Columns of a tile, of gate and up together with two ``parts``: blocks of nearly equal width.

    At most 256; gathering leaves more registers to its loaders at 240, taken where it wastes
    little. 144 at least: a unit's product is two instructions, the first of 128 columns.
    """
    wide = parts * _even(columns, _WIDEST // parts, 16 // parts)
    narrow = parts * _even(columns, 240 // parts, 16 // parts)
    blocks = cdiv(parts * columns, narrow)
    if gather and narrow >= 224 and blocks * narrow <= 1.02 * parts * columns:
        wide = narrow
    return max(wide, 144)


def _even(columns: int, most: int, step: int) -> int:
    """Blocks of at most ``most`` columns, as few as can be, of nearly equal width."""
    return cdiv(cdiv(columns, cdiv(columns, most)), step) * step


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where copies of 16 bytes could not read it."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _launch(
    run: Run,
    a: Tensor,
    w: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    out: Tensor,
    h: Tensor | None,
    constants: dict[str, int],
    first_block: int,
    blocks: int,
) -> None:
    routing, native = run.routing, run.plan.native
    assert native is not None
    cluster = 1 if constants["GATHER"] else native.cluster
    values = {
        **constants,
        "KDIM": a.shape[1],
        "STRIDE": out.stride(0),
        "TOPK": run.p.top_k,
        "CL": cluster,
        "STAGES": native.stages,
        "GROUP": native.group,
    }
    key = tuple(values.items())
    if is_recording():
        _RECORDED.append(key)
        return
    a, w = _aligned(a), _aligned(w)

    def weight(tensor: Tensor) -> Any:
        return runtime.weight_map(
            tensor,
            constants["NT"],
            transposed=bool(constants["KN"]),
            pair=h is not None,
            cluster=cluster,
        )

    maps = [runtime.rows_map(a), weight(w)]
    if left is not None and right is not None:
        left, right = _aligned(left), _aligned(right)
        maps += [runtime.rows_map(left), weight(right)]
    else:
        maps += maps
    expert, row = routing.tile_expert, routing.tile_row
    if cluster > 1:
        expert, row = routing.wide_expert, routing.wide_row
    tiles = expert.shape[0]
    args = runtime.Args(
        *(
            None if tensor is None else tensor.data_ptr()
            for tensor in (
                a, routing.order, routing.weights, out, h,
                expert, row, routing.offsets, routing.counter,
            )
        ),
        tiles,
        first_block,
        blocks,
    )  # fmt: skip
    found = runtime.kernel(torch.cuda.current_device(), key)
    dependent = launch.DEPENDENT_LAUNCH is not False
    runtime.start(found, maps, args, tiles * blocks, dependent=dependent)


def recorded() -> list[runtime.Constants]:
    """What was asked for while recording, once each; forgets it."""
    found = list(dict.fromkeys(_RECORDED))
    _RECORDED.clear()
    return found


def compile_one(device: torch.device, constants: runtime.Constants) -> Any:
    """Compile and load ahead of the first launch."""
    torch.cuda.set_device(device)
    return runtime.kernel(device.index or 0, constants)
