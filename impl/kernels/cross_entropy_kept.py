"""Linear cross-entropy with a trainable classifier, in three products and one pass over the logits.

As in `cross_entropy_lean`, tiles hold exp(z - top) dz/dx and are normalised after the products; for
the weight's gradient the divisor goes into the hidden states, and the label's term, which would be
rounded a second time there, is added apart in fp32. Tiles of a chunk are kept until its sums are
known. Every chunk reads and writes all fp32 sums of the weight's gradient, so chunks are to be few
and large: before those sums exist, the logits of a first chunk lie in their storage, which holds
those of `2 D` tokens in bf16 and of more with what the budget adds (`Room`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cross_entropy_chunks import SLICE, Gradients, Operands, bounds, hidden_gradient
from .cross_entropy_lean import close_chunk, sweep_chunk
from .cross_entropy_products import accumulation_dtype
from .cross_entropy_rows import LabelRows, label_shares
from .cross_entropy_weight import Room, WeightGradient, padded

_MOST_SLICES, _MOST_CHUNKS = 64, 32


@dataclass(frozen=True)
class Kept:
    """A first chunk of `room.tokens` tokens in the sums' storage, further ones of `later`."""

    room: Room
    later: int


def kept_chunks(op: Operands, budget: int) -> Kept | None:
    """The fewest chunks that fit the budget; None where the sums' storage cannot hold tiles."""
    count, (vocabulary, dim) = op.labels.shape[0], op.weight.shape
    item, wide = op.buffer_dtype.itemsize, accumulation_dtype(op.hidden.dtype).itemsize
    gather = op.hidden.element_size() if op.rows is not None else 0
    token = dim * (wide + gather) + _MOST_SLICES * wide
    line = padded(vocabulary) * item
    budget -= 1 << 20
    halves = 1 if op.weight.dtype.itemsize == wide else 2
    least = -(-vocabulary // SLICE)
    for more in range(_MOST_CHUNKS + 1):
        later = 0
        if more and line > more * token:
            later = (budget - count * token) // (line - more * token)
            later = min(count // (more + 1), later)
            later = later // 64 * 64 if later > 128 else later
        if more and later < 1:
            return None
        first = count - more * later
        for slices in range(-(-least // halves) * halves, _MOST_SLICES + 1, halves):
            room = Room.plan(op.weight, first, slices, op.buffer_dtype)
            if room is not None and room.spare <= budget - first * token:
                return Kept(room, later)
    return None


def kept_pass(op: Operands, chunks: Kept, factor: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """Per-token losses (n,) and the gradients of hidden states and weight of factor * sum(loss)."""
    count, vocabulary = op.labels.shape[0], op.weight.shape[0]
    job, first = _Pass(op, chunks, factor), chunks.room.tokens
    job.chunk(0, first, job.weight.first_tiles(chunks.room))
    if chunks.later:
        buffer = job.weight.tail(chunks.later, op.buffer_dtype)
        for start, end in bounds(count - first, chunks.later):
            tiles = [
                (low, buffer[: end - start, low:high])
                for low, high in bounds(vocabulary, chunks.room.width)
            ]
            job.chunk(first + start, first + end, tiles)
    return job.losses, job.gradients()


class _Pass:
    """The buffers of a call that every chunk shares, and its sums."""

    def __init__(self, op: Operands, chunks: Kept, factor: torch.Tensor) -> None:
        count, (vocabulary, dim) = op.labels.shape[0], op.weight.shape
        device, wide = op.hidden.device, accumulation_dtype(op.hidden.dtype)
        tokens = max(chunks.room.tokens, chunks.later)
        self.op, self.factor = op, factor
        spare = max(chunks.room.spare, chunks.later * padded(vocabulary) * op.buffer_dtype.itemsize)
        self.weight = WeightGradient(op.weight, spare)
        self.losses = torch.empty(count, device=device, dtype=wide)
        self.shares = torch.empty(count, device=device, dtype=wide)
        self.hidden = hidden_gradient(op)
        self.acc = torch.empty(tokens, dim, device=device, dtype=wide)
        slices = -(-vocabulary // chunks.room.width)
        self.tops = torch.empty(slices, tokens, device=device, dtype=wide)

    def chunk(self, start: int, end: int, tiles: list[tuple[int, torch.Tensor]]) -> None:
        """One chunk of tokens through all three products."""
        op, tokens = self.op, end - start
        hidden, acc, tops = op.chunk(start, end), self.acc[:tokens], self.tops[:, :tokens]
        state = sweep_chunk(op, hidden, op.labels[start:end], tiles, acc, tops)
        close_chunk(op, start, end, state, acc, self.factor, self.hidden, self.losses)
        self.shares[start:end] = label_shares(state, op.form)
        # The accumulator is spent: its storage holds the divided hidden states.
        divided = acc.view(-1).view(op.buffer_dtype)[: acc.numel()].view(acc.shape)
        torch.mul(hidden, torch.reciprocal(state.sum()).unsqueeze(1), out=divided)
        for index, (low, x) in enumerate(tiles):
            op.ops.rescale(x, tops[index], state.top)
            self.weight.add(low, x, divided, start == 0)

    def gradients(self) -> Gradients:
        """Both gradients, the labels' terms and the factor included."""
        op = self.op
        del self.acc, self.tops  # room for what narrowing takes
        labels, order = torch.sort(op.labels, stable=True)
        rows = order if op.rows is None else op.rows[order]
        terms = LabelRows(labels, self.shares[order], rows, op.hidden)
        for low, sums in self.weight.pieces:
            op.ops.add_label_rows(sums, low, terms)
        weight = self.weight.result(self.factor * op.form.scale, op.ops)
        return Gradients(hidden=self.hidden, weight=weight)
