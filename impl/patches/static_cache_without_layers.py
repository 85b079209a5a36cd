"""A static cache for a model that could share keys and values, but does not, has no layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import Refused
from ..model_facts import body, text_config
from ..training_plan import TrainingPlan

REASON = "the list of layers is cut by minus the number of shared ones, and [:-0] is empty"
ISSUE = "https://github.com/huggingface/transformers/issues/45242"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether a static cache of the model's configuration is made without layers."""
    config = text_config(model)
    if getattr(config, "num_kv_shared_layers", None) != 0:
        return False
    from transformers import StaticCache

    return not StaticCache(config=config, max_cache_len=1).layers


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Refuse such a cache in words, where the attention would raise an IndexError."""

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        layers = getattr(cache, "layers", None)
        if layers == [] and getattr(cache, "layer_class_to_replicate", None) is None:
            raise Refused(
                f"this transformers makes a {type(cache).__name__} without layers where"
                " num_kv_shared_layers is 0; pass a DynamicCache"
            )

    return body(model).register_forward_pre_hook(hook, with_kwargs=True).remove
