"""What an implementation put in place of what was there, seen from outside, and the calls to it.

A place is where a model finds a function: a name in a modelling module, a class, an instance, one
of its hooks, or a registry of transformers. Nothing is asked of the implementation.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

Key = tuple[int, str]
# transformers' own, given to whole models too, which never call it
_CHECKPOINT = "_gradient_checkpointing_func"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Place(NamedTuple):
    """A function and where it is found. owner: what holds it (a dict, or an object with
    attributes); of: the module instance that alone uses it, None where many do; new: whether
    nothing was there before."""

    owner: Any
    name: Any
    function: Any
    label: str
    of: nn.Module | None = None
    new: bool = False


def places(model: nn.Module) -> dict[Key, Place]:
    """Every place of a transformers model (below its wrappers) that a patch could take."""
    found: dict[Key, Place] = {}

    def add(owner: Any, table: Mapping[Any, Any], label: str, of: nn.Module | None = None) -> None:
        for name, value in table.items():
            if name == _CHECKPOINT:
                continue
            if callable(value) and not isinstance(value, type | nn.Module):
                found[id(owner), str(name)] = Place(owner, name, value, f"{label}.{name}", of)

    for path, module in model.named_modules():
        add(module, vars(module), path, module)
        for hooks in _HOOKS:
            table = getattr(module, hooks)
            add(table, table, f"{path}.{hooks}", module)
    for kind in {k for m in model.modules() for k in type(m).__mro__}:
        if kind.__module__.startswith("transformers."):
            add(kind, vars(kind), kind.__name__)
    for name in {type(m).__module__ for m in model.modules()}:
        if name.startswith("transformers.models."):
            add(sys.modules[name], vars(sys.modules[name]), name.rpartition(".")[2])
    return found


def registered() -> dict[tuple[str, str], Any]:
    """The functions by name in transformers' registries of attention and experts."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tables = {"attention": ALL_ATTENTION_FUNCTIONS, "experts": experts_registry()}
    return {(kind, name): table[name] for kind, table in tables.items() for name in table}


def experts_registry() -> Any:
    """transformers' registry of experts implementations."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


@contextmanager
def counted_experts(name: str | None) -> Iterator[Counter[int]]:
    """How often the experts implementation of a name was called for a module, by the module's id.

    None where the registry has no such name: eager code is the module's own forward.
    """
    calls: Counter[int] = Counter()
    registry = experts_registry()
    function = registry.get(name)
    if function is None:
        yield calls
        return

    @functools.wraps(function)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[id(module)] += 1
        return function(module, *args, **kwargs)

    local = getattr(registry, "_local_mapping", {})
    mine = local.get(name)
    registry[name] = call
    try:
        yield calls
    finally:
        if mine is None:
            del registry[name]
        else:
            registry[name] = mine


def replaced(before: Mapping[Key, Place], after: Mapping[Key, Place]) -> list[Place]:
    """The places that hold another function now, or did not exist."""
    return [
        place._replace(new=key not in before)
        for key, place in after.items()
        if key not in before or before[key].function is not place.function
    ]


@dataclass
class Calls:
    """by_layer: (label of the place, number of the decoder layer that was running or None) → calls.
    children: path of a module inside an owner of a place → calls."""

    by_layer: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    children: Counter[str] = field(default_factory=Counter)

    def layers(self, label: str) -> set[int | None]:
        """The layers (None: outside of them) in which a place was called."""
        return {layer for name, layer in self.by_layer if name == label}

    def children_of(self, owner: nn.Module) -> dict[str, int]:
        """Calls of each leaf module inside the owner of a place, by its path there."""
        return {path: self.children[f"{id(owner)}.{path}"] for path, _ in _leaves(owner)}


@contextmanager
def counted(put: Sequence[Place], layers: Sequence[nn.Module]) -> Iterator[Calls]:
    """Calls of the functions in these places while the context is open; the places are as before
    afterwards."""
    calls, running = Calls(), [None]  # type: tuple[Calls, list[Any]]
    handles: list[Any] = []
    for number, layer in enumerate(layers):
        enter = functools.partial(_set, running, number)
        leave = functools.partial(_set, running, None)
        handles.append(layer.register_forward_pre_hook(enter, prepend=True))
        handles.append(layer.register_forward_hook(leave, always_call=True))
    owners = {id(place.of): place.of for place in put if place.of is not None}
    for owner in owners.values():
        for path, module in _leaves(owner):
            count = functools.partial(_count, calls.children, f"{id(owner)}.{path}")
            handles.append(module.register_forward_pre_hook(count))
    for place in put:
        put_in_place(place, _counting(place, calls.by_layer, running))
    try:
        yield calls
    finally:
        for place in put:
            put_back(place)
        for handle in handles:
            handle.remove()


def _leaves(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules below one that have none below them, by their path."""
    for path, module in owner.named_modules():
        if path and not list(module.children()):
            yield path, module


def _set(running: list[Any], number: int | None, *_: Any) -> None:
    running[0] = number


def _count(counter: Counter[str], name: str, *_: Any) -> None:
    counter[name] += 1


def _counting(place: Place, counter: Counter[Any], running: list[Any]) -> Callable[..., Any]:
    function = place.function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        counter[place.label, running[0]] += 1
        return function(*args, **kwargs)

    return call


def put_back(place: Place) -> None:
    """The place as it was found."""
    put_in_place(place, place.function)


def put_in_place(place: Place, function: Any) -> None:
    """Another function where the model finds this one."""
    if isinstance(place.owner, dict):
        place.owner[place.name] = function
    else:
        setattr(place.owner, place.name, function)
