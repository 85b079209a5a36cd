"""Reentrant checkpointing on a model with shared keys and values trains on wrong gradients."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import Refused
from ..model_facts import shares_kv
from ..training_plan import TrainingPlan

REASON = (
    "the first reentrant pass runs without gradients, so layers that reuse keys and values read"
    " detached ones: the loss is right, the gradients are not"
)
ISSUE = "https://github.com/unslothai/unsloth-zoo/issues/813"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the plan would recompute a consumer of shared keys and values reentrantly."""
    return shares_kv(model) and bool(plan.checkpointing and plan.checkpointing.get("use_reentrant"))


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Refuse: there is nothing to repair, non-reentrant checkpointing is the right one."""
    raise Refused(
        f"use_reentrant=True on {type(model).__name__}, whose layers share keys and values, gives"
        ' wrong gradients; use gradient_checkpointing_kwargs={"use_reentrant": False}'
    )
