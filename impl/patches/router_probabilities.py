"""Routers that record probabilities where the load-balancing loss expects logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..model_facts import every_module, text_config, unwrap
from ..training_plan import TrainingPlan
from .swap import swap

REASON = (
    "the loss takes the softmax of what the router returned, a softmax already: it is off by 12 %"
    " on mixtral, and nearly flat"
)
ISSUE = "https://github.com/huggingface/transformers/issues/44242"
_LOSS = "load_balancing_loss_func"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the class computes such a loss from a router that returns probabilities."""
    if not hasattr(inspect.getmodule(type(unwrap(model))), _LOSS):
        return False
    config = text_config(model)
    return any(records_probabilities(router, config) for router in _recorded(model))


def _recorded(model: nn.Module) -> set[type[nn.Module]]:
    """The router classes whose first output the model records as router logits."""
    found: set[type[nn.Module]] = set()
    for module in every_module(unwrap(model)):
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        target = getattr(recorder, "target_class", recorder)
        if (
            inspect.isclass(target)
            and issubclass(target, nn.Module)
            and not getattr(recorder, "index", 0)
        ):
            found.add(target)
    return found


_answers: dict[type[nn.Module], bool] = {}  # a property of the code


def records_probabilities(router: type[nn.Module], config: Any) -> bool:
    """Whether the first output of a router, tried on three tokens, sums to one over the experts."""
    if router not in _answers:
        generator = torch.Generator().manual_seed(0)
        with torch.device("cpu"), torch.no_grad():
            tried: Any = router(config)
            for parameter in tried.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            dtype = next(tried.parameters()).dtype
            tokens = torch.randn(3, config.hidden_size, generator=generator).to(dtype)
            first = tried(tokens)
            first = (first[0] if isinstance(first, tuple) else first).float()
        one = torch.ones(len(first))
        _answers[router] = bool((first >= 0).all()) and torch.allclose(first.sum(-1), one, atol=0.1)
    return _answers[router]


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Give the loss the logarithms, whose softmax the probabilities are."""
    return swap(inspect.getmodule(type(unwrap(model))), _LOSS, _of_logarithms)


def _of_logarithms(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def balance(gate_logits: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(gate_logits, tuple):
            gate_logits = tuple(_logarithm(layer) for layer in gate_logits)
        return original(gate_logits, *args, **kwargs)

    return balance


def _logarithm(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
