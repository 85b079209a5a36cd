"""The four large products of the experts layer: two Triton kernels, LoRA as extra inner columns.

A program owns one tile of rows of one expert and one block of output columns. A tile that holds at
most half its rows runs as a half tile, and a last column block at most half full as a half block.
Rows are gathered through pointers; weights come through tensor descriptors (TMA) where there are
some. Operands keep their dtype, sums are float32.
"""

# Triton's language has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .launch import begin


@triton.jit
def program_tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Map a program to (row tile, column block): column blocks fastest in groups of GROUP tiles."""
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = pid % width
    return first + inside % size, inside // size


@triton.jit
def activate(gate, ACT: tl.constexpr):
    """silu(gate) or tanh-gelu(gate), written with one sigmoid so that it also runs interpreted."""
    if ACT == "silu":
        return gate * tl.sigmoid(gate)
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))


@triton.jit
def _add_lora(
    acc,
    small,
    wide,
    rows,
    live,
    e,
    n0,
    N: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    KN: tl.constexpr,
    RP: tl.constexpr,
    BN: tl.constexpr,
):
    """acc + small[rows] @ wide[e]: the extra inner columns. ``wide`` is (E, N, RP) or (E, RANK, N).

    With SPLIT (gate and up in one block) columns BN/2 .. BN belong to the second half of N.
    """
    ranks = tl.arange(0, RP)
    left = tl.load(
        small + rows.to(tl.int64)[:, None] * RP + ranks[None, :],
        mask=live[:, None],
        other=0.0,
    )
    lane = tl.arange(0, BN)
    if SPLIT:
        column = n0 + lane % (BN // 2)
        fits = column < N // 2
        column += (lane // (BN // 2)) * (N // 2)
    else:
        column = n0 + lane
        fits = column < N
    base = e.to(tl.int64) * N
    if KN:
        right = tl.load(
            wide + base * RANK + ranks[:, None] * N + column[None, :],
            mask=fits[None, :] & (ranks[:, None] < RANK),
            other=0.0,
        )
    else:
        right = tl.load(
            wide + (base + column[None, :]) * RP + ranks[:, None],
            mask=fits[None, :],
            other=0.0,
        )
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _rows_of(order, row, end, TOP_K: tl.constexpr, GATHER: tl.constexpr, BM: tl.constexpr):
    """The rows of a tile, which of them are the expert's, and where A holds each."""
    rows = row + tl.arange(0, BM)
    live = rows < end
    source = tl.where(live, rows, row)
    if GATHER:
        source = tl.load(order + rows, mask=live, other=0) // TOP_K
    return rows, live, source.to(tl.int64)


@triton.jit
def _finish_up(
    acc,
    rows,
    live,
    xa,
    b,
    gate_up,
    h,
    e,
    n0,
    INNER: tl.constexpr,
    RP: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Add LoRA, split gate from up, write both and h."""
    if RP:
        acc = _add_lora(acc, xa, b, rows, live, e, n0, 2 * INNER, RP, True, False, RP, 2 * BN)
    gate, up = tl.split(tl.permute(tl.reshape(acc, [BM, 2, BN]), [0, 2, 1]))
    columns = n0 + tl.arange(0, BN)
    keep = live[:, None] & (columns[None, :] < INNER)
    kind = gate_up.dtype.element_ty
    wide_rows = rows.to(tl.int64)[:, None]
    at = gate_up + wide_rows * (2 * INNER) + columns[None, :]
    tl.store(at, gate.to(kind), mask=keep)
    tl.store(at + INNER, up.to(kind), mask=keep)
    value = activate(gate, ACT) * up
    tl.store(h + wide_rows * INNER + columns[None, :], value.to(kind), mask=keep)


@triton.jit
def _up_tile(
    x,
    order,
    w,
    w_desc,
    xa,
    b,
    gate_up,
    h,
    e,
    row,
    end,
    n0,
    H: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    RP: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BM rows, columns n0 .. n0+BN of gate and of up in one product of width 2 BN."""
    rows, live, source = _rows_of(order, row, end, TOP_K, True, BM)
    ks = tl.arange(0, BK)
    pointers = x + source[:, None] * H + ks[None, :]
    acc = tl.zeros([BM, 2 * BN], tl.float32)
    lane = tl.arange(0, 2 * BN)
    column = n0 + lane % BN
    weight_row = (e.to(tl.int64) * 2 + lane // BN) * INNER + column
    w_pointers = w + weight_row[None, :] * H + ks[:, None]
    fits = column < INNER
    for k in range(0, H, BK):
        if w_desc is not None:
            right = tl.trans(tl.reshape(w_desc.load([e * 2, n0, k]), [2 * BN, BK]))
        else:
            right = tl.load(w_pointers, mask=fits[None, :] & ((k + ks)[:, None] < H), other=0.0)
            w_pointers += BK
        if H % BK == 0:
            left = tl.load(pointers)
        else:
            left = tl.load(pointers, mask=(k + ks)[None, :] < H, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        pointers += BK
    _finish_up(acc, rows, live, xa, b, gate_up, h, e, n0, INNER, RP, ACT, BM, BN)


@triton.jit
def _up_rows(
    x,
    order,
    w,
    w_desc,
    xa,
    b,
    gate_up,
    h,
    e,
    row,
    end,
    n0,
    H: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    RP: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALF_ROWS: tl.constexpr,
):
    """Run the smallest tile that holds the rows left: half, or BM."""
    if HALF_ROWS and end - row <= BM // 2:
        _up_tile(
            x, order, w, w_desc, xa, b, gate_up, h, e, row, end, n0,
            H, INNER, TOP_K, RP, ACT, BM // 2, BN, BK,
        )  # fmt: skip
    else:
        _up_tile(
            x, order, w, w_desc, xa, b, gate_up, h, e, row, end, n0,
            H, INNER, TOP_K, RP, ACT, BM, BN, BK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def up_kernel(
    x,
    order,
    w,
    w_desc,
    w_half_desc,
    xa,
    b,
    gate_up,
    h,
    tile_expert,
    tile_row,
    offsets,
    tiles,
    H: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    RP: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_ROWS: tl.constexpr,
    HALF_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """gate_up = X Wᵀ + XA Bᵀ and h = act(gate) up; x (T, H) gathered, w (E, 2 INNER, H)."""
    begin(PDL)
    blocks = tl.cdiv(INNER, BN)
    m, n = program_tile(tl.program_id(0), tiles, blocks, GROUP)
    e = tl.load(tile_expert + m)
    if e < 0:
        return
    row = tl.load(tile_row + m)
    end = tl.load(offsets + e + 1)
    n0 = n * BN
    if HALF_COLUMNS and n == blocks - 1:
        _up_rows(
            x, order, w, w_half_desc, xa, b, gate_up, h, e, row, end, n0,
            H, INNER, TOP_K, RP, ACT, BM, BN // 2, BK, HALF_ROWS,
        )  # fmt: skip
    else:
        _up_rows(
            x, order, w, w_desc, xa, b, gate_up, h, e, row, end, n0,
            H, INNER, TOP_K, RP, ACT, BM, BN, BK, HALF_ROWS,
        )  # fmt: skip


@triton.jit
def _finish_product(
    acc,
    rows,
    live,
    small,
    wide,
    weights,
    out,
    e,
    n0,
    first_column,
    N: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    KN: tl.constexpr,
    BN: tl.constexpr,
):
    """Add LoRA, scale by the routing weight if there is one, write."""
    if RP:
        acc = _add_lora(acc, small, wide, rows, live, e, n0, N, RANK, False, KN, RP, BN)
    if weights is not None:
        acc *= tl.load(weights + rows, mask=live, other=0.0)[:, None]
    columns = n0 + tl.arange(0, BN)
    at = out + rows.to(tl.int64)[:, None] * OUT_STRIDE + (columns - first_column)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & (columns < N)[None, :])


@triton.jit
def _product_tile(
    a,
    a_desc,
    order,
    w,
    w_desc,
    small,
    wide,
    weights,
    out,
    e,
    row,
    end,
    n0,
    first_column,
    K: tl.constexpr,
    N: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    GATHER: tl.constexpr,
    KN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BM rows, columns n0 .. n0+BN of A times the weight of expert e."""
    rows, live, source = _rows_of(order, row, end, TOP_K, GATHER, BM)
    ks = tl.arange(0, BK)
    pointers = a + source[:, None] * K + ks[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    columns = n0 + tl.arange(0, BN)
    fits = columns < N
    base = e.to(tl.int64) * N * K
    if KN:
        w_pointers = w + base + ks.to(tl.int64)[:, None] * N + columns[None, :]
    else:
        w_pointers = w + base + columns.to(tl.int64)[None, :] * K + ks[:, None]
    for k in range(0, K, BK):
        if w_desc is None:
            right = tl.load(w_pointers, mask=fits[None, :] & ((k + ks)[:, None] < K), other=0.0)
            if KN:
                w_pointers += BK * N
            else:
                w_pointers += BK
        elif KN:
            right = tl.reshape(w_desc.load([e, k, n0]), [BK, BN])
        else:
            right = tl.trans(tl.reshape(w_desc.load([e, n0, k]), [BN, BK]))
        if a_desc is not None:
            left = a_desc.load([row, k])
        elif K % BK == 0:
            left = tl.load(pointers)
        else:
            left = tl.load(pointers, mask=(k + ks)[None, :] < K, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        pointers += BK
    _finish_product(
        acc, rows, live, small, wide, weights, out, e, n0, first_column,
        N, OUT_STRIDE, RANK, RP, KN, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "first_block", "blocks"])
def product_kernel(
    a,
    a_desc,
    a_half_desc,
    order,
    w,
    w_desc,
    small,
    wide,
    weights,
    out,
    tile_expert,
    tile_row,
    offsets,
    tiles,
    first_block,
    blocks,
    K: tl.constexpr,
    N: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    GATHER: tl.constexpr,
    KN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = (A W + small wide), times the row's routing weight if given, for some column blocks.

    a: (rows or T, K); w: (E, N, K), wide: (E, N, RP); with KN w: (E, K, N), wide: (E, RANK, N).
    Column block ``first_block`` lands in column 0 of out. GATHER takes row r of A from token
    order[r] // TOP_K.
    """
    begin(PDL)
    m, n = program_tile(tl.program_id(0), tiles, blocks, GROUP)
    e = tl.load(tile_expert + m)
    if e < 0:
        return
    row = tl.load(tile_row + m)
    end = tl.load(offsets + e + 1)
    n0 = (first_block + n) * BN
    start = first_block * BN
    if HALF_ROWS and end - row <= BM // 2:
        _product_tile(
            a, a_half_desc, order, w, w_desc, small, wide, weights, out, e, row, end, n0,
            start, K, N, OUT_STRIDE, TOP_K, RANK, RP, GATHER, KN, BM // 2, BN, BK,
        )  # fmt: skip
    else:
        _product_tile(
            a, a_desc, order, w, w_desc, small, wide, weights, out, e, row, end, n0,
            start, K, N, OUT_STRIDE, TOP_K, RANK, RP, GATHER, KN, BM, BN, BK,
        )  # fmt: skip
