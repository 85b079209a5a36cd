"""Sums over the rows of an expert: float32 partials chunk by chunk, added in order by one kernel.

No atomics, and a crowded expert is spread over many programs. A gradient of lora_A whose expert has
one chunk is written at once, where it belongs.
"""

# Triton's language has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .launch import begin


@triton.jit
def store_by_rank(
    acc,
    parts,
    direct,
    chunk_first,
    chunk,
    e,
    columns,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
):
    """Store acc (columns, RP) transposed.

    To direct (E, RANK, WIDTH) if the expert has this one chunk, else to parts (chunks, RP, WIDTH).
    """
    ranks = tl.arange(0, RP)
    at = ranks[None, :] * WIDTH + columns[:, None]
    fits = columns[:, None] < WIDTH
    if tl.load(chunk_first + e + 1) - tl.load(chunk_first + e) == 1:
        to = direct + e.to(tl.int64) * RANK * WIDTH + at
        tl.store(to, acc.to(direct.dtype.element_ty), mask=fits & (ranks[None, :] < RANK))
    else:
        tl.store(parts + chunk.to(tl.int64) * RP * WIDTH + at, acc, mask=fits)


@triton.jit(do_not_specialize=["chunk_rows"])
def input_sum_kernel(
    a,
    small,
    order,
    parts,
    direct,
    chunk_expert,
    chunk_row,
    chunk_first,
    offsets,
    chunk_rows,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gradient of lora_A of gate_up: the sum over rows of small[row]ᵀ a[token], (RP, WIDTH)."""
    begin(PDL)
    chunk = tl.program_id(0)
    e = tl.load(chunk_expert + chunk)
    if e < 0:
        return
    first = tl.load(chunk_row + chunk)
    end = tl.minimum(tl.load(offsets + e + 1), first + chunk_rows)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    fits = columns < WIDTH
    ranks = tl.arange(0, RP)
    acc = tl.zeros([BC, RP], tl.float32)
    for start in range(first, end, BR):
        rows = start + tl.arange(0, BR)
        live = rows < end
        token = (tl.load(order + rows, mask=live, other=0) // TOP_K).to(tl.int64)
        keep = live[:, None] & fits[None, :]
        left = tl.load(a + token[:, None] * WIDTH + columns[None, :], mask=keep, other=0.0)
        at = small + rows.to(tl.int64)[:, None] * RP + ranks[None, :]
        right = tl.load(at, mask=live[:, None], other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    store_by_rank(acc, parts, direct, chunk_first, chunk, e, columns, WIDTH, RANK, RP)


@triton.jit(do_not_specialize=["slots", "chunk_rows"])
def output_sum_kernel(
    grad,
    small,
    order,
    weights,
    b,
    p_parts,
    parts,
    chunk_expert,
    chunk_row,
    offsets,
    slots,
    chunk_rows,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    RP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """One pass over the gathered dO for two products with it, BC columns of one chunk of rows.

    p_parts (groups, slots, RP): the columns' part of dO B₂; parts (chunks, WIDTH, RP): the chunk's
    part of the gradient of B₂, the sum over rows of w dO[token]ᵀ small[row].
    """
    begin(PDL)
    chunk = tl.program_id(0)
    e = tl.load(chunk_expert + chunk)
    if e < 0:
        return
    group = tl.program_id(1)
    first = tl.load(chunk_row + chunk)
    end = tl.minimum(tl.load(offsets + e + 1), first + chunk_rows)
    columns = group * BC + tl.arange(0, BC)
    fits = columns < WIDTH
    ranks = tl.arange(0, RP)
    at_b = b + (e.to(tl.int64) * WIDTH + columns)[:, None] * RP + ranks[None, :]
    factor = tl.load(at_b, mask=fits[:, None], other=0.0)
    acc = tl.zeros([BC, RP], tl.float32)
    for start in range(first, end, BR):
        rows = start + tl.arange(0, BR)
        live = rows < end
        token = (tl.load(order + rows, mask=live, other=0) // TOP_K).to(tl.int64)
        keep = live[:, None] & fits[None, :]
        left = tl.load(grad + token[:, None] * WIDTH + columns[None, :], mask=keep, other=0.0)
        at = rows.to(tl.int64)[:, None] * RP + ranks[None, :]
        p = tl.dot(left, factor, input_precision="ieee")
        tl.store(p_parts + group.to(tl.int64) * slots * RP + at, p, mask=live[:, None])
        w = tl.load(weights + rows, mask=live, other=0.0)
        right = tl.load(small + at, mask=live[:, None], other=0.0)
        right = (right.to(tl.float32) * w[:, None]).to(left.dtype)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    to = parts + (chunk.to(tl.int64) * WIDTH + columns)[:, None] * RP + ranks[None, :]
    tl.store(to, acc, mask=fits[:, None])


@triton.jit(do_not_specialize=["slots"])
def finish_rows_kernel(
    p_parts,
    w_parts,
    order,
    pb,
    d_weights,
    offsets,
    scale,
    slots,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the column groups' parts in order: pb (rows, RP) = scale * sum, d_weights by slot."""
    begin(PDL)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < tl.load(offsets + EXPERTS)
    wide_rows = rows.to(tl.int64)
    part = wide_rows * 0 + slots
    if p_parts is not None:
        ranks = tl.arange(0, RP)
        total = tl.zeros([BLOCK, RP], tl.float32)
        at = p_parts + wide_rows[:, None] * RP + ranks[None, :]
        for group in range(GROUPS):
            offset = part * (group * RP)
            total += tl.load(at + offset[:, None], mask=live[:, None], other=0.0)
        to = pb + wide_rows[:, None] * RP + ranks[None, :]
        tl.store(to, (total * scale).to(pb.dtype.element_ty), mask=live[:, None])
    if d_weights is not None:
        weight = tl.zeros([BLOCK], tl.float32)
        for group in range(GROUPS):
            weight += tl.load(w_parts + part * group + wide_rows, mask=live, other=0.0)
        slot = tl.load(order + rows, mask=live, other=0)
        tl.store(d_weights + slot, weight.to(d_weights.dtype.element_ty), mask=live)


@triton.jit
def sum_chunks_kernel(
    parts,
    out,
    chunk_first,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """lora_A gradient: out (E, RANK, WIDTH) = the ordered sum of the expert's chunks (RP, WIDTH).

    An expert with one chunk was written directly.
    """
    begin(PDL)
    e = tl.program_id(1)
    if tl.load(chunk_first + e + 1) - tl.load(chunk_first + e) == 1:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < RANK * WIDTH
    acc = tl.zeros([BLOCK], tl.float32)
    first = tl.load(chunk_first + e)
    pointers = parts + first.to(tl.int64) * RP * WIDTH + at
    for _ in range(first, tl.load(chunk_first + e + 1)):
        acc += tl.load(pointers, mask=inside, other=0.0)
        pointers += RP * WIDTH
    to = out + e.to(tl.int64) * RANK * WIDTH + at
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_chunks_swap_kernel(
    parts,
    out,
    chunk_first,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    WIDTH: tl.constexpr,
    BX: tl.constexpr,
    BE: tl.constexpr,
    PDL: tl.constexpr,
):
    """lora_B gradient: out (WIDTH, RANK, E) = the ordered sum of an expert's chunks (WIDTH, RP)."""
    begin(PDL)
    flat = tl.program_id(0) * BX + tl.arange(0, BX)
    row, rank = flat // RP, flat % RP
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    real = expert < EXPERTS
    first = tl.load(chunk_first + expert, mask=real, other=0)
    count = tl.load(chunk_first + expert + 1, mask=real, other=0) - first
    inside = (row < WIDTH) & (rank < RANK)
    acc = tl.zeros([BX, BE], tl.float32)
    for c in range(tl.max(count, 0)):
        at = (first + c).to(tl.int64)[None, :] * WIDTH * RP + flat[:, None]
        acc += tl.load(parts + at, mask=inside[:, None] & (c < count)[None, :], other=0.0)
    to = out + (row.to(tl.int64) * RANK + rank)[:, None] * EXPERTS + expert[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def weight_gradient_kernel(
    left,
    right,
    order,
    weights,
    out,
    offsets,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[e] (M, N) = sum over the expert's rows of left[row]ᵀ right[row]; one operand is gathered.

    GATHER_LEFT gathers left by token and scales it by the routing weight, else right is gathered.
    """
    begin(PDL)
    e = tl.program_id(2)
    ms = tl.program_id(1) * BM + tl.arange(0, BM)
    ns = tl.program_id(0) * BN + tl.arange(0, BN)
    first, end = tl.load(offsets + e), tl.load(offsets + e + 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(first, end, BR):
        rows = start + tl.arange(0, BR)
        live = rows < end
        slot = tl.load(order + rows, mask=live, other=0)
        token = (slot // TOP_K).to(tl.int64)
        m_row, n_row = rows.to(tl.int64), token
        if GATHER_LEFT:
            m_row, n_row = token, rows.to(tl.int64)
        keep = live[:, None]
        a = tl.load(
            left + m_row[:, None] * M + ms[None, :],
            mask=keep & (ms[None, :] < M),
            other=0.0,
        )
        b = tl.load(
            right + n_row[:, None] * N + ns[None, :],
            mask=keep & (ns[None, :] < N),
            other=0.0,
        )
        if GATHER_LEFT:
            w = tl.load(weights + rows, mask=live, other=0.0)
            a = (a.to(tl.float32) * w[:, None]).to(b.dtype)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    at = out + e.to(tl.int64) * M * N + ms.to(tl.int64)[:, None] * N + ns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(ms[:, None] < M) & (ns[None, :] < N))
