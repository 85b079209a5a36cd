"""Mutants: the reference with exactly one known bug put back, each naming the check that kills it.

One file a part of the field; every function decorated with `mutant` is one bug. It is given a
`Patch` (pytest's monkeypatch) and puts its bug back with it; or, for a bug that must be there in
forked ranks too, `implementation` names an adapter (`module:attribute`) that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

Apply = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """A bug. case: the id (or a glob over ids) of the case that must fail by assertion.

    crash: exception types, only where the bug itself was a crash. issue: the thread.
    """

    bug: str
    case: str
    issue: str
    symptom: str
    apply: Apply
    name: str
    implementation: str = ""
    crash: tuple[type[BaseException], ...] = ()

    @property
    def killed_by(self) -> str:
        """The id of the check."""
        return self.case.split("/")[0]


MUTANTS: list[Mutant] = []


def mutant(
    bug: str,
    *,
    case: str,
    issue: str,
    implementation: str = "",
    crash: tuple[type[BaseException], ...] = (),
) -> Callable[[Apply], Apply]:
    """Register a bug; the function's docstring is the symptom."""

    def register(apply: Apply) -> Apply:
        symptom = (apply.__doc__ or "").strip().splitlines()[0]
        name = apply.__name__
        MUTANTS.append(Mutant(bug, case, issue, symptom, apply, name, implementation, crash))
        return apply

    return register


def load() -> list[Mutant]:
    """Every mutant of every file of this folder."""
    for path in sorted(Path(__file__).parent.glob("mutants_*.py")):
        import_module(f"tests.mutants.{path.stem}")
    return MUTANTS
