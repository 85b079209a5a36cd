"""A padding mask, or a cache, beside packed position ids lets documents see the ones before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..cache_argument import cache_of
from ..documents import document_ids, joins_documents
from ..errors import Refused
from ..model_facts import body
from ..training_plan import TrainingPlan

REASON = (
    "the document mask is made from position ids only when no mask is given and no cache exists,"
    " and use_cache is True unless someone says otherwise: either leaks, in every family"
)
ISSUE = "https://github.com/axolotl-ai-cloud/axolotl/pull/2449"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Every family: any batch may be packed."""
    parameters = inspect.signature(type(body(model)).forward).parameters
    return {"attention_mask", "position_ids"} <= set(parameters)


def apart(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Forward arguments that keep the documents of packed rows apart; others are returned as given.

    No cache is made. A mask is dropped if it joins documents: padding after the last document needs
    none (nothing after it is labelled). Padding inside a document is Refused, since neither choice
    would be right, and so is a cache that is handed in.
    """
    positions = kwargs.get("position_ids")
    ids = document_ids(positions) if isinstance(positions, Tensor) else None
    if ids is None:
        return kwargs
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if not joins_documents(positions, mask):
            return kwargs  # the positions of left padding, not documents
        _refuse_holes(mask, ids)
        kwargs = {**kwargs, "attention_mask": None}
    if cache_of(kwargs) is not None:
        raise Refused("a packed batch cannot continue from a cache; give one document a row")
    return {**kwargs, "use_cache": False}


def _refuse_holes(mask: Tensor, ids: Tensor) -> None:
    real = mask.bool()
    inside = (ids[:, 1:] == ids[:, :-1]) & (real[:, 1:] != real[:, :-1])
    returns = real[:, 1:] & ~real[:, :-1]
    if bool((inside & returns.flip(-1).cumsum(-1).flip(-1).bool()).any()):
        raise Refused(
            "a packed batch has masked positions inside a row; drop attention_mask and give"
            " padding position ids of its own"
        )


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Correct the arguments before the model sees them."""

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, apart(kwargs)

    return body(model).register_forward_pre_hook(hook, with_kwargs=True).remove
