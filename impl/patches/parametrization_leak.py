"""Adapters of an expert weight that already has a parametrization pile up, call after call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from ..training_plan import TrainingPlan
from .swap import swap

REASON = (
    "PEFT removes its own proxy by one class and registers another, so each forward adds the delta"
    " once more on quantised expert weights"
)
ISSUE = "https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py"
_PROXIES = ("_LoraParameterProxy", "_LoraFactorsProxy")


def _classes() -> tuple[Any, tuple[type, ...]]:
    from peft.tuners.lora import layer

    proxies = tuple(getattr(layer, name) for name in _PROXIES if hasattr(layer, name))
    return getattr(layer, "ParamWrapper", None), proxies


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether expert weights are adapted in place by this PEFT."""
    wrapper, proxies = _classes()
    asked = plan.lora is not None and bool(plan.lora.target_parameters)
    return asked and hasattr(wrapper, "_remove_parametrizations") and len(proxies) > 1


def _remove(original: Callable[[Any], None]) -> Callable[[Any], None]:
    _, proxies = _classes()

    @wraps(original)
    def remove(self: Any) -> None:
        chains, name = self.get_base_layer().parametrizations, self.parameter_name
        if name not in chains or len(chains[name]) == 1:
            original(self)
            return
        chain = chains[name]
        for index in reversed(range(len(chain))):
            if isinstance(chain[index], proxies):
                del chain[index]
                return
        original(self)

    return remove


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Remove whichever proxy is there, the last one first."""
    wrapper, _ = _classes()
    return swap(wrapper, "_remove_parametrizations", _remove)
