"""Imported first by the forkserver: what a library asks of the GPUs as it is imported, a process of
its own finds out.

bitsandbytes reads the compute capabilities at its import, and PEFT imports it: the question makes a
CUDA context, which no child may inherit
(https://docs.pytorch.org/docs/stable/notes/multiprocessing.html).
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import torch

_ASK = """
import torch
for index in range(torch.cuda.device_count()):
    print(*torch.cuda.get_device_capability(index))
"""
_own = torch.cuda.get_device_capability


@cache
def capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capability of every visible GPU, in order; its context ends with the process."""
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=True)
    pairs = (line.split() for line in done.stdout.splitlines())
    return tuple((int(major), int(minor)) for major, minor in pairs)


def _told(device: Any = None) -> tuple[int, int]:
    """`torch.cuda.get_device_capability`, without a context."""
    index = getattr(device, "idx", device)  # `torch.cuda.device(0)` holds an index
    if not isinstance(index, int):
        index = None if index is None else torch.device(index).index
    return capabilities()[index or 0]


def ask_again() -> None:
    """Give torch its own function back: the imports are done."""
    torch.cuda.get_device_capability = _own


torch.cuda.get_device_capability = _told
