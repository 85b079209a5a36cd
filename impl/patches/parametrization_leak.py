"""Adapters of expert weights that already have a parametrization pile up, or do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..training_plan import TrainingPlan
from .swap import swap

REASON = (
    "on quantised expert weights PEFT removes its proxy by one class and registers another: each"
    " forward adds the delta once more; and the second of two adapted parameters is read from a"
    " cache filled before its adapter was there, so that it never acts"
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


def _activate(original: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    @wraps(original)
    def activate(self: Any, active_adapters: list[str]) -> Iterator[None]:
        with original(self, active_adapters):
            # the outer of two nested wrappers has switched the cache on, and this one read its
            # weight to find the shape
            parametrize._cache.pop((id(self.get_base_layer()), self.parameter_name), None)
            yield

    return activate


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Remove whichever proxy is there, the last one first; forget what was read before it came."""
    wrapper, _ = _classes()
    undo = [
        swap(wrapper, "_remove_parametrizations", _remove),
        swap(wrapper, "_activate_lora", _activate),
    ]

    def take_back() -> None:
        for step in undo:
            step()

    return take_back
