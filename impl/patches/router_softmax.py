"""A router that takes its softmax in the dtype of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..model_facts import every_module, text_config, unwrap
from ..training_plan import TrainingPlan

REASON = "eight bits of a probability do not tell apart the experts that a token could go to"
ISSUE = "https://github.com/axolotl-ai-cloud/axolotl/pull/3791"


class _Float32Softmax(TorchFunctionMode):
    """A softmax of low precision is taken, and returned, in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.softmax, torch.softmax, torch.Tensor.softmax) and not kwargs.get("dtype"):
            kwargs["dtype"] = torch.promote_types(args[0].dtype, torch.float32)
        return func(*args, **kwargs)


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    """Routers that are modules of their own and scale their experts: they return probabilities."""
    for module in every_module(unwrap(model)):
        if "proj" in module._modules and hasattr(module, "per_expert_scale"):
            yield module


_answers: dict[type[nn.Module], bool] = {}  # a property of the code


def in_low_precision(router: type[nn.Module], config: Any) -> bool:
    """Whether a bfloat16 router, tried on one token, takes the softmax in bfloat16."""
    if router not in _answers:
        seen: list[torch.dtype] = []

        class Spy(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = func(*args, **(kwargs or {}))
                if func in (F.softmax, torch.softmax, torch.Tensor.softmax):
                    seen.append(result.dtype)
                return result

        with torch.device("cpu"), torch.no_grad():
            tried: Any = router(config).to(torch.bfloat16)
            for parameter in tried.parameters():
                parameter.fill_(1.0)
            with Spy():
                tried(torch.ones(1, config.hidden_size, dtype=torch.bfloat16))
        _answers[router] = torch.bfloat16 in seen
    return _answers[router]


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the model has such a router."""
    config = text_config(model)
    return any(in_low_precision(type(router), config) for router in _routers(model))


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Take it in float32; a float64 one stays as it is."""
    undo: list[Callable[[], None]] = []
    for router in _routers(model):
        undo.append(_in_float32(router))

    def take_back() -> None:
        for step in undo:
            step()

    return take_back


def _in_float32(router: Any) -> Callable[[], None]:
    before = vars(router).get("forward")
    original = router.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Float32Softmax():
            return original(*args, **kwargs)

    router.forward = forward

    def undo() -> None:
        if before is None:
            vars(router).pop("forward", None)
        else:
            router.forward = before

    return undo
