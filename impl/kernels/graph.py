"""What autograd knows about the backward that is running."""

from __future__ import annotations

import torch


def is_kept() -> bool:
    """Whether this backward may be run again (retain_graph); assumed where torch cannot tell, and
    outside a backward. Where it may not, what the forward saved is free to be overwritten."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else bool(probe())
