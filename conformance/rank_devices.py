"""Imported first by the forkserver: what a library asks of the GPUs as it is imported, the parent
has found out and answers.

bitsandbytes reads the compute capabilities at its import, and PEFT imports it: the question makes a
CUDA context, which no child may inherit (https://docs.pytorch.org/docs/stable/notes/multiprocessing.html).
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "CONFORMANCE_COMPUTE_CAPABILITIES"
_asked: Any = None  # torch's own function, while ours answers


def capabilities() -> str:
    """Compute capability of every visible GPU, in order, as `VARIABLE` holds it: `9.0,9.0`."""
    import torch

    if not torch.cuda.is_available():
        return ""
    found = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return ",".join(f"{major}.{minor}" for major, minor in found)


def answer() -> None:
    """Let `torch.cuda.get_device_capability` answer from `VARIABLE`, where that names any GPU."""
    import torch

    global _asked
    named = (one.split(".") for one in os.environ.get(VARIABLE, "").split(",") if one)
    known = [(int(major), int(minor)) for major, minor in named]
    if not known or _asked is not None:
        return

    def told(device: Any = None) -> tuple[int, int]:
        index = getattr(device, "idx", device)  # `torch.cuda.device(0)` holds an index
        if not isinstance(index, int):
            index = None if index is None else torch.device(index).index
        return known[index or 0]

    _asked, torch.cuda.get_device_capability = torch.cuda.get_device_capability, told


def ask_again() -> None:
    """Give torch its own function back: the imports are done."""
    import torch

    global _asked
    if _asked is not None:
        torch.cuda.get_device_capability, _asked = _asked, None


if os.environ.get(VARIABLE):
    answer()
