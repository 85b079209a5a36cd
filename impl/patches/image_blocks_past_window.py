"""Gemma 4's image blocks are joined to the mask after the window, and to full attention too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ..model_facts import bidirectional_images, type_id_name, unwrap
from ..training_plan import TrainingPlan
from .swap import swap

REASON = (
    "an image wider than the window is seen past its edge, and on layers that are causal by the"
    " model's description"
)
ISSUE = "https://github.com/huggingface/transformers/pull/46850"
_SLIDING, _FULL = "create_sliding_window_causal_mask", "create_causal_mask"
_ALL, _OWN = "create_masks_for_generate", "create_masks_for_vision_model"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the class joins image blocks to sliding layers without a mask maker of its own."""
    modelling = inspect.getmodule(type(unwrap(model)))
    if not bidirectional_images(model) or type_id_name(model) != "mm_token_type_ids":
        return False
    return not hasattr(modelling, _OWN) and hasattr(modelling, _SLIDING)


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Join the blocks inside the window of sliding layers, and to no other layer."""
    modelling: Any = inspect.getmodule(type(unwrap(model)))
    undo = [swap(modelling, _SLIDING, _inside_the_window)]

    def by_kind(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def masks(*, block_sequence_ids: Tensor | None = None, **kwargs: Any) -> Any:
            if block_sequence_ids is None:
                return original(**kwargs)
            kwargs = {**kwargs, "config": kwargs["config"].get_text_config()}
            sliding = getattr(modelling, _SLIDING)
            return {
                "full_attention": getattr(modelling, _FULL)(**kwargs),
                "sliding_attention": sliding(block_sequence_ids=block_sequence_ids, **kwargs),
            }

        return masks

    maker = getattr(modelling, _ALL, None)
    if maker is not None and "block_sequence_ids" in inspect.signature(maker).parameters:
        undo.append(swap(modelling, _ALL, by_kind))

    def take_back() -> None:
        for step in reversed(undo):
            step()

    return take_back


def _inside_the_window(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def sliding(
        *args: Any,
        or_mask_function: Callable[..., Tensor] | None = None,
        block_sequence_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        joined = or_mask_function
        if block_sequence_ids is not None:
            joined = _same_block(block_sequence_ids)
        if joined is None:
            return original(*args, **kwargs)
        config = kwargs["config"] if "config" in kwargs else args[0]

        def near(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
            found: Tensor = joined(batch, head, query, key)
            inside: Tensor = found & (key > query - config.sliding_window)
            return inside

        return original(*args, or_mask_function=near, **kwargs)

    return sliding


def _same_block(blocks: Tensor) -> Callable[..., Tensor]:
    """Whether two positions lie in one image; a cache's positions past the end lie in none."""

    def same(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
        last = blocks.shape[-1] - 1
        mine = blocks[batch, query.clamp(max=last)]
        inside = (mine >= 0) & (query <= last) & (key <= last)
        shared: Tensor = inside & (mine == blocks[batch, key.clamp(max=last)])
        return shared

    return same
