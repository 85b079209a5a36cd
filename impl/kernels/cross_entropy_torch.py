"""Row operations of the linear cross-entropy in plain torch: CPU, float64, machines without Triton.

The same operations and the same memory discipline as the Triton rows (tiles, never the full
logits); arithmetic in the accumulation dtype, float64 for float64 input. Not an oracle: the
oracles that judge it are separate code.
"""

from __future__ import annotations

import torch

from .cross_entropy_rows import JUMP, Form, LabelRows, State, Target, Tile, label_shares


def _logits(tile: Tile, dtype: torch.dtype) -> torch.Tensor:
    """The scaled and capped logits of a tile, in `dtype`."""
    form, z = tile.form, tile.x.to(dtype)
    if tile.bias is not None:
        z = z + tile.bias.to(dtype)
    if form.scale != 1.0:
        z = z * form.scale
    if form.softcap is not None:
        z = form.softcap * torch.tanh(z / form.softcap)
    return z


def _slope(z: torch.Tensor, form: Form) -> torch.Tensor | float:
    """Derivative of the softcap at capped logits z; 1 without a softcap."""
    return 1.0 if form.softcap is None else 1.0 - (z / form.softcap) ** 2


class TorchRows:
    """`RowOperations` in plain torch; see there for what each method does."""

    def sweep(
        self, tile: Tile, state: State, *, write: bool, accumulator: torch.Tensor | None = None
    ) -> None:
        """See `RowOperations.sweep`."""
        z = _logits(tile, state.top.dtype)
        column, hit = _label_columns(tile)
        tile_top = z.amax(1)
        top = torch.where(tile_top > state.top + JUMP, tile_top, state.top)
        shrink = torch.exp(state.top - top)
        if accumulator is not None:
            accumulator.mul_(shrink.unsqueeze(1))
        state.target.copy_(torch.where(hit, z.gather(1, column).squeeze(1), state.target))
        state.total.add_(z.sum(1))
        e = torch.exp(z - top.unsqueeze(1))
        e.scatter_(1, column, torch.where(hit, 0.0, e.gather(1, column).squeeze(1)).unsqueeze(1))
        state.rest.mul_(shrink).add_(e.sum(1))
        state.top.copy_(top)
        if write:
            tile.x.copy_(e * _slope(z, tile.form))

    def rescale(self, x: torch.Tensor, before: torch.Tensor, top: torch.Tensor) -> None:
        """See `RowOperations.rescale`."""
        if x.is_cuda or not torch.equal(before, top):
            x.mul_(torch.exp(before - top).unsqueeze(1))

    def gradient(self, tile: Tile, lse: torch.Tensor, row_weight: torch.Tensor | None) -> None:
        """See `RowOperations.gradient`."""
        form, z = tile.form, _logits(tile, lse.dtype)
        d = torch.exp(z - lse.unsqueeze(1))
        if form.z_loss:
            d = d * (1.0 + 2.0 * form.z_loss * lse).unsqueeze(1)
        if form.smoothing:
            d = d - form.smoothing / form.vocabulary
        column, hit = _label_columns(tile)
        d.scatter_add_(1, column, (hit.to(d.dtype) * (form.smoothing - 1.0)).unsqueeze(1))
        d = d * _slope(z, form) * form.scale
        tile.x.copy_(d if row_weight is None else d * row_weight.unsqueeze(1))

    def finish(self, accumulator: torch.Tensor, state: State, target: Target) -> None:
        """See `RowOperations.finish`."""
        form, away = target.form, label_shares(state, target.form)
        grad = accumulator / state.sum().unsqueeze(1)
        grad += away.unsqueeze(1) * target.weight.index_select(0, target.labels).to(grad.dtype)
        grad = (grad * (target.factor * form.scale)).to(target.out.dtype)
        if target.rows is None:
            target.out.copy_(grad)
        else:
            target.out.index_copy_(0, target.rows, grad)

    def add_label_rows(self, sums: torch.Tensor, low: int, terms: LabelRows) -> None:
        """See `RowOperations.add_label_rows`."""
        inside = (terms.label >= low) & (terms.label < low + sums.shape[0])
        at = terms.label[inside] - low
        values = terms.hidden[terms.row[inside]].to(sums.dtype) * terms.share[inside].unsqueeze(1)
        if sums.is_cuda:  # index_add_ adds in any order there
            sums.index_put_((at,), values, accumulate=True)
        else:
            sums.index_add_(0, at, values)

    def scale(self, source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
        """See `RowOperations.scale`."""
        torch.mul(source, factor, out=out)


def _label_columns(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each row's label in the tile (clamped; (tokens, 1)) and whether it lies inside."""
    width = tile.x.shape[1]
    column = tile.labels - tile.offset
    hit = (column >= 0) & (column < width)
    return column.clamp(0, width - 1).unsqueeze(1), hit
