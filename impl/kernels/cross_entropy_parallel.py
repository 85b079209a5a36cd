"""Linear cross-entropy with the vocabulary split over ranks.

Every rank holds the same hidden states and labels and its own rows of the classifier. A rank's
log-sum-exp and target logit are all that the others need of it: one all-gather of 8 bytes a token
and rank; the hidden states' gradient is all-reduced in fp32; the classifier's stays local. The
logits are computed twice (before and after the all-gather), so no buffer for all tokens is needed.
Formula: kernels.md section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .cross_entropy import Mode, row_operations, scaled, tiles_for
from .cross_entropy_chunks import Needs, Operands, Tiles, bounds, exact_pass, logits_buffer
from .cross_entropy_products import accumulation_dtype
from .cross_entropy_rows import Form, State


@dataclass(frozen=True)
class _Shard:
    """What a call carries besides its tensors."""

    form: Form
    group: dist.ProcessGroup | None
    start: int
    ignore_index: int
    mode: Mode
    budget: int | None
    needs: Needs


def vocabulary_parallel_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocabulary_start: int,
    vocabulary: int,
    group: dist.ProcessGroup | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    num_items_in_batch: torch.Tensor | float | None = None,
    z_loss: float = 0.0,
    memory_budget: int | None = None,
    mode: Mode = "auto",
) -> torch.Tensor:
    """The loss of `linear_cross_entropy`, from this rank's rows of the classifier.

    hidden (..., D) and labels (...) are the same on every rank of `group`; weight (V_rank, D) and
    bias (V_rank) are rows `vocabulary_start`.. of a classifier with `vocabulary` rows. Returns the
    same scalar on every rank: the mean, or the sum over `num_items_in_batch`. The gradient of
    hidden is the full one on every rank. Label smoothing would need a third number a token: absent.
    Raises ValueError for rows outside the vocabulary.
    """
    if not 0 <= vocabulary_start <= vocabulary_start + weight.shape[0] <= vocabulary:
        raise ValueError(f"rows {vocabulary_start}..{vocabulary_start + weight.shape[0]} lie "
                         f"outside a vocabulary of {vocabulary}")  # fmt: skip
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    on = torch.is_grad_enabled()
    wanted = [on and t is not None and t.requires_grad for t in (flat, weight, bias)]
    form = Form(vocabulary, softcap, logit_scale, 0.0, z_loss)
    shard = _Shard(form, group, vocabulary_start, ignore_index, mode, memory_budget, Needs(*wanted))
    divisor: torch.Tensor | None = None
    if num_items_in_batch is not None:
        divisor = torch.as_tensor(num_items_in_batch).to(flat.device, non_blocking=True)
    result: torch.Tensor = _VocabularyParallel.apply(  # type: ignore[no-untyped-call]
        flat, weight, bias, flat_labels, divisor, shard
    )
    return result


class _VocabularyParallel(torch.autograd.Function):
    """Forward computes the loss and every gradient; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        divisor: torch.Tensor | None,
        shard: _Shard,
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            op = _operands(hidden, weight, bias, labels, shard)
            wide, count = accumulation_dtype(hidden.dtype), op.labels.shape[0]
            factor = torch.full((), 1.0 / max(count, 1), device=hidden.device, dtype=wide)
            if divisor is not None:
                factor = torch.reciprocal(divisor.to(wide)).reshape(())
            ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
            if count == 0:
                zeros = (torch.zeros_like(hidden), torch.zeros_like(weight))
                kept = [t if n else None for t, n in zip(zeros, _wanted(shard.needs), strict=False)]
                ctx.save_for_backward(*kept, None if bias is None else torch.zeros_like(bias))
                return factor.new_zeros(())
            tiles = tiles_for(op, shard.mode, shard.budget, shard.needs)
            lse, target = _global(op, tiles, shard.group)
            losses = lse - target + shard.form.z_loss * lse * lse
            _, _, grads = exact_pass(op, tiles, shard.needs, factor, lse=lse)
            if grads.hidden is not None:
                dist.all_reduce(grads.hidden, group=shard.group)
            ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        return losses.sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out = [
            None if g is None else scaled(g, upstream, keep=True).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*out, None, None, None)


def _wanted(needs: Needs) -> tuple[bool, bool]:
    """Whether hidden states and weight want a gradient."""
    return needs.hidden, needs.weight


def _operands(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    shard: _Shard,
) -> Operands:
    """Valid tokens only, labels counted from this rank's first row (elsewhere: no hit)."""
    rows: torch.Tensor | None = (labels != shard.ignore_index).nonzero().squeeze(1)
    assert rows is not None
    if rows.shape[0] == labels.shape[0]:
        rows = None
    else:
        labels = labels.index_select(0, rows)
    ops, buffer_dtype = row_operations(hidden, shard.mode)
    return Operands(
        hidden=hidden.contiguous(), labels=labels - shard.start, weight=weight, form=shard.form,
        ops=ops, rows=rows, bias=bias, buffer_dtype=buffer_dtype,
        gradient_dtype=accumulation_dtype(hidden.dtype),
    )  # fmt: skip


def _global(
    op: Operands, tiles: Tiles, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and target logit over every rank's columns: the one all-gather."""
    count, vocabulary = op.labels.shape[0], op.weight.shape[0]
    wide = accumulation_dtype(op.hidden.dtype)
    mine = torch.empty(2, count, device=op.hidden.device, dtype=wide)
    buffer = logits_buffer(op, min(tiles.tokens, count), tiles.inner)
    for start, end in bounds(count, tiles.tokens):
        hidden, state = op.chunk(start, end), State.start(end - start, op.hidden.device, wide)
        for low, high in bounds(vocabulary, tiles.inner):
            x = buffer[: end - start, : high - low]
            op.logits(x, hidden, None, low)
            op.ops.sweep(op.tile(x, op.labels[start:end], low), state, write=False)
        mine[0, start:end] = state.log_sum_exp()
        mine[1, start:end] = state.target
    size = dist.get_world_size(group)
    every = torch.empty(size, 2, count, device=op.hidden.device, dtype=wide)
    dist.all_gather_into_tensor(every.view(size * 2, count), mine, group=group)
    return torch.logsumexp(every[:, 0], 0), every[:, 1].amax(0)
