"""Fresh rank processes in a tenth of a second, and the same call in place under `torchrun`.

`run(2, fn, ...)` forks two ranks from one preloaded forkserver, meets them through a FileStore, and
returns what `fn` returned on each. Every start is fresh, never a pool. A rank that raises or dies
is a `RankFailed` with its number and traceback; a rank that hangs is a `RanksTimeout` with every
rank's stack. Whatever happens, the processes are gone and the disk is clean when the call ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from conformance import rank_server
from conformance.rank_process import (
    Outcome,
    RankContext,
    Start,
    dumps,
    loads,
    rank_main,
    run_in_place,
)
from conformance.rank_server import expect, preload, warm

__all__ = [
    "RankContext",
    "RankFailed",
    "RanksTimeout",
    "WrongWorldSize",
    "expect",
    "in_place",
    "launched_ranks",
    "preload",
    "reporter",
    "run",
    "warm",
]

START_SECONDS = 240.0
"""For the forkserver's own start (4 s alone on two cores, far more on a crowded machine)."""
GRACE_SECONDS = 0.5
"""After a first failure: time for a killed rank to show itself before its peers' complaints are
believed."""
REAPED_SECONDS = 5.0
"""For the forkserver to say how a rank ended whose pipe is closed: it is dead, the word is late."""
OUTPUT_TAIL = 2000
"""Characters of a failing rank's output that its error carries."""


class RankFailed(Exception):
    """A rank raised, or died. `error` is the rank's own exception where it could be brought
    over."""

    def __init__(self, rank: int, traceback: str, error: BaseException | None = None) -> None:
        super().__init__(f"rank {rank} failed\n{traceback}")
        self.rank = rank
        self.traceback = traceback
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return RankFailed, (self.rank, self.traceback, None)


class RanksTimeout(Exception):
    """Ranks gave no result within the deadline; `stacks` holds what every live rank was doing."""

    def __init__(self, stacks: dict[int, str], timeout: float = 0.0) -> None:
        lines = [f"rank {rank}:\n{stack}" for rank, stack in sorted(stacks.items())]
        super().__init__(f"no result within {timeout:g} s\n" + "\n".join(lines))
        self.stacks = stacks
        self.timeout = timeout

    def __reduce__(self) -> tuple[Any, ...]:
        return RanksTimeout, (self.stacks, self.timeout)


class WrongWorldSize(Exception):
    """Started by `torchrun` with another number of ranks than the case needs."""


_context = multiprocessing.get_context("forkserver")


def in_place() -> bool:
    """Was this process started as one rank by a launcher such as `torchrun`?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_ranks() -> int:
    """How many ranks the launcher started; 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if in_place() else 1


def reporter() -> bool:
    """Does this process report? Always, but under a launcher only rank 0."""
    return not in_place() or int(os.environ["RANK"]) == 0


@dataclass
class _Rank:
    """The parent's view of one rank."""

    context: RankContext
    process: ForkServerProcess
    connection: Connection
    here: bool = False
    met: bool = False
    outcome: Outcome | None = None
    death: str = ""

    def read(self) -> None:
        """Take in what the rank has sent; the end of its pipe without an outcome is its death."""
        try:
            while self.outcome is None and self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, Outcome):
                    self.outcome = message
                self.met = self.here  # the second word, whichever it is
                self.here = True
        except (EOFError, OSError):
            self.process.join(REAPED_SECONDS)
            self.death = _death(self.process.exitcode)

    @property
    def failed(self) -> bool:
        """Has the rank raised or died?"""
        return bool(self.death) or (self.outcome is not None and self.outcome.value is None)

    @property
    def running(self) -> bool:
        """Has the rank neither ended nor answered?"""
        return self.outcome is None and not self.death

    def file(self, name: str) -> str:
        """A file that the rank wrote in the scratch directory; empty if there is none."""
        try:
            return (self.context.scratch / f"{name}.{self.context.rank}").read_text(
                errors="replace"
            )
        except OSError:
            return ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the rank, SIGKILL to everything that it started as well."""
        pid = self.process.pid
        if pid is None or self.process.exitcode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL and os.getpgid(pid) == pid:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)


def _death(exitcode: int | None) -> str:
    """How a process ended that left no outcome."""
    if exitcode is None:
        return "closed its pipe without a result"
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"exited with status {exitcode} without a result"


@dataclass
class _Group:
    """The ranks of one call."""

    timeout: float
    ranks: list[_Rank] = field(default_factory=list)

    def start(
        self, size: int, payload: bytes, device: str, seed: int, scratch: Path,
        environment: dict[str, str],
    ) -> None:  # fmt: skip
        """Fork the ranks."""
        for rank in range(size):
            where = f"cuda:{rank}" if device == "cuda" else device
            context = RankContext(rank, size, rank, where, scratch, self.timeout)
            ours, theirs = _context.Pipe()
            start = Start(context, payload, seed, environment)
            process = _context.Process(target=rank_main, args=(theirs, start), daemon=True)
            rank_server.begin(process)
            theirs.close()
            self.ranks.append(_Rank(context, process, ours))

    def collect(self) -> list[Outcome]:
        """Wait for every outcome, the first failure, or the deadline."""
        deadline = time.monotonic() + START_SECONDS
        called = met = failing = False
        while running := [rank for rank in self.ranks if rank.running]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for rank in wait([rank.connection for rank in running], left):
                next(each for each in running if each.connection is rank).read()
            if not called and all(rank.here for rank in self.ranks):
                called = True
                self.tell("meet")
            if not met and all(rank.met for rank in self.ranks):
                met, deadline = True, time.monotonic() + self.timeout
            if not failing and any(rank.failed for rank in self.ranks):
                failing = True
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if any(rank.failed for rank in self.ranks):
            raise self.failure()
        if any(rank.running for rank in self.ranks):
            raise RanksTimeout(self.stacks(), self.timeout)
        return [rank.outcome for rank in self.ranks if rank.outcome is not None]

    def tell(self, word: str) -> None:
        """Send every rank a word; one that is gone shows by its pipe."""
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                rank.connection.send(word)

    def stacks(self) -> dict[int, str]:
        """What each rank is doing, from its own fault handler; how it ended, if it has."""
        running = [rank for rank in self.ranks if rank.running]
        for rank in running:
            rank.signal(signal.SIGUSR1)
        expiry = time.monotonic() + 2.0
        while time.monotonic() < expiry and not all(rank.file("stack") for rank in running):
            time.sleep(0.01)
        time.sleep(0.02 if running else 0.0)  # the handler writes line by line
        return {rank.context.rank: self._state(rank) for rank in self.ranks}

    def _state(self, rank: _Rank) -> str:
        """One rank's stack or its end, in words."""
        if rank.death:
            return f"  {rank.death}"
        if rank.outcome is not None:
            return "  raised" if rank.failed else "  had already returned"
        return rank.file("stack") or "  gave no stack"

    def failure(self) -> RankFailed:
        """The error of the first rank that failed: a death before any exception, else the
        earliest."""
        failed = [rank for rank in self.ranks if rank.failed]
        first = min(failed, key=lambda rank: 0.0 if rank.death else _when(rank.outcome))
        number = first.context.rank
        error = None
        if first.outcome is not None and not first.death:
            text = first.outcome.traceback
            error = loads(first.outcome.error) if first.outcome.error else None
        else:
            place = first.file("place")
            text = f"rank {number} {first.death}" + (f" at: {place}" if place else "")
        others = {r: s for r, s in self.stacks().items() if r != number}
        text += "".join(f"\nmeanwhile rank {rank}:\n{stack}" for rank, stack in others.items())
        output = first.file("output")[-OUTPUT_TAIL:].strip()
        return RankFailed(
            number, text + (f"\noutput of rank {number}:\n{output}" if output else ""), error
        )

    def close(self, clean: bool) -> None:
        """Let finished ranks go, end the others, and reap all of them."""
        if clean:
            self.tell("release")
        for rank in self.ranks:
            if not clean:
                rank.signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.process.join(5.0 if clean else 2.0)
            rank.signal(signal.SIGKILL)
            rank.process.join(2.0)
            rank.connection.close()


def _when(outcome: Outcome | None) -> float:
    """The time of a failure, for ordering."""
    return outcome.when if outcome is not None else 0.0


def run(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    device: str = "cpu",
    timeout: float = 60.0,
    seed: int = 0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `fn(rank_context, *args)` on `world_size` fresh ranks; its results, by rank.

    `fn` is a module-level function. Arguments and results are pickled; tensors arrive on the CPU.
    `device` is `cpu` (gloo) or `cuda` (NCCL, rank i on device i). `timeout` is in seconds, from
    when all ranks have met. `environment` is this process's as it is now, unless it is given. Under
    `torchrun` the same call runs on the ranks that are there, and every rank gets all results.

    Raises RankFailed, RanksTimeout, and WrongWorldSize under a launcher with another number of
    ranks.
    """
    payload = dumps((fn, args))
    if in_place():
        return _values_in_place(world_size, payload, device, timeout, seed)
    warm()
    scratch = Path(tempfile.mkdtemp(prefix=f"conformance-ranks-{os.getpid()}-"))
    group = _Group(timeout)
    clean = False
    try:
        group.start(world_size, payload, device, seed, scratch, dict(environment or os.environ))
        outcomes = group.collect()
        clean = True
    finally:
        group.close(clean)
        shutil.rmtree(scratch, ignore_errors=True)
    return [loads(outcome.value or b"") for outcome in outcomes]


def _values_in_place(
    world_size: int, payload: bytes, device: str, timeout: float, seed: int
) -> list[Any]:
    """`run` on a launcher's ranks: the first failure becomes everyone's."""
    present = int(os.environ["WORLD_SIZE"])
    if present != world_size:
        raise WrongWorldSize(f"the case needs {world_size} ranks, this run has {present}")
    outcomes = run_in_place(payload, device, timeout, seed)
    failed = [(_when(o), rank, o) for rank, o in enumerate(outcomes) if o.value is None]
    if failed:
        _, rank, outcome = min(failed, key=lambda entry: entry[:2])
        error = loads(outcome.error) if outcome.error else None
        raise RankFailed(rank, outcome.traceback, error)
    return [loads(outcome.value or b"") for outcome in outcomes]
