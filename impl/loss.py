"""The training loss: shifted once, weighted by token, zero where nothing is labelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .context_parallel import local_targets
from .model_facts import text_config
from .prepared import state_of

IGNORED = -100


def loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_items_in_batch: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of a batch: Σ nll over labelled tokens / num_items_in_batch (None: their number).

    batch: forward arguments and `labels` (B, S), shifted here; or `shift_labels`, shifted already.
    Without a labelled token it is 0 with zero gradients, where the mean would be NaN. Where the
    model returns a load-balancing loss it is added with its coefficient, weighted by this batch's
    share of the labelled tokens, so that it does not grow with the number of micro-batches
    (Megatron-LM#3672). label_smoothing: the share given to the uniform distribution.
    """
    inputs = dict(batch)
    state = state_of(model)
    if state is not None and state.fused_loss and not label_smoothing:
        targets = shifted(inputs.pop("labels", None), inputs.pop("shift_labels", None))
        return _fused(model, inputs, targets, num_items_in_batch)
    return loss_and_outputs(model, inputs, num_items_in_batch, label_smoothing)[0]


def loss_and_outputs(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_items_in_batch: Tensor | float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Any]:
    """As `loss`, from logits even where the loss is fused, with the model's outputs."""
    inputs = dict(batch)
    targets = shifted(inputs.pop("labels", None), inputs.pop("shift_labels", None))
    _ask(model, inputs)
    outputs = model(**inputs)
    targets = local_targets(model, targets)  # context parallel: logits are this rank's slice
    total, count = summed(outputs.logits, targets, label_smoothing)
    extra = _auxiliary(model, outputs)
    if extra is not None:
        total = total + extra.to(total) * count
    return total / denominator(num_items_in_batch, count, total), outputs


def shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """The target (B, S) of each position's logits: the next label, none after the last."""
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("the batch has no labels")
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


def summed(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Σ nll and the number of targets, of logits (B, S, V) and targets (B, S) with −100.

    Ignored rows are dropped first, so that the float32 copy is of the labelled ones only, and an
    empty sum has exact zero gradients. float64 logits stay float64.
    """
    targets = targets.to(logits.device)
    kept = targets != IGNORED
    rows = logits[kept]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = F.cross_entropy(rows, targets[kept], reduction="sum", label_smoothing=label_smoothing)
    return total, kept.sum()


def denominator(items: Tensor | float | None, count: Tensor, like: Tensor) -> Tensor:
    """The divisor as a scalar of the loss's dtype and device, at least 1; no device sync."""
    given = count if items is None else items
    divisor = torch.as_tensor(given).to(device=like.device, dtype=like.dtype)
    return divisor.reshape(-1)[0].clamp(min=1)


def count_items(batch: Mapping[str, Any]) -> Tensor:
    """How many positions of a batch have a target after the shift."""
    return (shifted(batch.get("labels"), batch.get("shift_labels")) != IGNORED).sum()


def _ask(model: nn.Module, inputs: dict[str, Any]) -> None:
    """No cache; and the router logits by keyword where the config asks for a balancing loss.

    Up to transformers 5.17 qwen3_5_moe's multimodal class heeds the keyword alone.
    """
    inputs.setdefault("use_cache", False)
    config = text_config(model)
    if getattr(config, "output_router_logits", False) and hasattr(config, "router_aux_loss_coef"):
        inputs.setdefault("output_router_logits", True)


def _auxiliary(model: nn.Module, outputs: Any) -> Tensor | None:
    """The coefficient times the load-balancing loss, if the model was asked for one."""
    config = text_config(model)
    value = getattr(outputs, "aux_loss", None)
    if not getattr(config, "output_router_logits", False) or not isinstance(value, Tensor):
        return None
    return value * float(config.router_aux_loss_coef)


def _fused(
    model: nn.Module, inputs: dict[str, Any], targets: Tensor, items: Tensor | float | None
) -> Tensor:
    """The loss from hidden states, by the head that `prepare` replaced; it makes no logits.

    The model adds its load-balancing loss whole; it is brought to this batch's share here.
    """
    count = (targets != IGNORED).sum()
    divisor = denominator(items, count, torch.zeros((), device=targets.device))
    _ask(model, inputs)
    outputs = model(**inputs, labels=targets, shift_labels=targets, num_items_in_batch=divisor)
    result = outputs.loss
    assert isinstance(result, Tensor)
    extra = _auxiliary(model, outputs)
    return result if extra is None else result + extra.to(result) * (count / divisor - 1)
