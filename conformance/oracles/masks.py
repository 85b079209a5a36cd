"""Who may attend to whom, pair by pair, as Python rules (`families.md` §8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def allowed(
    length: int,
    *,
    batch: int = 1,
    causal: bool = True,
    window: int | None = None,
    valid: Sequence[Sequence[int]] | None = None,
    documents: Sequence[Sequence[int]] | None = None,
    blocks: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Boolean (B, Q, K): query q may attend to key k.

    Pair (q, k) is allowed when k ≤ q or both lie in one image block, and k > q − window, and k is
    no padding, and both lie in one document. valid: 1 for real tokens. documents: document ids.
    blocks: image-block ids, −1 for text; None where the layer has no bidirectional images.
    Rows of padded queries follow the same rules; nobody should read them.
    """
    table = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for q in range(length):
            for k in range(length):
                past = k <= q or not causal
                block = blocks is not None and 0 <= blocks[row][q] == blocks[row][k]
                near = window is None or k > q - window
                real = valid is None or bool(valid[row][k])
                own = documents is None or documents[row][q] == documents[row][k]
                table[row, q, k] = (past or block) and near and real and own
    return table


def image_blocks(
    type_ids: Sequence[Sequence[int]], vision: Sequence[int] = (1, 2)
) -> list[list[int]]:
    """Block ids of rows of token type ids: a run of vision tokens is a block, −1 elsewhere."""
    found = []
    for row in type_ids:
        ids, block, before = [], -1, False
        for kind in row:
            inside = kind in vision
            block += inside and not before
            ids.append(block if inside else -1)
            before = inside
        found.append(ids)
    return found


def documents_of(position_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Document ids of packed rows: a document starts where the position does not rise by one."""
    found = []
    for row in position_ids:
        ids, document = [], 0
        for index, position in enumerate(row):
            document += index > 0 and position != row[index - 1] + 1
            ids.append(document)
        found.append(ids)
    return found


def bidirectional_layer_types(
    model_type: str, use_bidirectional_attention: object
) -> frozenset[str]:
    """Layer types whose image blocks are bidirectional, from the config's facts.

    Gemma 3: every layer. Gemma 4 (and unified): sliding layers only, and only with "vision".
    """
    if model_type in ("gemma3", "gemma3_text"):
        return frozenset({"sliding_attention", "full_attention"})
    if model_type.startswith("gemma4") and use_bidirectional_attention == "vision":
        return frozenset({"sliding_attention"})
    return frozenset()
