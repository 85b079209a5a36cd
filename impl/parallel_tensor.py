"""Tensor and expert parallel, sharded by transformers while the checkpoint is loaded.

The working forms of `DistributedConfig` only: `enable_expert_parallel=True` alone does nothing
(L8), so it is never used, and the local shapes are checked after loading rather than the call being
believed.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .errors import Refused
from .parallel_plan import ParallelPlan, Unsupported
from .patches.expert_parallel_plan import apply_to_config
from .patches.partial_gradients import summed_once


def distributed_config_class() -> Any:
    """transformers' `DistributedConfig`, if it can do what is needed here.

    Unsupported where it is absent or knows no `ep_size` (5.17).
    """
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise Unsupported("the installed transformers has no DistributedConfig") from error
    fields = {field.name for field in dataclasses.fields(DistributedConfig)}
    lacking = {"tp_size", "fsdp_size", "ep_size", "ep_implementation"} - fields
    if lacking:
        raise Unsupported(
            f"the installed transformers' DistributedConfig knows no {', '.join(sorted(lacking))}: "
            "tensor and expert parallel need a newer one"
        )
    return DistributedConfig


def why_unsupported() -> str | None:
    """None if tensor and expert parallel can be had here, else the reason."""
    try:
        distributed_config_class()
    except Unsupported as reason:
        return str(reason)
    return None


def distributed_config(plan: ParallelPlan) -> Any:
    """The `DistributedConfig` of a strategy."""
    forms: dict[str, dict[str, Any]] = {
        "tp": {"tp_size": plan.tensor, "tp_plan": "auto"},
        "tp_ep": {"tp_size": plan.tensor, "tp_plan": "auto", "ep_size": plan.expert},
        "fsdp2_ep": {
            "fsdp_size": plan.data,
            "ep_size": plan.expert,
            "ep_implementation": "all_to_all",
        },
    }
    if plan.strategy not in forms:
        raise Refused(f"strategy {plan.strategy} does not shard while loading")
    return distributed_config_class()(**forms[plan.strategy])


def _text_config(config: Any) -> Any:
    """The decoder's own configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def number_of_experts(config: Any) -> int:
    """Routed experts a layer, by whatever name the family gives them; 0 without."""
    text = _text_config(config)
    for name in ("num_experts", "num_local_experts"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    return 0


def check_divisible(config: Any, plan: ParallelPlan) -> None:
    """Refuse sizes that the ranks do not divide: some are a shape error deep inside, some silently
    wrong."""
    text = _text_config(config)
    heads = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")
    for name in heads if plan.tensor > 1 else ():
        size = getattr(text, name, None)
        if size is not None and size % plan.tensor:
            raise Refused(
                f"{plan.strategy}: {name} is {size}, which {plan.tensor} ranks do not divide"
            )
    experts = number_of_experts(config)
    if plan.expert > 1 and not experts:
        raise Refused(f"{plan.strategy}: the model has no routed experts to spread")
    if plan.expert > 1 and experts % plan.expert:
        raise Refused(f"{plan.strategy}: {plan.expert} ranks do not divide {experts} experts")


def refuse_layouts(config: Any, plan: ParallelPlan) -> None:
    """Refuse models that a tensor-parallel plan computes wrongly or not at all (5.23).

    Activation sparsity takes its cutoff from the mean and deviation of all features, and a shard
    has its own: gemma3n's loss is off by 1 % and its gradients by their own size, silently.
    A multimodal model with per-layer inputs reads a row of the embedding table, which is sharded:
    "aten.where.self got mixed torch.Tensor and DTensor".
    """
    text = _text_config(config)
    sparsity: Any = getattr(text, "activation_sparsity_pattern", None)
    if plan.tensor > 1 and any(sparsity or ()):
        raise Refused(
            f"{plan.strategy}: activation sparsity cuts off by statistics of all features, which a"
            " rank has only a part of; use ddp, fsdp2 or cp"
        )
    per_layer: Any = getattr(text, "hidden_size_per_layer_input", None)
    if plan.tensor > 1 and text is not config and per_layer:
        raise Refused(
            f"{plan.strategy}: the multimodal class with per-layer inputs reads a row of the"
            " sharded embedding table; load the text-only class, or use fsdp2"
        )


def load_sharded(
    model_class: Any, path: Path | str, plan: ParallelPlan, **arguments: Any
) -> nn.Module:
    """`model_class.from_pretrained(path)`, sharded while loading. All ranks call it.

    `arguments` go to `from_pretrained` (dtype, experts_implementation, …). Refused for one rank,
    for which transformers leaves every weight whole, and for sizes that do not divide. Unsupported
    where the installed transformers cannot.
    """
    from transformers import AutoConfig

    if max(plan.data, plan.tensor, plan.expert) == 1:
        raise Refused(f"{plan.strategy}: one rank shards nothing; use single")
    spread = distributed_config(plan)
    config = arguments.pop("config", None) or AutoConfig.from_pretrained(path)
    check_divisible(config, plan)
    refuse_layouts(config, plan)
    take_back = apply_to_config(config) if plan.strategy == "fsdp2_ep" else None
    with summed_once():
        model: nn.Module = model_class.from_pretrained(
            path, config=config, distributed_config=spread, **arguments
        )
    if take_back is not None:  # or the trimmed plan would be written into the saved config
        take_back()
    check_sharded(model, plan)
    _refuse_untied(model, plan)
    return model


def _refuse_untied(model: Any, plan: ParallelPlan) -> None:
    """Refuse a head and an embedding that are one weight by name, but two to FSDP2.

    transformers (5.23) shards while loading, before the two are tied: FSDP2 keeps a shard for each,
    the optimizer moves one, and from the second step on the embedding is another weight than the
    head (gemma4-moe: the loss is off by 0.4 % after one step, silently; gradients are right).
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        group = getattr(state, "_fsdp_param_group", None)
        owners = [kept._module_info.module for kept in getattr(group, "fsdp_params", ())]
        if head in owners and embedding in owners:
            raise Refused(
                f"{plan.strategy}: transformers shards the tied head and embedding as two weights,"
                " which differ after the first step; use fsdp2"
            )


def mend_expert_division(model: nn.Module, plan: ParallelPlan) -> None:
    """Make the expert gradients' divisor what transformers asked for, in float64 and float16 too.

    For dtypes at risk of overflow torch (2.13) divides before the reduction and again after it;
    where the experts' shard group has one rank it applies the factor in between as well, so that
    gradients are half of what they should be on two ranks. Measured on a one-weight module, not
    assumed.
    """
    from torch.distributed.fsdp import FSDPModule

    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts" or not isinstance(module, FSDPModule):
            continue
        dtype = next(model.get_submodule(name).parameters()).dtype
        mesh = model._mesh_manager.get_mesh("efsdp")  # type: ignore[union-attr, operator]
        if mesh.size() > 1 or dtype not in (torch.float64, torch.float16):
            return
        factor = float(plan.data)
        squared = _measured_divisor(mesh, dtype, 4.0) == 16.0
        module.set_gradient_divide_factor(factor**0.5 if squared else factor)


@functools.cache
def _measured_divisor(mesh: Any, dtype: torch.dtype, factor: float) -> float:
    """By what FSDP2 divides the gradient of a module whose divide factor is `factor`."""
    from torch.distributed.fsdp import fully_shard

    probe = nn.Linear(1, 1, bias=False, dtype=dtype, device=mesh.device_type)
    fully_shard(probe, mesh=mesh)
    probe.set_gradient_divide_factor(factor)  # type: ignore[operator]
    probe(torch.ones(1, 1, dtype=dtype, device=mesh.device_type)).sum().backward()
    gradient = probe.weight.grad
    assert isinstance(gradient, DTensor)
    return 1.0 / gradient.full_tensor().item()


def local_expert_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Experts on this rank and in all, by name of each stacked expert weight."""
    counts = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "experts" in parts and parameter.ndim == 3 and ".lora_" not in name:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            counts[name] = local.shape[0], parameter.shape[0]
    return counts


def refuse_adapters(model: nn.Module, plan: ParallelPlan) -> None:
    """Refuse adapters that PEFT puts on sharded weights but that would fail or train wrongly.

    Rowwise modules: PEFT shards A twice (shape error in the first forward). Stacked experts: PEFT
    adds the whole adapter to a rank's part of the experts.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else None
        where = name.removeprefix("base_model.model.")
        if hasattr(module, "parameter_name"):
            raise Refused(
                f"{plan.strategy}: an adapter on the experts {where}; use ddp, fsdp2 or cp"
            )
        if plan.tensor > 1 and getattr(base, "_hf_tp_plan", None) == "rowwise":
            raise Refused(f"{plan.strategy}: an adapter on {where}, which is sharded by its input")


def refuse_target_parameters(plan: ParallelPlan, target_parameters: tuple[str, ...]) -> None:
    """The same for stacked experts before PEFT is asked, which would raise an AttributeError of its
    own."""
    if target_parameters and plan.strategy in ("tp", "tp_ep", "fsdp2_ep"):
        raise Refused(
            f"{plan.strategy}: adapters on expert weights are not possible; use ddp, fsdp2 or cp"
        )


def check_sharded(model: nn.Module, plan: ParallelPlan) -> None:
    """Refuse a model whose experts or weights are not spread as the plan says (X07): the request
    was ignored."""
    refuse_adapters(model, plan)
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise Refused(
            f"{plan.strategy}: no weight of the model is sharded; load it with"
            " parallel_tensor.load_sharded"
        )
    experts = number_of_experts(model.config)
    for name, (local, _) in local_expert_counts(model).items() if plan.expert > 1 else ():
        if local * plan.expert != experts:
            raise Refused(
                f"{plan.strategy}: {name} has {local} experts here,"
                f" expected {experts // plan.expert}"
            )
