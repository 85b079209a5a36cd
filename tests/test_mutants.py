"""The suite proves itself: the reference passes, every mutant dies, no check is without one."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from conformance import subject
from conformance.case import Case
from conformance.catalogue import checks, run_check
from conformance.implementation import load
from conformance.matrix import cases
from tests.mutants import Mutant
from tests.mutants import load as load_mutants
from tests.mutants.__main__ import HEADER, table

MUTANTS = load_mutants()


def _case(mutant: Mutant) -> Case:
    check, _ = checks()[mutant.killed_by]
    matrix = "full" if check.nightly else "default"
    found = [c for c in cases(check, matrix) if fnmatchcase(c.id, mutant.case)]
    assert found, f"{mutant.name}: no case matches {mutant.case}"
    return found[0]


@pytest.fixture(autouse=True)
def _no_model_is_kept() -> None:
    subject.forget_models()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.killed_by}-{m.bug}-{m.name}")
def test_mutant_dies(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(mutant)
    run_check(case, load("reference"))
    subject.forget_models()
    mutant.apply(monkeypatch)
    loaded = load(mutant.implementation or "reference")
    with pytest.raises(mutant.crash or AssertionError):
        run_check(case, loaded)
    monkeypatch.undo()
    subject.forget_models()


def test_every_correctness_check_kills_a_mutant() -> None:
    killers = {m.killed_by for m in MUTANTS}
    owed = {c.id for c, _ in checks().values() if c.correctness and c.hardware == "cpu"}
    assert not owed - killers, f"checks that kill no mutant: {sorted(owed - killers)}"


def test_mutants_name_checks_that_exist() -> None:
    unknown = {m.killed_by for m in MUTANTS} - set(checks())
    assert not unknown, f"mutants name checks that do not exist: {sorted(unknown)}"


def test_the_published_table_has_a_row_a_mutant() -> None:
    lines = table(MUTANTS).splitlines()
    assert len(lines) == len(HEADER) + len(MUTANTS)
    columns = HEADER[0].count("|")
    crooked = [line for line in lines if line.replace(r"\|", "").count("|") != columns]
    assert not crooked, f"rows with another number of columns: {crooked[:2]}"
