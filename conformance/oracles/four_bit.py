"""The oracle of 4-bit weights: quantise to NF4 and expand, in plain torch on the CPU, no library's
code.

Blocks of 64 values of the flat weight, each scaled by its largest magnitude; each value becomes the
nearest of sixteen levels (the quantiles published with QLoRA, Dettmers et al. 2023, appendix E).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 64
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def rounded(weight: Tensor) -> Tensor:
    """The weight after packing and expanding, in its shape and dtype."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    values = weight.detach().cpu().double().flatten()
    found = torch.empty_like(values)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        scale = float(block.abs().max())
        if scale == 0:
            found[start : start + BLOCK] = 0
            continue
        nearest = (block[:, None] / scale - levels).abs().argmin(1)
        found[start : start + BLOCK] = levels[nearest] * scale
    return found.reshape(weight.shape).to(weight.dtype)


def packed_bytes(numel: int) -> float:
    """Bytes of a packed weight: half a byte a value and a float32 scale a block."""
    return numel / 2 + 4 * -(-numel // BLOCK)


def unpacked(packed: Tensor, scale: Tensor) -> Tensor:
    """Flat float32 values of packed bytes, two a byte, the first in the high half; `scale`: one for
    each block."""
    data = packed.detach().cpu().flatten().long()
    codes = torch.stack([data >> 4, data & 15], 1).flatten()
    values = torch.tensor(LEVELS)[codes]
    return values * scale.detach().cpu().float().flatten().repeat_interleave(BLOCK)[: len(values)]


def scales(state: Any) -> Tensor:
    """One float32 scale a block: `absmax` as it is, or where it is quantised in its turn, its code
    in blocks of 256 plus the mean that was taken off."""
    nested = getattr(state, "state2", None)
    if nested is None:
        plain: Tensor = state.absmax
        return plain
    values = nested.code.float()[state.absmax.flatten().long()]
    wide = nested.absmax.float().flatten().repeat_interleave(int(nested.blocksize))
    whole: Tensor = values * wide[: len(values)] + state.offset
    return whole
