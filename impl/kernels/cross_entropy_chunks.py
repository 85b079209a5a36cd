"""Linear cross-entropy over token chunks: tile sizes from a memory budget, and the exact pass.

The exact pass knows the log-sum-exp before it writes a gradient. It serves everything that needs
normalised rows: a trainable classifier, an adapted one, label smoothing, z-loss, float16. With a
buffer for whole rows the logits are computed once; with a narrower one, a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .cross_entropy_products import accumulation_dtype, add_product, multiply, product_into
from .cross_entropy_rows import Form, RowOperations, State, Tile, token_losses
from .cross_entropy_weight import WeightGradient

# Columns a product fills before the row operations look at them; wider gains nothing.
SLICE = 32768


@dataclass(frozen=True)
class Tiles:
    """`tokens` rows at a time; a logits buffer `width` columns wide, filled `inner` at a time."""

    tokens: int
    width: int
    inner: int


@dataclass(frozen=True)
class Needs:
    """Which gradients the caller wants."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    features: bool = False
    low_rank: bool = False

    @property
    def parameters(self) -> bool:
        """Some gradient sums over tokens, so every row must be normalised before the product."""
        return self.weight or self.bias or self.low_rank

    @property
    def any(self) -> bool:
        """Some gradient at all."""
        return self.hidden or self.features or self.parameters


@dataclass
class Gradients:
    """Gradients computed in the forward; None where not needed."""

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    features: torch.Tensor | None = None
    low_rank: torch.Tensor | None = None


@dataclass
class Operands:
    """The inputs of one call. `rows`: indices of the valid tokens, None when all are valid."""

    hidden: torch.Tensor  # (N, D)
    labels: torch.Tensor  # (n,) int64: labels of the valid tokens
    weight: torch.Tensor  # (V, D)
    form: Form
    ops: RowOperations
    rows: torch.Tensor | None = None  # (n,) int64
    bias: torch.Tensor | None = None  # (V,)
    features: torch.Tensor | None = None  # (N, r): scaled low-rank features of the hidden states
    low_rank: torch.Tensor | None = None  # (V, r)
    buffer_dtype: torch.dtype = torch.float32
    gradient_dtype: torch.dtype | None = None  # of the hidden states' gradient; None: theirs
    _gathered: torch.Tensor | None = field(default=None, repr=False)

    def index(self, start: int, end: int) -> torch.Tensor | None:
        """Row indices of a chunk of valid tokens, None when they are start..end themselves."""
        return None if self.rows is None else self.rows[start:end]

    def chunk(self, start: int, end: int) -> torch.Tensor:
        """Hidden states of valid tokens start..end; gathered into one reused buffer."""
        if self.rows is None:
            return self.hidden[start:end]
        if self._gathered is None or self._gathered.shape[0] < end - start:
            self._gathered = self.hidden.new_empty(end - start, self.hidden.shape[1])
        out = self._gathered[: end - start]
        return torch.index_select(self.hidden, 0, self.rows[start:end], out=out)

    def chunk_features(self, start: int, end: int) -> torch.Tensor | None:
        """Low-rank features of valid tokens start..end."""
        if self.features is None or self.rows is None:
            return None if self.features is None else self.features[start:end]
        return self.features.index_select(0, self.rows[start:end])

    def logits(
        self, out: torch.Tensor, hidden: torch.Tensor, features: torch.Tensor | None, low: int
    ) -> None:
        """Raw logits of columns low.. into out; the low-rank part first: it rounds the least."""
        high = low + out.shape[1]
        if features is not None and self.low_rank is not None:
            multiply(out, features, self.low_rank[low:high].t())
            add_product(out, hidden, self.weight[low:high].t())
        else:
            multiply(out, hidden, self.weight[low:high].t())

    def tile(self, x: torch.Tensor, labels: torch.Tensor, low: int) -> Tile:
        """The logits x of columns low.. as the row operations take them."""
        bias = None if self.bias is None else self.bias[low : low + x.shape[1]]
        return Tile(x, labels, self.form, low, bias)


def bounds(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the pieces of `total`."""
    for start in range(0, total, step):
        yield start, min(start + step, total)


def logits_buffer(op: Operands, tokens: int, width: int) -> torch.Tensor:
    """Uninitialised (tokens, width) buffer whose rows start at multiples of 128 bytes."""
    padded = -(-width // 64) * 64
    buffer = torch.empty(tokens, padded, device=op.hidden.device, dtype=op.buffer_dtype)
    return buffer[:, :width]


def whole_row_tiles(op: Operands, budget: int) -> Tiles:
    """Chunks of equal size whose whole rows of logits, with an fp32 accumulator, fit the budget."""
    count, (vocabulary, dim) = op.labels.shape[0], op.weight.shape
    item = op.buffer_dtype.itemsize
    gather = op.hidden.element_size() if op.rows is not None else 0
    token = vocabulary * item + dim * (4 + gather)
    tokens = min(count, max(1, (budget - (1 << 20)) // token))
    tokens = -(-count // -(-count // tokens))
    return Tiles(tokens, vocabulary, min(vocabulary, SLICE))


def exact_pass(
    op: Operands,
    tiles: Tiles,
    needs: Needs,
    factor: torch.Tensor,
    lse: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Per-token losses (n,), log-sum-exp (n,) and the gradients of `factor * sum(weight * loss)`.

    A known `lse` skips the sweep that finds it (the losses are then not computed).
    """
    count, vocabulary = op.labels.shape[0], op.weight.shape[0]
    sums = _Sums(op, tiles, needs, factor)
    wide = accumulation_dtype(op.hidden.dtype)
    losses = torch.empty(count, device=op.hidden.device, dtype=wide)
    known = lse is not None
    lse = torch.empty_like(losses) if lse is None else lse
    buffer = logits_buffer(op, min(tiles.tokens, count), tiles.width)
    kept = tiles.width >= vocabulary
    for start, end in bounds(count, tiles.tokens):
        hidden, features = op.chunk(start, end), op.chunk_features(start, end)
        labels = op.labels[start:end]
        x = buffer[: end - start]
        if not known:
            state = State.start(end - start, op.hidden.device, wide)
            for low, high in bounds(vocabulary, tiles.inner):
                part = x[:, low:high] if kept else x[:, : high - low]
                op.logits(part, hidden, features, low)
                op.ops.sweep(op.tile(part, labels, low), state, write=False)
            torch.add(state.log_sum_exp(), 0.0, out=lse[start:end])
            losses[start:end] = token_losses(state, lse[start:end], op.form)
        if not needs.any:
            continue
        weights = None if row_weight is None else row_weight[start:end]
        for low, high in bounds(vocabulary, tiles.width):
            part = x[:, : high - low]
            if known or not kept:
                op.logits(part, hidden, features, low)
            op.ops.gradient(op.tile(part, labels, low), lse[start:end], weights)
            sums.add(part, hidden, features, start, low)
        sums.close_chunk(start, end)
    return losses, lse, sums.result()


class _Sums:
    """Accumulates every needed gradient from normalised tiles: fp32 sums, rounded once."""

    def __init__(self, op: Operands, tiles: Tiles, needs: Needs, factor: torch.Tensor) -> None:
        self.op, self.needs, self.factor = op, needs, factor
        wide = accumulation_dtype(op.hidden.dtype)
        tokens = min(tiles.tokens, op.labels.shape[0])
        device = op.hidden.device
        self.out = Gradients()
        self.acc: torch.Tensor | None = None
        self.feature_acc: torch.Tensor | None = None
        self.weight = WeightGradient(op.weight) if needs.weight else None
        if needs.hidden:
            self.out.hidden = hidden_gradient(op)
            self.acc = torch.empty(tokens, op.hidden.shape[1], device=device, dtype=wide)
        if needs.features and op.features is not None:
            self.out.features = torch.zeros_like(op.features, dtype=wide)
            self.feature_acc = torch.empty(tokens, op.features.shape[1], device=device, dtype=wide)
        if needs.bias and op.bias is not None:
            self.out.bias = torch.zeros_like(op.bias, dtype=wide)
        if needs.low_rank and op.low_rank is not None:
            self.out.low_rank = torch.zeros_like(op.low_rank, dtype=wide)

    def add(
        self,
        gradient: torch.Tensor,
        hidden: torch.Tensor,
        features: torch.Tensor | None,
        start: int,
        low: int,
    ) -> None:
        """Take the normalised tile of tokens start.. and columns low.. into every sum."""
        op, tokens, high = self.op, gradient.shape[0], low + gradient.shape[1]
        if gradient.dtype != hidden.dtype:  # only where bf16 cannot be computed in (interpreter)
            hidden = hidden.to(gradient.dtype)
        weight = op.weight[low:high]
        if self.acc is not None:
            product_into(self.acc[:tokens], gradient, weight.to(gradient.dtype), low == 0)
        if self.weight is not None:
            self.weight.add(low, gradient, hidden, start == 0)
        if self.out.bias is not None:
            self.out.bias[low:high] += gradient.sum(0, dtype=self.out.bias.dtype)
        if self.feature_acc is not None and op.low_rank is not None:
            b = op.low_rank[low:high].to(gradient.dtype)
            product_into(self.feature_acc[:tokens], gradient, b, low == 0)
        if self.out.low_rank is not None and features is not None:
            add_product(self.out.low_rank[low:high], gradient.t(), features.to(gradient.dtype))

    def close_chunk(self, start: int, end: int) -> None:
        """Write the finished rows of the per-token gradients."""
        index = self.op.index(start, end)
        for out, acc in ((self.out.hidden, self.acc), (self.out.features, self.feature_acc)):
            if out is None or acc is None:
                continue
            if index is None:
                torch.mul(acc[: end - start], self.factor, out=out[start:end])
            else:
                out.index_copy_(0, index, (acc[: end - start] * self.factor).to(out.dtype))

    def result(self) -> Gradients:
        """Every gradient, scaled."""
        if self.weight is not None:
            self.out.weight = self.weight.result(self.factor, self.op.ops)
        if self.out.bias is not None:
            self.out.bias.mul_(self.factor)
        if self.out.low_rank is not None:
            self.out.low_rank.mul_(self.factor)
        return self.out


def hidden_gradient(op: Operands) -> torch.Tensor:
    """Where the hidden states' gradient is kept until the backward: zeros at ignored tokens.

    float16 is kept in fp32: a gradient already divided by the number of tokens would underflow
    before the loss scale of the upstream gradient reaches it.
    """
    dtype = torch.float32 if op.hidden.dtype == torch.float16 else op.hidden.dtype
    dtype = op.gradient_dtype or dtype
    make = torch.empty_like if op.rows is None else torch.zeros_like
    return make(op.hidden, dtype=dtype, memory_format=torch.contiguous_format)
