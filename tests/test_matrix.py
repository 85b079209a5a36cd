"""The default matrix: dealt settings are asked in each family, pairs are met, the rest is full."""

from __future__ import annotations

from itertools import combinations

import pytest

from conformance.case import Case, Check
from conformance.catalogue import checks
from conformance.families import MODELS
from conformance.matrix import cases
from conformance.settings import DIMENSIONS, Setting

CHECKS = [check for check, _ in checks().values() if check.per_model and not check.nightly]
FAMILIES = sorted({model.family for model in MODELS.values()})


def met(found: list[Case]) -> set[tuple[str, str]]:
    """(model, setting id) of cases."""
    return {(c.model.name, c.setting.id) for c in found if c.model}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.id)
def test_every_model_meets_every_check_that_asks_it(check: Check) -> None:
    default, full = (met(cases(check, matrix)) for matrix in ("default", "full"))
    who = (lambda name: MODELS[name].family) if check.one_a_family else str
    assert {who(model) for model, _ in default} == {who(model) for model, _ in full}
    assert default <= full


@pytest.mark.parametrize("check", [c for c in CHECKS if c.dealt], ids=lambda c: c.id)
def test_dealt_settings_are_asked_once_in_each_family(check: Check) -> None:
    default, full = (met(cases(check, matrix)) for matrix in ("default", "full"))
    for setting in check.dealt:
        for family in FAMILIES:
            able = {m for m, s in full if s == setting and MODELS[m].family == family}
            asked = {m for m, s in default if s == setting and MODELS[m].family == family}
            assert len(asked) == min(1, len(able)), f"{setting} in {family}: {sorted(asked)}"


@pytest.mark.parametrize("check", [c for c in CHECKS if c.varies], ids=lambda c: c.id)
def test_arrays_hold_the_pairs_of_the_full_matrix(check: Check) -> None:
    def pairs(found: list[Case]) -> set[object]:
        held: set[object] = set()
        for case in found:
            assert case.model
            where = {"model": case.model.name, "family": case.model.family, "all": ""}
            values = [(name, getattr(case.setting, name)) for name in check.varies]
            if check.pairs_over == "model":
                values.append(("model", case.model.name))
            scope = where["family" if check.pairs_over == "model" else check.pairs_over]
            held |= {(scope, *pair) for pair in combinations(values, 2)}
        return held

    assert pairs(cases(check)) == pairs(cases(check, "full"))


def test_settings_of_checks_are_spelt_in_order() -> None:
    for check in CHECKS:
        for text in (*check.settings, *check.dealt):
            assert Setting.parse(text).id == text
        assert set(check.varies) <= set(DIMENSIONS)
