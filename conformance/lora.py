"""LoRA in a model, seen from outside: which modules are adapted, and by which parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from conformance.case import Model

# The names that every guide gives; a spec of these means the decoder's own projections.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FACTOR = re.compile(r"\.lora_(?:[AB]|embedding_[AB])(?:\..*)?$")
_WRAPPED = re.compile(r"(?:^base_model\.model\.)|(?:\.base_layer)")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA factor."""
    return _FACTOR.search(name) is not None


def adapted_modules(model: nn.Module) -> set[str]:
    """Paths of adapted modules, as in the unadapted model."""
    return {
        _WRAPPED.sub("", _FACTOR.sub("", name))
        for name, _ in model.named_parameters()
        if is_adapter(name)
    }


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA factors by their names in the model."""
    return {name: p for name, p in model.named_parameters() if is_adapter(name)}


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is neither a LoRA factor nor a trained copy (`modules_to_save`)."""
    return {
        name: p
        for name, p in model.named_parameters()
        if not is_adapter(name) and ".modules_to_save." not in name
    }


def decoder_projections(
    stock: nn.Module, spec: Model, names: Iterable[str] = PROJECTIONS
) -> set[str]:
    """Linear modules of the unadapted decoder with these names: what a list of names must adapt.

    Towers are left out: no guide's list of decoder projections means them.
    """
    wanted = set(names)
    return {
        name
        for name, module in stock.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in wanted
        and not set(name.split(".")) & set(spec.freeze)
    }


def expert_modules(model: nn.Module) -> set[str]:
    """Paths of the modules that hold routed experts as 3-D parameters."""
    return {
        _WRAPPED.sub("", name.rpartition(".")[0])
        for name, parameter in model.named_parameters()
        if name.endswith("gate_up_proj") and parameter.dim() == 3
    }
