"""The small kernels around the products: rank-wide products, the gated middle, row sums, combines.

Sums over the rows of an expert go chunk by chunk into float32 partials that one later kernel adds in
order: no atomics, and a crowded expert is spread over many programs.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
):
    """lora_B (ROWS, RANK, EXPERTS) -> (EXPERTS, ROWS, RP) in the target's dtype, padded with zeros."""
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
):
    """out[row] = scale * a[row] @ factor[e], (rows, RP). factor: (E, RANK, K) by rank, else (E, K, RP)."""
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
):
    """out[t] = sum over k, in order and in float32, of rows_in[position[t, k]]; sentinels add nothing."""
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


@triton.jit(do_not_specialize=["slots", "chunk_rows"])
def middle_kernel(
    gate_up,
    d,
    weights,
    xa,
    pb,
    b,
    d_b,
    d_a,
    p_parts,
    w_parts,
    h,
    chunk_expert,
    chunk_row,
    offsets,
    slots,
    chunk_rows,
    INNER: tl.constexpr,
    RP_UP: tl.constexpr,
    RP_DOWN: tl.constexpr,
    ACT: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Between the two backward products: one chunk of rows, COLUMN_BLOCKS blocks of BC inner columns.

    d (rows, 2 INNER) holds dh in its first half and gets dgate, dup. xa (rows, RP_UP) and
    pb (rows, RP_DOWN) are the scaled X Aᵀ and dO B₂; b (E, 2 INNER, RP_UP). Out, float32, by chunk:
    d_b (2 INNER, RP_UP), d_a (RP_DOWN, INNER); by group of columns: p_parts (rows, RP_UP) of dGU B,
    w_parts (rows) of <h, dh>. h is written if not None.
    """
    chunk = tl.program_id(0)
    e = tl.load(chunk_expert + chunk)
    if e < 0:
        return
    group = tl.program_id(1)
    first = tl.load(chunk_row + chunk)
    count = tl.minimum(tl.load(offsets + e + 1) - first, chunk_rows)
    kind = gate_up.dtype.element_ty
    lane = tl.arange(0, BR)
    row0 = first.to(tl.int64)
    part0 = group.to(tl.int64) * slots + row0
    for block in range(COLUMN_BLOCKS):
        columns = (group * COLUMN_BLOCKS + block) * BC + tl.arange(0, BC)
        fits = columns < INNER
        tile = lane[:, None] * (2 * INNER) + columns[None, :]
        if RP_UP:
            up_ranks = tl.arange(0, RP_UP)
            up_tile = lane[:, None] * RP_UP + up_ranks[None, :]
            at_b = b + (e.to(tl.int64) * 2 * INNER + columns)[:, None] * RP_UP + up_ranks[None, :]
            if p_parts is not None:
                b_gate = tl.load(at_b, mask=fits[:, None], other=0.0)
                b_up = tl.load(at_b + INNER * RP_UP, mask=fits[:, None], other=0.0)
            sum_gate = tl.zeros([BC, RP_UP], tl.float32)
            sum_up = tl.zeros([BC, RP_UP], tl.float32)
        if RP_DOWN:
            down_ranks = tl.arange(0, RP_DOWN)
            down_tile = lane[:, None] * RP_DOWN + down_ranks[None, :]
            sum_a = tl.zeros([BC, RP_DOWN], tl.float32)
        # The next rows are loaded before a step computes: nothing else hides their latency.
        keep = (lane < count)[:, None] & fits[None, :]
        gate_at = gate_up + row0 * (2 * INNER)
        d_at = d + row0 * (2 * INNER)
        next_gate = tl.load(gate_at + tile, mask=keep, other=0.0)
        next_up = tl.load(gate_at + INNER + tile, mask=keep, other=0.0)
        next_dh = tl.load(d_at + tile, mask=keep, other=0.0)
        next_w = tl.load(weights + row0 + lane, mask=lane < count, other=0.0)
        for start in range(0, count, BR):
            live = start + lane < count
            keep = live[:, None] & fits[None, :]
            at_row = row0 + start
            gate = next_gate.to(tl.float32)
            up = next_up.to(tl.float32)
            dh = next_dh.to(tl.float32)
            w = next_w
            gate_at += BR * 2 * INNER
            more = start + BR + lane < count
            keep_more = more[:, None] & fits[None, :]
            next_gate = tl.load(gate_at + tile, mask=keep_more, other=0.0)
            next_up = tl.load(gate_at + INNER + tile, mask=keep_more, other=0.0)
            next_dh = tl.load(d_at + BR * 2 * INNER + tile, mask=keep_more, other=0.0)
            next_w = tl.load(weights + at_row + BR + lane, mask=more, other=0.0)
            if RP_UP:
                left = tl.load(xa + at_row * RP_UP + up_tile, mask=live[:, None], other=0.0)
            if RP_DOWN:
                right = tl.load(pb + at_row * RP_DOWN + down_tile, mask=live[:, None], other=0.0)
                right = (right.to(tl.float32) * w[:, None]).to(kind)
            if ACT == "silu":
                s = tl.sigmoid(gate)
                slope = s + gate * s * (1.0 - s)
            else:
                cube = gate * gate * 0.044715
                s = tl.sigmoid(1.5957691216057308 * gate * (1.0 + cube))
                slope = s + gate * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 3.0 * cube)
            value = gate * s
            hidden = value * up
            part = tl.sum(hidden * dh, 1)
            at_w = w_parts + part0 + start + lane
            if COLUMN_BLOCKS > 1:
                part += tl.load(at_w, mask=live & (block > 0), other=0.0)
            tl.store(at_w, part, mask=live)
            dh *= w[:, None]
            d_gate = (dh * up * slope).to(kind)
            d_up = (dh * value).to(kind)
            tl.store(d_at + tile, d_gate, mask=keep)
            tl.store(d_at + INNER + tile, d_up, mask=keep)
            d_at += BR * 2 * INNER
            low = hidden.to(kind)
            if h is not None:
                h_tile = lane[:, None] * INNER + columns[None, :]
                tl.store(h + at_row * INNER + h_tile, low, mask=keep)
            if RP_UP:
                if p_parts is not None:
                    p = tl.dot(d_gate, b_gate, input_precision="ieee")
                    p = tl.dot(d_up, b_up, p, input_precision="ieee")
                    at_p = p_parts + (part0 + start) * RP_UP + up_tile
                    if COLUMN_BLOCKS > 1:
                        p += tl.load(at_p, mask=live[:, None] & (block > 0), other=0.0)
                    tl.store(at_p, p, mask=live[:, None])
                sum_gate = tl.dot(tl.trans(d_gate), left, sum_gate, input_precision="ieee")
                sum_up = tl.dot(tl.trans(d_up), left, sum_up, input_precision="ieee")
            if RP_DOWN:
                sum_a = tl.dot(tl.trans(low), right, sum_a, input_precision="ieee")
        if RP_UP:
            base = chunk.to(tl.int64) * 2 * INNER + columns
            to_b = d_b + base[:, None] * RP_UP + up_ranks[None, :]
            tl.store(to_b, sum_gate, mask=fits[:, None])
            tl.store(to_b + INNER * RP_UP, sum_up, mask=fits[:, None])
        if RP_DOWN:
            to_a = d_a + chunk.to(tl.int64) * RP_DOWN * INNER
            to_a += down_ranks[None, :] * INNER + columns[:, None]
            tl.store(to_a, sum_a, mask=fits[:, None])


@triton.jit(do_not_specialize=["chunk_rows"])
def gather_sum_kernel(
    a,
    small,
    order,
    weights,
    out,
    chunk_expert,
    chunk_row,
    offsets,
    chunk_rows,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    RP: tl.constexpr,
    BY_RANK: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Per chunk, float32: sum over rows of a[token]ᵀ small[row], (WIDTH, RP), or (RP, WIDTH) by rank.

    a (T, WIDTH) is gathered; small (rows, RP) is scaled by the row's routing weight, if given.
    """
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
        slot = tl.load(order + rows, mask=live, other=0)
        token = (slot // TOP_K).to(tl.int64)
        keep = live[:, None] & fits[None, :]
        left = tl.load(a + token[:, None] * WIDTH + columns[None, :], mask=keep, other=0.0)
        at = small + rows.to(tl.int64)[:, None] * RP + ranks[None, :]
        right = tl.load(at, mask=live[:, None], other=0.0)
        if weights is not None:
            w = tl.load(weights + rows, mask=live, other=0.0)
            right = (right.to(tl.float32) * w[:, None]).to(left.dtype)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    base = out + chunk.to(tl.int64) * WIDTH * RP
    if BY_RANK:
        at = base + ranks[None, :] * WIDTH + columns[:, None]
    else:
        at = base + columns[:, None] * RP + ranks[None, :]
    tl.store(at, acc, mask=fits[:, None])


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
):
    """Add the column groups' parts in order: pb (rows, RP) = scale * sum, d_weights by slot."""
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
):
    """lora_A gradient: out (E, RANK, WIDTH) = the sum, in order, of the expert's (RP, WIDTH) chunks."""
    e = tl.program_id(1)
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
):
    """lora_B gradient: out (WIDTH, RANK, E) = the sum, in order, of each expert's (WIDTH, RP) chunks."""
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
):
    """out[e] (M, N) = sum over the expert's rows of left[row]ᵀ right[row]; one operand is gathered.

    GATHER_LEFT gathers left by token and scales it by the routing weight, else right is gathered.
    """
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
