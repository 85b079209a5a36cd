"""Gemma 4 Unified's training forward makes its masks with the generic maker, not its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from ..model_facts import bidirectional_images, body, unwrap
from ..training_plan import TrainingPlan
from .swap import swap

REASON = (
    "the generic maker joins image blocks on full-attention layers too and past the window; the"
    " class's own maker, which generation uses, joins them inside the window of sliding layers"
)
ISSUE = "https://github.com/huggingface/transformers/issues/46850"
_OWN, _GENERIC = "create_masks_for_vision_model", "create_masks_for_generate"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the class has a mask maker of its own that its forward does not call."""
    modelling = inspect.getmodule(type(unwrap(model)))
    if not bidirectional_images(model) or not hasattr(modelling, _OWN):
        return False
    return hasattr(modelling, _GENERIC) and not _calls_its_own(type(body(model)).forward)


@cache
def _calls_its_own(forward: Callable[..., Any]) -> bool:
    """A property of the code, read once."""
    return _OWN in inspect.getsource(forward)


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Send masks with image blocks to the class's own maker."""
    modelling: Any = inspect.getmodule(type(unwrap(model)))

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def masks(*, block_sequence_ids: Tensor | None = None, **kwargs: Any) -> Any:
            if block_sequence_ids is None:
                return original(**kwargs)
            # looked up now: the patch of packed images replaces it too
            return getattr(modelling, _OWN)(block_sequence_ids=block_sequence_ids, **kwargs)

        return masks

    return swap(modelling, _GENERIC, make)
