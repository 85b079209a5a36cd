"""The gated delta rule and its causal convolution, documents of a packed row kept apart.

State of a head, S (K, V): S_t = exp(g_t) (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t;
a document starts with S = 0. Chunked form: Yang et al., "Gated Delta Networks" (2024), §3. Instead
of a loop over documents, every product between two positions (or with the state carried into the
chunk) is kept only where both belong to one document.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..documents import cumulative_lengths

RULE_ARGUMENTS = (
    "g",
    "beta",
    "chunk_size",
    "initial_state",
    "output_final_state",
    "use_qk_l2norm_in_kernel",
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


def causal_conv1d(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    document_ids: Tensor,
) -> Tensor:
    """Depthwise causal convolution that never reaches over a document's start.

    hidden: (B, C, S). weight: (C, W). document_ids: (B, S). Returns (B, C, S) in hidden's dtype.
    """
    width, length = weight.shape[-1], hidden.shape[-1]
    source = hidden.to(weight.dtype)
    out = source * weight[:, -1, None]
    for back in range(1, min(width, length)):
        same = document_ids[:, back:] == document_ids[:, :-back]
        term = source[:, :, :-back] * weight[:, width - 1 - back, None]
        out = out + F.pad(term * same[:, None, :].to(term.dtype), (back, 0))
    if bias is not None:
        out = out + bias[:, None]
    if activation is not None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"causal_conv1d: unknown activation {activation!r}")
        out = _ACTIVATIONS[activation](out)
    return out.to(hidden.dtype)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    document_ids: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The rule over packed rows, by flash-linear-attention where it is there and right.

    query, key: (B, S, Hk, K). value: (B, S, Hv, V), Hv a multiple of Hk. g (log decay, ≤ 0), beta:
    (B, S, Hv). document_ids: (B, S), constant within a document. Returns (B, S, Hv, V) in query's
    dtype and the state (B, Hv, K, V) after the last document, or None.
    """
    plain = initial_state is None and not output_final_state
    if plain and query.is_cuda and _fast_rule_is_right(query.device.index or 0):
        return _fast_rule(query, key, value, g, beta, document_ids, use_qk_l2norm_in_kernel), None
    return chunked(
        query,
        key,
        value,
        g,
        beta,
        document_ids,
        chunk_size,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
    )


def _normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    document_ids: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule` in plain torch: one triangular solve a chunk, a scan over chunks."""
    out_dtype, (batch, length, heads) = query.dtype, value.shape[:3]
    work = torch.promote_types(query.dtype, torch.float32)
    size = max(1, min(chunk_size, length))
    pad = -length % size
    repeat = heads // key.shape[2]
    if repeat > 1:
        query, key = (x.repeat_interleave(repeat, dim=2) for x in (query, key))

    def chunks(x: Tensor) -> Tensor:
        """(B, S, H, ...) to (B, H, N, C, ...), padded with zeros."""
        x = x.transpose(1, 2).to(work)
        x = F.pad(x, (0,) * 2 * (x.dim() - 3) + (0, pad))
        return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])

    q, k, v, decay, rate = (chunks(x) for x in (query, key, value, g, beta))
    # padding continues the last document and changes nothing: k = 0, beta = 0, decay 1
    docs = F.pad(document_ids[:, None].to(work), (0, pad), mode="replicate")[:, 0]
    docs = docs.reshape(batch, 1, -1, size)
    if use_qk_l2norm_in_kernel:
        q, k = _normalize(q), _normalize(k)
    out, state = _scan(q * q.shape[-1] ** -0.5, k, v, decay, rate, docs, initial_state)
    out = out.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out.to(out_dtype).contiguous(), state if output_final_state else None


def _scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, docs: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chunks (B, H, N, C, ·) to outputs (B, H, N, C, V) and the last state (B, H, K, V)."""
    size = q.shape[-2]
    before = torch.cat([docs[:, :, :1, :1], docs[:, :, :-1, -1:]], dim=2)  # last of chunk before
    last = docs[..., -1:]
    total = decay.cumsum(-1)
    together = docs.unsqueeze(-1) == docs.unsqueeze(-2)
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(
        ~(together & causal), float("-inf")
    )
    between = between.exp()
    entering = (total.exp() * (docs == before)).unsqueeze(-1)
    leaving = ((total[..., -1:] - total).exp() * (docs == last)).unsqueeze(-1)
    carried = (total[..., -1:].exp() * (last == before)).unsqueeze(-1)

    weighted = k * rate.unsqueeze(-1)
    system = (weighted @ k.transpose(-1, -2)) * between
    right = torch.cat([v * rate.unsqueeze(-1), weighted * entering], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, read = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    within = (q @ k.transpose(-1, -2)) * between
    q, k = q * entering, k * leaving

    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]) if start is None else start.to(q)
    outputs = []
    for n in range(q.shape[2]):
        update = new[:, :, n] - read[:, :, n] @ state
        outputs.append(q[:, :, n] @ state + within[:, :, n] @ update)
        state = state * carried[:, :, n] + k[:, :, n].transpose(-1, -2) @ update
    return torch.stack(outputs, dim=2), state


def _fla() -> Any:
    """flash-linear-attention's rule, or None."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception:  # absent, or broken beside this torch or triton
        return None
    return chunk_gated_delta_rule


def _fast_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, ids: Tensor, normalize: bool
) -> Tensor:
    """The packed rule by fla: all rows laid end to end, int32 boundaries (axolotl#3468)."""
    shape = value.shape
    repeat = shape[2] // key.shape[2]
    if repeat > 1:
        query, key = (x.repeat_interleave(repeat, dim=2) for x in (query, key))
    flat = [x.reshape(1, -1, *x.shape[2:]).contiguous() for x in (query, key, value, g, beta)]
    out, _ = _fla()(
        flat[0],
        flat[1],
        flat[2],
        g=flat[3],
        beta=flat[4],
        cu_seqlens=cumulative_lengths(ids),
        use_qk_l2norm_in_kernel=normalize,
        output_final_state=False,
    )
    result: Tensor = out.reshape(shape)
    return result


@cache
def _fast_rule_is_right(device: int) -> bool:
    """Whether fla is there and agrees with `chunked`, value and gradient, on two documents."""
    if _fla() is None:
        return False
    where = torch.device("cuda", device)
    draw = torch.Generator(where).manual_seed(0)
    shapes = [(1, 96, 2, 64)] * 3 + [(1, 96, 2)] * 2
    inputs = [torch.randn(s, generator=draw, device=where, dtype=torch.bfloat16) for s in shapes]
    inputs[3], inputs[4] = F.logsigmoid(inputs[3].float()), inputs[4].sigmoid()
    ids = (torch.arange(96, device=where) >= 37).int()[None]
    results = []
    try:
        for fast in (True, False):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            q, k, v, g, beta = leaves
            if fast:
                out = _fast_rule(q, k, v, g, beta, ids, True)
            else:
                out, _ = chunked(q, k, v, g, beta, ids, use_qk_l2norm_in_kernel=True)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    except Exception:  # a kernel that does not compile here is not right here
        return False
    return all(
        bool(((a.float() - b.float()).norm() <= 0.03 * b.float().norm() + 1e-6).item())
        for a, b in zip(*results, strict=True)
    )
