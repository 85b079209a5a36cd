"""Ranks that fail on purpose: hung, killed, raising, or leaving a collective out."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from conformance.ranks import RankContext


class Deliberate(Exception):
    """Raised by a rank on purpose."""


def healthy(context: RankContext) -> int:
    """A collective that works: the sum of all ranks' numbers."""
    total = torch.tensor(context.rank + 1)
    dist.all_reduce(total)
    return int(total)


def hung(context: RankContext) -> None:
    """Rank 1 sleeps outside of any collective; rank 0 waits for it in one."""
    if context.rank == 1:
        time.sleep(60)
    dist.barrier()


def killed_in_forward(context: RankContext) -> None:
    """Rank 1 is killed inside a layer's forward."""
    context.at("forward of layer 0")
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def killed_in_collective(context: RankContext) -> None:
    """Rank 1 is killed while it waits in an all-reduce that rank 0 does not reach."""
    context.at("all-reduce")
    if context.rank == 1:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
        dist.all_reduce(torch.ones(1))
    time.sleep(60)


def raising(context: RankContext) -> None:
    """Rank 1 raises while rank 0 waits for it in a collective."""
    if context.rank == 1:
        raise Deliberate("on purpose")
    dist.barrier()


def skipping(context: RankContext) -> None:
    """Rank 1 leaves a collective out and returns."""
    if context.rank == 0:
        dist.all_reduce(torch.ones(1))
