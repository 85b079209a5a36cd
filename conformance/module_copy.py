"""A deep copy of a model, in half of deepcopy's time: nearly every case takes one.

Most of what a module holds is empty dicts, flags and other modules, which `copy.deepcopy` takes
through its general machinery one by one. Anything else goes through that machinery here too, in
the same memo, so that whatever is shared inside the model is shared inside its copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

_ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device}
)
_DICTS = (dict, OrderedDict)
_PROTOCOL = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")


def copied(model: nn.Module) -> Any:
    """The copy of a module with everything below it; equal to `copy.deepcopy(model)`."""
    return _module(model, {})


def _module(module: nn.Module, memo: dict[int, Any]) -> Any:
    found = memo.get(id(module))
    if found is not None:
        return found
    if not _is_plain(type(module)):
        return copy.deepcopy(module, memo)
    made = memo[id(module)] = type(module).__new__(type(module))
    own = made.__dict__
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _ATOMS:
            own[name] = value
        elif kind in _DICTS and not value:  # hooks, above all: nobody shares an empty one
            own[name] = kind()
        else:
            own[name] = _value(value, memo)
    return made


_plain: dict[type[nn.Module], bool] = {}


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a class leaves copying and pickling as `nn.Module` has them."""
    if kind not in _plain:
        _plain[kind] = all(
            getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _PROTOCOL
        )
    return _plain[kind]


def _value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in _DICTS:
        return _dict(value, memo)
    if isinstance(value, nn.Module):
        return _module(value, memo)
    if kind is nn.Parameter:
        return _parameter(value, memo)
    return copy.deepcopy(value, memo)


def _dict(value: dict[Any, Any], memo: dict[int, Any]) -> dict[Any, Any]:
    found: dict[Any, Any] | None = memo.get(id(value))
    if found is None:
        found = memo[id(value)] = type(value)()
        for key, item in value.items():
            found[key if type(key) in _ATOMS else copy.deepcopy(key, memo)] = _value(item, memo)
    return found


def _parameter(value: nn.Parameter, memo: dict[int, Any]) -> Any:
    """As `Parameter.__deepcopy__`; a tied one is copied once."""
    found = memo.get(id(value))
    if found is None:
        data = value.data.clone(memory_format=torch.preserve_format)
        found = memo[id(value)] = nn.Parameter(data, value.requires_grad)
    return found
