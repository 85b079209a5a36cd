"""The gated delta rule, one token after another, and the causal convolution before it.

Yang, Kautz and Hatamizadeh 2024 (Gated DeltaNet), eq. 10: the state decays, forgets what it holds
under the key, and stores the value. Documents are kept apart by an empty state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conformance.oracles.experts import silu

NORM_EPS = 1e-6


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    documents: Sequence[Sequence[int]] | None = None,
    normalise: bool = True,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, S, N, Dv) and the last state (B, N, Dk, Dv), in the dtype given.

    query, key (B, S, M, Dk); value (B, S, N, Dv), N a multiple of M: value head n reads key head
    n // (N/M); decay (B, S, N), the logarithm of what is kept (≤ 0); beta (B, S, N), the strength
    of writing. normalise: unit q and k first; q is scaled by Dk^-0.5 in any case. documents: ids
    (B, S); None: each row is one.
    """
    batch, length, heads, size = value.shape
    share = heads // key.shape[2]
    if normalise:
        query, key = _unit(query), _unit(key)
    if state is None:
        state = value.new_zeros(batch, heads, key.shape[-1], size)
    outputs = []
    for t in range(length):
        if documents is not None and t > 0:
            same = [documents[b][t] == documents[b][t - 1] for b in range(batch)]
            state = state * torch.tensor(same, device=state.device)[:, None, None, None]
        k = torch.stack([key[:, t, n // share] for n in range(heads)], dim=1)
        q = torch.stack([query[:, t, n // share] for n in range(heads)], dim=1)
        state = state * torch.exp(decay[:, t])[..., None, None]
        held = torch.einsum("bnd,bndv->bnv", k, state)
        wrong = beta[:, t][..., None] * (value[:, t] - held)
        state = state + torch.einsum("bnd,bnv->bndv", k, wrong)
        outputs.append(torch.einsum("bnd,bndv->bnv", q, state) / key.shape[-1] ** 0.5)
    return torch.stack(outputs, dim=1), state


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    documents: Sequence[Sequence[int]] | None = None,
    activate: bool = True,
) -> Tensor:
    """silu(Σ_j weight[c, j] · x[t − (W−1) + j, c]) of x (B, S, C), weight (C, W): (B, S, C).

    A tap that reaches before the sequence or into another document reads 0.
    """
    batch, length, _ = x.shape
    width = weight.shape[1]
    rows = []
    for b in range(batch):
        for t in range(length):
            total = torch.zeros_like(x[b, t]) if bias is None else bias.clone()
            for j in range(width):
                source = t - (width - 1) + j
                if source < 0 or (documents and documents[b][source] != documents[b][t]):
                    continue
                total = total + weight[:, j] * x[b, source]
            rows.append(silu(total) if activate else total)
    return torch.stack(rows).reshape(x.shape)


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)
