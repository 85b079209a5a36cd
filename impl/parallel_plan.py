"""What a parallel strategy needs to know, and the names of the strategies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .errors import Refused
from .training_plan import TrainingPlan

STRATEGIES = ("single", "ddp", "fsdp1", "fsdp2", "hsdp", "tp", "tp_ep", "fsdp2_ep", "cp")


class Unsupported(Refused):
    """The installed libraries, or the model, cannot do this; the message says which and what
    can."""


@dataclass(frozen=True)
class ParallelPlan:
    """How a prepared model is spread.

    wrap_classes: class names of the FSDP units (the decoder layers); also the layers that context
    parallel splits. ignored_modules: path components of towers that FSDP1 leaves whole. dtype: the
    parameters' dtype in forward and backward under mixed precision, or None; reduce_dtype: that of
    gradient reduction. data, tensor, expert, context: sizes of those groups.
    """

    strategy: str
    wrap_classes: tuple[str, ...] = ()
    find_unused_parameters: bool = False
    dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = torch.float32
    cast_forward_inputs: bool = True
    ignored_modules: tuple[str, ...] = ()
    data: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise Refused(f"unknown strategy {self.strategy!r}; it is one of {known}")

    @property
    def averaged(self) -> int:
        """Over how many ranks gradients are averaged."""
        return self.data * self.context

    @classmethod
    def of(
        cls, strategy: str, wrap_classes: tuple[str, ...], ranks: int, **fields: object
    ) -> ParallelPlan:
        """The plan of a strategy over `ranks` ranks, with the group sizes that it implies."""
        sizes = {"data": 1, "tensor": 1, "expert": 1, "context": 1}
        if strategy in ("ddp", "fsdp1", "fsdp2", "hsdp", "fsdp2_ep"):
            sizes["data"] = ranks
        if strategy in ("tp", "tp_ep"):
            sizes["tensor"] = ranks
        if strategy in ("tp_ep", "fsdp2_ep"):
            sizes["expert"] = ranks
        if strategy == "cp":
            sizes["context"] = ranks
        return cls(strategy, wrap_classes, **{**sizes, **fields})  # type: ignore[arg-type]

    @classmethod
    def from_training(cls, plan: TrainingPlan, ranks: int | None = None) -> ParallelPlan:
        """What a training plan says about spreading, over `ranks` ranks (None: those of the process
        group).

        Context parallel cuts at the decoder layers also where the plan wraps none. FSDP1 leaves
        frozen towers whole: in a flat parameter they would get gradient storage (L19).
        """
        if ranks is None:
            ranks = dist.get_world_size() if dist.is_initialized() else 1
        facts = getattr(plan.traits, "cls", None)
        wrap = tuple(plan.wrap_classes) or tuple(getattr(facts, "layer_classes", ()))
        return cls.of(
            plan.strategy,
            wrap,
            ranks,
            find_unused_parameters=plan.find_unused_parameters,
            ignored_modules=tuple(plan.freeze) if plan.strategy == "fsdp1" else (),
        )
