"""When a run's rank processes start: the forkserver beside the collection, and where this process
alone runs the cases, their starts ahead of them (no torch).

The forkserver is the controller's under xdist, the run's own process's otherwise. It begins as soon
as the arguments tell that cases will be spread, else when the cases are known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.mark.expression import Expression

from conformance import asked

if TYPE_CHECKING:
    from conformance.case import Case

_TOLD = "conformance_ranks"  # what the controller tells its workers


def begin(config: pytest.Config) -> None:
    """Start the forkserver if the arguments tell that cases will be spread; a worker uses its
    controller's."""
    from conformance import rank_server, ranks

    worker = getattr(config, "workerinput", None)
    if worker is not None:
        rank_server.use(worker.get(_TOLD, {}))
    elif not ranks.in_place():
        _warm(config, _foreseen(config))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist's controller, before each worker starts."""
    from conformance import rank_server

    node.workerinput[_TOLD] = rank_server.told()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell the rank processes which models the selected cases spread, and what is read of them."""
    from conformance import ranks, reading
    from conformance.plugin import CASE

    cases = [item.stash[CASE] for item in session.items if CASE in item.stash]
    reading.expect(cases)
    config = session.config
    runs = hasattr(config, "workerinput") or config.getoption("dist", "no") == "no"
    if runs and not ranks.in_place():
        models = [case.model.name for case in cases if case.model and case.strategy.ranks > 1]
        _warm(config, dict.fromkeys(models))


def _warm(config: pytest.Config, models: Collection[str]) -> None:
    """Start the forkserver in the background, once, for these models."""
    from conformance import ranks

    if models and not config.option.collectonly:
        ranks.expect(models, config.getoption("impl"))
        ranks.warm()


def _foreseen(config: pytest.Config) -> list[str]:
    """The models whose cases a run will spread, as far as its arguments tell: none where they
    select otherwise than by `-m`."""
    from conformance.families import MODELS
    from conformance.strategies import STRATEGIES

    narrowed = any("::" in arg or arg.endswith(".py") for arg in config.args)
    if narrowed or config.getoption("case") or config.option.keyword:
        return []
    if not asked.for_checks(config):
        return []
    expression = config.getoption("-m")
    spread = [s for s in STRATEGIES.values() if s.ranks > 1]
    return [
        model.name
        for model in MODELS.values()
        for names in [{model.family, model.name, *model.traits}]
        if any(
            strategy.applies_to(model.traits)
            and _may_match(expression, {*names, strategy.name, "ranks"})
            for strategy in spread
        )
    ]


def _may_match(expression: str, names: Collection[str]) -> bool:
    """Whether a case with these markers, and any tokens of a setting, can match."""
    from conformance.settings import DIMENSIONS

    if not expression:
        return True
    tokens = {t for values in DIMENSIONS.values() for t in values.values() if t}
    open_ = sorted(tokens & set(re.findall(r"[\w+-]+", expression)))
    try:
        compiled = Expression.compile(expression)
    except SyntaxError:
        return False  # pytest says what is wrong with it
    for present in product((False, True), repeat=len(open_)):
        has = {*names, *(token for token, here in zip(open_, present, strict=True) if here)}
        if compiled.evaluate(lambda name, /, _has=has, **_: name in _has):
            return True
    return False
