"""Linear cross-entropy without the logits, in two products: normalise after the second one.

A tile of logits becomes exp(z - top) dz/dx in place and is multiplied by its slice of the
classifier at once; the running `top` is only a reference, so the tile needs no log-sum-exp. bf16
keeps the exponent range of fp32, hence nothing is lost. When all slices are through, the rows of
the accumulated product are divided by the sum, and the label's term, -(1 - p) dz/dx C[label], is
added from a sum that never held the label: no cancellation for confident tokens. No tile is kept,
none computed twice: the buffer may be as small as the budget says, and a tile of a few MiB is
read back from the second-level cache.

Valid for a frozen classifier and the plain loss; see `can_defer`.
"""

from __future__ import annotations

import torch

from .cross_entropy_chunks import (
    CACHED_TILE,
    Operands,
    Tiles,
    bounds,
    hidden_gradient,
    logits_buffer,
)
from .cross_entropy_products import accumulation_dtype, product_into
from .cross_entropy_rows import State, token_losses

# A tile of the vendor's fastest product kernels, and the least width worth a launch.
_TILE_ROWS, _TILE_COLUMNS, _LEAST_WIDTH = 128, 256, 1024


def can_defer(op: Operands, parameters: bool) -> bool:
    """Whether late normalisation is exact here.

    Not for gradients that sum over tokens (each row has its own divisor), not with terms beside
    the softmax, not in float16 (exp(40) overflows it).
    """
    return (
        not parameters
        and op.form.plain
        and op.features is None
        and op.hidden.dtype != torch.float16
    )


def sliced_tiles(op: Operands, budget: int) -> Tiles:
    """Token chunk and vocabulary slice within the budget: fewest idle multiprocessors first.

    The product with the classifier slice has (tokens / 128) x (dim / 256) tiles, each done by one
    multiprocessor at a time: a count just above a multiple of theirs wastes almost a whole round.
    """
    count, (vocabulary, dim) = op.labels.shape[0], op.weight.shape
    item = op.buffer_dtype.itemsize
    gather = op.hidden.element_size() if op.rows is not None else 0
    fixed = dim * (accumulation_dtype(op.hidden.dtype).itemsize + gather)
    budget -= 1 << 20
    processors = _processors(op.hidden.device)
    best: tuple[float, Tiles] | None = None
    for chunks in range(1, count + 1):
        tokens = -(-count // chunks)
        room = (budget - tokens * fixed) // (tokens * item)
        if room < min(_LEAST_WIDTH, vocabulary) and tokens > 64:
            continue
        cached = max(_LEAST_WIDTH, CACHED_TILE // (tokens * item))
        width = min(vocabulary, max(64, min(room, cached) // 256 * 256))
        blocks = -(-tokens // _TILE_ROWS) * -(-dim // _TILE_COLUMNS)
        cost = chunks * -(-blocks // processors) * (1.0 + 512.0 / width)
        if best is None or cost < best[0] * 0.98:
            best = (cost, Tiles(tokens, width, width))
        if tokens <= 512:
            break
    assert best is not None
    return best[1]


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
