"""A rank that hangs, dies, raises or leaves a collective out ends the case, and nothing stays."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from conformance import rank_failures, ranks
from conformance.case import Case
from conformance.check import check

Measured = dict[str, float]
DEADLINE = 2.0
# failure -> (what is raised, the rank that is blamed, words of its message)
FAILURES: dict[str, tuple[Callable[..., Any], type[Exception], int | None, str]] = {
    "hung": (rank_failures.hung, Exception, None, "rank 1"),
    "killed in the forward": (
        rank_failures.killed_in_forward, ranks.RankFailed, 1, "SIGKILL at: forward of layer 0",
    ),
    "killed in a collective": (
        rank_failures.killed_in_collective, ranks.RankFailed, 1, "SIGKILL at: all-reduce",
    ),
    "raising": (rank_failures.raising, ranks.RankFailed, 1, "Deliberate: on purpose"),
    "skipping a collective": (rank_failures.skipping, ranks.RankFailed, 0, "all_reduce"),
}  # fmt: skip


def left_over() -> list[str]:
    """Scratch directories of this process's ranks (other workers have theirs)."""
    mine = f"conformance-ranks-{os.getpid()}-"
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(mine)]


def failure_of(fn: Callable[..., Any]) -> tuple[Exception | None, float]:
    """What running `fn` on two ranks raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        ranks.run(2, fn, timeout=DEADLINE)
    except (ranks.RankFailed, ranks.RanksTimeout) as error:
        return error, time.monotonic() - begin
    return None, time.monotonic() - begin


@check("F17", per_model=False, marks=("ranks",))
def test_failing_rank_ends_the_case(case: Case, measured: Measured) -> None:
    """A hung, killed, raising or skipping rank ends in time, named, and nothing of it stays.

    https://github.com/huggingface/accelerate/issues/4021
    """
    before = set(left_over())
    assert ranks.run(2, rank_failures.healthy) == [3, 3], f"{case.id}: healthy ranks fail"
    for what, (fn, kind, blamed, words) in FAILURES.items():
        error, seconds = failure_of(fn)
        measured[f"seconds, {what}"] = seconds
        assert isinstance(error, kind), f"{case.id}: {what}: no error"
        assert words in str(error), f"{case.id}: {what}: the message lacks {words!r}: {error}"
        if blamed is not None:
            assert getattr(error, "rank", None) == blamed, f"{case.id}: {what}: blames {error}"
        assert seconds < DEADLINE + 4, f"{case.id}: {what} took {seconds:.1f} s"
        alive = [p for p in multiprocessing.active_children() if p.is_alive()]
        assert not alive, f"{case.id}: {what}: {alive} still run"
    assert set(left_over()) <= before, f"{case.id}: {set(left_over()) - before} stay on the disk"
    assert ranks.run(2, rank_failures.healthy) == [3, 3], f"{case.id}: the next case is affected"
