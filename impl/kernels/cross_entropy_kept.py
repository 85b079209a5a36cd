"""Linear cross-entropy with a trainable classifier, in three products and one pass over the logits.

As in `cross_entropy_lean`, tiles hold exp(z - top) dz/dx and are normalised after the products; for
the weight's gradient the divisor goes into the hidden states, and the label's term, which would be
rounded a second time there, is added apart in fp32. Tiles of a chunk are kept until its sums are
known. Every chunk reads and writes all fp32 sums of the weight's gradient, so chunks are to be few
and large: before those sums exist, a first chunk of `2 D` tokens has its bf16 logits in their
storage, which is exactly as large (`WeightGradient.kept_tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cross_entropy_chunks import (
    SLICE,
    Gradients,
    Operands,
    bounds,
    hidden_gradient,
    logits_buffer,
)
from .cross_entropy_lean import close_chunk, sweep_chunk
from .cross_entropy_products import accumulation_dtype
from .cross_entropy_rows import LabelRows, label_shares
from .cross_entropy_weight import WeightGradient

_MOST_SLICES = 64


@dataclass(frozen=True)
class Kept:
    """A first chunk of `first` tokens in the sums' storage, the others of `later` in a buffer of
    whole rows; products go by slices of at most `width` columns."""

    first: int
    later: int
    width: int


def kept_chunks(op: Operands, budget: int) -> Kept | None:
    """The largest chunks that fit the budget; None where the sums' storage cannot hold tiles."""
    count, (vocabulary, dim) = op.labels.shape[0], op.weight.shape
    item, wide = op.buffer_dtype.itemsize, accumulation_dtype(op.hidden.dtype).itemsize
    first = min(count, dim * wide // item)
    gather = op.hidden.element_size() if op.rows is not None else 0
    room = budget - (1 << 20) - first * dim * (wide + item + gather)
    rest, later = count - first, 0
    if rest:
        later = min(first, room // (vocabulary * item + 64 * item))
        if later < 1:
            return None
        later = -(-rest // -(-rest // later))
    halves = op.weight.dtype.itemsize != wide and vocabulary > 1 and vocabulary * dim % 2 == 0
    rows = -(-vocabulary // 2) if halves else vocabulary
    for parts in range(-(-rows // SLICE), _MOST_SLICES + 1):
        width = rows // parts
        # Equal slices, so that each fits where the next one's sums will be; rows of 16 bytes.
        even = vocabulary % (2 * parts if halves else parts) == 0 and width * item % 16 == 0
        if (parts == 1 or even) and first * (width + 64) * item <= room:
            return Kept(first, later, width)
    return None


def kept_pass(op: Operands, chunks: Kept, factor: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """Per-token losses (n,) and the gradients of hidden states and weight of factor * sum(loss)."""
    count, vocabulary = op.labels.shape[0], op.weight.shape[0]
    job = _Pass(op, chunks, factor)
    last = logits_buffer(op, chunks.first, chunks.width)
    job.chunk(0, chunks.first, job.weight.kept_tiles(chunks.first, chunks.width, last))
    del last
    if chunks.later:
        cuts = [(low, rows.shape[0]) for low, rows in job.weight.slices(chunks.width)]
        buffer = logits_buffer(op, chunks.later, vocabulary)
        for start, end in bounds(count - chunks.first, chunks.later):
            tiles = [(low, buffer[: end - start, low : low + size]) for low, size in cuts]
            job.chunk(chunks.first + start, chunks.first + end, tiles)
    return job.losses, job.gradients()


class _Pass:
    """The buffers of a call that every chunk shares, and its sums."""

    def __init__(self, op: Operands, chunks: Kept, factor: torch.Tensor) -> None:
        count, dim = op.labels.shape[0], op.weight.shape[1]
        device, wide = op.hidden.device, accumulation_dtype(op.hidden.dtype)
        self.op, self.factor = op, factor
        self.weight = WeightGradient(op.weight)
        self.losses = torch.empty(count, device=device, dtype=wide)
        self.shares = torch.empty(count, device=device, dtype=wide)
        self.hidden = hidden_gradient(op)
        self.acc = torch.empty(chunks.first, dim, device=device, dtype=wide)
        self.divided = torch.empty(chunks.first, dim, device=device, dtype=op.buffer_dtype)
        slices = len(self.weight.slices(chunks.width))
        self.tops = torch.empty(slices, chunks.first, device=device, dtype=wide)

    def chunk(self, start: int, end: int, tiles: list[tuple[int, torch.Tensor]]) -> None:
        """One chunk of tokens through all three products."""
        op, tokens = self.op, end - start
        hidden, acc, tops = op.chunk(start, end), self.acc[:tokens], self.tops[:, :tokens]
        state = sweep_chunk(op, hidden, op.labels[start:end], tiles, acc, tops)
        close_chunk(op, start, end, state, acc, self.factor, self.hidden, self.losses)
        self.shares[start:end] = label_shares(state, op.form)
        divided = self.divided[:tokens]
        torch.mul(hidden, torch.reciprocal(state.sum()).unsqueeze(1), out=divided)
        for index, (low, x) in enumerate(tiles):
            op.ops.rescale(x, tops[index], state.top)
            self.weight.add(low, x, divided, start == 0)

    def gradients(self) -> Gradients:
        """Both gradients, the labels' terms and the factor included."""
        op = self.op
        labels, order = torch.sort(op.labels, stable=True)
        rows = order if op.rows is None else op.rows[order]
        terms = LabelRows(labels, self.shares[order], rows, op.hidden)
        for low, sums in self.weight.pieces:
            op.ops.add_label_rows(sums, low, terms)
        weight = self.weight.result(self.factor * op.form.scale)
        return Gradients(hidden=self.hidden, weight=weight)
