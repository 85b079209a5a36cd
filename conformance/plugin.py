"""The pytest plugin: options, markers, cases, expectations, verdicts and the record of a run.

It loads in every pytest run of an environment in which the suite is installed, so it imports no
torch and does nothing until one of our checks is collected.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance import asked, starting

if TYPE_CHECKING:
    from conformance.case import Case
    from conformance.implementation import Loaded

DEFAULT = "reference"
CASE = pytest.StashKey["Case"]()
RUN = pytest.StashKey["Run"]()
TIERS = {
    "ranks": "cases that start rank processes",
    "process": "cases of one process",
    "kernels": "the experts and cross-entropy kernels",
    "packing": "packed rows",
    "quantization": "4-bit base weights",
    "training": "whole trainings and their loops",
    "launch": "cases that go through torchrun or accelerate launch",
    "smoke": "is the adapter sane, apart from being right",
    "bench": "benchmarks: figures, never assertions",
    "gpu": "cases that need a GPU",
    "schema": "snapshots of what a version exposes",
    "issues": "the specification's table of common issues",
}


class Run:
    """What one run knows: the implementation, and a row for each case."""

    def __init__(self, config: pytest.Config) -> None:
        from conformance.implementation import AdapterError, load

        try:
            self.loaded: Loaded = load(config.getoption("impl"))
        except AdapterError as error:
            raise pytest.UsageError(str(error)) from None
        self.config = config
        self.case_ids: list[str] = []
        self.checks: dict[str, tuple[str, str]] = {}
        self.files: set[Path] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's options; they are declared here since a packaged conftest comes too late."""
    group = parser.getgroup("conformance", "conformance of fine-tuning stacks")
    group.addoption(
        "--impl",
        default=DEFAULT,
        metavar="NAME",
        help="implementation to judge: reference, transformers, or package.module:attribute",
    )
    group.addoption(
        "--matrix",
        default="default",
        choices=("default", "full"),
        help="which cases: the covering matrix, or the whole product (nightly)",
    )
    group.addoption(
        "--case",
        action="append",
        default=[],
        metavar="GLOB",
        help="only cases whose id matches, such as 'M05/gemma4-e2b/*'; may be given several times",
    )
    group.addoption(
        "--report", default=None, metavar="FILE", help="write the run's report.json to FILE"
    )
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the cases run")
    group.addoption(
        "--shard", default=None, metavar="I/N", help="only the I-th of N parts (counting from 1)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register every marker that a case can carry."""
    from conformance.case import TRAITS
    from conformance.settings import DIMENSIONS
    from conformance.strategies import STRATEGIES

    try:
        from conformance.families import MODELS
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"conformance/families: {error}") from error
    names: dict[str, str] = {}
    for model in MODELS.values():
        names.setdefault(model.family, "model family")
        names.setdefault(model.name, "model")
    names.update(dict.fromkeys(TRAITS, "trait of the model"))
    for tokens in DIMENSIONS.values():
        names.update({token: "setting" for token in tokens.values() if token})
    names.update({s.name: f"strategy: {s.claim}" for s in STRATEGIES.values()})
    names.update(TIERS)
    names["xdist_group(name)"] = (
        "one worker for all of a group (xdist's own, where it is installed)"
    )
    for name, meaning in names.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.pluginmanager.register(starting, "conformance-starting")


def run_of(config: pytest.Config) -> Run:
    """The run's record; the implementation is loaded on first use."""
    if RUN not in config.stash:
        config.stash[RUN] = Run(config)
    return config.stash[RUN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The only place that turns a check into cases."""
    from conformance.check import check_of
    from conformance.matrix import cases

    check = check_of(metafunc.function)
    if check is None:
        return
    run = run_of(metafunc.config)
    found = cases(check, metafunc.config.getoption("matrix"))
    run.case_ids += [case.id for case in found]
    told = (check.claim, check.motivation)
    if run.checks.setdefault(check.id, told) != told:
        raise ValueError(f"check id {check.id} is taken; give {check.name} the next free number")
    run.files.add(Path(metafunc.definition.path))
    wanted = metafunc.config.getoption("case")
    if wanted:
        found = [c for c in found if any(fnmatchcase(c.id, glob) for glob in wanted)]
    metafunc.parametrize("case", [_param(case, run) for case in found])


def _param(case: Case, run: Run) -> Any:
    from conformance.expectation import expected

    marks = [getattr(pytest.mark, name) for name in case.marks]
    if "ranks" not in case.marks and case.strategy.ranks == 1:
        marks.append(pytest.mark.process)
        if case.model:  # one worker makes what the cases of a model and tuning copy
            marks.append(pytest.mark.xdist_group(f"{case.model.name}:{case.setting.tuning}"))
    else:
        # one worker has all of a model's starts, and the one process that they are held against
        group = f"{case.model.name}:{case.setting.tuning}:ranks" if case.model else "ranks"
        marks.append(pytest.mark.xdist_group(group))
    known = expected(case.id, run.loaded.expectations)
    if known and run.loaded.unsupported(case) is None:
        marks.append(
            pytest.mark.xfail(
                strict=True, raises=known.raises, reason=f"{known.reason} ({known.issue})"
            )
        )
    return pytest.param(case, id=case.id, marks=marks)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remember each item's case, refuse stale expectations, and cut the shard."""
    for item in items:
        spec = getattr(item, "callspec", None)
        case = spec.params.get("case") if spec else None
        if case is not None and hasattr(case, "check"):
            item.stash[CASE] = case
    _drop_empty(config, items)
    if RUN in config.stash:
        _refuse_stale(config.stash[RUN])
    index, count = asked.shard(config)
    items[:] = items[index - 1 :: count]


def _drop_empty(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Checks of which `--case` leaves nothing, which pytest would show as skips, and beside
    `--case` every test that is no case."""
    from conformance.check import check_of

    narrowed = bool(config.getoption("case"))
    bare = [item for item in items if CASE not in item.stash]
    empty = [i for i in bare if narrowed or check_of(getattr(i, "function", None))]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in set(empty)]


def _refuse_stale(run: Run) -> None:
    """UsageError for expectations that match no case, if every check was collected."""
    from conformance.expectation import stale

    here = Path(__file__).parent / "checks"
    if not {path.resolve() for path in here.glob("test_*.py")} <= {p.resolve() for p in run.files}:
        return
    found = stale(run.case_ids, run.loaded.expectations)
    if not found:
        return
    text = "; ".join(e.pattern for e in found)
    message = f"{run.loaded.name}: expectations that match no case (remove or mend them): {text}"
    if hasattr(run.config, "workeroutput"):
        run.config.workeroutput["conformance_stale"] = message
        return
    raise pytest.UsageError(message)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The two skips: what is not claimed, and what this machine lacks."""
    case = item.stash.get(CASE, None)
    if case is None:
        return
    run = run_of(item.config)
    reason = _model_missing(case) or run.loaded.unsupported(case)
    if reason:
        _skip(item, "unsupported", reason)
    lacking = _hardware_missing(case, item.config.getoption("device"))
    if lacking:
        _skip(item, "unavailable", lacking)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """An implementation that declines a combination loudly is `unsupported` there, with its reason.

    Not in the default setting on one process: who refuses that claims too much.
    """
    try:
        return (yield)
    except Exception as raised:
        error = _of_the_rank(raised)
        case = pyfuncitem.stash.get(CASE, None)
        if case is None or not isinstance(error, run_of(pyfuncitem.config).loaded.refusals):
            raise error from (raised if error is not raised else None)
        if not case.setting.tokens and case.strategy.name == "single":
            raise
        _skip(pyfuncitem, "unsupported", f"refuses: {_first_line(error)}")
        raise


def _of_the_rank(error: Exception) -> Exception:
    """The first failing rank's own exception, with where and how it failed as a note: reports and
    expectations name what really happened. RankFailed itself where a rank died."""
    from conformance.ranks import RankFailed

    own = error.error if isinstance(error, RankFailed) else None
    if not isinstance(own, Exception):
        return error
    own.add_note(str(error))
    return own


def _skip(item: pytest.Item, verdict: str, reason: str) -> None:
    item.user_properties.append(("verdict", verdict))
    pytest.skip(f"{verdict}: {reason}")


def _model_missing(case: Case) -> str | None:
    if case.model is None:
        return None
    from conformance.checkpoint import available

    return available(case.model)


def _hardware_missing(case: Case, device: str) -> str | None:
    from conformance import ranks

    if ranks.in_place() and case.strategy.ranks not in (1, present := ranks.launched_ranks()):
        return f"needs {case.strategy.ranks} ranks, the launcher started {present}"
    if ranks.in_place() and {"ranks", "launch"} & set(case.check.marks):
        return "starts processes of its own, which ranks of a launcher do not"
    if case.check.hardware == "cpu" and device == "cpu":
        return None
    import torch

    count = torch.cuda.device_count()
    needed = case.strategy.ranks if device == "cuda" else 1
    if case.check.hardware != "cpu" and device == "cpu":
        return "needs a GPU (run with --device cuda)"
    return None if count >= needed else f"needs {needed} GPUs, this machine has {count}"


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """Numbers that go into the case's row of the report."""
    numbers: dict[str, float] = {}
    yield numbers
    request.node.user_properties.append(("measured", numbers))


@pytest.fixture
def curve(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Call it with a figure's name, what it shows, a series' name and its values, one a step (or
    every so many steps): the page draws them."""
    drawn: list[tuple[str, str, str, list[tuple[int, float]]]] = []

    def draw(figure: str, metric: str, series: str, values: Any, every: int = 1) -> None:
        points = [((i + 1) * every, float(value)) for i, value in enumerate(values)]
        drawn.append((figure, metric, series, points))

    yield draw
    request.node.user_properties.append(("curves", drawn))


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The implementation under test, bound to the case."""
    from conformance.subject import bound

    case = request.node.stash[CASE]
    run = run_of(request.config)
    with bound(run.loaded, case, request.config.getoption("device")) as found:
        yield found


@pytest.fixture
def unavailable(request: pytest.FixtureRequest) -> Any:
    """Call it with a reason where this machine lacks what the case or test needs."""

    def decline(reason: str) -> None:
        _skip(request.node, "unavailable", reason)

    return decline


@pytest.fixture
def unsupported(request: pytest.FixtureRequest) -> Any:
    """Call it with a reason where the implementation or a version lacks what is asked."""

    def decline(reason: str) -> None:
        _skip(request.node, "unsupported", reason)

    return decline


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Attach the case id and, to a failure, its kind and the command that repeats it."""
    outcome = yield
    case = item.stash.get(CASE, None)
    if case is None:
        return
    report = outcome.get_result()  # type: ignore[attr-defined]
    properties: list[tuple[str, object]] = [("case_id", case.id)]
    if call.excinfo is not None and not report.skipped:
        error = call.excinfo.value
        properties += [
            ("exception", type(error).__name__),
            ("assertion", isinstance(error, AssertionError)),
            ("message", _first_line(error)),
        ]
        report.sections.append(("repeat with", repeat_command(case.id, item.config)))
        properties.append(("where", _place(call.excinfo)))
    known = _expectation(item)
    if known is not None:
        properties += [
            ("expected", known.pattern),
            ("reason", known.reason),
            ("issue", known.issue),
        ]
    report.user_properties = [*report.user_properties, *properties]


def _expectation(item: pytest.Item) -> Any:
    from conformance.expectation import expected

    if item.get_closest_marker("xfail") is None:
        return None
    return expected(item.stash[CASE].id, run_of(item.config).loaded.expectations)


def _place(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    last = excinfo.traceback[-1]
    return f"{Path(last.path).name}:{last.lineno + 1}"


def _first_line(error: BaseException) -> str:
    """What an error says first; more of it where that line only opens a bracket."""
    text = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
    line = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    if line.rstrip().endswith(("(", "[", "{", ":")):
        whole = " ".join(text.split())
        line = whole if len(whole) <= 400 else f"{whole[:150]} … {whole[-240:]}"
    return line


def repeat_command(case_id: str, config: pytest.Config) -> str:
    """The one command that repeats a case."""
    options = "".join(
        f" --{name} {config.getoption(name)}"
        for name, default in (("impl", "reference"), ("device", "cpu"), ("matrix", "default"))
        if config.getoption(name) != default
    )
    return f"pytest --pyargs conformance --case '{case_id}'{options}"


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Load an implementation that was named, so that a wrong name costs no collection; record on
    the controller only."""
    asked.refuse_mistakes(session.config)
    if session.config.getoption("impl") != DEFAULT:
        run_of(session.config)
    from conformance import ranks

    starting.begin(session.config)
    if not hasattr(session.config, "workerinput") and ranks.reporter():
        from conformance.recording import Recorder

        session.config.pluginmanager.register(Recorder(session.config, RUN), "conformance-recorder")
