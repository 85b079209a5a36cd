"""Dense attention with an explicit boolean mask, computed in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale·q·kᵀ, over allowed keys)·v, one head at a time.

    query (B, N, Q, D); key, value (B, M, K, D) with N a multiple of M (query head n reads key head
    n // (N/M)); allowed boolean (B, Q, K). softcap c: scores become c·tanh(score/c) before masking.
    A query without any key gives 0. Returns (B, N, Q, Dv).
    """
    share = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        k, v = key[:, head // share], value[:, head // share]
        scores = scale * torch.einsum("bqd,bkd->bqk", query[:, head], k)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        masked = scores.masked_fill(~allowed, float("-inf"))
        top = masked.max(-1, keepdim=True).values
        powers = torch.exp(masked - torch.where(top.isinf(), torch.zeros_like(top), top))
        total = powers.sum(-1, keepdim=True)
        weights = powers / torch.where(total > 0, total, torch.ones_like(total))
        heads.append(torch.einsum("bqk,bkd->bqd", weights, v))
    return torch.stack(heads, dim=1)
