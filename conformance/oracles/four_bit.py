"""The oracle of 4-bit weights: quantise to NF4 and expand, in plain torch, no library's code.

Blocks of 64 values of the flat weight, each scaled by its largest magnitude; each value becomes the
nearest of sixteen levels (the quantiles published with QLoRA, Dettmers et al. 2023, appendix E).
"""

from __future__ import annotations

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


def expanded(weight: Tensor) -> Tensor:
    """The weight after packing and expanding, in its shape and dtype."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    values = weight.detach().double().flatten()
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
