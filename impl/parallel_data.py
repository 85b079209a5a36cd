"""Data parallel: DDP, FSDP1, and FSDP2 with its hybrid form.

FSDP2 units are the decoder layers and the root: a frozen or never-run tower belongs to the root,
because a unit of its own that never runs has no unsharded parameter when the deferred backward asks
for one (Automodel#2566).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .errors import Refused
from .parallel_plan import ParallelPlan


def is_fsdp1(model: nn.Module) -> bool:
    """Is the module an FSDP1 wrapper?"""
    return isinstance(model, FullyShardedDataParallel)


def wrapped_modules(model: nn.Module, wrap_classes: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """The modules of the classes named, with their paths, innermost first.

    Classes are matched by name along the inheritance line, so that a class that FSDP2 or a
    checkpoint wrapper derived still counts. Refused if none is there: the default of
    `_no_split_modules` lists classes that a model without a tower lacks (L18).
    """
    if not wrap_classes:
        raise Refused(
            "no class to wrap is named; give the decoder layer's, such as the plan's wrap_classes"
        )
    names = set(wrap_classes)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if names & {each.__name__ for each in type(module).__mro__}
    ]
    if not found:
        raise Refused(f"no module of class {', '.join(wrap_classes)} in {type(model).__name__}")
    return sorted(found, key=lambda entry: -entry[0].count("."))


def has_adapter(model: nn.Module) -> bool:
    """Does the model hold trainable weights beside frozen ones of the same layers, as PEFT leaves
    it?"""
    return any(".lora_" in name for name, _ in model.named_parameters())


def _reentrant(model: nn.Module) -> bool:
    """Is a decoder layer checkpointed in reentrant mode?"""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            return bool(getattr(function, "keywords", {}).get("use_reentrant"))
    return False


def ddp(model: nn.Module, mesh: Any, find_unused_parameters: bool) -> nn.Module:
    """`DistributedDataParallel` over the whole mesh.

    Buffers are not broadcast: they are equal from the start, and a broadcast in the forward would
    add a collective to ranks that run it a different number of times.
    """
    if find_unused_parameters and _reentrant(model):
        raise Refused(
            "ddp: reentrant checkpointing with find_unused_parameters marks a parameter ready twice"
            " (L25); use non-reentrant checkpointing"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Refused("ddp: no parameter requires a gradient")
    devices = [torch.cuda.current_device()] if mesh.device_type == "cuda" else None
    group = mesh.get_group() if mesh.ndim == 1 else None
    return DistributedDataParallel(
        model,
        device_ids=devices,
        process_group=group,
        find_unused_parameters=find_unused_parameters,
        **_without_buffer_broadcast(),
    )


def _without_buffer_broadcast() -> dict[str, Any]:
    """The argument by which the installed DDP leaves buffers alone in the forward."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}


def fsdp1(model: nn.Module, plan: ParallelPlan, mesh: Any) -> nn.Module:
    """`FullyShardedDataParallel` with one flat parameter a decoder layer, original parameters kept.

    Refused with adapters: gradient storage covers nearly the whole flat parameter, frozen weights
    included (gemma4 MoE: 46 404 of 47 972 local elements for 624 trainable ones), and with
    `use_orig_params=False` torch raises (L19).
    """
    if has_adapter(model):
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        raise Refused(
            f"fsdp1 with adapters stores gradients of frozen weights: about {total} elements for"
            f" {trainable} trainable ones; use fsdp2"
        )
    units = {type(module) for _, module in wrapped_modules(model, plan.wrap_classes)}
    mixed = None
    if plan.dtype is not None:
        mixed = MixedPrecision(
            param_dtype=plan.dtype,
            reduce_dtype=plan.reduce_dtype,
            cast_forward_inputs=plan.cast_forward_inputs,
        )
    ignored = [
        module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in plan.ignored_modules
    ]
    if any(p.requires_grad for module in ignored for p in module.parameters()):
        raise Refused(
            f"fsdp1: {', '.join(plan.ignored_modules)} would be left whole but is not frozen"
        )
    return FullyShardedDataParallel(
        model,
        process_group=mesh.get_group(),
        auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls=units),
        mixed_precision=mixed,
        ignored_modules=ignored or None,
        use_orig_params=True,
        device_id=torch.cuda.current_device()
        if mesh.device_type == "cuda"
        else torch.device("cpu"),
    )


def keeps_mutable_arguments() -> bool:
    """Do the installed transformers share K/V in an object that survives input casting?

    FSDP2 casts forward inputs by rebuilding every dict and list; a `UserDict` passes as it is
    (transformers#45912).
    """
    try:
        from transformers.cache_utils import KVSharingDict
    except ImportError:
        return False
    return not issubclass(KVSharingDict, dict)


def _shares_kv(model: nn.Module) -> bool:
    """Does a decoder layer of the model read another layer's keys and values?"""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "num_kv_shared_layers", 0))


def fsdp2(model: nn.Module, plan: ParallelPlan, mesh: Any) -> nn.Module:
    """`fully_shard` for every decoder layer, innermost first, then the root; a 2-D mesh makes it
    hybrid.

    Tied weights lie in the root's one unit and stay tied. Under mixed precision the inputs of the
    layers are cast only if that leaves shared K/V the same object; the root's always are.
    """
    policy, unit_policy = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if plan.dtype is not None:
        cast = plan.cast_forward_inputs and (keeps_mutable_arguments() or not _shares_kv(model))
        policy = MixedPrecisionPolicy(plan.dtype, plan.reduce_dtype)
        unit_policy = MixedPrecisionPolicy(plan.dtype, plan.reduce_dtype, cast_forward_inputs=cast)
    tied = tied_groups(model)
    for _, module in wrapped_modules(model, plan.wrap_classes):
        fully_shard(module, mesh=mesh, mp_policy=unit_policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if tied_groups(model) != tied:
        raise Refused("fsdp2: sharding has untied weights that were tied (accelerate#3870)")
    return model


def tied_groups(model: nn.Module) -> frozenset[frozenset[str]]:
    """The groups of names that are one parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return frozenset(frozenset(names) for names in groups.values() if len(names) > 1)


@contextlib.contextmanager
def summoned(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """FSDP1 parameters whole for the length of a block; nothing for other models."""
    if not is_fsdp1(model):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=gradients):
        yield


class _Averaging:
    """Averages the gradients of parameters that FSDP2 does not hold, such as adapters added after
    sharding."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.active = True
        self.ranks = torch.distributed.get_world_size()
        for parameter in parameters:
            hook: Any = parameter.register_post_accumulate_grad_hook
            hook(self.average)

    def average(self, parameter: torch.Tensor) -> None:
        """After a backward: what was accumulated locally, averaged over all ranks."""
        if self.active and parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.ranks


def average_replicated(model: nn.Module) -> None:
    """Make whole trainable parameters beside sharded ones train as in data parallel over all ranks.

    Their values are broadcast from rank 0 first: each rank has initialised its own.
    """
    whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for parameter in whole:
        torch.distributed.broadcast(parameter.data, src=0)
    if whole:
        object.__setattr__(model, "replicated_averaging", _Averaging(whole))


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """See `parallel.no_sync`."""
    if isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        with model.no_sync():
            yield
        return
    sharded = next((each for each in model.modules() if isinstance(each, FSDPModule)), None)
    averaging: _Averaging | None = getattr(model, "replicated_averaging", None)
    _reduce(sharded, averaging, False)
    try:
        yield
    finally:
        _reduce(sharded, averaging, True)


def _reduce(sharded: FSDPModule | None, averaging: _Averaging | None, active: bool) -> None:
    """Turn gradient reduction on or off."""
    if sharded is not None:
        sharded.set_requires_gradient_sync(active)
    if averaging is not None:
        averaging.active = active
