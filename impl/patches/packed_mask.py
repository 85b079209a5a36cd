"""A padding mask beside packed position ids lets every document see the ones before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..documents import document_ids, joins_documents
from ..errors import Refused
from ..model_facts import body
from ..training_plan import TrainingPlan

REASON = "a mask that is given switches off the document mask made from position ids"
ISSUE = "https://github.com/axolotl-ai-cloud/axolotl/pull/2449"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Every family: any batch may be packed."""
    parameters = inspect.signature(type(body(model)).forward).parameters
    return {"attention_mask", "position_ids"} <= set(parameters)


def without_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a mask that joins documents removed.

    Padding after the last document needs no mask (nothing after it is labelled); padding anywhere
    else in a packed row is Refused, since neither choice would be right.
    """
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not isinstance(positions, Tensor):
        return kwargs
    if not joins_documents(positions, mask):
        return kwargs
    real = mask.bool()
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        ids = document_ids(positions)
        assert ids is not None
        if bool(((ids[:, 1:] == ids[:, :-1]) & (real[:, 1:] != real[:, :-1])).any()):
            raise Refused(
                "a packed batch has masked positions inside a row; drop attention_mask and give"
                " padding position ids of its own"
            )
    return {**kwargs, "attention_mask": None}


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Drop such a mask before the model sees it."""

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, without_mask(kwargs)

    return body(model).register_forward_pre_hook(hook, with_kwargs=True).remove
