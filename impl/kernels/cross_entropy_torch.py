"""Row operations of the linear cross-entropy in plain torch: CPU, float64, machines without Triton.

The same operations and the same memory discipline as the Triton rows (tiles, never the full
logits); arithmetic in the accumulation dtype, float64 for float64 input. Not an oracle: the
oracles that judge it are separate code.
"""

from __future__ import annotations

import torch

from .cross_entropy_rows import JUMP, Form, State


def _logits(
    x: torch.Tensor, bias: torch.Tensor | None, form: Form, dtype: torch.dtype
) -> torch.Tensor:
    """The scaled and capped logits of a tile, in `dtype`."""
    z = x.to(dtype)
    if bias is not None:
        z = z + bias.to(dtype)
    if form.scale != 1.0:
        z = z * form.scale
    if form.softcap is not None:
        z = form.softcap * torch.tanh(z / form.softcap)
    return z


def _slope(z: torch.Tensor, form: Form) -> torch.Tensor | float:
    """Derivative of the softcap at capped logits z; 1 without a softcap."""
    return 1.0 if form.softcap is None else 1.0 - (z / form.softcap) ** 2


class TorchRows:
    """See `RowOperations`."""

    def sweep(
        self,
        x: torch.Tensor,
        labels: torch.Tensor,
        state: State,
        form: Form,
        offset: int,
        bias: torch.Tensor | None,
        write: bool,
        accumulator: torch.Tensor | None,
    ) -> None:
        """Take a tile into the state; with `write`, leave exp(z - top) dz/dx / scale in it."""
        z = _logits(x, bias, form, state.top.dtype)
        column, hit = _label_columns(labels, offset, x.shape[1])
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
            x.copy_(e * _slope(z, form))

    def gradient(
        self,
        x: torch.Tensor,
        labels: torch.Tensor,
        lse: torch.Tensor,
        form: Form,
        offset: int,
        bias: torch.Tensor | None,
        row_weight: torch.Tensor | None,
    ) -> None:
        """Replace a tile of raw logits by the derivative of the loss."""
        z = _logits(x, bias, form, lse.dtype)
        d = torch.exp(z - lse.unsqueeze(1))
        if form.z_loss:
            d = d * (1.0 + 2.0 * form.z_loss * lse).unsqueeze(1)
        if form.smoothing:
            d = d - form.smoothing / form.vocabulary
        column, hit = _label_columns(labels, offset, x.shape[1])
        d.scatter_add_(1, column, (hit.to(d.dtype) * (form.smoothing - 1.0)).unsqueeze(1))
        d = d * _slope(z, form) * form.scale
        x.copy_(d if row_weight is None else d * row_weight.unsqueeze(1))

    def finish(
        self,
        accumulator: torch.Tensor,
        state: State,
        labels: torch.Tensor,
        weight: torch.Tensor,
        form: Form,
        factor: torch.Tensor,
        out: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """Rows of out = factor * scale * (accumulator / sum - (1 - p) dz/dx C[label])."""
        total = state.rest + torch.exp(state.target - state.top)
        away = -(state.rest / total) * _slope(state.target, form)
        grad = accumulator / total.unsqueeze(1)
        grad += away.unsqueeze(1) * weight.index_select(0, labels).to(grad.dtype)
        grad = (grad * (factor * form.scale)).to(out.dtype)
        if rows is None:
            out.copy_(grad)
        else:
            out.index_copy_(0, rows, grad)


def _label_columns(
    labels: torch.Tensor, offset: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each row's label in the tile (clamped; (tokens, 1)) and whether it lies inside."""
    column = labels - offset
    hit = (column >= 0) & (column < width)
    return column.clamp(0, width - 1).unsqueeze(1), hit
