"""PEFT rejects a linear layer that sits in a clamping wrapper."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from ..model_facts import every_module
from ..training_plan import TrainingPlan
from .swap import swap

REASON = "Gemma4ClippableLinear is no nn.Linear: 'Target module ... is not supported'"
ISSUE = "https://github.com/huggingface/peft/issues/3129"


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module only clamps around one child, `linear`, and has no weights of its own."""
    if len(module._modules) != 1 or "linear" not in module._modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer):
        return False
    bare = next(module.parameters(recurse=False), None) is None
    return bare and isinstance(module._modules["linear"], nn.Linear | BaseTunerLayer)


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the model has such wrappers (an adapter may be attached or loaded)."""
    return any(is_wrapper(module) for module in every_module(model))


def _redirect(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def create_and_replace(
        self: Any,
        lora_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, nn.Module) and is_wrapper(target):
            target, target_name, parent = target.linear, "linear", target
        original(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs)

    return create_and_replace


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Adapt the inner linear layer; its clamping wrapper stays around the adapter."""
    from peft.tuners.lora.model import LoraModel

    return swap(LoraModel, "_create_and_replace", _redirect)
