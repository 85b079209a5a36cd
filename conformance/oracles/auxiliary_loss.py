"""The load-balancing loss of Switch Transformer (eq. 4–6), for top-k routing, from raw logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balance_loss(
    logits: Sequence[Tensor], top_k: int, valid: Sequence[int] | None = None
) -> Tensor:
    """E · Σ_e f_e · p_e, over the real tokens of all layers together.

    logits: one (T, E) tensor a layer. f_e: assignments to expert e per token (so Σ f = top_k), no
    gradient. p_e: mean routing probability. valid: flat, 1 for real tokens. A perfectly balanced
    router gives top_k.
    """
    experts = logits[0].shape[-1]
    counts = [0] * experts
    mass = torch.zeros(experts, dtype=logits[0].dtype, device=logits[0].device)
    rows = 0
    for layer in logits:
        for token in range(layer.shape[0]):
            if valid is not None and not valid[token]:
                continue
            powers = torch.exp(layer[token] - layer[token].max())
            mass = mass + powers / powers.sum()
            scores = layer[token].tolist()
            for expert in sorted(range(experts), key=lambda e: (-scores[e], e))[:top_k]:
                counts[expert] += 1
            rows += 1
    share = torch.tensor(counts, dtype=mass.dtype, device=mass.device) / rows
    return experts * (share * mass / rows).sum()
