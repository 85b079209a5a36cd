"""Deep copies of a model, in a quarter of deepcopy's time: nearly every case takes one.

Most of what a module holds is empty dicts, flags and other modules, which `copy.deepcopy` takes
through its general machinery one by one. Which attributes these are is read once for all copies of
a model. Anything else goes through that machinery here too, in the same memo, so that whatever is
shared inside the model is shared inside its copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

_ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device}
)
_DICTS = (dict, OrderedDict)
_PROTOCOL = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")


def copied(model: nn.Module) -> Any:
    """The copy of a module with everything below it; equal to `copy.deepcopy(model)`."""
    return Original(model).copy()


class Original:
    """A module that is copied again and again, and changed no more."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts = [(module, *_sorted(module)) for module in _below(model, set())]

    def copy(self) -> Any:
        """One more copy."""
        memo: dict[Any, Any] = {}
        for module, _, _ in self._parts:
            kind = _unparametrized(module) or type(module)
            memo[id(module)] = kind.__new__(kind)
        for module, empty, rest in self._parts:
            own = memo[id(module)].__dict__
            own.update(module.__dict__)
            for name, container in empty:
                own[name] = container()
            for name in rest:
                own[name] = _value(own[name], memo)
        for module, _, _ in self._parts:
            if _unparametrized(module):
                _parametrize(memo[id(module)])
        return _value(self._model, memo)


def _below(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """The module and those below it that are copied attribute by attribute, each once."""
    if id(module) not in seen and _is_plain(_unparametrized(module) or type(module)):
        seen.add(id(module))
        yield module
        for child in module._modules.values():
            if child is not None:
                yield from _below(child, seen)


def _sorted(module: nn.Module) -> tuple[list[tuple[str, Any]], list[str]]:
    """Names of a module's empty containers, with their kinds (hooks, above all: nobody shares an
    empty one), and names of what else has to be copied."""
    empty: list[tuple[str, Any]] = []
    rest: list[str] = []
    for name, value in vars(module).items():
        kind = type(value)
        if (kind in _DICTS or kind is set) and not value:
            empty.append((name, kind))
        elif kind not in _ATOMS:
            rest.append(name)
    return empty, rest


def _unparametrized(module: nn.Module) -> type[nn.Module] | None:
    """The class of a parametrized module before it was, or None: torch gives each such module a
    class of its own, which `deepcopy` shares, so that removing it from one breaks the other."""
    if "parametrizations" not in module._modules:
        return None
    base: type[nn.Module] = type(module).__bases__[0]
    return base


def _parametrize(module: nn.Module) -> None:
    """Give a copy, which has its parametrizations already, the class that goes with them."""
    torch_own: Any = parametrize
    torch_own._inject_new_class(module)
    chains = module._modules["parametrizations"]
    assert isinstance(chains, nn.ModuleDict)
    for name in chains:
        torch_own._inject_property(module, name)


_plain: dict[type[nn.Module], bool] = {}


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a class leaves copying and pickling as `nn.Module` has them."""
    if kind not in _plain:
        _plain[kind] = all(
            getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _PROTOCOL
        )
    return _plain[kind]


def _value(value: Any, memo: dict[Any, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    found = memo.get(id(value))
    if found is not None:
        return found
    if kind in _DICTS:
        return _dict(value, memo)
    if kind is nn.Parameter:
        data = value.data.clone(memory_format=torch.preserve_format)
        made = memo[id(value)] = nn.Parameter(data, value.requires_grad)
        return made
    if kind is torch.Tensor:
        return _tensor(value, memo)
    made = copy.deepcopy(value, memo)
    owner = getattr(made, "module", None) if isinstance(value, nn.Parameter) else None
    if id(owner) in memo:  # a packed parameter of bitsandbytes knows the module that it is of
        made.module = memo[id(owner)]
    return made


def _dict(value: dict[Any, Any], memo: dict[Any, Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = type(value)()
    memo[id(value)] = made
    for key, item in value.items():
        made[key if type(key) in _ATOMS else copy.deepcopy(key, memo)] = _value(item, memo)
    return made


def _tensor(value: torch.Tensor, memo: dict[Any, Any]) -> torch.Tensor:
    """A buffer that fills its storage is cloned, and the storage's copy noted where torch's own
    `__deepcopy__` looks for it; any other is left to that."""
    storage = value.untyped_storage()
    copies = memo.setdefault("torch", {})
    plain = value.is_contiguous() and storage.nbytes() == value.nbytes
    plain = plain and all(type(own) in _ATOMS for own in vars(value).values())
    if not plain or value.requires_grad or value.is_meta or storage._cdata in copies:
        made: torch.Tensor = copy.deepcopy(value, memo)
        return made
    made = memo[id(value)] = value.clone()
    vars(made).update(vars(value))
    copies[storage._cdata] = made.untyped_storage()
    return made
