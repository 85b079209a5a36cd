"""Keys and values that are shared through a cache alone: training, which has none, goes wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from ..errors import Refused
from ..model_facts import unwrap
from ..training_plan import TrainingPlan

REASON = (
    "without a cache the consumers of shared keys and values compute their own, from weights that"
    " no checkpoint has trained: logits differ by 60 to 70 %"
)
ISSUE = "https://github.com/huggingface/transformers/pull/45242"


def reads_cache_alone(attention: nn.Module) -> bool:
    """Whether an attention that consumes shared keys and values finds them in the cache only."""
    if not getattr(attention, "is_kv_shared_layer", False):
        return False
    return "past_key_values.shared_layers" in inspect.getsource(type(attention).forward)


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether some layer would."""
    return any(reads_cache_alone(module) for module in unwrap(model).modules())


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Refuse: a cache in training would hold every step's tensors and break recomputation."""
    raise Refused(
        f"this transformers shares keys and values of {type(unwrap(model)).__name__} through the"
        " cache alone, so it computes wrong numbers without one; it needs a release with"
        " huggingface/transformers#45242"
    )
