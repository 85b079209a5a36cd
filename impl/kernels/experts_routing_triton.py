"""Routing on the device in four launches: who serves which slot, in a stable order, no sync.

Slots (``slot = token * K + k``) are counting-sorted by expert. Two maps cut every expert's rows
into *tiles* (units of a product) and *chunks* (units of a sum over rows), within one expert. Map
entries past the last are -1; an empty expert has no tile and one empty chunk, so that its partial
sums are written as zeros.
"""

# Triton's language has no types.
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, cdiv, launch, next_power

_BLOCK = 256  # slots a program counts and scatters


@dataclass(frozen=True)
class Routing:
    """Device tensors, int32 but for the weights. ``rows`` are positions in the sorted order."""

    order: Tensor  # (S,) row -> slot; sentinels have no row
    position: Tensor  # (S,) slot -> row, -1 for a sentinel
    weights: Tensor  # (S,) float32 routing weight of each row
    offsets: Tensor  # (E + 1,) first row of each expert; the last is the number of rows
    tile_expert: Tensor  # (tiles,)
    tile_row: Tensor  # (tiles,) first row
    chunk_expert: Tensor  # (chunks,)
    chunk_row: Tensor  # (chunks,)
    chunk_first: Tensor  # (E + 1,) first chunk of each expert
    counter: Tensor  # (2,) zeros; the products in CUDA hand out tiles by it and leave it at zero
    wide_expert: Tensor  # (wide tiles,) as above, of several tiles' rows; empty unless asked for
    wide_row: Tensor  # (wide tiles,)

    def tensors(self) -> list[Tensor]:
        """The fields in order, to be saved for backward; ``Routing(*tensors)`` is the inverse."""
        return [getattr(self, name) for name in self.__dataclass_fields__]


def route(
    index: Tensor, weights: Tensor, experts: int, tile: int, chunk: int, *, cluster: int = 1
) -> Routing:
    """Sort the slots of ``index`` (T, K) by expert; map entries cover ``tile``, ``chunk`` rows.

    With a ``cluster`` a third map is made, whose entries cover so many times ``tile`` rows.
    """
    slots = index.numel()
    device = index.device
    blocks = cdiv(slots, _BLOCK)
    bins = next_power(experts, 128)
    tiles = slots // tile + min(experts, slots)
    chunks = slots // chunk + experts
    wides = slots // (tile * cluster) + min(experts, slots) if cluster > 1 else 0

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    counts, totals = empty(blocks, bins), empty(bins)
    tile_first, wide_first = empty(experts + 1), empty(experts + 1) if wides else None
    result = Routing(
        empty(slots),
        empty(slots),
        torch.empty(slots, dtype=torch.float32, device=device),
        empty(experts + 1),
        empty(tiles),
        empty(tiles),
        empty(chunks),
        empty(chunks),
        empty(experts + 1),
        empty(2),
        empty(wides),
        empty(wides),
    )
    flat = index.reshape(-1)
    sizes = {"SLOTS": slots, "EXPERTS": experts, "BINS": bins, "BLOCK": _BLOCK}
    launch(count_kernel, (blocks,), index=flat, counts=counts, **sizes, warps=4, stages=1)
    launch(
        start_kernel,
        (bins // 16,),
        counts=counts,
        totals=totals,
        blocks=blocks,
        BINS=bins,
        ROWS=256,
        COLUMNS=16,
        warps=8,
        stages=1,
    )
    launch(
        scan_kernel,
        (1,),
        totals=totals,
        offsets=result.offsets,
        tile_first=tile_first,
        chunk_first=result.chunk_first,
        wide_first=wide_first,
        counter=result.counter,
        EXPERTS=experts,
        BINS=bins,
        TILE=tile,
        WIDE=tile * cluster,
        chunk_rows=chunk,
        warps=4,
        stages=1,
    )
    launch(
        scatter_kernel,
        (blocks,),
        index=flat,
        counts=counts,
        offsets=result.offsets,
        weights=weights.reshape(-1),
        order=result.order,
        sorted_weights=result.weights,
        position=result.position,
        tile_first=tile_first,
        tile_expert=result.tile_expert,
        tile_row=result.tile_row,
        tiles=tiles,
        chunk_first=result.chunk_first,
        chunk_expert=result.chunk_expert,
        chunk_row=result.chunk_row,
        chunks=chunks,
        wide_first=wide_first,
        wide_expert=result.wide_expert if wides else None,
        wide_row=result.wide_row if wides else None,
        wides=wides,
        **sizes,
        TILE=tile,
        WIDE=tile * cluster,
        chunk_rows=chunk,
        FILL=next_power(cdiv(max(tiles, chunks), blocks)),
        STEP=32,
        warps=8,
        stages=1,
    )
    return result


@triton.jit
def _expert_of(index, i, SLOTS, EXPERTS):
    """Expert of slots ``i``; whatever is no expert becomes ``EXPERTS``."""
    e = tl.load(index + i, mask=i < SLOTS, other=EXPERTS)
    return tl.where((e < 0) | (e > EXPERTS), EXPERTS, e).to(tl.int32)


@triton.jit(do_not_specialize=["SLOTS"])
def count_kernel(
    index,
    counts,
    SLOTS,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Histogram of one block of slots; sentinels are left out."""
    begin(PDL)
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    e = _expert_of(index, i, SLOTS, EXPERTS)
    tl.store(counts + block * BINS + tl.arange(0, BINS), tl.histogram(e, BINS, mask=e < EXPERTS))


@triton.jit(do_not_specialize=["blocks"])
def start_kernel(
    counts,
    totals,
    blocks,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Turn the blocks' counts of a few experts into starts within the expert, and add them up."""
    begin(PDL)
    bins = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    carry = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        pointers = counts + rows[:, None] * BINS + bins[None, :]
        live = rows[:, None] < blocks
        block = tl.load(pointers, mask=live, other=0)
        running = tl.cumsum(block, 0)
        tl.store(pointers, running - block + carry[None, :], mask=live)
        carry += tl.sum(block, 0)
    tl.store(totals + bins, carry)


@triton.jit(do_not_specialize=["chunk_rows"])
def scan_kernel(
    totals,
    offsets,
    tile_first,
    chunk_first,
    wide_first,
    counter,
    chunk_rows,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Cut the experts' rows into tiles and chunks. One program."""
    begin(PDL)
    bins = tl.arange(0, BINS)
    real = bins < EXPERTS
    total = tl.load(totals + bins, mask=real, other=0)
    tiles = (total + TILE - 1) // TILE
    chunks = tl.where(real, tl.maximum((total + chunk_rows - 1) // chunk_rows, 1), 0)
    tl.store(counter + tl.arange(0, 2), tl.zeros([2], tl.int32))
    tl.store(offsets + EXPERTS, tl.sum(total, 0))
    tl.store(tile_first + EXPERTS, tl.sum(tiles, 0))
    tl.store(chunk_first + EXPERTS, tl.sum(chunks, 0))
    tl.store(offsets + bins, tl.cumsum(total, 0) - total, mask=real)
    tl.store(tile_first + bins, tl.cumsum(tiles, 0) - tiles, mask=real)
    tl.store(chunk_first + bins, tl.cumsum(chunks, 0) - chunks, mask=real)
    if wide_first is not None:
        wides = (total + WIDE - 1) // WIDE
        tl.store(wide_first + EXPERTS, tl.sum(wides, 0))
        tl.store(wide_first + bins, tl.cumsum(wides, 0) - wides, mask=real)


@triton.jit
def _fill_map(
    first,
    offsets,
    to_expert,
    to_row,
    size,
    start,
    EXPERTS,
    BINS: tl.constexpr,
    FILL: tl.constexpr,
    UNIT,
):
    """Write map entries ``start .. start + FILL``: the expert of each and its first row, or -1."""
    entry = start + tl.arange(0, FILL)
    bins = tl.arange(0, BINS)
    ends = tl.load(first + 1 + bins, mask=bins < EXPERTS, other=2147483647)
    expert = tl.sum((ends[None, :] <= entry[:, None]).to(tl.int32), 1)
    live = expert < EXPERTS
    row = tl.load(offsets + expert, mask=live, other=0)
    row += (entry - tl.load(first + expert, mask=live, other=0)) * UNIT
    tl.store(to_expert + entry, tl.where(live, expert, -1), mask=entry < size)
    tl.store(to_row + entry, row, mask=entry < size)


@triton.jit(do_not_specialize=["tiles", "chunks", "wides", "chunk_rows", "SLOTS"])
def scatter_kernel(
    index,
    weights,
    counts,
    offsets,
    order,
    sorted_weights,
    position,
    tile_first,
    tile_expert,
    tile_row,
    tiles,
    chunk_first,
    chunk_expert,
    chunk_row,
    chunks,
    wide_first,
    wide_expert,
    wide_row,
    wides,
    chunk_rows,
    SLOTS,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    FILL: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Place one block of slots, in slot order within each expert; fill its share of the maps."""
    begin(PDL)
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    i = block * BLOCK + lane
    e = _expert_of(index, i, SLOTS, EXPERTS)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in tl.static_range(0, BLOCK, STEP):
        other_lane = first + tl.arange(0, STEP)
        other = _expert_of(index, block * BLOCK + other_lane, SLOTS, EXPERTS)
        earlier = (other[None, :] == e[:, None]) & (other_lane[None, :] < lane[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    live = (i < SLOTS) & (e < EXPERTS)
    row = rank + tl.load(offsets + e, mask=live, other=0)
    row += tl.load(counts + block * BINS + e, mask=live, other=0)
    tl.store(order + row, i, mask=live)
    weight = tl.load(weights + i, mask=live, other=0.0).to(tl.float32)
    tl.store(sorted_weights + row, weight, mask=live)
    tl.store(position + i, tl.where(live, row, -1), mask=i < SLOTS)
    start = block * FILL
    _fill_map(
        tile_first,
        offsets,
        tile_expert,
        tile_row,
        tiles,
        start,
        EXPERTS,
        BINS,
        FILL,
        TILE,
    )
    _fill_map(
        chunk_first,
        offsets,
        chunk_expert,
        chunk_row,
        chunks,
        start,
        EXPERTS,
        BINS,
        FILL,
        chunk_rows,
    )
    if wide_first is not None:
        _fill_map(
            wide_first,
            offsets,
            wide_expert,
            wide_row,
            wides,
            start,
            EXPERTS,
            BINS,
            FILL,
            WIDE,
        )
