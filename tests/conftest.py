"""A run that asks for cases by their markers does not import the suite's own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import asked

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
        return None if asked.may_match(expression, (), CARRIED) else True
    except SyntaxError:
        return None  # pytest says what is wrong with it


def pytest_itemcollected(item: pytest.Item) -> None:
    """UsageError for a marker that would be overlooked above."""
    unknown = {mark.name for mark in item.iter_markers()} - set(CARRIED)
    if unknown:
        raise pytest.UsageError(f"{item.nodeid}: add {sorted(unknown)} to CARRIED in {__file__}")
