"""Adapters: which modules and expert weights, rank, dropout, 4-bit base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError, Refused
from .lora_targets import ALL_LINEAR, ROUTED_EXPERTS, default_regex, names_regex
from .plan_draft import SHARDED_WHILE_LOADING, Draft
from .training_plan import LoraPlan
from .traits import ExpertFacts, Traits

# Rank of real models, and of those so narrow that it would exceed their projections.
RANK, TINY_RANK, TINY_WIDTH = 16, 4, 256
# Strategies whose weights are sharded before PEFT meets them.
SHARDED = ("tp", "tp_ep", "fsdp2_ep")


def decide_lora(draft: Draft) -> LoraPlan | None:
    """Every `lora_*` key, `adapter` and `load_in_4bit`; None for full fine-tuning.

    Refused: expert adapters without experts or with dropout, targets that are experts in a model
    whose experts are not weights.
    """
    _four_bit(draft)
    if not draft.adapters:
        _none(draft)
        return None
    quantized = draft.setting.tuning == "qlora"
    kind = "qlora" if quantized else "lora"
    draft.decide("adapter", kind, f"the setting: {draft.setting.tuning}")
    modules, parameters, exclude = _targets(draft)
    modules = _spread(draft, modules, parameters, exclude)
    r, alpha = _rank(draft)
    dropout = _dropout(draft, parameters)
    saved = tuple(draft.wish("lora_modules_to_save", ()))
    reason = "as asked for" if saved else "nothing beside the adapters is trained"
    draft.decide("lora_modules_to_save", list(saved) or None, reason)
    rslora = bool(draft.wish("peft_use_rslora", False))
    reason = "as asked for: scale α/√r" if rslora else "the usual scale α/r"
    draft.decide("peft_use_rslora", rslora or None, reason)
    return LoraPlan(
        target_modules=modules,
        target_parameters=parameters,
        r=r,
        alpha=alpha,
        rslora=rslora,
        exclude=exclude,
        modules_to_save=saved,
        quantize_4bit=quantized,
        dropout=dropout,
        rank_pattern=_pattern(draft, "lora_rank_pattern"),
        alpha_pattern=_pattern(draft, "lora_alpha_pattern"),
    )


def _none(draft: Draft) -> None:
    asked = sorted(name for name in draft.wishes if name.startswith(("lora_", "peft_")))
    if asked:
        draft.warn(f"{', '.join(asked)} asked for, but the setting trains every weight, no adapter")
    names = ("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    more = (
        "lora_target_linear",
        "lora_target_parameters",
        "lora_modules_to_save",
        "peft_use_rslora",
    )
    for name in (*names, *more):
        draft.decide(name, None, "full fine-tuning")


def _four_bit(draft: Draft) -> None:
    """`load_in_4bit`, and `quantize_moe_experts` for the expert weights it would pass over.

    Refused: 4-bit weights under a strategy that cuts them while loading.
    """
    experts = draft.traits.experts
    if draft.setting.tuning != "qlora":
        why = "the base weights are not quantised in this setting"
        draft.decide("load_in_4bit", False, why)
        draft.decide("quantize_moe_experts", None, why)
        return
    if draft.strategy in SHARDED_WHILE_LOADING:
        raise Refused(
            f"{draft.strategy} with 4-bit weights: they are flat bytes, two values each, a scale"
            " for every 64 of them (a weight of 64 by 48 is 1536 by 1), without the rows, columns"
            " and experts that the strategy cuts while loading: no weight would be sharded, each"
            " rank would hold them all; use fsdp2, which cuts bytes"
        )
    draft.decide("load_in_4bit", True, "QLoRA: linear layers of the base in 4 bits")
    if experts is None or not experts.parameters:
        why = "no expert weights beside linear layers"
        draft.decide("quantize_moe_experts", None, why)
        return
    why = (
        f"the {len(experts.layers)} layers' expert weights are 3-D parameters: bitsandbytes"
        " replaces linear layers only and would leave most of the model as it is"
    )
    draft.decide("quantize_moe_experts", True, why)


def _targets(draft: Draft) -> tuple[str | None, tuple[str, ...], dict[str, str]]:
    """The regex, the expert weights, and what is left out."""
    traits = draft.traits
    asked, linear = draft.wish("lora_target_modules"), draft.wish("lora_target_linear")
    if linear and asked:
        raise Refused("lora_target_linear and lora_target_modules exclude one another")
    towers = _towers(draft)
    named: tuple[str, ...] = ()
    if linear:
        draft.warn("lora_target_linear is given as a regex over the language model's linear layers")
        asked = ALL_LINEAR
    draft.decide("lora_target_linear", False, _linear_reason(traits), "target-linear")
    if asked is None:
        regex: str | None
        regex, exclude = default_regex(traits)
        row = _regex_row(traits, regex)
        draft.decide("lora_target_modules", regex, _regex_reason(traits), row)
    else:
        regex, exclude, named = _asked(draft, asked, towers)
    parameters = _parameters(draft, named)
    if traits.components and not towers:
        exclude["|".join(traits.components)] = "not the language model: no gradient on text"
    return regex, parameters, exclude


def _spread(
    draft: Draft, regex: str | None, parameters: tuple[str, ...], exclude: dict[str, str]
) -> str | None:
    """The regex without what PEFT cannot adapt once it is sharded; Refused for sharded experts."""
    if draft.strategy not in SHARDED:
        return regex
    if parameters:
        raise Refused(
            f"{draft.strategy}: adapters on expert weights are not possible, since PEFT adds the"
            " whole adapter to a rank's part of the experts; use ddp, fsdp2 or cp"
        )
    if draft.strategy == "fsdp2_ep" or regex is None or draft.traits.cls is None:
        return regex
    leaves = draft.traits.cls.rowwise
    if not leaves:
        return regex
    why = "sharded by its input: PEFT would shard lora_A twice, a shape error in the first forward"
    for leaf in leaves:
        exclude[leaf] = why
    names = "|".join(leaves)
    regex = rf"(?!.*\b({names})$){regex}"
    draft.warn(f"{draft.strategy}: no adapter on {', '.join(leaves)}, {why}")
    draft.decide("lora_target_modules", regex, f"without {', '.join(leaves)}: {why}", "lora-names")
    return regex


def _towers(draft: Draft) -> bool:
    """Whether adapters go on the towers too: only asked for, and only where images feed them."""
    if not draft.wish("adapt_towers"):
        return False
    if not draft.images:
        raise Refused("adapt_towers without images: the towers' adapters would get no gradient")
    draft.freeze = ()
    draft.decide("freeze_mm_modules", False, "adapters on the towers were asked for")
    draft.decide("frozen_modules", [], "adapters on the towers were asked for")
    return True


def _asked(
    draft: Draft, asked: Any, towers: bool
) -> tuple[str | None, dict[str, str], tuple[str, ...]]:
    """The user's own targets: a regex as it is (Refused if it reaches nothing), or names."""
    traits = draft.traits
    if isinstance(asked, str) and asked not in (ALL_LINEAR, ROUTED_EXPERTS):
        if not towers:
            _check_regex(traits, asked)
        draft.decide("lora_target_modules", asked, "as asked for")
        return asked, {}, ()
    words = [asked] if isinstance(asked, str) else [str(word) for word in asked]
    regex, targets = names_regex(words, traits, towers)
    for warning in targets.warnings:
        draft.warn(warning)
    text = f"{', '.join(words)}, as asked for, on the language model of this class"
    draft.decide("lora_target_modules", regex, text, "lora-names")
    return regex, dict(targets.excluded), targets.parameters


def _check_regex(traits: Traits, regex: str) -> None:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ConfigError(f"plan: lora_target_modules is no regex: {error}") from None
    if traits.cls is None:
        return
    names = [f"{traits.layers}.{i}.{linear.name}" for linear in traits.cls.linears for i in (0, 1)]
    names += traits.cls.model_linears
    if any(pattern.fullmatch(name) for name in names):
        return
    raise Refused(
        f"lora_target_modules {regex!r} matches no linear layer of the language model in"
        f" {traits.cls.name}, such as {names[0]}; names differ from class to class"
    )


def _regex_reason(traits: Traits) -> str:
    where = f"{traits.cls.name}: " if traits.cls else "class unknown: "
    text = f"{where}restricted to the language model ({traits.layers}); optional checkpoint wrapper"
    if traits.kv_sharing and traits.cls and traits.cls.keyless:
        text += f"; the {len(traits.cls.keyless)} layers that borrow keys and values have no k, v"
    if _peft_rewrites(traits):
        text += "; PEFT alone would rewrite the shared experts' names to the routed experts"
    if traits.attention_k_eq_v:
        text += "; full-attention layers have no v_proj"
    return text


def _peft_rewrites(traits: Traits) -> bool:
    """Whether PEFT turns names of shared experts into routed experts on this model type."""
    if not (traits.experts and traits.experts.shared):
        return False
    try:
        from peft.utils import transformers_weight_conversion as conversion

        pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(traits.model_type)
        return pattern in conversion._MOE_TARGET_MODULE_MAPPING
    except (ImportError, AttributeError):
        return False


def _regex_row(traits: Traits, regex: str) -> str | None:
    if _peft_rewrites(traits):
        return "peft-rewrite"
    if not traits.layers.startswith("model.language_model."):
        return "regex-by-class"
    specified = regex.endswith("(up|down|gate|q|k|v|o)_proj")
    return "regex-names" if specified else "regex-recurrent"


def _linear_reason(traits: Traits) -> str:
    if traits.multimodal:
        return "would adapt the towers too, whose adapters get no gradient on text"
    if traits.experts:
        return "would adapt the router and leave routed experts out"
    return "the regex says the same, and says it by name"


def _parameters(draft: Draft, named: tuple[str, ...]) -> tuple[str, ...]:
    """`lora_target_parameters`: the routed experts, if they are asked for."""
    experts, asked = draft.traits.experts, draft.wish("lora_target_parameters")
    wanted = bool(named) or asked is not None or draft.setting.tuning == "lora-experts"
    if experts is None:
        if wanted:
            raise Refused(f"expert LoRA: {draft.traits.model_type} has no routed experts")
        draft.decide("lora_target_parameters", None, "no routed experts")
        return ()
    if not wanted:
        where = "the dense MLP beside them" if experts.in_layer else "attention and shared parts"
        why = f"routed experts stay frozen; names reach {where}: ask for {ROUTED_EXPERTS!r}"
        draft.decide("lora_target_parameters", None, why, "lora-names")
        return ()
    if not experts.parameters:
        raise Refused(
            "expert LoRA: the experts are modules, not 3-D weights; name their linear layers in"
            " lora_target_modules"
            if experts.layout == "modules"
            else "expert LoRA: the class is unknown, and so are the experts' weights"
        )
    value = _expert_weights(experts, asked, named)
    why = f"routed experts: {experts.layout} 3-D weights"
    draft.decide("lora_target_parameters", list(value), why)
    return value


def _expert_weights(experts: ExpertFacts, asked: Any, named: tuple[str, ...]) -> tuple[str, ...]:
    if asked is None:
        return named or experts.targets
    if ROUTED_EXPERTS in asked:
        return experts.targets
    stray = [str(name) for name in asked if not _names_weight(str(name), experts)]
    if stray or not asked:
        raise Refused(
            f"lora_target_parameters: {', '.join(stray) or 'an empty list'} names no expert weight;"
            f" this model has {', '.join(experts.targets)}"
        )
    return tuple(str(name) for name in asked)


def _names_weight(name: str, experts: ExpertFacts) -> bool:
    """Whether a (possibly full) path ends in an expert weight of this model."""
    full = [f"{experts.path}.{leaf}" for leaf in experts.parameters]
    return any(path.endswith(f".{name}") or path == name or name.endswith(path) for path in full)


def _rank(draft: Draft) -> tuple[int, int]:
    tiny = draft.traits.hidden_size < TINY_WIDTH
    r = int(draft.wish("lora_r", TINY_RANK if tiny else RANK))
    if r < 1:
        raise ConfigError(f"plan: lora_r is {r}; it must be positive")
    alpha = int(draft.wish("lora_alpha", 2 * r))
    if alpha < 1:
        raise ConfigError(f"plan: lora_alpha is {alpha}; it must be positive")
    why = "small, as the model is narrow" if tiny else "ordinary; the specification names none"
    draft.decide("lora_r", r, "as asked for" if "lora_r" in draft.wishes else why)
    draft.decide("lora_alpha", alpha, f"scale α/r = {alpha / r:g}")
    return r, alpha


def _pattern(draft: Draft, name: str) -> dict[str, int]:
    """A rank or alpha of their own for what a pattern names; ConfigError for one that is none."""
    asked: Mapping[str, Any] = draft.wish(name, {})
    for pattern, value in asked.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"plan: {name}: {pattern} is {value!r}; it must be a positive number")
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise ConfigError(f"plan: {name}: {pattern!r} is no regex: {error}") from None
    if asked:
        draft.decide(name, dict(asked), "as asked for; axolotl has no key for it")
    return {str(pattern): value for pattern, value in asked.items()}


def _dropout(draft: Draft, parameters: tuple[str, ...]) -> float:
    value = float(draft.wish("lora_dropout", 0.0))
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"plan: lora_dropout is {value:g}; it must lie in [0, 1)")
    if value and parameters:
        raise Refused(
            f"lora_dropout: {value:g} with lora_target_parameters: adapters on 3-D weights have no"
            " dropout (PEFT's ParamWrapper refuses it); set it to 0"
        )
    why = (
        "adapters on 3-D expert weights allow no dropout" if parameters else "off unless asked for"
    )
    draft.decide("lora_dropout", value, "as asked for" if value else why)
    return value


def trainable(traits: Traits, plan: LoraPlan) -> int:
    """Parameters of the adapters, counted over the linear layers and expert weights they cover."""
    if traits.cls is None:
        return 0
    count = 0
    for linear in traits.cls.linears:
        name = f"{traits.layers}.0.{linear.name}"
        if plan.target_modules and re.fullmatch(plan.target_modules, name):
            count += plan.rank_of(name) * (linear.inputs + linear.outputs) * linear.count
    experts = traits.experts
    if experts and plan.target_parameters:
        width = traits.hidden_size + experts.width
        ranks = sum(plan.rank_of(name) for name in plan.target_parameters)
        count += ranks * len(experts.layers) * experts.num * width
    return count
