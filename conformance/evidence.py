"""Evidence shared by the parity checks: each (implementation, model, setting, strategy) runs once.

A start of ranks costs more than what is measured in it, so F01, F02, F07, … read the same one. What
was refused or failed is remembered too, and raised again for every check that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from conformance import ahead, checkpoint, rank_steps, ranks, reading, spread
from conformance.numerics import assert_close_gradients, assert_equal, relative_error, worst
from conformance.spread import Job, Spread
from conformance.strategies import STRATEGIES
from conformance.subject import Subject
from conformance.tolerances import Tolerance, tolerance

Measured = dict[str, float]
T = TypeVar("T")
_kept: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True)
class Evidence:
    """What the ranks saw, by rank, and what one process sees of the same training."""

    ranks: tuple[Spread, ...]
    single: Spread

    @property
    def first(self) -> Spread:
        """Rank 0's: the only one with tensors."""
        return self.ranks[0]


def forget() -> None:
    """Drop all evidence (between implementations of one process)."""
    _kept.clear()


def evidence(subject: Subject) -> Evidence:
    """The evidence of the subject's case; raises what its start raised, refusals unwrapped.

    Beside the step it has what the selected checks of the case's model, setting and strategy read.
    """
    parts = reading.parts_of_all(subject.case)

    def single() -> Spread:
        return run_alone(subject, partial(spread.observe, parts=parts), options)

    subject.plan()  # a refusal costs nothing
    options = oracle_options(subject)
    # first: the forkserver is still importing
    one = _once((*_where(subject), parts, repr(options)), single)
    key = start_key(subject)
    ranks = _once(key, lambda: ahead.taken(key, partial(spreading, subject)))
    return Evidence(ranks, one)


def _where(subject: Subject) -> tuple[Any, ...]:
    return (
        subject.loaded.spec,
        subject.model_spec.name,
        subject.case.setting,
        subject.device,
    )


def start_key(subject: Subject) -> tuple[Any, ...]:
    """What tells the start of a case's evidence from others."""
    return (*_where(subject), reading.parts(subject.case), subject.case.strategy)


def spreading(subject: Subject, environment: Mapping[str, str] | None = None) -> tuple[Spread, ...]:
    """The start of a case's evidence: what each rank saw."""
    fn = partial(spread.observe, parts=reading.parts(subject.case))
    return tuple(run(subject, fn, oracle_options(subject), environment=environment))


def starts_ahead(
    subjects: Iterable[Subject], environment: Mapping[str, str]
) -> Iterator[tuple[Hashable, Callable[[], tuple[Spread, ...]]]]:
    """The starts that the cases will read, in their order; none of what cannot be planned.

    All that one needs of this process is made before it is given, so that it can run on a thread.
    """
    for subject in subjects:
        try:
            subject.plan(options=oracle_options(subject))
            checkpoint.checkpoint(subject.model_spec)
        except Exception:
            continue  # the case itself will say why
        yield start_key(subject), partial(spreading, subject, environment)


def saved_adapter(subject: Subject) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What `save` writes from ranks, and from one process: of the step's own start, or of a start
    that only saves where a step cannot be taken."""
    try:
        seen = evidence(subject)
        return seen.first.saved, seen.single.saved
    except ranks.RankFailed:
        want = run_alone(subject, rank_steps.saved_adapter, oracle_options(subject))
        return run(subject, rank_steps.saved_adapter)[0], want


def oracle_options(subject: Subject) -> dict[str, Any]:
    """What one process must be told to adapt the modules that the spread plan adapts."""
    if subject.case.setting.tuning == "full":
        return {}
    targets = subject.plan().decisions["lora_target_modules"].value
    return {"lora_targets": targets} if isinstance(targets, str) else {}


def run(
    subject: Subject,
    fn: Callable[[Job], T],
    options: Mapping[str, Any] | None = None,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[T]:
    """`fn(job)` on each of the strategy's ranks; a rank's refusal is raised as a refusal.

    fn: a module-level function, or a partial of one. options: of the plan.
    """
    subject.plan(options=options)  # a refusal costs no start
    return start(subject, fn, options, timeout, environment)


def start(
    subject: Subject,
    fn: Callable[[Job], T],
    options: Mapping[str, Any] | None = None,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[T]:
    """As `run`, whatever the implementation's plan says of the case."""
    case = subject.case
    assert subject.loaded.spec, f"{case.id}: ranks cannot load {subject.name}: it has no spec"
    path = checkpoint.checkpoint(subject.model_spec)
    kind = "cuda" if subject.device.startswith("cuda") else "cpu"
    rest = (subject.loaded.spec, case, fn, path, dict(options or {}))
    try:
        return ranks.run(
            case.strategy.ranks, spread.on_rank, *rest,
            device=kind, timeout=timeout, environment=environment,
        )  # fmt: skip
    except ranks.RankFailed as failed:
        if isinstance(failed.error, subject.refusals):
            raise failed.error from failed
        raise


def under(subject: Subject, strategy: str) -> Subject:
    """The same case under another strategy."""
    return replace(subject, case=replace(subject.case, strategy=STRATEGIES[strategy]))


def once(subject: Subject, fn: Callable[[Job], T]) -> list[T]:
    """As `run`, for what several checks of a case's model, setting and strategy read."""
    case = subject.case
    where = (subject.loaded.spec, subject.model_spec.name, case.setting, subject.device)
    return _once((*where, case.strategy, fn), lambda: run(subject, fn))


def run_alone(
    subject: Subject, fn: Callable[[Job], T], options: Mapping[str, Any] | None = None
) -> T:
    """`fn(job)` in this process under `single`: the oracle."""
    path = checkpoint.checkpoint(subject.model_spec)
    return spread.alone(subject, fn, path, dict(options or {}))


def _once(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """The value of a key, made once; an error is made once as well."""
    if key not in _kept:
        try:
            _kept[key] = make()
        except Exception as error:
            _kept[key] = error
    found = _kept[key]
    if isinstance(found, Exception):
        raise found
    result: T = found
    return result


def row_of(subject: Subject, what: str = "gradients") -> Tolerance:
    """The tolerance row of the case's strategy and family class."""
    case = subject.case
    kind = {"cp": "context-parallel", "tp": "tensor-parallel", "tp_ep": "tensor-parallel"}
    if what == "gradients":
        kind["hsdp"] = "hybrid"
    row = kind.get(case.strategy.name, "data-parallel")
    return tolerance(f"{what}/{row}", subject.numerics)


def without_zeros(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without gradients that are all zero where one process has none (FSDP1's flat ones)."""
    return {name: g for name, g in got.items() if name in want or bool(g.any())}


def assert_parity(
    subject: Subject, got: Mapping[str, Tensor], want: Mapping[str, Tensor], row: Tolerance,
    measured: Measured, what: str,
) -> None:  # fmt: skip
    """Every gradient is that of one process."""
    kept = without_zeros(got, want)
    assert_close_gradients(subject.case.id, kept, want, row, measured, what)


def assert_number(
    subject: Subject, got: float, want: float, row: Tolerance, measured: Measured, what: str
) -> None:
    """A number within tolerance; recorded as `what`."""
    error = abs(got - want) / max(abs(want), 1e-12)
    measured[what] = error
    assert error <= row.limit, (
        f"{subject.case.id}: {what} is {got:.9g}, one process has {want:.9g}: off by {error:.3g}, "
        f"tolerance {row.limit:g} ({row.name}, noise {row.observed:g})"
    )


def assert_parameters(
    subject: Subject, got: Mapping[str, Tensor], want: Mapping[str, Tensor], row: Tolerance,
    measured: Measured,
) -> None:  # fmt: skip
    """Every parameter after the step is that of one process; the worst is recorded."""
    assert want and set(got) == set(want), f"{subject.case.id}: {sorted(set(got) ^ set(want))[:3]}"
    errors = {name: relative_error(got[name], p).frobenius for name, p in want.items()}
    name, value = worst(errors)
    measured["parameters"] = value
    assert value <= row.limit, (
        f"{subject.case.id}: after one float64 step {name} is off by {value:.3g}, tolerance "
        f"{row.limit:g} ({row.name}, noise {row.observed:g})"
    )


def assert_step(subject: Subject, seen: Evidence, measured: Measured) -> None:
    """Loss, every gradient, and every parameter after one float64 step are those of one process."""
    first, single = seen.first, seen.single
    assert single.loss and single.gradients, f"{subject.case.id}: one process trains nothing"
    row = row_of(subject)
    assert_number(subject, first.loss, single.loss, tolerance("loss/spread"), measured, "loss")
    assert_parity(subject, first.gradients, single.gradients, row, measured, "gradients")
    if "exact" not in (subject.case.check.reads or ()):
        return
    exact = row_of(subject, "parameters")
    assert_parameters(subject, first.parameters, single.parameters, exact, measured)


def assert_saved(
    subject: Subject, got: Mapping[str, Tensor], want: Mapping[str, Tensor], measured: Measured
) -> None:
    """The adapter on disk is bitwise the one that one process writes."""
    where = subject.case.id
    assert len(want) > 2 and any(bool(t.any()) for t in want.values()), f"{where}: no adapter"
    assert set(got) == set(want), f"{where}: keys {sorted(set(got) ^ set(want))[:3]}"
    for name, tensor in want.items():
        shape = tuple(got[name].shape)
        assert shape == tuple(tensor.shape), f"{where}: {name} was saved as {shape}"
        assert_equal(where, name, got[name], tensor, {})
    measured["tensors"] = len(want)


def same_on_all(values: Sequence[Any]) -> bool:
    """Whether all ranks have one value."""
    return all(value == values[0] for value in values)
