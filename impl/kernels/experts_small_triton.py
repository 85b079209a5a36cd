"""The small kernels around the products: lora_B by expert, rank-wide products, the combine."""

# Triton's language has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .launch import begin


@triton.jit
def swap_kernel(
    source,
    target,
    RANK,
    EXPERTS,
    ROWS,
    RP: tl.constexpr,
    BX: tl.constexpr,
    BE: tl.constexpr,
    PDL: tl.constexpr,
):
    """lora_B (ROWS, RANK, EXPERTS) -> (EXPERTS, ROWS, RP) in the target's dtype, zero-padded."""
    begin(PDL)
    flat = tl.program_id(0) * BX + tl.arange(0, BX)
    row, rank = flat // RP, flat % RP
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    inside = (row[:, None] < ROWS) & (expert[None, :] < EXPERTS)
    values = tl.load(
        source + (row.to(tl.int64) * RANK + rank)[:, None] * EXPERTS + expert[None, :],
        mask=inside & (rank[:, None] < RANK),
        other=0.0,
    )
    at = target + expert.to(tl.int64)[None, :] * ROWS * RP + flat[:, None]
    tl.store(at, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def skinny_kernel(
    a,
    order,
    factor,
    out,
    scale,
    tile_expert,
    tile_row,
    offsets,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    GATHER: tl.constexpr,
    BY_RANK: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[row] (RP) = scale a[row] factor[e]; factor: (E, RANK, K) by rank, else (E, K, RP)."""
    begin(PDL)
    tile = tl.program_id(0) // (TILE // BM)
    e = tl.load(tile_expert + tile)
    if e < 0:
        return
    row = tl.load(tile_row + tile) + (tl.program_id(0) % (TILE // BM)) * BM
    end = tl.load(offsets + e + 1)
    if row >= end:
        return
    rows = row + tl.arange(0, BM)
    live = rows < end
    source = tl.where(live, rows, row)
    if GATHER:
        source = tl.load(order + rows, mask=live, other=0) // TOP_K
    ks = tl.arange(0, BK)
    ranks = tl.arange(0, RP)
    a_pointers = a + source.to(tl.int64)[:, None] * K + ks[None, :]
    if BY_RANK:
        pointers = factor + e.to(tl.int64) * RANK * K + ranks[None, :] * K + ks[:, None]
    else:
        pointers = factor + e.to(tl.int64) * K * RP + ks[:, None] * RP + ranks[None, :]
    acc = tl.zeros([BM, RP], tl.float32)
    for k in range(0, K, BK):
        inside = k + ks < K
        left = tl.load(a_pointers, mask=inside[None, :], other=0.0)
        if BY_RANK:
            right = tl.load(pointers, mask=inside[:, None] & (ranks[None, :] < RANK), other=0.0)
            pointers += BK
        else:
            right = tl.load(pointers, mask=inside[:, None], other=0.0)
            pointers += BK * RP
        acc = tl.dot(left, right, acc, input_precision="ieee")
        a_pointers += BK
    at = out + rows.to(tl.int64)[:, None] * RP + ranks[None, :]
    tl.store(at, (acc * scale).to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def combine_kernel(
    rows_in,
    position,
    out,
    width,
    in_stride,
    out_stride,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t] = sum over k, in order, in float32, of rows_in[position[t, k]], sentinels apart."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(position + token * TOP_K + k).to(tl.int64)
        at = rows_in + row * in_stride + columns
        limit = tl.where(row >= 0, width, 0)
        acc += tl.load(at, mask=columns < limit, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + columns, acc.to(out.dtype.element_ty), mask=inside)
