"""Linear cross-entropy without the logits, in two products: normalise after the second one.

A tile of logits becomes exp(z - top) dz/dx in place and is multiplied by its slice of the
classifier at once; the running `top` is only a reference, so the tile needs no log-sum-exp. bf16
keeps the exponent range of fp32, hence nothing is lost. When all slices are through, the rows of
the accumulated product are divided by the sum, and the label's term, -(1 - p) dz/dx C[label], is
added from a sum that never held the label: no cancellation for confident tokens. No tile is kept,
none computed twice: the buffer may be as small as the budget says, and a tile of a few MiB is
read back from the second-level cache.

Not for a trainable classifier, whose gradient sums over tokens: each has its own divisor, and
dividing the hidden states instead costs a second bf16 rounding (1.6 to 1.8 times the eager error of
the weight's gradient on flat distributions: tried, and left). See `can_defer`.
"""

from __future__ import annotations

import torch

from .cross_entropy_chunks import (
    SLICE,
    Needs,
    Operands,
    Tiles,
    bounds,
    hidden_gradient,
    logits_buffer,
)
from .cross_entropy_products import accumulation_dtype, product_into
from .cross_entropy_rows import State, token_losses

_CHUNK, _NARROW = 2816, 8192


def can_defer(op: Operands, needs: Needs) -> bool:
    """Whether late normalisation is exact here.

    Not for gradients of parameters or adapters (normalised tiles are needed), not with terms beside
    the softmax, not in float16 (exp(40) overflows it).
    """
    return (
        needs.hidden
        and not needs.parameters
        and op.features is None
        and op.form.plain
        and op.hidden.dtype != torch.float16
    )


def sliced_tiles(op: Operands, budget: int) -> Tiles:
    """Token chunk and vocabulary slice within the budget.

    The vendor's products like both large. Chunks are equal and at most 2816 tokens, as large as
    leaves room for slices of 8192 columns; what is left of the budget widens the slices, up to
    32768 columns: beyond that nothing was gained.
    """
    count, (vocabulary, dim) = op.labels.shape[0], op.weight.shape
    item = op.buffer_dtype.itemsize
    gather = op.hidden.element_size() if op.rows is not None else 0
    fixed = dim * (accumulation_dtype(op.hidden.dtype).itemsize + gather)
    budget -= 1 << 20
    least = min(_NARROW, vocabulary)
    tokens = max(1, min(count, _CHUNK, budget // (fixed + least * item)))
    tokens = -(-count // -(-count // tokens))
    width = (budget - tokens * fixed) // (tokens * item) // 256 * 256
    width = min(vocabulary, max(256, min(width, SLICE)))
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
        hidden, labels, rows = op.chunk(start, end), op.labels[start:end], end - start
        state = State.start(rows, device, wide)
        for low, high in bounds(vocabulary, tiles.width):
            x = buffer[:rows, : high - low]
            op.logits(x, hidden, None, low)
            op.ops.sweep(
                x, labels, state, op.form, low, op.bias_of(low, high), True,
                None if low == 0 else acc[:rows],
            )  # fmt: skip
            product_into(acc[:rows], x, op.weight[low:high].to(x.dtype), low == 0)
        index = op.index(start, end)
        target = out[start:end] if index is None else out
        op.ops.finish(acc[:rows], state, labels, op.weight, op.form, factor, target, index)
        losses[start:end] = token_losses(state, state.log_sum_exp(), op.form)
    return losses, out
