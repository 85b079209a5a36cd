"""A plan in the making: the facts, the user's wishes, and the decisions taken so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError
from .training_plan import Decision, SettingLike
from .traits import Traits

# How many ranks a strategy has unless `ranks` says otherwise.
RANKS = {
    "single": 1,
    "ddp": 2,
    "fsdp1": 2,
    "fsdp2": 2,
    "hsdp": 4,
    "tp": 2,
    "tp_ep": 2,
    "fsdp2_ep": 2,
    "cp": 2,
}
FSDP = frozenset({"fsdp1", "fsdp2", "hsdp", "fsdp2_ep"})
# Their model is spread already when it comes from `parallel_tensor.load_sharded`.
SHARDED_WHILE_LOADING = frozenset({"tp", "tp_ep", "fsdp2_ep"})

# What a user may ask for against the defaults, by the specification's names where it has one.
WISHES: Mapping[str, tuple[type, ...]] = {
    "activation_offloading": (bool, str),
    "adapt_towers": (bool,),
    "attn_implementation": (str,),
    "auto_class": (str,),
    "auxiliary_loss": (bool,),
    "base_model": (str,),
    "chat_template": (str,),
    "ddp_find_unused_parameters": (bool,),
    "experts_implementation": (str,),
    "freeze_mm_modules": (bool,),
    "fsdp_transformer_layer_cls_to_wrap": (str,),
    "gradient_checkpointing_kwargs": (Mapping,),
    "lora_alpha": (int,),
    "lora_alpha_pattern": (Mapping,),
    "lora_dropout": (int, float),
    "lora_modules_to_save": (list, tuple),
    "lora_r": (int,),
    "lora_rank_pattern": (Mapping,),
    "lora_target_linear": (bool,),
    "lora_target_modules": (str, list, tuple),
    "lora_target_parameters": (list, tuple),
    "normalize_weight_scales": (list, tuple),
    "peft_use_rslora": (bool,),
    "ranks": (int,),
    "roles_to_train": (list, tuple),
    "sample_packing": (bool,),
    "train_on_eos": (str,),
    "train_on_inputs": (bool,),
    "use_kernels": (bool,),
    "use_scattermoe": (bool,),
    "use_sonicmoe": (bool,),
}


def check_wishes(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that are not None; ConfigError for an unknown one or one of a wrong type."""
    for name, value in wishes.items():
        if name not in WISHES:
            raise ConfigError(f"plan: unknown option {name!r}; known: {', '.join(sorted(WISHES))}")
        if value is None:
            continue
        wanted = WISHES[name]
        mistaken = isinstance(value, bool) and bool not in wanted
        if mistaken or not isinstance(value, wanted):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise ConfigError(f"plan: {name} is {value!r}; it must be {names}")
    return {name: value for name, value in wishes.items() if value is not None}


@dataclass
class Draft:
    """What the concept modules read and write; `plan` turns it into a `TrainingPlan`.

    images: image features are fed. pack: rows are packed. freeze: components that get no gradient.
    find_unused: DDP looks for unused parameters.
    """

    traits: Traits
    setting: SettingLike
    strategy: str
    ranks: int
    wishes: Mapping[str, Any] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    images: bool = False
    pack: bool = False
    freeze: tuple[str, ...] = ()
    find_unused: bool = False

    def decide(self, name: str, value: Any, reason: str, deviation: str | None = None) -> Any:
        """Record a decision and return its value."""
        self.decisions[name] = Decision(value, reason, deviation)
        return value

    def wish(self, name: str, default: Any = None) -> Any:
        """What the user asked for, or the default."""
        return self.wishes.get(name, default)

    def warn(self, sentence: str) -> None:
        """Record what was changed or left out against the user's wish."""
        self.warnings.append(sentence)

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained instead of the weights."""
        return self.setting.tuning != "full"

    @property
    def fsdp(self) -> bool:
        """Whether parameters are sharded by FSDP, in whatever form."""
        return self.strategy in FSDP
