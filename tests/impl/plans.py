"""Plans for the tests of `impl`, by hand: the planner has its own tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from conformance.case import Model
from conformance.families import MODELS
from conformance.settings import Setting
from impl.training_plan import LoraPlan, TrainingPlan

LORA = LoraPlan(
    target_modules=r"model\.(language_model\.)?layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
)
EXPERTS = LoraPlan(
    target_modules=None, target_parameters=("experts.gate_up_proj", "experts.down_proj")
)


def make_plan(model: Model | None = None, **changes: Any) -> TrainingPlan:
    """A plan that asks for nothing but what is given."""
    traits = SimpleNamespace(type_ids=model.images.type_ids if model and model.images else None)
    given: dict[str, Any] = {"decisions": {}, "traits": traits, "strategy": "single"}
    given["setting"] = changes.pop("setting", Setting())
    return TrainingPlan(**(given | changes))


def spec(name: str) -> Model:
    """A model of the suite by name."""
    return MODELS[name]
