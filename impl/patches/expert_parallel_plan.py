"""gemma4's expert-parallel plan also shards the dense MLP, which FSDP shards too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..model_facts import unwrap
from ..training_plan import TrainingPlan

REASON = (
    "base_model_ep_plan holds the dense mlp.{gate,up,down}_proj on the expert mesh; beside FSDP"
    " that is 'Cannot concatenate overlapping meshes'"
)
ISSUE = "https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma4"


def _configs(config: Any) -> list[Any]:
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config] if inner is config else [config, inner]


def dense_entries(config: Any) -> list[str]:
    """Entries of the expert-parallel plan that name no experts and no router."""
    plan = getattr(config, "base_model_ep_plan", None) or {}
    return [key for key in plan if not {"experts", "router", "gate"} & set(key.split("."))]


def apply_to_config(config: Any) -> Callable[[], None]:
    """Drop the dense entries; for `build`, since transformers shards while it loads."""
    undo: list[tuple[Any, Any, bool]] = []
    for part in _configs(config):
        dense = dense_entries(part)
        if dense:
            own = "base_model_ep_plan" in vars(part)
            before = part.base_model_ep_plan
            undo.append((part, before, own))
            part.base_model_ep_plan = {k: v for k, v in before.items() if k not in dense}

    def take_back() -> None:
        for part, before, own in undo:
            if own:
                part.base_model_ep_plan = before
            else:
                del part.base_model_ep_plan

    return take_back


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether experts are spread over the ranks that also shard the rest."""
    shares_ranks = plan.strategy == "fsdp2_ep"
    return shares_ranks and any(dense_entries(c) for c in _configs(unwrap(model).config))


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Drop the dense entries from the loaded model's configuration."""
    return apply_to_config(unwrap(model).config)
