"""A static cache for a model that could share keys and values, but does not, has no layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..cache_argument import cache_of
from ..errors import Refused
from ..model_facts import body, text_config
from ..training_plan import TrainingPlan

REASON = "the list of layers is cut by minus the number of shared ones, and [:-0] is empty"
ISSUE = "https://github.com/huggingface/transformers/issues/45242"
_WORDS = (
    "this transformers makes a {} without layers where num_kv_shared_layers is 0; pass a"
    " DynamicCache"
)


_answers: dict[type, bool] = {}  # a property of the code


def makes_none(config: Any) -> bool:
    """Whether a static cache of a text configuration that shares nothing is made without layers."""
    from transformers import StaticCache

    if type(config) not in _answers:
        _answers[type(config)] = not StaticCache(config=config, max_cache_len=1).layers
    return _answers[type(config)]


def why_not() -> str | None:
    """Why a static cache cannot be used here for a model that shares nothing; None if it can."""
    try:
        from transformers import Gemma4TextConfig
    except ImportError:
        return None
    config = Gemma4TextConfig(num_hidden_layers=2, num_kv_shared_layers=0)
    return _WORDS.format("StaticCache") if makes_none(config) else None


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether a static cache of the model's configuration is made without layers."""
    config = text_config(model)
    return getattr(config, "num_kv_shared_layers", None) == 0 and makes_none(config)


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Refuse such a cache in words, where the attention would raise an IndexError."""

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = cache_of(kwargs)
        layers = getattr(cache, "layers", None)
        if layers == [] and getattr(cache, "layer_class_to_replicate", None) is None:
            raise Refused(_WORDS.format(type(cache).__name__))

    return body(model).register_forward_pre_hook(hook, with_kwargs=True).remove
