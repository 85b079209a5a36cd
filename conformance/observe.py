"""A training loop seen from outside: gradients, parameters, losses and memory, step by step.

A black box (HF `Trainer`, a script) calls `optimizer.step()` somewhere; the global step hooks of
`torch.optim` see every optimizer, the hooks on parameters count backward passes, and the hook on
the model's forward sees the losses. Nothing of the loop is replaced.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from conformance.weights import canonical_name


@dataclass(frozen=True)
class Step:
    """The evidence of one step.

    loss: of the step, or None where it was not seen. gradients, parameters: by canonical name, as
    full CPU tensors; gradients as the optimizer got them (clipped), parameters after its step.
    losses: of each forward with labels, in order. backwards: backward passes since the last step.
    learning_rate: of the first parameter group. cpu_peak, gpu_peak: bytes; the CPU's is the
    process's high-water mark so far, the GPU's that of this step.
    """

    loss: float | None
    gradients: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    backwards: int = 0
    learning_rate: float | None = None
    cpu_peak: int = 0
    gpu_peak: int = 0


@dataclass
class Observation:
    """What was seen so far: the finished steps, and the losses after the last of them."""

    steps: list[Step] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def last(self) -> Step:
        """The last step; LookupError when no optimizer of this model has stepped."""
        if not self.steps:
            raise LookupError("observe: no optimizer step on this model's parameters was seen")
        return self.steps[-1]


def full(tensor: Tensor) -> Tensor:
    """A detached CPU copy; a distributed tensor is gathered (a collective call on its ranks)."""
    gather = getattr(tensor, "full_tensor", None)
    whole = tensor.detach() if gather is None else gather().detach()
    return whole.to("cpu", copy=True)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients a model holds now, by canonical name; parameters without one are left out."""
    return {
        canonical_name(name): full(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def parameters(model: nn.Module, trainable: bool = False) -> dict[str, Tensor]:
    """The model's parameters (or the trainable ones), by canonical name."""
    return {
        canonical_name(name): full(p)
        for name, p in model.named_parameters()
        if p.requires_grad or not trainable
    }


@contextmanager
def observe(model: nn.Module, optimizer_step: int | None = None) -> Iterator[Observation]:
    """Record every optimizer step on the model's parameters while the context is open.

    optimizer_step: keep the tensors of this step only (from 0); None keeps all. The hooks are taken
    away on exit, also after an exception. The model may be wrapped or sharded inside the context:
    names are looked up again at each step.
    """
    watch = _Watch(model, optimizer_step)
    handles = [
        register_optimizer_step_pre_hook(watch.before),
        register_optimizer_step_post_hook(watch.after),
        model.register_forward_hook(watch.forward),
    ]
    parameter: Any  # torch leaves the registration method untyped
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and parameter.is_leaf:
            hook = watch.counter(index)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    watch.reset_memory()
    try:
        yield watch.seen
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    def __init__(self, model: nn.Module, keep: int | None) -> None:
        self.model = model
        self.keep = keep
        self.seen = Observation()
        self.hits: Counter[int] = Counter()
        self.pending: tuple[Optimizer, dict[str, Tensor]] | None = None

    def counter(self, index: int) -> Any:
        def hook(_: Tensor) -> None:
            self.hits[index] += 1

        return hook

    def forward(self, module: nn.Module, args: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if torch.is_grad_enabled() and isinstance(loss, Tensor) and loss.numel() == 1:
            self.seen.losses.append(float(loss.detach()))

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.pending is not None or not self._ours(optimizer):
            return
        kept = self.keep is None or self.keep == len(self.seen.steps)
        self.pending = (optimizer, gradients(self.model) if kept else {})

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.pending is None or self.pending[0] is not optimizer:
            return
        kept = self.keep is None or self.keep == len(self.seen.steps)
        losses = tuple(self.seen.losses)
        rate = optimizer.param_groups[0]["lr"]
        self.seen.steps.append(
            Step(
                loss=sum(losses) / len(losses) if losses else None,
                gradients=self.pending[1],
                parameters=parameters(self.model, trainable=True) if kept else {},
                losses=losses,
                backwards=self._backwards(),
                learning_rate=float(rate),
                cpu_peak=cpu_peak(),
                gpu_peak=gpu_peak(),
            )
        )
        self.pending = None
        self.seen.losses.clear()
        self.hits.clear()
        self.reset_memory()

    def reset_memory(self) -> None:
        if _gpu_in_use():
            torch.cuda.reset_peak_memory_stats()

    def _ours(self, optimizer: Optimizer) -> bool:
        mine = {id(p) for p in self.model.parameters()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def _backwards(self) -> int:
        """The count most parameters agree on: a tied or unused one may see more or fewer."""
        votes = Counter(self.hits.values())
        return max(votes, key=lambda count: (votes[count], count), default=0)


def cpu_peak() -> int:
    """The process's high-water mark of resident memory, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def gpu_peak() -> int:
    """The current CUDA device's peak of allocated memory since the last reset, in bytes; 0 without
    a device. Never creates a CUDA context."""
    return int(torch.cuda.max_memory_allocated()) if _gpu_in_use() else 0


def _gpu_in_use() -> bool:
    cuda: Any = torch.cuda
    return bool(cuda.is_available() and cuda.is_initialized())


def storage_bytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: a view that keeps its whole base counts it."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        storage = local.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
