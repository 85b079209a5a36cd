"""The memory that one GPU needs for a training, by strategy, counted on the meta device.

Weights, gradients and optimizer states are counted parameter by parameter as each strategy shards
them; activations by running a step without memory (`memory_trace`); what a strategy holds beside
(units gathered whole, reduction buckets) by rule. Figures are bytes of the allocator, without the
CUDA context (about half a gigabyte) and without fragmentation.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapters import attach
from .detect_class import meta_model
from .errors import Refused
from .freeze import freeze
from .memory_trace import Trace, trace_step
from .parallel import canonical_name
from .parallel_data import wrapped_modules
from .parallel_plan import STRATEGIES
from .plan import plan as make_plan
from .training_plan import SettingLike, TrainingPlan

CUBLAS_WORKSPACE = 32 * 2**20
"""Bytes that the matrix library takes from torch's allocator on Hopper GPUs."""
FOUR_BIT = 0.5 + 1 / 64
"""Bytes an element of a 4-bit weight: two a byte, and one absmax byte in 64 (double quantised)."""
STATES = 2
"""AdamW's moments, in the parameter's dtype."""
_TP_ATTRIBUTES = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU. buffers: units gathered whole, reduction buckets. host: offloaded.

    total: at the fullest moment, in the backward or in the optimizer step. refused: why the
    combination cannot be trained; then all figures are 0.
    """

    strategy: str
    ranks: int
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    buffers: int = 0
    workspace: int = 0
    host: int = 0
    total: int = 0
    refused: str | None = None


def meta_prepared(config: Any, plan: TrainingPlan, tensor: int = 1) -> nn.Module:
    """The model on the meta device, frozen and adapted as planned.

    tensor: over how many ranks heads and widths are split; the model is then one rank's part,
    for its activations.
    """
    if tensor > 1:
        config = _split_sizes(config, tensor)
    facts = getattr(plan.traits, "cls", None)
    if facts is None:
        raise Refused("memory: the installed transformers has no class for this config")
    model: Any = meta_model(config, facts.auto_class).to(getattr(torch, plan.dtype))
    if hasattr(model, "set_experts_implementation"):
        with suppress(ValueError):  # newer classes all have the method; one without experts refuses
            model.set_experts_implementation("grouped_mm")
    freeze(model, plan.freeze)
    with torch.device("meta"):
        adapted: nn.Module = attach(model, plan)
    return adapted


def _split_sizes(config: Any, ranks: int) -> Any:
    """A copy of the config with one rank's heads and widths.

    Written and read again, because a config whose layers differ refuses to have a size asked for.
    """
    text = config.get_text_config()
    values = text.to_dict()
    if not values.get("head_dim"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    for name in _TP_ATTRIBUTES:
        value = values.get(name)
        if isinstance(value, int) and value:
            values[name] = max(value // ranks, 1)
        elif isinstance(value, list | tuple):
            values[name] = [max(each // ranks, 1) for each in value]
    small = type(text).from_dict(values)
    if text is config:
        return small
    config = copy.deepcopy(config)
    config.text_config = small
    return config


def local_numel(name: str, parameter: torch.Tensor, strategy: str, ranks: int, rules: Any) -> int:
    """How many elements of a parameter one rank holds."""
    whole, first = parameter.numel(), parameter.shape[0] if parameter.ndim else 1
    if strategy in ("tp_ep", "fsdp2_ep") and _expert(name, parameter):
        return whole // ranks
    if strategy == "fsdp1":
        return -(-whole // ranks)
    if strategy in ("fsdp2", "hsdp", "fsdp2_ep"):
        shards = ranks // 2 if strategy == "hsdp" else ranks
        return -(-first // shards) * (whole // max(first, 1))
    if strategy in ("tp", "tp_ep") and _sharded_by_rule(name, rules):
        return whole // ranks
    return whole


def _expert(name: str, parameter: torch.Tensor) -> bool:
    """Is it the stacked weight of routed experts?"""
    return parameter.ndim == 3 and "experts" in name.split(".") and ".lora_" not in name


def _sharded_by_rule(name: str, rules: Any) -> bool:
    """Does the model's tensor-parallel plan split this weight?"""
    generic = re.sub(r"\.\d+(?=\.)", ".*", name)
    style = rules.get(generic) or rules.get(generic.rpartition(".")[0]) or ""
    splits = ("colwise", "rowwise", "embedding", "local_packed", "grouped_gemm")
    return any(part in style for part in splits)


def _weight_bytes(
    name: str, parameter: torch.Tensor, plan: TrainingPlan, linears: set[str]
) -> float:
    """Bytes an element of a weight takes as it is kept."""
    quantised = plan.lora is not None and plan.lora.quantize_4bit and not parameter.requires_grad
    if quantised and (name in linears or parameter.ndim == 3):
        return FOUR_BIT
    return float(parameter.element_size())


@dataclass(frozen=True)
class _Static:
    """Bytes that do not depend on the batch; unit figures are of the largest FSDP unit, whole."""

    weights: int
    trainable: int
    trainable_whole: int
    root: int
    unit: int
    unit_trainable: int


def _static(model: nn.Module, plan: TrainingPlan, ranks: int) -> _Static:
    """Count parameters as the plan's strategy shards them."""
    rules = getattr(_base(model), "tp_plan", None) or {}
    linears = {
        canonical_name(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    weights = trainable = whole_trainable = 0.0
    whole: dict[int, float] = {}
    for raw, parameter in model.named_parameters():
        name = canonical_name(raw)
        numel = local_numel(name, parameter, plan.strategy, ranks, rules)
        size = _weight_bytes(name, parameter, plan, linears)
        weights += numel * size
        owned = plan.strategy == "fsdp2_ep" and _expert(name, parameter)  # never gathered
        whole[id(parameter)] = (numel if owned else parameter.numel()) * size
        if parameter.requires_grad:
            trainable += numel * parameter.element_size()
            whole_trainable += parameter.numel() * parameter.element_size()
    units = _units(model, plan)
    sizes = [sum(whole[id(p)] for p in unit) for unit in units]
    learning = [sum(whole[id(p)] for p in unit if p.requires_grad) for unit in units]
    return _Static(
        weights=round(weights),
        trainable=round(trainable),
        trainable_whole=round(whole_trainable),
        root=round(sum(whole.values()) - sum(sizes)),
        unit=round(max(sizes, default=0)),
        unit_trainable=round(max(learning, default=0)),
    )


def _base(model: Any) -> Any:
    """The transformers model under PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _units(model: nn.Module, plan: TrainingPlan) -> list[list[nn.Parameter]]:
    """The parameters of each decoder layer that FSDP makes a unit."""
    if not plan.wrap_classes or not plan.strategy.startswith(("fsdp", "hsdp")):
        return []
    return [list(m.parameters()) for _, m in wrapped_modules(model, plan.wrap_classes)]


def _buffers(static: _Static, strategy: str) -> int:
    """What a strategy holds beside the shards.

    FSDP: the root's parameters whole from the forward on, two units (one in use, one prefetched),
    and one unit's gradients before and after reduction. DDP and context parallel: buckets as
    large as the gradients.
    """
    if strategy.startswith(("fsdp", "hsdp")):
        return static.root + 2 * static.unit + 2 * static.unit_trainable
    return static.trainable_whole if strategy in ("ddp", "cp") else 0


def estimate(
    config: Any,
    plan: TrainingPlan,
    ranks: int = 1,
    *,
    batch: int = 1,
    tokens: int = 2048,
    device: str = "cuda",
    trace: Trace | None = None,
    model: nn.Module | None = None,
) -> Estimate:
    """The memory of one GPU for `batch` rows of `tokens` text tokens per rank (per group of ranks
    that share a batch: context and tensor parallel).

    config: a transformers config object. trace, model: of the same setting (`meta_prepared`), if
    at hand.
    Refused where the model has no class here or the plan cannot be had.
    """
    model = meta_prepared(config, plan) if model is None else model
    static = _static(model, plan, ranks)
    if trace is None:
        trace = _trace(config, plan, ranks, batch, tokens, model)
    share = static.trainable / static.trainable_whole if static.trainable_whole else 1.0
    rows = 1.0 / ranks if plan.strategy == "cp" else 1.0
    peak, activations = trace.peak(share, rows)
    optimizer, buffers = STATES * static.trainable, _buffers(static, plan.strategy)
    # A fused optimizer over all tensors needs one temporary of their size; on the CPU it is small.
    temporary = static.trainable if device == "cuda" else 0
    kept = static.weights + optimizer
    workspace = CUBLAS_WORKSPACE if device == "cuda" else 0
    total = kept + max(peak + buffers, static.trainable + temporary) + workspace
    return Estimate(
        plan.strategy,
        ranks,
        static.weights,
        static.trainable,
        optimizer,
        activations,
        buffers,
        workspace,
        round(trace.host * rows),
        total,
    )


def _trace(
    config: Any, plan: TrainingPlan, ranks: int, batch: int, tokens: int, model: nn.Module
) -> Trace:
    """The step of the model, or of one rank's part of it where ranks split heads and widths."""
    if plan.strategy in ("tp", "tp_ep") and ranks > 1:
        model = meta_prepared(config, plan, ranks)
    return trace_step(model, plan, batch, tokens)


def compare_strategies(
    config: Any,
    setting: SettingLike,
    ranks: int,
    *,
    batch: int = 1,
    tokens: int = 2048,
    device: str = "cuda",
    strategies: Iterable[str] = STRATEGIES,
) -> list[Estimate]:
    """Estimates of every strategy over `ranks` GPUs, least memory first; refused ones last, each
    with its reason. `single` is one GPU alone."""
    results: list[Estimate] = []
    traces: dict[str, Trace] = {}
    models: dict[str, nn.Module] = {}
    for strategy in strategies:
        count = 1 if strategy == "single" else ranks
        try:
            plan = make_plan(config, setting, strategy, ranks=count)
            sharded = strategy.startswith(("fsdp", "hsdp"))  # adapters have another dtype then
            key = repr((plan.freeze, plan.lora, plan.dtype, sharded))
            if key not in models:
                models[key] = meta_prepared(config, plan)
            model = models[key]
            key += repr((plan.checkpointing, plan.offload, plan.fused_loss))
            key += str(count if strategy in ("tp", "tp_ep") else 1)
            if key not in traces:
                traces[key] = _trace(config, plan, count, batch, tokens, model)
            found = estimate(
                config,
                plan,
                count,
                batch=batch,
                tokens=tokens,
                device=device,
                trace=traces[key],
                model=model,
            )
        except Refused as reason:
            found = Estimate(strategy, count, refused=str(reason))
        results.append(found)
    return sorted(results, key=lambda e: (e.refused is not None, e.total))
