"""Adapters that older releases of PEFT wrote, in today's layout.

Until 0.18 PEFT took the first dimension of every expert parameter for its input. 0.19 takes it for
the output unless the class says `is_transposed`, so A and B changed places (peft#3083): an older
file has the wrong shapes, or, for a square parameter, loads and means another update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

SWAPPED_BEFORE = Version("0.19.0.dev0")
_FACTOR = re.compile(r"^(?P<owner>.*)\.lora_A\.weight$")


def _written_before_swap(version: Any) -> bool:
    """Whether the config's `peft_version` says so; False where it does not say."""
    try:
        return Version(str(version)) < SWAPPED_BEFORE
    except InvalidVersion:
        return False


def _exchanged(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (E·r, D1), B (D2, r·E) of ΔW[e, d1, d2] = Σ B[d2, r, e] A[e, r, d1], as the factors
    A' (E·r, D2), B' (D1, r·E) of the same ΔW[e, d1, d2] = Σ B'[d1, r, e] A'[e, r, d2]."""
    new_a = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0).reshape(-1, b.shape[0])
    new_b = a.reshape(experts, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)
    return new_a.contiguous(), new_b.contiguous()


def in_todays_layout(
    adapted: nn.Module, tensors: Mapping[str, Tensor], version: Any = None
) -> dict[str, Tensor]:
    """Tensors by this model's keys (`adapter_layout.from_disk`) with older expert factors mended.

    version: `peft_version` of the adapter's config; it decides where the shapes cannot. Factors
    that have their places already, or fit neither way, are returned as they are.
    """
    found = dict(tensors)
    modules = dict(adapted.named_modules())
    for key in tensors:
        match = _FACTOR.match(key)
        module: Any = modules.get(match["owner"]) if match else None
        if module is None or not getattr(module, "_did_swap_in_out_features", False):
            continue
        other = f"{match['owner']}.lora_B.weight" if match else ""
        a, b = tensors[key], tensors.get(other)
        if b is None:
            continue
        here = (int(module.in_features), int(module.out_features))
        disk = (int(a.shape[1]), int(b.shape[0]))
        square = here[0] == here[1] and _written_before_swap(version)
        if disk == here[::-1] and (disk != here or square):
            found[key], found[other] = _exchanged(a, b, int(module.num_experts))
    return found
