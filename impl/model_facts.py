"""Facts read off a loaded model, by what it has and never by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import nn

# Names under which a class takes the modality of each position, newest first.
TYPE_ID_NAMES = ("mm_token_type_ids", "token_type_ids")
# What a modelling module has when it builds masks with image blocks, newest first.
_IMAGE_BLOCK_MAKERS = (
    "get_block_sequence_ids_for_mask",
    "create_causal_mask_mapping",
    "token_type_ids_mask_function",
)
IMAGE_INPUT_NAMES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


def unwrap(model: nn.Module) -> Any:
    """The transformers model below DDP, FSDP1, torch.compile and PEFT wrappers.

    Only for reading: calling the result would bypass the wrappers (axolotl#3584 read
    `model.config` on the wrapper instead).
    """
    inner: Any = without_parallel(model)
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def without_parallel(model: nn.Module) -> Any:
    """The model below DDP, FSDP1 and torch.compile, adapters kept."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif not hasattr(inner, "config") and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            return inner


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is a PEFT model, looking below parallel wrappers."""
    return hasattr(without_parallel(model), "peft_config")


def body(model: nn.Module) -> nn.Module:
    """The module that `forward` of the head class calls (hooks on it also run under PEFT)."""
    inner = unwrap(model)
    found = getattr(inner, "base_model", inner)
    assert isinstance(found, nn.Module)
    return found


def text_config(model: nn.Module) -> Any:
    """The decoder's own configuration."""
    config = unwrap(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def shares_kv(model: nn.Module) -> bool:
    """Whether some layers read the keys and values of others."""
    return bool(getattr(text_config(model), "num_kv_shared_layers", 0))


def type_id_name(model: nn.Module) -> str | None:
    """The forward argument that carries modalities, or None (a text model has none)."""
    accepted = _parameters(type(unwrap(model)).forward)
    if "pixel_values" not in accepted:
        return None
    return next((name for name in TYPE_ID_NAMES if name in accepted), None)


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """A property of the code, read once."""
    return frozenset(inspect.signature(forward).parameters)


def bidirectional_images(model: nn.Module) -> bool:
    """Whether positions of an image attend to each other in both directions.

    A class that takes `token_type_ids` and builds image blocks always does; one with
    `mm_token_type_ids` does when its text configuration says "vision".
    """
    name = type_id_name(model)
    modelling = inspect.getmodule(type(unwrap(model)))
    if name is None or not any(hasattr(modelling, maker) for maker in _IMAGE_BLOCK_MAKERS):
        return False
    if name == "token_type_ids":
        return True
    return getattr(text_config(model), "use_bidirectional_attention", None) == "vision"


_walks: ContextVar[dict[int, list[nn.Module]] | None] = ContextVar("walks", default=None)


@contextmanager
def walked_once() -> Iterator[None]:
    """Inside, `every_module` goes through each model once: nothing there may change its modules."""
    token = _walks.set({})
    try:
        yield
    finally:
        _walks.reset(token)


def every_module(model: nn.Module) -> Iterable[nn.Module]:
    """What `model.modules()` gives, in its order, in a third of its time: no names are made."""
    walks = _walks.get()
    if walks is None:
        return _walk(model)
    if id(model) not in walks:
        walks[id(model)] = list(_walk(model))
    return walks[id(model)]


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        if module._modules:
            below = reversed(module._modules.values())
            waiting.extend(child for child in below if child is not None)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold all experts in parameters of rank 3, with their names."""
    for name, module in model.named_modules():
        if _holds_experts(module):
            yield name, module


def _holds_experts(module: nn.Module) -> bool:
    shapes = [p.shape for p in module._parameters.values() if p is not None]
    chains: Any = module._modules.get("parametrizations")
    for chain in chains.values() if chains is not None else ():
        # a packed weight knows the shape that it expands to
        shapes.append(getattr(chain[0], "shape", chain.original.shape))
    return sum(len(shape) == 3 for shape in shapes) >= 2


def is_moe(model: nn.Module) -> bool:
    """Whether the model routes tokens to experts."""
    return any(_holds_experts(module) for module in every_module(unwrap(model)))


def gated_delta_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Pairs (decoder layer, its gated delta network), by the parameters such a network has."""
    for layer in every_module(unwrap(model)):
        for child in layer._modules.values():
            if (
                child is not None
                and "conv1d" in child._modules
                and all(hasattr(child, part) for part in ("A_log", "dt_bias"))
            ):
                yield layer, child


def on_meta(model: nn.Module) -> bool:
    """Whether any parameter has no storage yet."""
    own = (module._parameters.values() for module in every_module(model))
    return any(p is not None and p.is_meta for parameters in own for p in parameters)


def placeholder_ids(model: nn.Module) -> frozenset[int]:
    """Token ids that stand for something other than text, from the top configuration."""
    config = unwrap(model).config
    ids = (
        value
        for key, value in vars(config).items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    )
    return frozenset(ids)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter."""
    return next(iter(model.parameters())).device
