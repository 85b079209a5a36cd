"""Replace an attribute of a module or class for as long as anyone needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_HELD: dict[tuple[int, str], list[Any]] = {}  # (owner, name) -> [owner, original, count]


def swap(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Set `owner.name` to `make(original)`; the returned function gives it back, once.

    Counted: a second model that needs the same replacement shares it, and the original returns
    with the last one. The original is taken from `vars`, so a staticmethod stays one.
    """
    key = (id(owner), name)
    if key not in _HELD:
        original = vars(owner)[name]
        setattr(owner, name, make(original))
        _HELD[key] = [owner, original, 0]
    _HELD[key][2] += 1
    held = True

    def release() -> None:
        nonlocal held
        if not held:
            return
        held = False
        entry = _HELD[key]
        entry[2] -= 1
        if entry[2] == 0:
            setattr(owner, name, entry[1])
            del _HELD[key]

    return release


def swapped() -> int:
    """How many attributes are replaced now; 0 means nothing global is left."""
    return len(_HELD)
