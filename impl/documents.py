"""Which document of a packed row a position belongs to, from position ids alone."""

from __future__ import annotations

import torch
from torch import Tensor


def text_positions(position_ids: Tensor | None) -> Tensor | None:
    """The text row (B, S) of position ids (B, S), (4, B, S) = text + three mRoPE rows; else None.

    Three mRoPE rows alone say nothing about documents: an image holds its temporal row still.
    """
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        return position_ids[0]
    return None


def document_ids(position_ids: Tensor | None) -> Tensor | None:
    """The document index (B, S) int32 of each position; None when every row is one document.

    A document starts where a position is not its predecessor plus one, so a shard that starts in
    the middle of a document is right too (axolotl 0.21.0 `get_cu_seqlens`). The attention layers of
    transformers use the same rule, so both kinds of layers agree.
    """
    positions = text_positions(position_ids)
    if positions is None or positions.shape[-1] < 2:
        return None
    ids = document_ids_always(positions)
    return ids if bool((ids[:, -1] > 0).any()) else None


def document_ids_always(positions: Tensor) -> Tensor:
    """As `document_ids` for (B, S) positions, without looking at the values (no device sync)."""
    starts = torch.zeros_like(positions, dtype=torch.int32)
    starts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).to(torch.int32)
    return starts.cumsum(-1, dtype=torch.int32)


def joins_documents(position_ids: Tensor | None, attention_mask: Tensor) -> bool:
    """Whether a (B, S) mask lets two documents of one row be attended to (padding apart)."""
    ids = document_ids(position_ids)
    if ids is None or ids.shape != attention_mask.shape:
        return False
    real = attention_mask.bool()
    boundary = (ids[:, 1:] != ids[:, :-1]) & real[:, 1:] & real[:, :-1]
    return bool(boundary.any())


def cumulative_lengths(ids: Tensor) -> Tensor:
    """Boundaries (D + 1) int32 of the documents of (B, S) ids laid end to end, rows apart."""
    flat = ids.reshape(-1)
    change = torch.ones_like(flat, dtype=torch.bool)
    change[1:] = flat[1:] != flat[:-1]
    change[:: ids.shape[-1]] = True
    starts = change.nonzero().flatten().to(torch.int32)
    return torch.cat([starts, starts.new_tensor([flat.numel()])])
