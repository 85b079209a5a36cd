"""A run that asks for cases by their markers does not import the suite's own tests."""

from __future__ import annotations

from itertools import chain, combinations
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression, ExpressionMatcher

# What tests here carry, as is seen to below; cases have markers beyond these.
CARRIED = (
    "bench",
    "hypothesis",
    "launch",
    "parametrize",
    "ranks",
    "skipif",
    "usefixtures",
    "xdist_group",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Nothing is collected below this folder where `-m` can select none of its tests."""
    expression = config.getoption("-m")
    if not expression:
        return None
    try:
        compiled = Expression.compile(expression)
    except SyntaxError:
        return None  # pytest says what is wrong with it
    named = [name for name in CARRIED if name in expression]
    subsets = chain.from_iterable(combinations(named, n) for n in range(len(named) + 1))
    return None if any(compiled.evaluate(_has(subset)) for subset in subsets) else True


def pytest_itemcollected(item: pytest.Item) -> None:
    """UsageError for a marker that would be overlooked above."""
    unknown = {mark.name for mark in item.iter_markers()} - set(CARRIED)
    if unknown:
        raise pytest.UsageError(f"{item.nodeid}: add {sorted(unknown)} to CARRIED in {__file__}")


def _has(names: tuple[str, ...]) -> ExpressionMatcher:
    def has(name: str, /, **_: str | int | bool | None) -> bool:
        return name in names

    return has
