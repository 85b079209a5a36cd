"""What the selected checks read of a start's evidence, so that a start takes no more (no torch).

The step in the setting's dtype is always there; its further parts are `Check.reads`. All cases of
one (model, setting, strategy) share a start, so it takes what any of them reads.
"""

from __future__ import annotations

from collections.abc import Iterable

from conformance.case import Case
from conformance.settings import Setting
from conformance.strategies import Strategy

Key = tuple[str, Setting, Strategy]
_read: dict[Key, set[str]] = {}


def expect(cases: Iterable[Case]) -> None:
    """Name the cases that this run will ask, before the first of them."""
    _read.clear()
    for case in cases:
        if case.model is not None:
            key = (case.model.name, case.setting, case.strategy)
            _read.setdefault(key, set()).update(case.check.reads or ())


def parts(case: Case) -> frozenset[str]:
    """What the checks of the case's model, setting and strategy read."""
    assert case.model is not None, f"{case.id} has no model"
    key = (case.model.name, case.setting, case.strategy)
    return frozenset(case.check.reads or ()) | frozenset(_read.get(key, ()))


def parts_of_all(case: Case) -> frozenset[str]:
    """The same over every strategy: what one process, which all are held against, must have."""
    assert case.model is not None, f"{case.id} has no model"
    name, found = case.model.name, set(case.check.reads or ())
    for (model, setting, _), read in _read.items():
        if (model, setting) == (name, case.setting):
            found |= read
    return frozenset(found)
