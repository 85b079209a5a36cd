"""A prepared model and a plan → the model spread over ranks, and what a training loop asks of it
then.

`parallelize` spreads; `full_parameters` and `full_gradients` read a spread model as if it were
whole; `clip_grad_norm`, `no_sync` and `reduce_loss_scale` are what differs between strategies in a
step. Tensor and expert parallel shard while loading (`parallel_tensor.load_sharded`), so that
`parallelize` only checks them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from . import parallel_data
from .context_parallel import enable as enable_context_parallel
from .errors import Refused
from .parallel_plan import ParallelPlan, Unsupported
from .parallel_tensor import check_sharded, mend_expert_division
from .plan_draft import SHARDED_WHILE_LOADING
from .training_plan import TrainingPlan

__all__ = [
    "ParallelPlan",
    "Unsupported",
    "canonical_name",
    "clip_grad_norm",
    "count_items",
    "full_gradients",
    "full_parameters",
    "gather_state_dict",
    "global_loss",
    "no_sync",
    "parallelize",
    "reduce_loss_scale",
    "save_adapter",
    "save_spread",
    "unwrap",
]

_PREFIXES = ("module.", "base_model.model.")
_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def canonical_name(name: str) -> str:
    """A parameter's name without what wrappers added: DDP, FSDP1, checkpointing, compile, PEFT.

    A base weight under an adapter has its own name back (`q_proj.weight`); adapter weights keep
    PEFT's (`q_proj.lora_A.default.weight`, and `base_layer.` where two adapters of one module
    nest).
    """
    for infix in _INFIXES:
        name = name.replace(infix, "")
    shorter = True
    while shorter:
        shorter = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, shorter = name[len(prefix) :], True
    return name if ".lora_" in name else name.replace(".base_layer.", ".")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model (a transformers or a PEFT one) under DDP or FSDP1."""
    while isinstance(model, DistributedDataParallel) or parallel_data.is_fsdp1(model):
        inner: Any = model.module
        model = inner
    return model


def parallelize(model: nn.Module, plan: ParallelPlan | TrainingPlan, mesh: Any = None) -> nn.Module:
    """Spread a prepared model over the ranks of `mesh` (a DeviceMesh; None for `single`).

    A TrainingPlan is read for what concerns spreading (`ParallelPlan.from_training`). Refused where
    the combination would train wrongly, Unsupported where the libraries cannot do it.
    """
    if isinstance(plan, TrainingPlan):
        plan = ParallelPlan.from_training(plan)
    if plan.strategy == "single":
        return model
    if plan.strategy in SHARDED_WHILE_LOADING:
        check_sharded(model, plan)
        if plan.strategy == "fsdp2_ep":
            mend_expert_division(model, plan)
            parallel_data.average_replicated(model)
        return model
    if mesh is None:
        raise Refused(f"strategy {plan.strategy}: a device mesh is needed")
    if plan.strategy == "ddp":
        return parallel_data.ddp(model, mesh, plan.find_unused_parameters)
    if plan.strategy == "fsdp1":
        return parallel_data.fsdp1(model, plan, mesh)
    if plan.strategy in ("fsdp2", "hsdp"):
        return parallel_data.fsdp2(model, plan, mesh)
    enable_context_parallel(model, plan.wrap_classes, mesh)
    return parallel_data.ddp(model, mesh, plan.find_unused_parameters)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """A whole, detached tensor of its own; collective for a DTensor."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().clone()


def full_parameters(model: nn.Module, trainable_only: bool = False) -> dict[str, torch.Tensor]:
    """Every parameter, whole, by canonical name. All ranks call it, all get everything."""
    with parallel_data.summoned(model):
        return {
            canonical_name(name): _full(parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad or not trainable_only
        }


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient that exists, whole, by canonical name. All ranks call it, all get
    everything."""
    with parallel_data.summoned(model, gradients=True):
        return {
            canonical_name(name): _full(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and parameter.requires_grad
        }


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Backward passes inside accumulate locally; the first one after reduces. A no-op where nothing
    is reduced."""
    return parallel_data.no_sync(model)


def clip_grad_norm(
    model: nn.Module, max_norm: float, plan: ParallelPlan | None = None
) -> torch.Tensor:
    """Clip the gradients to a global norm of `max_norm`; returns the norm before, equal everywhere.

    Squares of local shards are summed and reduced layout by layout: DTensors of different meshes
    (experts beside dense weights) cannot be stacked, and FSDP1's own method refuses float64.
    `plan` is accepted for symmetry; the gradients themselves say how they are sharded.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    layouts: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        layouts.setdefault(_layout(gradient), []).append(_local(gradient))
    if not gradients:
        return torch.zeros(())
    squares = [_square(layout, tensors) for layout, tensors in layouts.items()]
    total = torch.stack(squares).sum()
    if parallel_data.is_fsdp1(model):
        dist.all_reduce(total, group=model.process_group)
    total = total.sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for tensor in map(_local, gradients):
        tensor.mul_(factor.to(tensor.dtype))
    return total


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part; the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layout(tensor: torch.Tensor) -> Any:
    """How a gradient is spread: None if it is whole on every rank."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def _square(layout: Any, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The squared norm, over all ranks, of gradients of one layout; at least in float32."""
    norms = torch._foreach_norm(tensors)
    wide = torch.promote_types(norms[0].dtype, torch.float32)
    square = torch.stack(norms).to(wide).square().sum()
    if layout is not None:
        mesh, placements = layout
        for dim, placement in enumerate(placements):
            if placement.is_partial():
                raise Refused("clip_grad_norm: a gradient is still a partial sum")
            if not placement.is_replicate():
                dist.all_reduce(square, group=mesh.get_group(dim))
    return square


def count_items(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """How many tokens are predicted: labelled ones, without the first of each row. int64, no
    dimension."""
    return (labels[..., 1:] != ignore_index).sum()


def reduce_loss_scale(
    items: torch.Tensor | int, plan: ParallelPlan, mesh: Any = None
) -> torch.Tensor:
    """What a rank divides its summed loss by (`num_items_in_batch`), so that gradients are those of
    the mean over all ranks' tokens.

    `items` counts this rank's labelled tokens over all its micro-batches of a step; context, tensor
    and expert ranks that share a batch count the whole of it. Data-parallel strategies average
    gradients, so it is the global count over the number of ranks averaged; one at least, so that a
    step without labels is zero and not NaN (axolotl#3033). Tensor and expert ranks share the loss
    and must not multiply it (transformers#45994).
    """
    count = torch.as_tensor(items, dtype=torch.float64)
    if dist.is_initialized() and plan.data > 1:
        device = torch.device(mesh.device_type) if mesh is not None else torch.device("cpu")
        count = count.to(device)
        dist.all_reduce(count)
    return count.clamp(min=1.0) / plan.averaged


def global_loss(loss: torch.Tensor, plan: ParallelPlan) -> torch.Tensor:
    """The loss over all ranks' tokens, from each rank's share divided by `reduce_loss_scale`."""
    value = loss.detach().clone()
    if dist.is_initialized() and plan.averaged > 1:
        dist.all_reduce(value)
        value /= plan.averaged
    return value


def gather_state_dict(model: nn.Module, trainable_only: bool = False) -> dict[str, torch.Tensor]:
    """Parameters and buffers, whole, on the CPU, under the names of `unwrap(model)`. All ranks call
    it.

    Copies own their storage: a view would keep a whole flat shard alive (axolotl#3597).
    """
    inner = unwrap(model)
    state: dict[str, torch.Tensor] = {}
    with parallel_data.summoned(model):
        trainable = {name for name, p in inner.named_parameters() if p.requires_grad}
        for name, tensor in inner.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and (name in trainable or not trainable_only):
                state[_without_infixes(name)] = _full(tensor).cpu()
    return state


def _without_infixes(name: str) -> str:
    """A state-dict name without the wrappers inside a model."""
    for infix in _INFIXES:
        name = name.replace(infix, "")
    return name


def save_spread(model: nn.Module, directory: Path) -> None:
    """Gather the adapter, or the model without one, and write it once, as one process would.

    All ranks call it. A model that transformers sharded while loading is written by its own
    `save_pretrained`, which gathers.
    """
    from .adapter_layout import mend_file
    from .model_facts import is_adapted

    inner: Any = unwrap(model)
    adapted = is_adapted(model)
    state = gather_state_dict(model, trainable_only=adapted)
    if not dist.is_initialized() or dist.get_rank() == 0:
        options = {"save_embedding_layers": False} if adapted else {}
        inner.save_pretrained(str(directory), state_dict=state, **options)
        if adapted:
            mend_file(inner, Path(directory))
    if dist.is_initialized():
        dist.barrier()


def save_adapter(model: nn.Module, directory: Path) -> None:
    """`save_spread` of a model that must have an adapter."""
    if not hasattr(unwrap(model), "peft_config"):
        raise Refused("save_adapter: the model has no adapter")
    save_spread(model, directory)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients, and the training mode back after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)
