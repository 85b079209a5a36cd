"""Functions that the suite's own tests run on ranks; module-level, so that a rank can import
them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conformance.ranks import RankContext


class Own(Exception):
    """An exception class of the tests."""


def hello(context: RankContext, scale: torch.Tensor) -> dict[str, Any]:
    """An all-reduce, and what a fresh rank must look like."""
    total = scale * (context.rank + 1)
    dist.all_reduce(total)
    return {
        "rank": context.rank,
        "sum": total,
        "cuda": torch.cuda.is_initialized(),
        "threads": torch.get_num_threads(),
        "draw": torch.rand(1).item(),
        "pid": os.getpid(),
        "server_threads": _threads(os.getppid()),
        "preloaded": "conformance.subject" in sys.modules,
        "scratch": str(context.scratch),
        "marker": os.environ.get("RANKS_TEST_MARKER", ""),
    }


def inherited(context: RankContext) -> dict[str, Any]:
    """Whether the forkserver's mixtral is there, once, and equal to the installed class's."""
    from conformance import prebuilt
    from conformance.case import Case, Check
    from conformance.checkpoint import build_stock
    from conformance.families import MODELS
    from conformance.implementation import load
    from conformance.strategies import STRATEGIES
    from conformance.subject import Subject

    def subject(strategy: str) -> Subject:
        case = Case(Check("A1"), MODELS["mixtral"], strategy=STRATEGIES[strategy])
        return Subject(load("reference"), case)

    sharded = prebuilt.take(subject("tp"), subject("tp").plan())
    spread = subject("ddp")
    found = prebuilt.take(spread, spread.plan())
    again = prebuilt.take(spread, spread.plan())
    wanted = dict(build_stock(MODELS["mixtral"]).named_parameters())
    equal = found is not None and all(
        torch.equal(p, wanted[name]) for name, p in found.named_parameters()
    )
    return {
        "equal": equal,
        "again": again is not None,
        "sharded": sharded is not None,
        "server threads": _threads(os.getppid()),
    }


def _threads(pid: int) -> int:
    """The threads of a process; 1 where that cannot be known."""
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 1


def raise_on_one(context: RankContext) -> None:
    """Rank 1 raises while rank 0 waits for it in a collective."""
    if context.rank == 1:
        print("said before raising")
        raise Own("deliberate")
    dist.barrier()


def killed_in_forward(context: RankContext) -> None:
    """Rank 1 is killed inside a forward; rank 0 waits in the collective that follows."""
    layer = torch.nn.Linear(2, 2)

    def die(*_: Any) -> None:
        context.at("forward of layer 0")
        if context.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    layer.register_forward_hook(die)
    dist.all_reduce(layer(torch.ones(1, 2)).detach())


def killed_in_collective(context: RankContext) -> None:
    """Rank 1 is killed while it waits in an all-reduce that rank 0 has not reached."""
    context.at("all-reduce")
    if context.rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        dist.all_reduce(torch.ones(1))
    time.sleep(20)


def skip_collective(context: RankContext) -> None:
    """Rank 1 leaves without the all-reduce that rank 0 waits in."""
    if context.rank == 0:
        dist.all_reduce(torch.ones(1))


def hang(context: RankContext, directory: str = "") -> None:
    """Every rank sleeps; its id and its scratch directory are left in `directory` for the one who
    looks."""
    if directory:
        text = f"{os.getpid()} {context.scratch}"
        Path(directory, f"rank.{context.rank}").write_text(text)
    time.sleep(60)


def unpicklable(context: RankContext) -> Any:
    """A result that cannot travel."""
    return lambda: context.rank


def twice(context: RankContext, fail: bool) -> tuple[int, list[int]]:
    """For `torchrun`: a collective, then a failure of rank 1 if asked for."""
    total = torch.tensor(context.rank + 1)
    dist.all_reduce(total)
    if fail and context.rank == 1:
        raise Own("deliberate")
    return int(total), [context.rank, context.world_size]


def launched() -> None:
    """What each rank of the two `torchrun` agents does: a good call, a failing one, and a good one
    again."""
    from conformance import ranks

    good = ranks.run(2, twice, False, timeout=20.0)
    try:
        ranks.run(2, twice, True, timeout=20.0)
        failure = "none"
    except ranks.RankFailed as error:
        failure = f"{error.rank} {type(error.error).__name__}"
    again = ranks.run(2, twice, False, timeout=20.0)
    try:
        ranks.run(4, twice, False)
    except ranks.WrongWorldSize as error:
        wrong = str(error)
    line = (
        f"{good == again == [(3, [0, 2]), (3, [1, 2])]} | {failure} | {wrong} | {ranks.reporter()}"
    )
    Path(sys.argv[2], f"launched.{os.environ['RANK']}").write_text(line)


def parent() -> None:
    """A parent that is going to be killed or interrupted while its ranks sleep."""
    # a background job of a shell without job control inherits an ignored SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from conformance import ranks

    ranks.preload((), base=("torch", "torch.distributed", "conformance.rank_process"))
    ranks.run(2, hang, sys.argv[2])


if __name__ == "__main__":
    # Under its importable name, so that what it runs can be pickled.
    import tests.rank_functions as this

    getattr(this, sys.argv[1])()


def forked_by(context: RankContext) -> int:
    """The process that forked this rank."""
    return os.getppid()
