"""When a run's rank processes start: the forkserver beside the collection, and where this process
alone runs the cases, their starts ahead of them (no torch).

The forkserver is the controller's under xdist, the run's own process's otherwise. It begins as soon
as the arguments tell that cases will be spread, else when the cases are known.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

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
        if models and _alone(config):
            _run_ahead(session)


def _alone(config: pytest.Config) -> bool:
    """Does this process run every case, on the CPU?"""
    device = config.getoption("device")
    return not hasattr(config, "workerinput") and device == "cpu" and not config.option.collectonly


def _run_ahead(session: pytest.Session) -> None:
    """Begin the starts of ranks that the cases will read, and put cases on ranks behind the others:
    these run meanwhile."""
    from conformance import ahead
    from conformance.evidence import starts_ahead
    from conformance.plugin import CASE

    places = [n for n, item in enumerate(session.items) if CASE in item.stash]
    items = sorted((session.items[n] for n in places), key=_on_ranks)
    for place, item in zip(places, items, strict=True):
        session.items[place] = item
    subjects = _reading(session.config, [item.stash[CASE] for item in items])
    session.config.add_cleanup(ahead.begin(starts_ahead(subjects, dict(os.environ))))


def _on_ranks(item: pytest.Item) -> bool:
    return "ranks" in item.keywords


def _reading(config: pytest.Config, cases: Iterable[Case]) -> Iterator[Any]:
    """The subjects of those cases that read the evidence of ranks and can be asked here."""
    from conformance.checkpoint import available
    from conformance.plugin import run_of
    from conformance.subject import Subject

    loaded = run_of(config).loaded
    for case in cases:
        if case.model is None or case.check.reads is None or case.check.hardware != "cpu":
            continue
        if not available(case.model) and not loaded.unsupported(case):
            yield Subject(loaded, case)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Who looks for processes left over has this process to itself: tests that are no cases, and
    cases on ranks without a model."""
    from conformance import ahead
    from conformance.plugin import CASE

    case = item.stash.get(CASE, None)
    if case is not None and (case.model is not None or not _on_ranks(item)):
        return (yield)
    with ahead.held():
        return (yield)


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

    tokens = {t for values in DIMENSIONS.values() for t in values.values() if t}
    try:
        return not expression or asked.may_match(expression, names, tokens)
    except SyntaxError:
        return False  # pytest says what is wrong with it
