"""A plan in axolotl's keys, as YAML with the reasons as comments (no YAML library is needed)."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from .plan_numerics import FLASH_WIDTH
from .training_plan import TrainingPlan

# Decisions that are no key of axolotl's, or stand inside another one.
_NOT_KEYS = frozenset(
    {
        "forward_inputs",
        "frozen_modules",
        "fsdp_version",
        "fsdp_transformer_layer_cls_to_wrap",
        "output_router_logits",
        "dp_shard_size",
        "dp_replicate_size",
        "roles_to_train",
        "train_on_eos",
        "lora_rank_pattern",
        "lora_alpha_pattern",
    }
)
# Keys that a plugin brings: left out when they say no.
_PLUGIN_KEYS = frozenset({"cut_cross_entropy", "use_scattermoe", "use_sonicmoe"})
_EXPERT_PARALLEL = "axolotl.integrations.expert_parallel.ExpertParallelPlugin"
_FLASH_ONLY = "axolotl's context parallel takes FlashAttention only"
_RING = (
    f"{_FLASH_ONLY}, and a ring drops sliding windows; the reference gathers keys and values"
    " instead, with sdpa"
)
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./@-]*")
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"})


def to_axolotl(plan: TrainingPlan, base_model: str = "./model") -> dict[str, Any]:
    """The plan as axolotl's config: its decisions, and around them the fields that its schema
    demands and no plan can know (base model, data, batch size, learning rate), as placeholders."""
    config: dict[str, Any] = {"base_model": base_model}
    for name, decision in plan.decisions.items():
        silent = decision.value is None or (name in _PLUGIN_KEYS and not decision.value)
        if name not in _NOT_KEYS and not silent:
            config[name] = decision.value
    if plan.decisions["expert_parallel_size"].value:
        config["plugins"] = [*(config.get("plugins") or []), _EXPERT_PARALLEL]
    if plan.strategy in ("hsdp", "fsdp2_ep", "fsdp2"):
        for name in ("dp_replicate_size", "dp_shard_size"):
            if plan.decisions[name].value and plan.strategy != "fsdp2":
                config[name] = plan.decisions[name].value
    if _rings(plan):
        config["attn_implementation"] = "flash_attention_2"
    if plan.auxiliary_loss:
        config["overrides_of_model_config"] = {"output_router_logits": True}
    template = plan.decisions["chat_template"].value or "tokenizer_default"
    of_data = {name: plan.decisions[name].value for name in ("roles_to_train", "train_on_eos")}
    config["datasets"] = [{"path": "./data.jsonl", "type": "chat_template", **of_data}]
    config.setdefault("chat_template", template)
    config |= {
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 4 if plan.setting.accumulation == "on" else 1,
        "learning_rate": 0.0002 if plan.lora else 0.00002,
        "output_dir": "./out",
    }
    return config


def _rings(plan: TrainingPlan) -> bool:
    """Whether axolotl's schema wants FlashAttention where the reference has sdpa."""
    known = plan.traits.cls.attention if plan.traits.cls else ()
    return plan.strategy == "cp" and "flash_attention_2" in known


def _cautions(plan: TrainingPlan) -> list[str]:
    """What a reader of the file must know before it is run."""
    width = plan.traits.head_width
    if not _rings(plan) or width <= FLASH_WIDTH:
        return list(plan.warnings)
    says = f"axolotl cannot train this: {_FLASH_ONLY}, and heads of {width} are wider"
    return [*plan.warnings, f"{says} than the {FLASH_WIDTH} that it takes; use another strategy"]


def to_yaml(plan: TrainingPlan, base_model: str = "./model", reasons: bool = True) -> str:
    """`to_axolotl` as YAML; each decision under a comment that gives its reason."""
    lines = [f"# {plan.traits.model_type}, {plan.strategy}: fill in base_model, datasets, rates"]
    for sentence in _cautions(plan):
        lines += _comment(f"! {sentence}")
    for key, value in to_axolotl(plan, base_model).items():
        decision = plan.decisions.get(key)
        if decision is not None and reasons:
            other = key == "attn_implementation" and value != decision.value
            lines += _comment(_RING if other else decision.reason)
        lines += _entry(key, value, 0)
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="#   ")


def _entry(key: str, value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(value, Mapping):
        if not value:
            return [f"{pad}{key}: {{}}"]
        inner = [line for k, v in value.items() for line in _entry(str(k), v, depth + 1)]
        return [f"{pad}{key}:", *inner]
    if isinstance(value, list | tuple):
        if not value:
            return [f"{pad}{key}: []"]
        return [f"{pad}{key}:", *(line for item in value for line in _item(item, depth + 1))]
    return [f"{pad}{key}: {scalar(value)}"]


def _item(value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(value, Mapping):
        lines = [line for k, v in value.items() for line in _entry(str(k), v, depth + 1)]
        return [f"{pad}- {lines[0].lstrip()}", *lines[1:]] if lines else [f"{pad}- {{}}"]
    return [f"{pad}- {scalar(value)}"]


def scalar(value: Any) -> str:
    """A YAML 1.1 scalar that reads back as the same value; strings in single quotes where
    needed.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = f"{value:.10f}".rstrip("0")
        return text + "0" if text.endswith(".") else text
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    if any(ord(char) < 32 for char in text):
        return json.dumps(text)
    return "'" + text.replace("'", "''") + "'"
