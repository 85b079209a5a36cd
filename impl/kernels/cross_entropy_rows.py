"""What the row operations of the linear cross-entropy share: the logit's formula and a row's state.

Both sets of row operations (plain torch, Triton) work on a tile of raw logits `x = h C^T` of shape
(tokens, width) that starts at vocabulary column `offset`, and know nothing of products or memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

# A row's reference maximum moves only when a later tile exceeds it by more than this many nats, so
# that tiles already multiplied stay valid; exp(40) summed over any vocabulary is far inside fp32
# and bf16, and what lies 87 nats below the reference is lost to nobody.
JUMP = 40.0


@dataclass(frozen=True)
class Form:
    """How a raw logit becomes a loss: `z = scale (x + b)`, then `c tanh(z / c)`, then the loss.

    `vocabulary` is the number of classes that label smoothing spreads over (the global one where
    the vocabulary is sharded).
    """

    vocabulary: int
    softcap: float | None = None
    scale: float = 1.0
    smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def plain(self) -> bool:
        """No term of the gradient but softmax minus one-hot, so that it may be normalised late."""
        return self.smoothing == 0.0 and self.z_loss == 0.0


@dataclass
class State:
    """Running log-sum-exp of a chunk of rows; all (tokens,), in the accumulation dtype.

    `top`: reference maximum; `rest`: sum of exp(z - top) over all columns but the label, so that
    1 - p(label) never cancels; `target`: the label's logit, -inf until seen; `total`: sum of z.
    """

    top: torch.Tensor
    rest: torch.Tensor
    target: torch.Tensor
    total: torch.Tensor

    @classmethod
    def start(cls, tokens: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before any tile."""
        block = torch.empty(4, tokens, device=device, dtype=dtype)
        block[0].fill_(-torch.inf)
        block[1].zero_()
        block[2].fill_(-torch.inf)
        block[3].zero_()
        return cls(block[0], block[1], block[2], block[3])

    def sum(self) -> torch.Tensor:
        """Sum of exp(z - top) over every column seen, the label included."""
        return self.rest + torch.exp(self.target - self.top)

    def log_sum_exp(self) -> torch.Tensor:
        """Log-sum-exp over every column seen, the label included."""
        return self.top + torch.log(self.sum())


@dataclass(frozen=True)
class Tile:
    """Raw logits x (tokens, width) of the vocabulary's columns from `offset`; the tokens' labels
    count from column 0. `bias`: (width,) or None."""

    x: torch.Tensor
    labels: torch.Tensor
    form: Form
    offset: int
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Target:
    """Where rows of the hidden states' gradient go: rows `rows` of out (None: all, in order).

    labels (tokens,), weight (V, D) for the label's term, a one-element `factor` for all of it.
    """

    out: torch.Tensor
    rows: torch.Tensor | None
    labels: torch.Tensor
    weight: torch.Tensor
    form: Form
    factor: torch.Tensor


@dataclass(frozen=True)
class LabelRows:
    """The label's term of the weight's gradient: share[i] * hidden[row[i]] for row `label[i]`.

    label: sorted; `row`: int64 rows of hidden (N, D); all three (tokens,).
    """

    label: torch.Tensor
    share: torch.Tensor
    row: torch.Tensor
    hidden: torch.Tensor


def token_losses(state: State, lse: torch.Tensor, form: Form) -> torch.Tensor:
    """Per-token loss: smoothed negative log-likelihood plus `z_loss * lse^2`."""
    loss = lse - state.target
    if form.smoothing:
        uniform = lse - state.total / form.vocabulary
        loss = (1.0 - form.smoothing) * loss + form.smoothing * uniform
    if form.z_loss:
        loss = loss + form.z_loss * lse * lse
    return loss


class RowOperations(Protocol):
    """The operations on rows; one implementation in plain torch, one in Triton."""

    def sweep(
        self, tile: Tile, state: State, *, write: bool, accumulator: torch.Tensor | None = None
    ) -> None:
        """Take the tile into `state`; with `write`, replace x by exp(z - top) dz/dx / scale.

        The label's column is written as 0: its term has the whole row's sum in it and is added by
        `finish` or `add_label_rows`. Where `top` moves, the row of `accumulator`, built from
        earlier tiles, is scaled.
        """
        ...

    def rescale(self, x: torch.Tensor, before: torch.Tensor, top: torch.Tensor) -> None:
        """Multiply the rows of a tile swept under `before` by exp(before - top), where it is
        another."""
        ...

    def gradient(self, tile: Tile, lse: torch.Tensor, row_weight: torch.Tensor | None) -> None:
        """Replace x by the loss's derivative with respect to it, times `row_weight`."""
        ...

    def finish(self, accumulator: torch.Tensor, state: State, target: Target) -> None:
        """Rows of out = factor scale (accumulator / sum - (1 - p) dz/dx C[label]): what
        `sweep(write=True)` deferred."""
        ...

    def add_label_rows(self, sums: torch.Tensor, low: int, terms: LabelRows) -> None:
        """Add the terms whose label is a row of `sums`, fp32 rows of the vocabulary from `low`."""
        ...

    def scale(self, source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
        """out = source times a one-element factor, rounded to out's dtype; both contiguous."""
        ...


def label_shares(state: State, form: Form) -> torch.Tensor:
    """-(1 - p) dz/dx / scale at each token's label: what `LabelRows` takes as its share."""
    share = -(state.rest / state.sum())
    if form.softcap is not None:
        share = share * (1.0 - (state.target / form.softcap) ** 2)
    return share
