"""Row operations of the linear cross-entropy in Triton: one program a row, two launches a tile.

`_sweep` reads a tile once, keeps the running maximum and sum, and can leave the not yet normalised
gradient in place; `_gradient` writes the exact gradient where the log-sum-exp is known; `_finish`
normalises rows of the hidden states' gradient, `_label_rows` adds the labels' rows of the weight's.
Everything is computed in fp32 from loads converted at once, because the interpreter's bf16
arithmetic is wrong. No atomics: a second run is equal bit by bit.
"""

# mypy: ignore-errors
from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from .cross_entropy_rows import JUMP, Form, LabelRows, State, Target, Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LOG2E = tl.constexpr(1.4426950408889634)
_JUMP = tl.constexpr(JUMP)

_ASM = tl.constexpr(not INTERPRETED)

# How a softcap's tanh is taken: not at all; by one exp2 and one reciprocal (absolute error 1e-7,
# for 16-bit logits); with a series near 0 and a true division (for fp32 logits); by the hardware
# instruction (absolute error 5e-4, for measurements only).
NO_TANH, FAST_TANH, FULL_TANH, HARDWARE_TANH = 0, 1, 2, 3


@triton.jit
def _exp2(x):
    """2^x of a block in one instruction: tl.exp2 adds three for denormals."""
    if _ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def _tanh(x, inner, TANH: tl.constexpr):
    """tanh(inner x), by the given way; NaN stays NaN and nothing overflows."""
    if TANH == 3:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * inner], dtype=tl.float32, is_pure=True, pack=1
        )
    if TANH == 1:  # noqa: SIM102
        if _ASM:
            e = _exp2(x * (inner * (2.0 * _LOG2E)))
            return 1.0 - 2.0 * tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True,
                pack=1,
            )  # fmt: skip
    x = x * inner
    a = tl.abs(x)
    e = tl.exp2(a * (-2.0 * _LOG2E))
    t = (1.0 - e) / (1.0 + e)
    q = a * a
    series = 1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835))))
    t = tl.where(a < 0.25, a * series, t)
    return tl.where(x < 0, -t, t)


@triton.jit
def _raw(x_row, cols, mask, EVEN: tl.constexpr):
    """A block of a row as stored."""
    if EVEN:
        return tl.load(x_row + cols)
    return tl.load(x_row + cols, mask=mask, other=0.0)


@triton.jit
def _reduced(x, bias_ptr, cols, mask, inner, HAS_BIAS: tl.constexpr, TANH: tl.constexpr):
    """Reduced logits q: the raw ones with bias, or tanh(inner x); the logit is outer * q."""
    x = x.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if TANH != 0:
        x = _tanh(x, inner, TANH)
    return x


@triton.jit
def _exponential(q, outer, reference, PRECISE: tl.constexpr):
    """exp(outer q - reference); one fused multiply-add where the logits are 16 bits wide."""
    if PRECISE:
        return _exp2((q * outer - reference) * _LOG2E)
    return _exp2(q * (outer * _LOG2E) - reference * _LOG2E)


@triton.jit
def _store(x_ptr, x_row, cols, mask, value, EVEN: tl.constexpr):
    """Write a block of a row in the buffer's dtype."""
    if EVEN:
        tl.store(x_row + cols, value.to(x_ptr.dtype.element_ty))
    else:
        tl.store(x_row + cols, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shrink(p, count, factor, BLOCK: tl.constexpr):
    """p[:count] *= factor, for the rare row whose reference maximum moves."""
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(p + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(p + at, (x * factor).to(p.dtype.element_ty), mask=at < count)


@triton.jit
def _sweep(
    x_ptr, x_stride, bias_ptr, label_ptr, top_ptr, rest_ptr, target_ptr, total_ptr, acc_ptr,
    acc_stride, offset, width, dim, inner, outer,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, PRECISE: tl.constexpr, WRITE: tl.constexpr,
    TOTAL: tl.constexpr, HAS_ACC: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of one tile, each element read once: see `RowOperations.sweep`.

    Last rows first: the product wrote them last, and they may still be in the second-level cache.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    x_row = x_ptr + row * x_stride
    column = tl.load(label_ptr + row) - offset
    inside = (column >= 0) & (column < width)
    # Read before any store of this program: the reductions below put a barrier between.
    target = tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        target += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if TANH != 0:
        target = _tanh(target, inner, 2)
    target = target * outer
    before = tl.load(top_ptr + row)
    top = before
    hit = column.to(tl.int32)
    sums = tl.zeros((BLOCK,), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    lanes = tl.arange(0, BLOCK)
    ahead = _raw(x_row, lanes, lanes < width, EVEN)
    for start in range(0, width, BLOCK):
        cols = start + lanes
        mask = cols < width
        x = ahead
        # The next block is on its way while this one is worked on; one past the end is masked.
        left = width - BLOCK - start
        ahead = tl.load(x_row + cols + BLOCK, mask=lanes < left, other=0.0)
        q = _reduced(x, bias_ptr, cols, mask, inner, HAS_BIAS, TANH)
        block_top = tl.max(q if EVEN else tl.where(mask, q, -float("inf")), 0) * outer
        if block_top > top + _JUMP:
            factor = tl.exp2((top - block_top) * _LOG2E)
            sums = sums * factor
            if WRITE:
                _shrink(x_row, start, factor, BLOCK)
            top = block_top
        e = tl.where(cols == hit, 0.0, _exponential(q, outer, top, PRECISE))
        if not EVEN:
            e = tl.where(mask, e, 0.0)
        sums += e
        if TOTAL:
            totals += q if EVEN else tl.where(mask, q, 0.0)
        if WRITE:
            if TANH != 0:
                e = e * (1.0 - q * q)
            _store(x_ptr, x_row, cols, mask, e, EVEN)
    shrink = tl.exp2((before - top) * _LOG2E)
    tl.store(rest_ptr + row, tl.load(rest_ptr + row) * shrink + tl.sum(sums, 0))
    tl.store(top_ptr + row, top)
    if TOTAL:
        total = tl.sum(totals, 0) * outer
        tl.store(total_ptr + row, tl.load(total_ptr + row) + total)
    if inside:
        tl.store(target_ptr + row, target)
    if HAS_ACC:  # noqa: SIM102
        if top > before:
            _shrink(acc_ptr + row * acc_stride, dim, shrink, BLOCK)


@triton.jit
def _gradient(
    x_ptr, x_stride, bias_ptr, label_ptr, lse_ptr, row_weight_ptr, offset, width, inner, outer,
    scale, smoothing, spread, z_loss,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, PRECISE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    PLAIN: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row: the derivative of the loss in place of the raw logits."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    x_row = x_ptr + row * x_stride
    hit = (tl.load(label_ptr + row) - offset).to(tl.int32)
    lse = tl.load(lse_ptr + row)
    x = _raw(x_row, cols, mask, EVEN)
    q = _reduced(x, bias_ptr, cols, mask, inner, HAS_BIAS, TANH)
    d = _exponential(q, outer, lse, PRECISE)
    if PLAIN:
        d = tl.where(cols == hit, d - 1.0, d)
    else:
        d = d * (1.0 + 2.0 * z_loss * lse) - spread
        d = tl.where(cols == hit, d - (1.0 - smoothing), d)
    if TANH != 0:
        d = d * (1.0 - q * q)
    if HAS_WEIGHT:
        scale = scale * tl.load(row_weight_ptr + row)
    _store(x_ptr, x_row, cols, mask, d * scale, EVEN)


@triton.jit
def _finish(
    acc_ptr, acc_stride, top_ptr, rest_ptr, target_ptr, label_ptr, weight_ptr, weight_stride,
    factor_ptr, out_ptr, out_stride, rows_ptr, vocabulary, dim, scale, outer,
    HAS_ROWS: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: out = factor scale (acc / sum - (1 - p) dz/dx C[label])."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    rest = tl.load(rest_ptr + row)
    label = tl.load(label_ptr + row).to(tl.int64)
    # A label outside the vocabulary gives an infinite loss; it must not read outside the weight.
    label = tl.where((label >= 0) & (label < vocabulary), label, 0)
    total = rest + tl.exp2((target - tl.load(top_ptr + row)) * _LOG2E)
    factor = tl.load(factor_ptr) * scale
    keep = factor / total
    away = -(rest / total) * factor
    if TANH != 0:
        t = target / outer
        away = away * (1.0 - t * t)
    out_row = row
    if HAS_ROWS:
        out_row = tl.load(rows_ptr + row).to(tl.int64)
    for start in range(0, dim, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < dim
        acc = tl.load(acc_ptr + row * acc_stride + cols, mask=mask, other=0.0)
        c = tl.load(weight_ptr + label * weight_stride + cols, mask=mask, other=0.0)
        grad = acc * keep + away * c.to(tl.float32)
        tl.store(
            out_ptr + out_row * out_stride + cols, grad.to(out_ptr.dtype.element_ty), mask=mask
        )


@triton.jit
def _rescale(x_ptr, x_stride, before_ptr, top_ptr, width, BLOCK: tl.constexpr):
    """One row: times exp(before - top), and nothing at all where they are equal (nearly always)."""
    row = tl.program_id(0).to(tl.int64)
    before, top = tl.load(before_ptr + row), tl.load(top_ptr + row)
    if before != top:
        _shrink(x_ptr + row * x_stride, width, tl.exp2((before - top) * _LOG2E), BLOCK)


@triton.jit
def _label_rows(
    sum_ptr, label_ptr, share_ptr, row_ptr, hidden_ptr, hidden_stride, count, dim, low, high,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum[label - low] += the terms of one label, in order; the label's first program adds all."""
    first = tl.program_id(0)
    label = tl.load(label_ptr + first)
    if (label < low) | (label >= high):
        return
    if tl.load(label_ptr + first - 1, mask=first > 0, other=-1) == label:
        return
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    fits = cols < dim
    total = tl.zeros((BLOCK,), tl.float32)
    found = ROWS
    while found == ROWS:
        at = first + tl.arange(0, ROWS)
        same = at < count
        same = same & (tl.load(label_ptr + at, mask=same, other=-1) == label)
        rows = tl.load(row_ptr + at, mask=same, other=0)
        share = tl.load(share_ptr + at, mask=same, other=0.0)
        h = tl.load(
            hidden_ptr + rows[:, None] * hidden_stride + cols[None, :],
            mask=same[:, None] & fits[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(h.to(tl.float32) * share[:, None], 0)
        first += ROWS
        found = tl.sum(same.to(tl.int32), 0)
    at = sum_ptr + (label - low) * dim + cols
    tl.store(at, tl.load(at, mask=fits, other=0.0) + total, mask=fits)


@triton.jit
def _scale(source_ptr, factor_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out = factor * source (torch's own kernel for mixed dtypes takes twice the time)."""
    factor = tl.load(factor_ptr)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _scale_in_place(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """x *= factor, and nothing at all when the factor is 1 (the usual upstream gradient)."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < count)


def _factors(form: Form) -> tuple[float, float]:
    """(inner, outer) of the logit: outer * tanh(inner x) with a softcap, outer * x without."""
    if form.softcap is None:
        return 1.0, form.scale
    return form.scale / form.softcap, form.softcap


class TritonRows:
    """`RowOperations` in Triton. `block`: the columns a program holds at once, on `warps` warps."""

    def __init__(self, block: int = 1024, warps: int = 4) -> None:
        self.block, self.warps = block, warps

    def _common(self, tile: Tile, wide: torch.Tensor) -> dict[str, Any]:
        """What `_sweep` and `_gradient` share: the tile, its block and the logit's formula."""
        x, form = tile.x, tile.form
        block = min(self.block, triton.next_power_of_2(x.shape[1]))
        inner, outer = _factors(form)
        return {
            "x_ptr": x, "x_stride": x.stride(0), "label_ptr": tile.labels, "offset": tile.offset,
            "bias_ptr": wide if tile.bias is None else tile.bias, "width": x.shape[1],
            "inner": inner, "outer": outer, "HAS_BIAS": tile.bias is not None,
            "TANH": tanh_of(form, x.dtype), "PRECISE": x.dtype == torch.float32,
            "EVEN": x.shape[1] % block == 0, "BLOCK": block, "num_warps": self.warps,
        }  # fmt: skip

    def sweep(
        self, tile: Tile, state: State, *, write: bool, accumulator: torch.Tensor | None = None
    ) -> None:
        """See `RowOperations.sweep`."""
        acc = tile.x if accumulator is None else accumulator
        _sweep[(tile.x.shape[0],)](
            top_ptr=state.top, rest_ptr=state.rest, target_ptr=state.target,
            total_ptr=state.total, acc_ptr=acc, acc_stride=acc.stride(0), dim=acc.shape[1],
            WRITE=write, TOTAL=tile.form.smoothing != 0.0, HAS_ACC=accumulator is not None,
            **self._common(tile, state.top),
        )  # fmt: skip

    def rescale(self, x: torch.Tensor, before: torch.Tensor, top: torch.Tensor) -> None:
        """See `RowOperations.rescale`."""
        _rescale[(x.shape[0],)](
            x, x.stride(0), before, top, x.shape[1], BLOCK=self.block, num_warps=self.warps
        )

    def gradient(self, tile: Tile, lse: torch.Tensor, row_weight: torch.Tensor | None) -> None:
        """See `RowOperations.gradient`."""
        form, common = tile.form, self._common(tile, lse)
        _gradient[(tile.x.shape[0], triton.cdiv(tile.x.shape[1], common["BLOCK"]))](
            lse_ptr=lse, row_weight_ptr=lse if row_weight is None else row_weight,
            scale=form.scale, smoothing=form.smoothing, spread=form.smoothing / form.vocabulary,
            z_loss=form.z_loss, HAS_WEIGHT=row_weight is not None, PLAIN=form.plain, **common,
        )  # fmt: skip

    def finish(self, accumulator: torch.Tensor, state: State, target: Target) -> None:
        """See `RowOperations.finish`."""
        weight, out, form = target.weight, target.out, target.form
        _finish[(accumulator.shape[0],)](
            accumulator, accumulator.stride(0), state.top, state.rest, state.target, target.labels,
            weight, weight.stride(0), target.factor, out, out.stride(0),
            target.labels if target.rows is None else target.rows, weight.shape[0],
            accumulator.shape[1], form.scale, _factors(form)[1], HAS_ROWS=target.rows is not None,
            TANH=tanh_of(form, torch.float32), BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def add_label_rows(self, sums: torch.Tensor, low: int, terms: LabelRows) -> None:
        """See `RowOperations.add_label_rows`."""
        dim, count = sums.shape[1], terms.label.shape[0]
        block = min(512, triton.next_power_of_2(dim))
        _label_rows[(count, triton.cdiv(dim, block))](
            sums, terms.label, terms.share, terms.row, terms.hidden, terms.hidden.stride(0), count,
            dim, low, low + sums.shape[0], ROWS=8, BLOCK=block, num_warps=4,
        )  # fmt: skip

    def scale(self, source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
        """See `RowOperations.scale`."""
        count = source.numel()
        _scale[(triton.cdiv(count, 4096),)](source, factor, out, count, BLOCK=4096, num_warps=4)


def tanh_of(form: Form, dtype: torch.dtype) -> int:
    """Which tanh the logits of `dtype` need."""
    if form.softcap is None:
        return NO_TANH
    return FULL_TANH if dtype == torch.float32 else FAST_TANH


def scale_in_place(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply contiguous x by a one-element fp32 tensor; free when the factor is 1; no sync."""
    _scale_in_place[(triton.cdiv(x.numel(), 4096),)](x, factor, x.numel(), BLOCK=4096, num_warps=4)


def compile_specs() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, signature, constexprs, options) of what runs on a GPU, for a compile-only check."""
    rows = {"top_ptr": "*fp32", "rest_ptr": "*fp32", "target_ptr": "*fp32"}
    sweep = {
        "x_ptr": "*bf16", "x_stride": "i32", "bias_ptr": "*bf16", "label_ptr": "*i64", **rows,
        "total_ptr": "*fp32", "acc_ptr": "*fp32", "acc_stride": "i32", "offset": "i32",
        "width": "i32", "dim": "i32", "inner": "fp32", "outer": "fp32",
    }  # fmt: skip
    gradient = {
        "x_ptr": "*bf16", "x_stride": "i32", "bias_ptr": "*bf16", "label_ptr": "*i64",
        "lse_ptr": "*fp32", "row_weight_ptr": "*fp32", "offset": "i32", "width": "i32",
        "inner": "fp32", "outer": "fp32", "scale": "fp32", "smoothing": "fp32", "spread": "fp32",
        "z_loss": "fp32",
    }  # fmt: skip
    finish = {
        "acc_ptr": "*fp32", "acc_stride": "i32", **rows, "label_ptr": "*i64", "weight_ptr": "*bf16",
        "weight_stride": "i32", "factor_ptr": "*fp32", "out_ptr": "*bf16", "out_stride": "i32",
        "rows_ptr": "*i64", "vocabulary": "i32", "dim": "i32", "scale": "fp32", "outer": "fp32",
    }  # fmt: skip
    specs: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    for tanh in (NO_TANH, FAST_TANH):
        common = {"HAS_BIAS": False, "TANH": tanh, "PRECISE": False}
        for even in (True, False):
            meta = {**common, "WRITE": True, "TOTAL": False, "HAS_ACC": True, "EVEN": even,
                    "BLOCK": 1024}  # fmt: skip
            specs.append((_sweep, sweep, meta, {"num_warps": 4}))
        meta = {**common, "HAS_WEIGHT": False, "PLAIN": True, "EVEN": True, "BLOCK": 1024}
        specs.append((_gradient, gradient, meta, {"num_warps": 4}))
        meta = {"HAS_ROWS": True, "TANH": FULL_TANH if tanh else NO_TANH, "BLOCK": 1024}
        specs.append((_finish, finish, meta, {"num_warps": 4}))
    rescale = {"x_ptr": "*bf16", "x_stride": "i32", "before_ptr": "*fp32", "top_ptr": "*fp32",
               "width": "i32"}  # fmt: skip
    specs.append((_rescale, rescale, {"BLOCK": 1024}, {"num_warps": 4}))
    terms = {
        "sum_ptr": "*fp32", "label_ptr": "*i64", "share_ptr": "*fp32", "row_ptr": "*i64",
        "hidden_ptr": "*bf16", "hidden_stride": "i32", "count": "i32", "dim": "i32", "low": "i32",
        "high": "i32",
    }  # fmt: skip
    specs.append((_label_rows, terms, {"ROWS": 8, "BLOCK": 512}, {"num_warps": 4}))
    narrow = {"source_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": "*bf16", "count": "i64"}
    specs.append((_scale, narrow, {"BLOCK": 4096}, {"num_warps": 4}))
    scale = {"x_ptr": "*bf16", "factor_ptr": "*fp32", "count": "i64"}
    specs.append((_scale_in_place, scale, {"BLOCK": 4096}, {"num_warps": 4}))
    return specs
