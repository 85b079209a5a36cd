"""Freeze components of a model: no gradient, and evaluation mode that survives `.train()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

from torch import nn


def frozen_components(
    model: nn.Module, components: Sequence[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules whose path has one of the components (`vision_tower`, …)."""
    wanted, seen = set(components), {id(model)}
    waiting = [("", model)] if wanted else []
    while waiting:
        name, module = waiting.pop()
        if name.rpartition(".")[2] in wanted:
            yield name, module
            continue
        prefix = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append((prefix + key, child))


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    """Instead of `train`: dropout and batch statistics of a frozen tower stay off."""
    return nn.Module.train(self, False)


def freeze(model: nn.Module, components: Sequence[str]) -> Callable[[], None]:
    """Freeze the components that are present; returns what takes it back exactly."""
    frozen = [module for _, module in frozen_components(model, components)]
    gradients = [(p, p.requires_grad) for module in frozen for p in module.parameters()]
    modes = [(part, part.training) for module in frozen for part in module.modules()]
    for module in frozen:
        module.requires_grad_(False)
        module.eval()
        patched: Any = module
        # a bound method, so that deepcopy binds the copy's to the copy
        patched.train = MethodType(_stay_in_eval, module)

    def undo() -> None:
        for module in frozen:
            vars(module).pop("train", None)
        for parameter, required in gradients:
            parameter.requires_grad_(required)
        for part, training in modes:
            part.training = training

    return undo
