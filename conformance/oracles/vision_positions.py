"""Multimodal position ids (mRoPE) of interleaved text, images and videos, token by token.

Rule (Qwen2-VL report, §2.1, as Qwen3.5 uses it): text counts on in all three rows; a picture starts
at the running position p, its token (t, h, w) sits at (p + t, p + h, p + w), and text after it goes
on from p + max(height, width) in merged patches. A video is one picture per frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multimodal_positions(
    type_ids: Sequence[Sequence[int]],
    image_grids: Sequence[Sequence[int]] = (),
    video_grids: Sequence[Sequence[int]] = (),
    *,
    merge: int = 2,
    valid: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, list[int]]:
    """Position ids (3, B, S) int64 and, per row, (largest position + 1 − number of real tokens).

    type_ids: 0 text, 1 image, 2 video. Grids: (frames, patch rows, patch columns) in reading order
    over the whole batch. merge: patches per token side. valid: 1 for real tokens; padding gets 0.
    """
    images = [tuple(grid) for grid in image_grids]
    videos = [(1, *list(grid)[1:]) for grid in video_grids for _ in range(grid[0])]
    queues = {1: images, 2: videos}
    length = len(type_ids[0])
    result = torch.zeros(3, len(type_ids), length, dtype=torch.int64)
    deltas = []
    for row, kinds in enumerate(type_ids):
        real = [i for i in range(length) if valid is None or valid[row][i]]
        places = _row([kinds[i] for i in real], queues, merge)
        for index, place in zip(real, places, strict=True):
            for axis in range(3):
                result[axis, row, index] = place[axis]
        deltas.append(max(max(place) for place in places) + 1 - len(real))
    return result, deltas


def _row(
    kinds: Sequence[int], queues: dict[int, list[tuple[int, ...]]], merge: int
) -> list[tuple[int, int, int]]:
    places: list[tuple[int, int, int]] = []
    at = 0
    while len(places) < len(kinds):
        kind = kinds[len(places)]
        if kind == 0:
            places.append((at, at, at))
            at += 1
            continue
        frames, rows, columns = queues[kind].pop(0)
        rows, columns = rows // merge, columns // merge
        for t in range(frames):
            for h in range(rows):
                places += [(at + t, at + h, at + w) for w in range(columns)]
        at += max(rows, columns)
    return places
