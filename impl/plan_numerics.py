"""dtype, attention implementation, and the rescaling of outlying weights."""

from __future__ import annotations

import re

from .errors import ConfigError, Refused
from .plan_draft import Draft

DTYPES = ("float32", "bfloat16", "float64")
FLASH_WIDTH = 256  # the widest head of FlashAttention 2 and 3 (Dao-AILab/flash-attention#2427)
THRESHOLD = 1.3  # the specification's example; families.md §1.1


def decide_dtype(draft: Draft) -> str:
    """`bf16` and `float32`; returns the dtype's name."""
    dtype = draft.setting.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"plan: dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    draft.decide("bf16", dtype == "bfloat16", f"the setting: {dtype}")
    if dtype == "float64":
        draft.decide("float32", None, "float64 has no key; it is for comparisons")
    else:
        draft.decide("float32", True if dtype == "float32" else None, f"the setting: {dtype}")
    return dtype


def decide_attention(draft: Draft) -> str:
    """`attn_implementation`: sdpa where the class has it, else eager; Refused for FlashAttention
    on heads that it does not take: transformers accepts it and the first forward fails."""
    known = draft.traits.cls.attention if draft.traits.cls else ("sdpa", "eager")
    asked = draft.wish("attn_implementation")
    if asked is not None:
        stock = asked in ("sdpa", "flash_attention_2", "flex_attention")
        if draft.traits.cls and stock and asked not in known:
            raise Refused(f"attn_implementation: {draft.traits.cls.name} has no {asked}")
        width = draft.traits.head_width
        if asked.startswith("flash_attention") and width > FLASH_WIDTH:
            raise Refused(
                f"attn_implementation: {asked} takes heads of at most {FLASH_WIDTH}, and this"
                f" model's widest have {width}; use sdpa"
            )
        return str(draft.decide("attn_implementation", asked, "as asked for"))
    value = "sdpa" if "sdpa" in known else "eager"
    reason = "the default of transformers" if value == "sdpa" else "the class has no sdpa form"
    return str(draft.decide("attn_implementation", value, reason))


def decide_weight_scales(draft: Draft) -> None:
    """`normalize_weight_scales`: where routed experts meet recurrent layers (specification)."""
    traits, asked = draft.traits, draft.wish("normalize_weight_scales")
    name = "normalize_weight_scales"
    if asked is not None:
        draft.decide(name, [dict(rule) for rule in asked], "as asked for", name)
        return
    if traits.experts is None or not traits.linear_layers:
        draft.decide(name, None, "no recurrent layers beside routed experts, so no known drift")
        return
    path = traits.cls.recurrent_path if traits.cls else "linear_attn"
    leaf = path.rpartition(".")[2] or "linear_attn"
    rules = [{"name_pattern": re.escape(f"{leaf}.conv1d.weight"), "threshold": THRESHOLD}]
    reason = (
        "late recurrent layers of such models drift (rare experts under AdamW); acts only where the"
        " function is called, so look with dry_run first"
    )
    draft.decide(name, rules, reason, name)
