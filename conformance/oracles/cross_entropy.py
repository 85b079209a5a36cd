"""Cross-entropy in float64 with its gradients written out by hand (contract: `kernels.md` §4).

z = scale·(h·Cᵀ + b), then c·tanh(z/c); nll = lse(z) − z[label]; the gradient of one token is
(softmax − target)·(1 − (z/c)²)·scale·weight. Nothing here uses autograd or torch's own losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """value: scalar. per_token: (…) with 0 where ignored. gradient: of the logits given, (…, V)."""

    value: Tensor
    per_token: Tensor
    gradient: Tensor


class LinearLoss(NamedTuple):
    """value: scalar; gradients of hidden (N, D), weight (V, D) and bias (V, or None)."""

    value: Tensor
    per_token: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    ignore: int = -100,
    num_items: float | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Loss:
    """Loss and gradient of logits (B, S, V) and labels (B, S), in float64.

    shift: token t predicts label t + 1 (per row). num_items: divisor; None is the number of valid
    tokens. label_smoothing e: (1 − e)·nll + e·mean over the vocabulary. softcap: applied to the
    logits given first. z_loss: weight of lse². No valid token: value 0 and gradient 0.
    """
    labels = labels.to(logits.device)
    target = torch.full_like(labels, ignore)
    if shift:
        target[..., :-1] = labels[..., 1:]
    else:
        target = labels
    flat, gradient = _tokens(
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(-1),
        ignore,
        label_smoothing,
        softcap,
        z_loss,
    )
    count = int((target != ignore).sum())
    divisor = float(count if num_items is None else num_items) or 1.0
    value = flat.sum() / divisor
    return Loss(value, flat.reshape(target.shape), (gradient / divisor).reshape(logits.shape))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore: int = -100,
    num_items: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    upstream: Tensor | None = None,
) -> LinearLoss:
    """Loss and gradients of hidden (N, D), weight (V, D), labels (N) that are already shifted.

    upstream (N): gradient that flows into an unreduced loss; None is 1/num_items for each token.
    """
    h, c = hidden.detach().double(), weight.detach().double()
    logits = torch.einsum("nd,vd->nv", h, c)
    if bias is not None:
        logits = logits + bias.detach().double()
    flat, gradient = _tokens(logits * scale, labels, ignore, label_smoothing, softcap, z_loss)
    count = int((labels != ignore).sum())
    divisor = float(count if num_items is None else num_items) or 1.0
    share = torch.full_like(flat, 1 / divisor) if upstream is None else upstream.double()
    gradient = gradient * share[:, None] * scale
    return LinearLoss(
        flat.sum() / divisor,
        flat,
        torch.einsum("nv,vd->nd", gradient, c),
        torch.einsum("nv,nd->vd", gradient, h),
        None if bias is None else gradient.sum(0),
    )


def _tokens(
    logits: Tensor,
    target: Tensor,
    ignore: int,
    smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    raw = logits.detach().double()
    losses = torch.zeros(raw.shape[0], dtype=torch.float64, device=raw.device)
    gradient = torch.zeros_like(raw)
    size = raw.shape[1]
    for row in range(raw.shape[0]):
        label = int(target[row])
        if label == ignore:
            continue
        if not 0 <= label < size:
            raise IndexError(f"label {label} of token {row} is outside 0…{size - 1}")
        z = raw[row] if softcap is None else softcap * torch.tanh(raw[row] / softcap)
        top = z.max()
        lse = top + torch.log(torch.exp(z - top).sum())
        probability = torch.exp(z - lse)
        goal = torch.full_like(z, smoothing / size)
        goal[label] += 1 - smoothing
        losses[row] = lse - (goal * z).sum() + z_loss * lse**2
        slope = probability - goal + 2 * z_loss * lse * probability
        gradient[row] = slope if softcap is None else slope * (1 - (z / softcap) ** 2)
    return losses, gradient
