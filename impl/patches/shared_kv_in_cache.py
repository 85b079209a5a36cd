"""Keys and values that are shared through a cache alone: training, which has none, goes wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import nn

from ..errors import Refused
from ..model_facts import every_module, unwrap
from ..training_plan import TrainingPlan

REASON = (
    "without a cache the consumers of shared keys and values compute their own, from weights that"
    " no checkpoint has trained: logits differ by 60 to 70 %"
)
ISSUE = "https://github.com/huggingface/transformers/pull/45242"
_FLAG = "is_kv_shared_layer"
_MARK = "past_key_values.shared_layers"
_WORDS = (
    "this transformers shares keys and values through the cache alone, so {} computes wrong"
    " numbers without one; it needs a release with huggingface/transformers#45242"
)


def why_not(modelling: str) -> str | None:
    """Why the models of a modelling module cannot be trained here; None if they can."""
    try:
        module = import_module(f"transformers.models.{modelling}.modeling_{modelling}")
    except ModuleNotFoundError:
        return None
    return _WORDS.format(modelling) if _MARK in inspect.getsource(module) else None


def reads_cache_alone(attention: nn.Module) -> bool:
    """Whether an attention that consumes shared keys and values finds them in the cache only."""
    if not (_FLAG in vars(attention) or hasattr(type(attention), _FLAG)):
        return False  # most modules, for which nn.Module's own search is slow
    if not getattr(attention, _FLAG):
        return False
    return _reads_marked(type(attention).forward)


@cache
def _reads_marked(forward: Callable[..., object]) -> bool:
    """A property of the code, read once."""
    return _MARK in inspect.getsource(forward)


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether some layer would."""
    return any(reads_cache_alone(module) for module in every_module(unwrap(model)))


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Refuse: a cache in training would hold every step's tensors and break recomputation."""
    raise Refused(_WORDS.format(type(unwrap(model)).__name__))
