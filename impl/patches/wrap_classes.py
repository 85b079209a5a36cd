"""Classes that must not be split are listed even where the model has none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..model_facts import every_module, unwrap
from ..training_plan import TrainingPlan

REASON = "the default FSDP wrapping raises on a listed class that is absent (audio layers)"
ISSUE = "https://github.com/axolotl-ai-cloud/axolotl/pull/3584"


def _absent(model: nn.Module) -> set[str]:
    listed = getattr(unwrap(model), "_no_split_modules", None) or ()
    return set(listed) - {type(module).__name__ for module in every_module(model)}


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether a listed class is absent."""
    return bool(_absent(model))


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """List what is present, on this instance only."""
    inner: Any = unwrap(model)
    before = inner._no_split_modules
    own = "_no_split_modules" in vars(inner)
    absent = _absent(model)
    inner._no_split_modules = type(before)(name for name in before if name not in absent)

    def undo() -> None:
        if own:
            inner._no_split_modules = before
        else:
            del inner._no_split_modules

    return undo
