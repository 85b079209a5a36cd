"""The plan of a training: every value a user would write, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class SettingLike(Protocol):
    """How the model is to be trained; any object with these attributes will do.

    dtype: float32, bfloat16, float64. tuning: full, lora, lora-experts, qlora. checkpointing: off,
    nonreentrant, reentrant. batch: text, padded, packed, images. offload: off, on, legacy, disk,
    hidden_states. kernels: off, on. accumulation: off, on.
    """

    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def tuning(self) -> str: ...  # noqa: D102
    @property
    def checkpointing(self) -> str: ...  # noqa: D102
    @property
    def batch(self) -> str: ...  # noqa: D102
    @property
    def offload(self) -> str: ...  # noqa: D102
    @property
    def kernels(self) -> str: ...  # noqa: D102
    @property
    def accumulation(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Decision:
    """A value and why it was chosen; `deviation` is a key of `impl.deviations` where we differ
    from the specification.
    """

    value: Any
    reason: str
    deviation: str | None = None


def names(pattern: str, name: str) -> bool:
    """Whether a pattern of ranks or alphas names a module or weight, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@dataclass(frozen=True)
class LoraPlan:
    """What is adapted. target_modules: a PEFT regex (full match) or None; target_parameters:
    suffixes of 3-D expert weights; exclude: why each left-out module is left out; dropout: of the
    adapters. rank_pattern, alpha_pattern: a pattern of names (a regex after a dot, as PEFT matches
    it) → r or alpha of what it names.
    """

    target_modules: str | None
    target_parameters: tuple[str, ...] = ()
    r: int = 4
    alpha: int = 8
    rslora: bool = False
    exclude: Mapping[str, str] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    quantize_4bit: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """The rank of the adapter on a module or weight of this full name."""
        found = (n for p, n in self.rank_pattern.items() if names(p, name))
        return next(found, self.r)


@dataclass(frozen=True)
class TrainingPlan:
    """The decisions by the specification's names, and what `prepare` and `parallelize` act on.

    traits: `impl.detect.Traits` of the model. setting, strategy: as asked for.
    checkpointing: None, or the kwargs (`{"use_reentrant": False}`). offload: None, True, "legacy",
    "disk", "hidden_states". freeze: path components of modules to freeze. wrap_classes: FSDP units.
    experts_implementation: as given to transformers ("eager", "grouped_mm", "scattermoe") or None.
    fused_loss: whether the loss is computed from hidden states. pack: whether rows are packed.
    forward_inputs: what a batch must carry. warnings: what was changed or left out.
    """

    decisions: Mapping[str, Decision]
    traits: Any
    setting: SettingLike
    strategy: str
    dtype: str = "float32"
    checkpointing: Mapping[str, Any] | None = None
    offload: bool | str | None = None
    freeze: tuple[str, ...] = ()
    lora: LoraPlan | None = None
    wrap_classes: tuple[str, ...] = ()
    find_unused_parameters: bool = False
    experts_implementation: str | None = None
    attn_implementation: str | None = None
    fused_loss: bool = False
    pack: bool = False
    train_on_images: bool = False
    forward_inputs: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    auxiliary_loss: bool = False

    def __getitem__(self, key: str) -> Any:
        """The value of a decision by the specification's name."""
        return self.decisions[key].value
