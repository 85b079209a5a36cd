"""The oracle of weight-scale normalisation: sorted lists and plain loops, no tensor statistics.

The specified algorithm (an upper median of standard deviations, strict bounds, rescaling) with the
holes closed as documented: compared are tensors of one shape, at least three; what has no finite,
positive deviation is left out; a tensor is scaled about its mean, which stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

FEWEST = 3
SMALLEST = 1e-10


def deviation(tensor: Tensor) -> tuple[float, float]:
    """Mean and unbiased standard deviation of all entries, by sums of Python floats.

    The deviation is NaN for a single entry.
    """
    values = tensor.detach().double().flatten().tolist()
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def normalized(
    tensors: Mapping[str, Tensor], pattern: str, threshold: float = 1.5
) -> dict[str, Tensor]:
    """The float64 values that the out-of-line tensors should get, by name; the others are absent.

    tensors: base parameters by name, adapters and quantised ones left out by the caller.
    """
    groups: dict[tuple[int, ...], list[tuple[str, float, float]]] = {}
    for name, tensor in tensors.items():
        if re.search(pattern, name):
            mean, std = deviation(tensor)
            if math.isfinite(std) and std > 0:
                groups.setdefault(tuple(tensor.shape), []).append((name, mean, std))
    found: dict[str, Tensor] = {}
    for members in groups.values():
        ranked = sorted(std for _, _, std in members)
        median = ranked[len(ranked) // 2]
        if len(members) < FEWEST or median < SMALLEST:
            continue
        for name, mean, std in members:
            if std > threshold * median or std * threshold < median:
                values = [
                    mean + (v - mean) * median / std for v in tensors[name].double().flatten()
                ]
                found[name] = torch.stack(values).reshape(tensors[name].shape)
    return found
