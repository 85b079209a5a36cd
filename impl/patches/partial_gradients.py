"""Replicated weights between sharded layers: each backward's gradient is summed over ranks once.

transformers (5.23) sums `param.grad` after it was accumulated: with a second backward before the
step the first one's gradient, whole already, is multiplied by the number of ranks again. Found by
check F12: query and key norms are off by their own size after two micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

ISSUE = "https://github.com/huggingface/transformers/issues/39648"


def _install_forward(self: Any, module: Any, mesh: Any) -> nn.Module:
    """Sum what a backward adds, before it is accumulated; hooks come with the first forward, when
    the loaded weights are there."""
    original = module.forward
    hooked: dict[str, nn.Parameter] = {}

    def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
        whole = gradient.clone()
        dist.all_reduce(whole, group=mesh.get_group())
        return whole

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and hooked.get(name) is not parameter:
                    parameter.register_hook(sum_over_ranks)
                    hooked[name] = parameter
        return original(*args, **kwargs)

    module.forward = forward
    found: nn.Module = module
    return found


@contextlib.contextmanager
def summed_once() -> Iterator[None]:
    """Models that are loaded inside get the mended hooks; nothing happens on versions without."""
    try:
        from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce as Style
    except ImportError:
        yield
        return
    before = Style.install_forward
    Style.install_forward = _install_forward
    try:
        yield
    finally:
        Style.install_forward = before
