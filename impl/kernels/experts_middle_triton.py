"""Between the two products of the backward: through the gate, with the small gradients there."""

# Triton's language has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .experts_sums_triton import store_by_rank
from .launch import begin


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
    direct,
    p_parts,
    w_parts,
    h,
    chunk_expert,
    chunk_row,
    chunk_first,
    offsets,
    slots,
    chunk_rows,
    INNER: tl.constexpr,
    RANK_DOWN: tl.constexpr,
    RP_UP: tl.constexpr,
    RP_DOWN: tl.constexpr,
    ACT: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Between the two backward products: one chunk of rows, COLUMN_BLOCKS blocks of BC columns.

    d (rows, 2 INNER) holds dh in its first half and gets dgate, dup. xa (rows, RP_UP) and
    pb (rows, RP_DOWN) are the scaled X Aᵀ and dO B₂; b (E, 2 INNER, RP_UP). Out, float32, by chunk:
    d_b (2 INNER, RP_UP), d_a (RP_DOWN, INNER); by group of columns: p_parts (rows, RP_UP) of dGU B,
    w_parts (rows) of <h, dh>. h is written if not None.
    """
    begin(PDL)
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
                value = gate * s
                slope = s + value * (1.0 - s)
            else:
                cube = gate * gate * 0.044715
                s = tl.sigmoid(1.5957691216057308 * gate * (1.0 + cube))
                value = gate * s
                slope = s + value * (1.0 - s) * 1.5957691216057308 * (1.0 + 3.0 * cube)
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
            store_by_rank(
                sum_a, d_a, direct, chunk_first, chunk, e, columns, INNER, RANK_DOWN, RP_DOWN
            )
