"""A plan for other hands: JSON, transformers and PEFT arguments, and the deviations explained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .deviations import BY_KEY, ROWS, Deviation
from .export_yaml import to_axolotl, to_yaml
from .training_plan import TrainingPlan

__all__ = ["explain", "rows_of", "to_args", "to_args_text", "to_axolotl", "to_json", "to_yaml"]

_INTRO = {
    "AutoModel": "the class that loads it, and what its from_pretrained takes",
    "TrainingArguments": "of transformers",
    "LoraConfig": "of peft",
    "DistributedConfig": "of transformers, given to from_pretrained as distributed_config",
}


def to_json(plan: TrainingPlan, indent: int | None = 2) -> str:
    """An object whose keys are the specification's names, each with value, reason and deviation;
    beside them `_model`, `_traits`, `_forward_inputs`, `_strategy` and `_warnings`."""
    body: dict[str, Any] = {
        "_model": {
            "model_type": plan.traits.model_type,
            "class": plan.traits.cls.name if plan.traits.cls else None,
            "layers": plan.traits.layers,
        },
        "_traits": sorted(plan.traits.names),
        "_strategy": plan.strategy,
        "_warnings": list(plan.warnings),
    }
    for name, decision in plan.decisions.items():
        entry = {"value": decision.value, "reason": decision.reason}
        if decision.deviation:
            entry["deviation"] = decision.deviation
        body[name] = entry
    return json.dumps(body, indent=indent, ensure_ascii=False)


def to_args(plan: TrainingPlan) -> dict[str, dict[str, Any]]:
    """Keyword arguments by the class that takes them: the auto class, `TrainingArguments`,
    `LoraConfig`, `DistributedConfig`; dtypes by name."""
    auto = plan.traits.cls.auto_class if plan.traits.cls else "AutoModelForCausalLM"
    loading: dict[str, Any] = {"dtype": plan.dtype}
    if plan.attn_implementation:
        loading["attn_implementation"] = plan.attn_implementation
    if plan.experts_implementation:
        loading["experts_implementation"] = plan.experts_implementation
    found: dict[str, dict[str, Any]] = {auto: loading}
    if plan.lora is not None and plan.lora.quantize_4bit:
        kwargs = {"load_in_4bit": True, "bnb_4bit_compute_dtype": plan.dtype}
        found["BitsAndBytesConfig"] = {**kwargs, "bnb_4bit_quant_type": "nf4"}
    distributed = _distributed(plan)
    if distributed:
        found["DistributedConfig"] = distributed
    found["TrainingArguments"] = _training(plan)
    if plan.lora is not None:
        found["LoraConfig"] = _lora(plan)
    return found


def _training(plan: TrainingPlan) -> dict[str, Any]:
    args: dict[str, Any] = {"bf16": plan.dtype == "bfloat16"}
    args["gradient_checkpointing"] = plan.checkpointing is not None
    if plan.checkpointing is not None:
        args["gradient_checkpointing_kwargs"] = dict(plan.checkpointing)
    if plan.strategy == "ddp":
        args["ddp_find_unused_parameters"] = plan.find_unused_parameters
    if plan["remove_unused_columns"] is not None:
        args["remove_unused_columns"] = plan["remove_unused_columns"]
    if plan["fsdp_version"] is not None and plan.strategy != "fsdp2_ep":
        args["fsdp"] = "full_shard auto_wrap" if plan["fsdp_version"] == 1 else True
        args["fsdp_config"] = {
            "version": plan["fsdp_version"],
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": list(plan.wrap_classes),
        }
    if plan.setting.accumulation == "on":
        args["gradient_accumulation_steps"] = 4
    return args


def _lora(plan: TrainingPlan) -> dict[str, Any]:
    lora = plan.lora
    assert lora is not None
    return {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        **({"rank_pattern": dict(lora.rank_pattern)} if lora.rank_pattern else {}),
        **({"alpha_pattern": dict(lora.alpha_pattern)} if lora.alpha_pattern else {}),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": lora.target_modules or [],
        "target_parameters": list(lora.target_parameters) or None,
        "modules_to_save": list(lora.modules_to_save) or None,
        "bias": "none",
    }


def _distributed(plan: TrainingPlan) -> dict[str, Any]:
    """The forms that work, by parallel.md §9 (`enable_expert_parallel` alone does nothing: L8)."""
    tensor, expert = plan["tensor_parallel_size"], plan["expert_parallel_size"]
    if plan.strategy == "fsdp2_ep":
        return {"fsdp_size": expert, "ep_size": expert, "ep_implementation": "all_to_all"}
    if tensor:
        extra = {"ep_size": expert} if expert else {}
        return {"tp_size": tensor, "tp_plan": "auto", **extra}
    return {}


def to_args_text(plan: TrainingPlan) -> str:
    """`to_args` as Python calls, one class after the other."""
    blocks = []
    for name, kwargs in to_args(plan).items():
        call = f"{name}.from_pretrained" if name.startswith("AutoModel") else name
        note = _INTRO.get("AutoModel" if name.startswith("AutoModel") else name, "")
        body = "".join(f"    {key}={value!r},\n" for key, value in kwargs.items())
        blocks.append(f"# {note}\n{call}(\n{body})" if note else f"{call}(\n{body})")
    return "\n".join(blocks) + "\n"


def rows_of(plan: TrainingPlan | None) -> list[tuple[Deviation, list[str]]]:
    """The deviations that bear on a plan, each with the decisions that name it (None: all rows)."""
    if plan is None:
        return [(row, []) for row in ROWS]
    named: dict[str, list[str]] = {}
    for name, decision in plan.decisions.items():
        if decision.deviation:
            named.setdefault(decision.deviation, []).append(name)
    return [(BY_KEY[key], names) for key, names in named.items()]


def explain(plan: TrainingPlan | None = None) -> str:
    """The deviations from the specification with their measurements, as plain text."""
    lines: list[str] = []
    for row, names in rows_of(plan):
        same = " (same value, other reason)" if row.same_value else ""
        lines.append(f"{row.topic}{same}")
        fields: Mapping[str, str] = {
            "specification": row.says,
            "emitted": row.emits,
            "measured": row.measured,
            "on": row.versions,
            "source": row.source,
        }
        lines += [f"  {label}: {text}" for label, text in fields.items()]
        if plan is not None:
            lines += [f"  here: {name} = {plan[name]!r}" for name in names]
    return "\n".join(lines) + ("\n" if lines else "")
