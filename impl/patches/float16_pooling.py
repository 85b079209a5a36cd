"""Gemma 4's vision pooler scales by the root of the width in float16, past its range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model_facts import every_module, unwrap
from ..training_plan import TrainingPlan

REASON = "large activations times the root of the width are infinite in float16, so the logits NaN"
ISSUE = "https://github.com/huggingface/transformers/issues/46277"


def _towers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Pairs (vision tower, its pooler) whose pooler returns float16 as it got it."""
    for tower in every_module(unwrap(model)):
        pooler = tower._modules.get("pooler")
        if not isinstance(pooler, nn.Module) or not hasattr(pooler, "root_hidden_size"):
            continue
        if pooled_dtype(pooler) == torch.float16:
            yield tower, pooler


def pooled_dtype(pooler: Any) -> torch.dtype | None:
    """The dtype in which a pooler returns one float16 patch; None where it is not so called."""
    with torch.device("cpu"), torch.no_grad():
        patch = torch.ones(1, 1, pooler.hidden_size, dtype=torch.float16)
        places, padding = (
            torch.zeros(1, 1, 2, dtype=torch.long),
            torch.zeros(1, 1, dtype=torch.bool),
        )
        try:
            pooled, _ = type(pooler).forward(pooler, patch, places, padding, 1)
        except (TypeError, ValueError, AttributeError):
            return None
    dtype: torch.dtype = pooled.dtype
    return dtype


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the model has such a pooler; it may be cast to float16 later."""
    return next(_towers(model), None) is not None


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Pool and standardize float16 in float32; what leaves the tower is float16 again."""
    undo: list[Callable[[], None]] = []
    for tower, pooler in _towers(model):
        undo.append(pooler.register_forward_pre_hook(_widen, with_kwargs=True).remove)
        undo.append(tower.register_forward_hook(_narrow).remove)

    def take_back() -> None:
        for step in undo:
            step()

    return take_back


def _widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def wide(value: Any) -> Any:
        low = isinstance(value, Tensor) and value.dtype == torch.float16
        return value.float() if low else value

    return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}


def _narrow(tower: nn.Module, args: Any, output: Any) -> Any:
    hidden = output.last_hidden_state
    weight = next(tower.parameters()).dtype
    if weight == torch.float16 and hidden.dtype == torch.float32:
        output["last_hidden_state"] = hidden.to(weight)
    return output
