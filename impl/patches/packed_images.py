"""Image blocks of packed documents are looked up at the positions of the first document."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..cache_argument import cache_of, without_cache
from ..documents import document_ids
from ..errors import Refused
from ..model_facts import bidirectional_images, body, type_id_name, unwrap
from ..training_plan import TrainingPlan
from .swap import swap

REASON = (
    "the image overlay is given inside the function whose positions are remapped for packing, so"
    " every document but the first gets the image blocks of the first"
)
ISSUE = "https://github.com/huggingface/transformers/issues/46850"
_MAKER = "create_masks_for_vision_model"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether images are attended to in both directions by such a mask, or by one not known."""
    return bidirectional_images(model) and not _overlays_outside(model)


def _overlays_outside(model: nn.Module) -> bool:
    """Whether the library's own maker adds the image blocks, after the remapping."""
    modelling = inspect.getmodule(type(unwrap(model)))
    if hasattr(modelling, _MAKER):
        return False
    maker = getattr(modelling, "create_masks_for_generate", None)
    return maker is not None and "block_sequence_ids" in inspect.signature(maker).parameters


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Make the masks of each document by itself and join them; Refused where that is impossible."""
    modelling = inspect.getmodule(type(unwrap(model)))
    if hasattr(modelling, _MAKER):
        return swap(modelling, _MAKER, _by_document)
    named = type_id_name(model)

    def refuse(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        types = kwargs.get(named) if named else None
        packed = document_ids(kwargs.get("position_ids")) is not None
        if packed and isinstance(types, Tensor) and bool(types.any()):
            raise Refused(
                "packed rows with images leak in this transformers; set sample_packing off"
            )

    return body(model).register_forward_pre_hook(refuse, with_kwargs=True).remove


def _by_document(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @wraps(original)
    def make(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        block_sequence_ids: Tensor,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = cache_of(kwargs)

        def masks(rows: slice, columns: slice) -> dict[str, Any]:
            assert position_ids is not None
            return original(
                config=config,
                inputs_embeds=inputs_embeds[rows, columns],
                attention_mask=None,
                position_ids=position_ids[rows, columns],
                block_sequence_ids=block_sequence_ids[rows, columns],
                **without_cache(kwargs),
            )

        ids = document_ids(position_ids)
        if ids is None or attention_mask is not None or cache is not None:
            return original(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                block_sequence_ids=block_sequence_ids,
                **kwargs,
            )
        return _joined(ids.expand(inputs_embeds.shape[0], -1), masks, inputs_embeds)

    return make


def _joined(
    ids: Tensor, masks: Callable[[slice, slice], dict[str, Any]], like: Tensor
) -> dict[str, Any]:
    """Block-diagonal masks (B, 1, S, S) by layer type; `None` of a block means causal."""
    rows, length = ids.shape
    joined: dict[str, Tensor] = {}
    for row in range(rows):
        start = 0
        for size in torch.unique_consecutive(ids[row], return_counts=True)[1].tolist():
            place = slice(start, start + size)
            for kind, block in masks(slice(row, row + 1), place).items():
                part = _tensor(block, size, like)
                if kind not in joined:
                    closed = False if part.dtype == torch.bool else torch.finfo(part.dtype).min
                    joined[kind] = part.new_full((rows, 1, length, length), closed)
                joined[kind][row, 0, place, place] = part.to(joined[kind].dtype)
            start += size
    return dict(joined)


def _tensor(block: Any, size: int, like: Tensor) -> Tensor:
    if block is None:
        return torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    if isinstance(block, Tensor) and block.dim() == 4:
        return block[0, 0]
    raise Refused("packed rows with images need eager or sdpa attention; set sample_packing off")
