"""PEFT rewrites LoRA targets of some mixtures of experts to other modules than were named."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ..training_plan import TrainingPlan
from .swap import swap

REASON = (
    "for model types that PEFT converts (qwen3_next), a target ending in gate, up or down_proj"
    " becomes the routed experts, even one that names the shared expert: that is never adapted"
)
ISSUE = "https://github.com/huggingface/peft/issues/3711"
_CONVERTER = "convert_peft_config_for_transformers"


def _module() -> ModuleType | None:
    try:
        from peft.utils import transformers_weight_conversion
    except ImportError:  # an older PEFT, which converts nothing
        return None
    found: ModuleType = transformers_weight_conversion
    return found if hasattr(found, _CONVERTER) else None


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether a plan names modules for a PEFT that would rewrite them."""
    return plan.lora is not None and _module() is not None


def take_literally() -> Callable[[], None]:
    """Make PEFT adapt what is named, nothing else; returns the undo."""
    module = _module()
    if module is None:
        return lambda: None

    def make(_: Any) -> Callable[..., None]:
        def convert(peft_config: Any, *args: Any, **kwargs: Any) -> None:
            """Leave the targets as they are: they are names of this model's own modules."""

        return convert

    return swap(module, _CONVERTER, make)


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Take the targets of the plan literally."""
    return take_literally()
