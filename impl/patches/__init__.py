"""Defects of the stock stack, one file each, applied to a model only while it is prepared.

A patch module has REASON (a sentence), ISSUE (an address or a thread), `applies_to(model, plan)`
and `apply(model, plan)`, which returns the function that takes it back.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, cast

from torch import nn

from ..model_facts import walked_once
from ..training_plan import TrainingPlan

# In the order of application. Adding a patch: a file here and its name in this tuple.
NAMES: tuple[str, ...] = (
    "shared_kv_in_cache",
    "static_cache_without_layers",
    "reentrant_shared_kv",
    "no_auxiliary_loss",
    "router_probabilities",
    "router_softmax",
    "wrap_classes",
    "expert_parallel_plan",
    "packed_rows",
    "unified_image_mask",
    "image_blocks_past_window",
    "packed_images",
    "delta_net_documents",
    "image_type_ids",
    "embeds_without_per_layer_inputs",
    "float16_pooling",
    "token_weighted_loss",
    "clippable_linear",
    "literal_lora_targets",
    "parametrization_leak",
)


class Patch(Protocol):
    """The shape of a patch module."""

    REASON: str
    ISSUE: str

    def applies_to(self, model: nn.Module, plan: TrainingPlan) -> bool:
        """Whether the model, trained by the plan, would meet the defect."""

    def apply(self, model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
        """Repair it (or raise Refused where that cannot be done); returns the undo."""


def load(name: str) -> Patch:
    """The patch module of a name; KeyError names the known ones."""
    if name not in NAMES:
        raise KeyError(f"unknown patch {name!r}; known: {', '.join(NAMES)}")
    return cast(Patch, import_module(f"{__name__}.{name}"))


def applicable(model: nn.Module, plan: TrainingPlan) -> list[str]:
    """The names of the patches a model needs under a plan, in the order of application."""
    with walked_once():
        return [name for name in NAMES if load(name).applies_to(model, plan)]


def apply(model: nn.Module, plan: TrainingPlan, undo: list[Callable[[], None]]) -> None:
    """Apply what is needed; each step's undo is appended at once, so that a failure loses none."""
    for name in applicable(model, plan):
        undo.append(load(name).apply(model, plan))
