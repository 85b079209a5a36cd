"""What `prepare` did to a model: its plan and how to take everything back, kept beside the model.

Nothing is stored on the module itself, so that copying, saving and sharding see an ordinary model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from .model_facts import unwrap
from .training_plan import TrainingPlan

Undo = Callable[[], None]


@dataclass
class Prepared:
    """The plan a model was prepared by, the undo steps in order, and what is switched on."""

    plan: TrainingPlan
    undo: list[Undo] = field(default_factory=list)
    fused_loss: bool = False

    def take_back(self) -> None:
        """Run the undo steps, last first; every step runs, the first error is raised at the end."""
        errors: list[BaseException] = []
        while self.undo:
            try:
                self.undo.pop()()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


_STATES: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()


def state_of(model: nn.Module) -> Prepared | None:
    """The state of a prepared model, also when wrapped; None if it is not prepared."""
    return _STATES.get(unwrap(model))


def remember(model: nn.Module, state: Prepared) -> None:
    """Attach a state to the model below all wrappers."""
    _STATES[unwrap(model)] = state


def forget(model: nn.Module) -> Prepared | None:
    """Detach and return the state."""
    return _STATES.pop(unwrap(model), None)
