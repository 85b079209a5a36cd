"""How users of the stock stack spread a model: accelerate for data parallel, transformers' own
`DistributedConfig` for tensor and expert parallel. Faithful: nothing is mended here.

accelerate takes an FSDP plugin on accelerators only: on a CPU it ignores the plugin without a word
and replicates. There its state is told what a GPU host would find, so that accelerate's own
sharding code (wrap policy, upcasts, state dicts) is what runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from pathlib import Path
from typing import Any

SHARDED_WHILE_LOADING = frozenset({"tp", "tp_ep", "fsdp2_ep"})
FSDP_VERSION = {"fsdp1": 1, "fsdp2": 2, "hsdp": 2}

_accelerators: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class NotInThisVersion(Exception):
    """The installed transformers or accelerate has no such form; the message names what it
    lacks."""


def sharding_options(plan: Any, ranks: int) -> dict[str, Any]:
    """What `from_pretrained` gets so that it shards while loading; empty for other strategies.

    ranks: how many share the model. Raises NotInThisVersion where the installed `DistributedConfig`
    lacks a field of the documented form.
    """
    if plan.strategy not in SHARDED_WHILE_LOADING:
        return {}
    forms: dict[str, dict[str, Any]] = {
        "tp": {"tp_size": ranks, "tp_plan": "auto"},
        "tp_ep": {"tp_size": ranks, "tp_plan": "auto", "ep_size": ranks},
        "fsdp2_ep": {"fsdp_size": ranks, "ep_size": ranks, "ep_implementation": "all_to_all"},
    }
    form = plan.options.get("distributed_config", forms[plan.strategy])
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise NotInThisVersion("this transformers has no DistributedConfig") from error
    known = {field.name for field in dataclasses.fields(DistributedConfig)}
    lacking = sorted(set(form) - known)
    if lacking:
        raise NotInThisVersion(f"this transformers' DistributedConfig has no {', '.join(lacking)}")
    return {"distributed_config": DistributedConfig(**form)}


def default_wrap_classes(config: Any) -> list[str]:
    """The classes that accelerate wraps when none is named: `_no_split_modules` of the model."""
    import torch
    import transformers

    multimodal = hasattr(config, "vision_config")
    auto: Any = (
        transformers.AutoModelForImageTextToText
        if multimodal
        else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"):
        model = auto.from_config(config)
    return sorted(getattr(model, "_no_split_modules", None) or ())


def parallelize(model: Any, plan: Any, mesh: Any) -> Any:
    """Through `Accelerator.prepare`; a model that was sharded while loading stays as it is."""
    if plan.strategy == "single" or plan.strategy in SHARDED_WHILE_LOADING:
        return model
    if plan.strategy not in FSDP_VERSION and plan.strategy != "ddp":
        raise NotInThisVersion(f"the stock stack has no strategy {plan.strategy}")
    accelerator = _accelerator(plan, mesh)
    if plan.strategy in ("fsdp2", "hsdp"):
        import torch

        # accelerate shards to FSDP2 only together with an optimizer, and repoints its parameters
        trainable = [p for p in model.parameters() if p.requires_grad]
        spread = accelerator.prepare(model, torch.optim.SGD(trainable, lr=0.0))[0]
    else:
        spread = accelerator.prepare(model)
    _accelerators[spread] = accelerator
    return spread


def _accelerator(plan: Any, mesh: Any) -> Any:
    """A fresh Accelerator for the plan's strategy on the device of the mesh."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    cpu = mesh is None or mesh.device_type == "cpu"
    options: dict[str, Any] = {
        "cpu": cpu,
        "mixed_precision": plan.options.get("mixed_precision", "no"),
    }
    if plan.strategy == "ddp":
        unused = plan.decisions["ddp_find_unused_parameters"].value
        handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
        return Accelerator(kwargs_handlers=[handler], **options)
    hybrid = _hybrid(mesh) if plan.strategy == "hsdp" else None
    plugin = _plugin(plan)
    if not cpu:
        return Accelerator(fsdp_plugin=plugin, parallelism_config=hybrid, **options)
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    state = accelerator.state
    state.fsdp_plugin = plugin
    for shared in (state, PartialState()):  # the first is refreshed from the second
        shared.distributed_type = DistributedType.FSDP
        shared.device = torch.device("cpu")  # FSDP1 refuses accelerate's `cpu:0`
    if options["mixed_precision"] != "no":
        plugin.set_mixed_precision(options["mixed_precision"])
    if hybrid is not None:
        state.parallelism_config = hybrid
        state.device_mesh = hybrid.build_device_mesh("cpu")
    return accelerator


def _plugin(plan: Any) -> Any:
    """The FSDP plugin that Trainer makes of `fsdp_config`: classes by the model's own list,
    original parameters kept, whole state dicts."""
    from accelerate import FullyShardedDataParallelPlugin

    config = plan.decisions["fsdp_config"].value
    version = FSDP_VERSION[plan.strategy]
    extra = {"use_orig_params": True} if version == 1 else {}
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=plan.options.get("fsdp_transformer_layer_cls_to_wrap"),
        state_dict_type=config["state_dict_type"],
        cpu_ram_efficient_loading=config["cpu_ram_efficient_loading"],
        sync_module_states=config["cpu_ram_efficient_loading"] and version == 1,
        **extra,
    )


def _hybrid(mesh: Any) -> Any:
    """accelerate's own mesh: replicas × shards, in the sizes of the given one."""
    from accelerate.parallelism_config import ParallelismConfig

    replicas, shards = mesh.shape
    return ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)


def clip_grad_norm(model: Any, max_norm: float) -> Any:
    """As Trainer does: `Accelerator.clip_grad_norm_`, or mesh by mesh for a model that was sharded
    while loading (torch's own function before Trainer could)."""
    import torch
    import transformers

    accelerator = _accelerators.get(model)
    if accelerator is not None:
        return accelerator.clip_grad_norm_(model.parameters(), max_norm)
    by_mesh: Any = getattr(transformers.Trainer, "_mixed_mesh_grad_norm", None)
    if by_mesh is not None:
        return by_mesh(None, model, max_norm)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def no_sync(model: Any) -> contextlib.AbstractContextManager[Any]:
    """`Accelerator.no_sync`."""
    accelerator = _accelerators.get(model)
    found: contextlib.AbstractContextManager[Any] = (
        contextlib.nullcontext() if accelerator is None else accelerator.no_sync(model)
    )
    return found


def save(model: Any, path: Path) -> None:
    """The documented way: the unwrapped model's `save_pretrained` with accelerate's state dict on
    the main process; `save_pretrained` alone where nothing was prepared by accelerate.
    """
    accelerator = _accelerators.get(model)
    if accelerator is None:
        model.save_pretrained(path)
        return
    state = _whole_state(accelerator, model)
    inner = accelerator.unwrap_model(model)
    inner.save_pretrained(
        path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=state,
    )
    accelerator.wait_for_everyone()


def _whole_state(accelerator: Any, model: Any) -> Any:
    """`Accelerator.get_state_dict`; for FSDP1 on a CPU the same call without offloading to the CPU,
    which ends torch 2.13 by a segmentation fault there."""
    from accelerate.utils import DistributedType

    fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
    if not fsdp1 or accelerator.device.type != "cpu":
        return accelerator.get_state_dict(model)
    from torch.distributed.fsdp import (
        FullStateDictConfig,
        FullyShardedDataParallel,
        StateDictType,
    )

    options = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, options):
        return model.state_dict()


def ranks() -> int:
    """How many ranks this process is one of."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size())
    return int(os.environ.get("WORLD_SIZE", "1"))
