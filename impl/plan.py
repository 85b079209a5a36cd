"""Traits + setting + strategy → `TrainingPlan`: every decision with its reason."""

from __future__ import annotations

from typing import Any

from .detect import detect
from .errors import ConfigError
from .plan_checkpointing import decide_checkpointing, decide_offload
from .plan_data import decide_data, decide_freeze, forward_inputs
from .plan_draft import RANKS, Draft, check_wishes
from .plan_kernels import decide_kernels, decide_plugins
from .plan_lora import decide_lora
from .plan_loss import decide_auxiliary_loss, decide_fused_loss
from .plan_numerics import decide_attention, decide_dtype, decide_weight_scales
from .plan_parallel import decide_ddp, decide_fsdp, decide_model_parallel
from .training_plan import SettingLike, TrainingPlan


def plan(config: Any, setting: SettingLike, strategy: Any, **overrides: Any) -> TrainingPlan:
    """What a user would write to train this model so, each value with its reason.

    config: as for `detect`. setting: any object with the attributes of `SettingLike`. strategy: a
    strategy's name, or an object with `.name` and `.ranks`. overrides: wishes by the
    specification's names (`plan_draft.WISHES`); what cannot be granted is refused or changed with a
    warning. Raises Refused for what would train wrongly, ConfigError for a config or option that
    makes no sense.
    """
    wishes = check_wishes(overrides)
    name = getattr(strategy, "name", strategy)
    if name not in RANKS:
        raise ConfigError(f"unknown strategy {name!r}; it is one of {', '.join(RANKS)}")
    ranks = wishes.get("ranks", getattr(strategy, "ranks", RANKS[name]))
    if ranks < 1:
        raise ConfigError(f"plan: ranks is {ranks}; it must be positive")
    traits = detect(config, wishes.get("auto_class"))
    draft = Draft(traits, setting, name, ranks, wishes)
    decide_data(draft)
    decide_freeze(draft)
    lora = decide_lora(draft)
    draft.find_unused = decide_ddp(draft)
    wrap_classes = decide_fsdp(draft, lora)
    decide_model_parallel(draft)
    offload = decide_offload(draft)
    checkpointing = decide_checkpointing(draft, offload)
    experts = decide_kernels(draft)
    auxiliary = decide_auxiliary_loss(draft)
    fused = decide_fused_loss(draft, auxiliary, _adapts_head(lora))
    decide_plugins(draft)
    attention = decide_attention(draft)
    dtype = decide_dtype(draft)
    decide_weight_scales(draft)
    inputs = forward_inputs(draft)
    return TrainingPlan(
        decisions=dict(draft.decisions),
        traits=traits,
        setting=setting,
        strategy=name,
        dtype=dtype,
        checkpointing=checkpointing,
        offload=offload,
        freeze=draft.freeze,
        lora=lora,
        wrap_classes=wrap_classes,
        find_unused_parameters=draft.find_unused,
        experts_implementation=experts,
        attn_implementation=attention,
        fused_loss=fused,
        pack=draft.pack,
        train_on_images=draft.images,
        forward_inputs=inputs,
        warnings=(*traits.notes, *draft.warnings),
        auxiliary_loss=auxiliary,
    )


def _adapts_head(lora: Any) -> bool:
    if lora is None:
        return False
    text = f"{lora.target_modules or ''} {' '.join(lora.modules_to_save)}"
    return "lm_head" in text
