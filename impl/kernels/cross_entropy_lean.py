"""Linear cross-entropy without the logits, in two products: normalise after the second one.

A tile of logits becomes exp(z - top) dz/dx in place and is multiplied by its slice of the
classifier at once; the running `top` is only a reference, so the tile needs no log-sum-exp. bf16
keeps the exponent range of fp32, hence nothing is lost. When all slices are through, the rows of
the accumulated product are divided by the sum, and the label's term, -(1 - p) dz/dx C[label], is
added from a sum that never held the label: no cancellation for confident tokens. No tile is kept,
none computed twice: the buffer may be as small as the budget says, and a tile of a few MiB is
read back from the second-level cache.

A trainable classifier keeps the tiles of a chunk for one product more: `cross_entropy_kept`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .cross_entropy_chunks import (
    Needs,
    Operands,
    Tiles,
    bounds,
    hidden_gradient,
    logits_buffer,
)
from .cross_entropy_products import accumulation_dtype, product_into
from .cross_entropy_rows import State, Target, token_losses

_CHUNK, _NARROW, _WIDE, _WIDEST = 2816, 8192, 31040, 65536


def can_defer(op: Operands, needs: Needs) -> bool:
    """Whether late normalisation is exact here.

    Not for gradients of a bias or an adapter (normalised tiles are needed), not with terms beside
    the softmax, not in float16 (exp(40) overflows it).
    """
    return (
        needs.hidden
        and not needs.bias
        and op.features is None
        and op.form.plain
        and op.hidden.dtype != torch.float16
    )


def sliced_tiles(op: Operands, budget: int) -> Tiles:
    """Token chunk and vocabulary slice within the budget.

    The vendor's products like both large. All tokens are one chunk where that leaves room for
    slices of `_WIDE` columns; else chunks are equal and at most `_CHUNK` tokens, as large as leaves
    room for `_NARROW` columns. What is left of the budget makes fewer, equal slices.
    """
    count, (vocabulary, dim) = op.labels.shape[0], op.weight.shape
    item = op.buffer_dtype.itemsize
    gather = op.hidden.element_size() if op.rows is not None else 0
    fixed = dim * (accumulation_dtype(op.hidden.dtype).itemsize + gather)
    budget -= 1 << 20
    least = min(_NARROW, vocabulary)
    tokens = max(1, min(count, _CHUNK, budget // (fixed + least * item)))
    if budget // (fixed + min(_WIDE, vocabulary) * item) >= count:
        tokens = count
    tokens = -(-count // -(-count // tokens))
    most = (budget - tokens * fixed) // (tokens * item)
    most = min(vocabulary, max(256, min(most // 256 * 256, _WIDEST)))
    equal = -(-vocabulary // -(-vocabulary // most))
    width = min(most, -(-equal // 256) * 256)
    return Tiles(tokens, width, width)


def deferred_pass(
    op: Operands, tiles: Tiles, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token losses (n,) and the hidden states' gradient (N, D) of `factor * sum(loss)`."""
    count, (vocabulary, dim) = op.labels.shape[0], op.weight.shape
    device, wide = op.hidden.device, accumulation_dtype(op.hidden.dtype)
    tokens = min(tiles.tokens, count)
    losses = torch.empty(count, device=device, dtype=wide)
    out = hidden_gradient(op)
    acc = torch.empty(tokens, dim, device=device, dtype=wide)
    buffer = logits_buffer(op, tokens, tiles.width)
    for start, end in bounds(count, tiles.tokens):
        slices = (
            (low, buffer[: end - start, : high - low])
            for low, high in bounds(vocabulary, tiles.width)
        )
        hidden = op.chunk(start, end)
        state = sweep_chunk(op, hidden, op.labels[start:end], slices, acc[: end - start])
        close_chunk(op, start, end, state, acc[: end - start], factor, out, losses)
    return losses, out


def sweep_chunk(
    op: Operands,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    tiles: Iterable[tuple[int, torch.Tensor]],
    acc: torch.Tensor,
    tops: torch.Tensor | None = None,
) -> State:
    """Leave exp(z - top) dz/dx in the tiles (first column, (tokens, width)) of a chunk, and their
    product with the classifier in acc. `tops` (tiles, tokens) gets the reference of each tile."""
    state: State | None = None
    for index, (low, x) in enumerate(tiles):
        op.logits(x, hidden, None, low)
        # After the first product is under way: the device has waited for the count of tokens.
        state = state or State.start(hidden.shape[0], hidden.device, acc.dtype)
        accumulator = None if index == 0 else acc
        op.ops.sweep(op.tile(x, labels, low), state, write=True, accumulator=accumulator)
        weight = op.weight[low : low + x.shape[1]]
        product_into(acc, x, weight.to(x.dtype), index == 0)
        if tops is not None:
            tops[index].copy_(state.top)
    assert state is not None, "a vocabulary has at least one slice"
    return state


def close_chunk(
    op: Operands,
    start: int,
    end: int,
    state: State,
    acc: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor,
    losses: torch.Tensor,
) -> None:
    """Write the losses of tokens start..end and their rows of the hidden states' gradient."""
    index = op.index(start, end)
    rows = out[start:end] if index is None else out
    target = Target(rows, index, op.labels[start:end], op.weight, op.form, factor)
    op.ops.finish(acc, state, target)
    losses[start:end] = token_losses(state, state.log_sum_exp(), op.form)
