"""The decorator that turns a test function into a check (no torch is imported here)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from conformance.case import TRAITS, Check
from conformance.implementation import METHODS
from conformance.settings import Setting
from conformance.strategies import STRATEGIES

F = TypeVar("F", bound=Callable[..., None])
ATTRIBUTE = "conformance_check"


def check(
    id: str,
    *,
    needs: Iterable[str] = (),
    traits: Iterable[str] = (),
    without: Iterable[str] = (),
    any_of: Iterable[str] = (),
    **rest: Any,
) -> Callable[[F], F]:
    """Declare a test function as the check `id`; the docstring's first line is its claim and its
    last line the thread or document that motivates it. See `Check` for the other arguments.

    Raises TypeError when the function has no docstring of at least two lines, ValueError for a
    capability, trait, setting or strategy that does not exist: such a check would ask nothing.
    """

    def declare(function: F) -> F:
        lines = [line.strip() for line in (inspect.getdoc(function) or "").splitlines() if line]
        if len(lines) < 2:
            raise TypeError(f"check {id}: its docstring needs a claim and, last, its motivation")
        spec = Check(
            id,
            needs=tuple(needs),
            traits=frozenset(traits),
            without=frozenset(without),
            any_of=frozenset(any_of),
            name=function.__name__,
            claim=lines[0],
            motivation=lines[-1],
            **rest,
        )
        _refuse_unknown(spec)
        setattr(function, ATTRIBUTE, spec)
        return function

    return declare


def _refuse_unknown(spec: Check) -> None:
    named = {
        "capability": (spec.needs, METHODS),
        "trait": (spec.traits | spec.without | spec.any_of, TRAITS),
        "strategy": (spec.strategies, STRATEGIES),
    }
    for kind, (names, known) in named.items():
        for name in names:
            if name not in known:
                raise ValueError(f"check {spec.id}: no {kind} {name!r}; known: {', '.join(known)}")
    for text in (*spec.settings, *spec.dealt):
        try:
            Setting.parse(text)
        except ValueError as error:
            raise ValueError(f"check {spec.id}: {error}") from None


def check_of(function: object) -> Check | None:
    """The check that a test function declares, if any."""
    found = getattr(function, ATTRIBUTE, None)
    return found if isinstance(found, Check) else None
