"""How to train these models rightly: the reference implementation, usable on its own.

The names below are loaded when they are first used, so that importing this package costs no torch.
A verb that is also the name of its module is imported from there: `from impl.prepare import
prepare`, and likewise `detect`, `plan`, `build`, `collate`, `loss`, `fit`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Refused": "errors",
    "ConfigError": "errors",
    "TrainingPlan": "training_plan",
    "LoraPlan": "training_plan",
    "Decision": "training_plan",
    "Traits": "traits",
    "undo": "prepare",
    "parallelize": "parallel",
    "label_free_ids": "collate",
    "count_items": "loss",
    "save": "checkpoints",
    "load": "checkpoints",
    "merge": "checkpoints",
    "normalize_weight_scales": "weight_scales",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
