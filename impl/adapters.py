"""Attach LoRA by a LoraPlan: exactly the planned modules, or a clear refusal."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import Refused
from .freeze import frozen_components
from .model_facts import expert_modules, unwrap
from .training_plan import LoraPlan, TrainingPlan
from .training_plan import names as pattern_names

ADAPTER = "default"
_EXPERT_LEAVES = re.compile(
    r"gate_up_proj|gate_proj|up_proj|down_proj|\bgate\b|\bup\b|\bdown\b|w[123]"
)


def matched_modules(model: nn.Module, pattern: str | None) -> list[str]:
    """The names that a PEFT regex (full match) selects, containers without weights apart."""
    if not pattern:
        return []
    found = re.compile(pattern)
    return [name for name, _ in model.named_modules() if found.fullmatch(name)]


def bypassed_modules(model: nn.Module) -> dict[str, str]:
    """Linear layers whose weight is read without calling them, and why they take no adapter."""
    return {
        f"{name}.correction_coefs" if name else "correction_coefs": (
            "with altup_coef_clip set, training reads its weight directly, so an adapter on it"
            " would never get a gradient"
        )
        for name, module in model.named_modules()
        if hasattr(module, "correction_coefs")
        and getattr(getattr(module, "config", None), "altup_coef_clip", None) is not None
    }


def attach(model: nn.Module, plan: TrainingPlan) -> nn.Module:
    """The model with the planned adapters (a PeftModel), or the model itself without a LoraPlan.

    Raises Refused when nothing matches, when a frozen component would be adapted, and on what PEFT
    cannot do rightly. Every lora_A starts from a generator seeded by its name, so that a start
    depends neither on the order of modules nor on the rank (axolotl 0.21.0); lora_B is zero.
    """
    if plan.lora is None:
        return model
    from peft import get_peft_model

    config = peft_config(model, plan)
    _warn_of_missed_experts(model, plan.lora)
    try:
        adapted: Any = get_peft_model(
            unwrap(model), config, autocast_adapter_dtype=_keeps_adapters_in_float32(plan)
        )
    except ValueError as error:
        raise Refused(f"LoRA on {type(model).__name__}: {error}") from error
    make_whole(adapted)
    start_by_name(adapted)
    assert isinstance(adapted, nn.Module)
    return adapted


def _refuse_packed(model: nn.Module, lora: LoraPlan, names: Iterable[str]) -> None:
    """Refused: a packed module of a kind that takes no adapter, or one that is to train whole."""
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        own += getattr(module, "parametrizations", nn.Module()).parameters()
        if not any(not p.is_floating_point() or hasattr(p, "quant_state") for p in own):
            continue
        whole = [leaf for leaf in lora.modules_to_save if name.split(".")[-1] == leaf]
        if whole:
            raise Refused(f"modules_to_save: {name} is held in 4 bits and cannot be trained whole")
        if name in names and not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise Refused(f"LoRA: {name} is a quantised {kind}, which takes no adapter")


def attach_key(plan: TrainingPlan) -> str | None:
    """What `attach` reads of a plan: plans of one key get the same adapters. None: without any."""
    if plan.lora is None:
        return None
    return repr((plan.lora, plan.freeze, _keeps_adapters_in_float32(plan)))


def make_whole(adapted: nn.Module) -> None:
    """Give adapters of layers that gather their sharded output a whole lora_B on every rank.

    PEFT (0.21) sizes lora_B by the layer's local rows and knows no style but colwise and rowwise;
    on `colwise_gather_output` (DeltaNet's projections) it is too small by the number of ranks.
    Input and gathered output are whole on every rank, and so are the adapter's gradients.
    """
    for module in adapted.modules():
        base: Any = getattr(module, "base_layer", None)
        weight: Any = getattr(base, "weight", None)
        factors = getattr(module, "lora_B", None)
        if getattr(base, "_hf_tp_plan", None) != "colwise_gather_output" or weight is None:
            continue
        factor: Any
        for factor in factors.values() if isinstance(factors, nn.ModuleDict) else ():
            if factor.weight.shape[0] != weight.shape[0]:
                factor.out_features = weight.shape[0]  # of a DTensor: the whole's
                whole = factor.weight.new_zeros(weight.shape[0], factor.weight.shape[1])
                factor.weight = nn.Parameter(whole, factor.weight.requires_grad)


def peft_config(model: nn.Module, plan: TrainingPlan) -> Any:
    """The PEFT configuration of a plan for this model; Refused as described at `attach`."""
    from peft import LoraConfig

    lora = plan.lora
    assert lora is not None
    names = matched_modules(model, lora.target_modules)
    bypassed = {k: v for k, v in bypassed_modules(model).items() if k in names}
    for name, reason in bypassed.items():
        warnings.warn(f"LoRA leaves out {name}: {reason}", stacklevel=3)
    if lora.target_modules and not set(names) - set(bypassed):
        raise Refused(
            f"LoRA target_modules {lora.target_modules!r} matches no module of"
            f" {type(model).__name__}; its layers are named like {_example(model)!r}"
        )
    if not lora.target_modules and not lora.target_parameters:
        raise Refused("a LoRA plan needs target_modules or target_parameters")
    _refuse_frozen(model, plan, names)
    _refuse_packed(model, lora, names)
    _refuse_absent_parameters(model, lora)
    _refuse_idle_patterns(lora, names)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.rslora,
        lora_dropout=0.0,  # parameter adapters take none, and one spelling serves both
        bias="none",
        target_modules=lora.target_modules or [],
        exclude_modules=sorted(bypassed) or None,
        target_parameters=parameter_targets(model, lora.target_parameters) or None,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type=None,
    )


def parameter_targets(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Targets as PEFT must be given them: parametrised weights by their full name only."""
    wanted = list(targets)
    names = [
        f"{name}.{key}"
        for name, module in unwrap(model).named_modules()
        for key in getattr(module, "parametrizations", {})
    ]
    if not names:
        return wanted
    return [n for n in names if any(n == t or n.endswith(f".{t}") for t in wanted)] or wanted


def refuse_dropout(dropout: float, target_parameters: Iterable[str]) -> None:
    """Refused if dropout is asked for together with adapters of expert parameters."""
    named = sorted(target_parameters)
    if dropout and named:
        raise Refused(
            f"lora_dropout={dropout} with target_parameters {', '.join(named)}: an adapter that is"
            " folded into a weight has no input to drop; set lora_dropout to 0"
        )


def _keeps_adapters_in_float32(plan: TrainingPlan) -> bool:
    """Adapters of a half-precision model train in float32, unless they are sharded with it.

    FSDP wants one dtype in a unit (axolotl#3090), so there they take the model's.
    """
    return not plan.strategy.startswith(("fsdp", "hsdp"))


def _example(model: nn.Module) -> str:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[0] if linear else "(no linear layers)"


def _refuse_frozen(model: nn.Module, plan: TrainingPlan, names: Iterable[str]) -> None:
    frozen = [name for name, _ in frozen_components(model, plan.freeze)]
    for name in names:
        if any(name == f or name.startswith(f"{f}.") for f in frozen):
            raise Refused(
                f"LoRA target {name} lies in a frozen component: its adapter would never train;"
                " restrict target_modules to the language model or unfreeze it"
            )


def _refuse_absent_parameters(model: nn.Module, lora: LoraPlan) -> None:
    names = [name for name, _ in model.named_parameters()]
    names += [
        f"{module_name}.{key}"
        for module_name, module in model.named_modules()
        for key in getattr(module, "parametrizations", {})
    ]
    for target in lora.target_parameters:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise Refused(
                f"LoRA target_parameters {target!r} matches no parameter of"
                f" {type(model).__name__}; it has no routed experts of that name"
            )


def _refuse_idle_patterns(lora: LoraPlan, adapted: Iterable[str]) -> None:
    """Refused: a pattern of ranks or alphas that names nothing which is adapted, of which PEFT says
    nothing."""
    known = [*adapted, *lora.target_parameters]
    for kind, patterns in (("rank", lora.rank_pattern), ("alpha", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(pattern_names(pattern, name) for name in known):
                raise Refused(f"LoRA {kind} pattern {pattern!r} names nothing that is adapted")


def _warn_of_missed_experts(model: nn.Module, lora: LoraPlan) -> None:
    """A spec that names expert leaves and reaches no routed expert says so (peft#3009, #3711)."""
    experts = [name for name, _ in expert_modules(model)]
    if not experts or lora.target_parameters or not lora.target_modules:
        return
    if _EXPERT_LEAVES.search(lora.target_modules):
        warnings.warn(
            f"LoRA target_modules names expert projections but adapts no routed expert of"
            f" {type(model).__name__} ({len(experts)} layers of them, such as {experts[0]});"
            ' give target_parameters=["experts.gate_up_proj", "experts.down_proj"] to adapt them',
            stacklevel=4,
        )


def start_by_name(model: nn.Module) -> None:
    """Draw every lora_A anew, uniform within 1/√(fan in), from its name alone."""
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name or parameter.is_meta:
            continue
        plain = re.sub(
            r"\b(base_model|model|language_model|_checkpoint_wrapped_module)\.", "", name
        )
        seed = int.from_bytes(hashlib.sha256(plain.encode()).digest()[:7], "big")
        draw = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(parameter.shape[-1])
        values = torch.rand(parameter.shape, generator=draw, dtype=torch.float64)
        values = ((2 * values - 1) * bound).to(parameter.device)
        with torch.no_grad():
            parameter.copy_(_spread_like(values, parameter))


def _spread_like(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The values laid out as the parameter is: whole, or this rank's part of them."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements)
