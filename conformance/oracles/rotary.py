"""Rotary position embeddings: default, partial, proportional, and interleaved multimodal.

Su et al. 2021 (RoFormer) for the default; `families.md` §5 and §9 for what each family uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def frequencies(head_dim: int, theta: float, *, partial: float = 1.0) -> Tensor:
    """theta^(−2j/d) for j < d/2 with d = int(head_dim · partial): float64 (d/2).

    The rotation covers the first d entries of a head; the rest pass unchanged.
    """
    rotated = int(head_dim * partial)
    return torch.tensor([theta ** (-2 * j / rotated) for j in range(rotated // 2)]).double()


def proportional_frequencies(
    head_dim: int, theta: float, *, partial: float = 1.0, factor: float = 1.0
) -> Tensor:
    """Frequencies over the whole head (head_dim/2), zero beyond the rotated share: float64.

    Unlike `frequencies`, the exponent is a share of head_dim, not of the rotated part.
    """
    angles = int(partial * head_dim // 2)
    values = [theta ** (-2 * j / head_dim) / factor for j in range(angles)]
    return torch.tensor(values + [0.0] * (head_dim // 2 - angles)).double()


def rotate(x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """Rotate pairs (j, j + d/2) of x (B, N, S, D) by positions (B, S) · inverse (d/2), d ≤ D."""
    angle = positions.to(inverse.dtype)[:, None, :, None] * inverse.to(x.device)
    return _rotate_by(x, angle)


def rotate_multimodal(
    x: Tensor, positions: Tensor, inverse: Tensor, sections: Sequence[int]
) -> Tensor:
    """The same with positions (3, B, S) for time, height, width, interleaved over frequencies.

    Frequency j belongs to axis a = j mod 3 while j < 3·sections[a], and to time otherwise
    (Qwen3-VL's interleaved layout, which Qwen3.5 keeps).
    """
    axes = [_axis(j, sections) for j in range(inverse.shape[0])]
    columns = [positions[axis].to(inverse.dtype) * inverse[j] for j, axis in enumerate(axes)]
    return _rotate_by(x, torch.stack(columns, dim=-1)[:, None])


def _axis(j: int, sections: Sequence[int]) -> int:
    axis = j % 3
    return axis if axis and j < 3 * sections[axis] else 0


def _rotate_by(x: Tensor, angle: Tensor) -> Tensor:
    half = angle.shape[-1]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
