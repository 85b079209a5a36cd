"""Which turns of a conversation train, and which stop tokens, in axolotl's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

STOPS = ("turn", "all", "last", "none")


@dataclass(frozen=True)
class LabelRules:
    """train_on_inputs: every role's turns train. roles_to_train: the roles whose turns do (none of
    them for an empty one). train_on_eos: the stop tokens that train: those of trained turns
    ("turn"), of all turns, of the last one of the conversation, or none.
    """

    train_on_inputs: bool = False
    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_eos: str = "turn"

    def __post_init__(self) -> None:
        if isinstance(self.roles_to_train, str):
            raise ConfigError(f"roles_to_train is {self.roles_to_train!r}; it must be a list")
        if self.train_on_eos not in STOPS:
            raise ConfigError(
                f"train_on_eos is {self.train_on_eos!r}; it is one of {', '.join(STOPS)}"
            )

    @classmethod
    def of(cls, plan: Any) -> LabelRules:
        """Those of a plan; the defaults where it decides nothing of the kind."""
        decisions: Mapping[str, Any] = getattr(plan, "decisions", {})
        names = ("train_on_inputs", "roles_to_train", "train_on_eos")
        found = {name: decisions[name].value for name in names if name in decisions}
        if "roles_to_train" in found:
            found["roles_to_train"] = tuple(found["roles_to_train"])
        return cls(**found)

    def trains(self, role: str) -> bool:
        """Whether a turn of this role trains."""
        return self.train_on_inputs or role in self.roles_to_train

    @property
    def marks_suffice(self) -> bool:
        """Whether what the template marks, the assistant's turns, is all that is asked about."""
        others = self.train_on_inputs or bool(set(self.roles_to_train) - {"assistant"})
        return not others and self.train_on_eos in ("turn", "none")
