"""Causal-LM loss from hidden states and the classifier weight, without the logits.

`linear_cross_entropy` takes rows that are already shifted; `causal_lm_loss` shifts, once. Ignored
tokens are dropped first. Gradients are computed in the forward, where the logits are at hand: two
matrix products for a frozen classifier, three for a trainable one. Nothing is filtered.

Contract: kernels.md section 4. The one host synchronisation is the count of valid tokens (shapes
depend on it); without it ignored tokens would cost as much as the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import graph
from .cross_entropy_chunks import Gradients, Needs, Operands, Tiles, exact_pass, whole_row_tiles
from .cross_entropy_kept import kept_chunks, kept_pass
from .cross_entropy_lean import can_defer, deferred_pass, sliced_tiles
from .cross_entropy_products import accumulation_dtype
from .cross_entropy_rows import Form, RowOperations
from .cross_entropy_torch import TorchRows

Mode = Literal["auto", "chunked", "lean", "torch"]

# Workspace in bytes when the caller names none: see NOTES-cross-entropy.md for what each buys.
FROZEN_BUDGET, LEAN_BUDGET, TRAINABLE_BUDGET = 320 << 20, 32 << 20, 1100 << 20


class LowRank(NamedTuple):
    """An adapter on the classifier: logits += (scaling * features_of(hidden)) @ b^T.

    `features`: (N, r) = scaling * hidden @ A^T, computed by the caller (so that dropout on the
    adapter's input and the gradient of A stay with autograd); `b`: (V, r).
    """

    features: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class _Job:
    """What a call carries besides its tensors."""

    form: Form
    ignore_index: int
    per_token: bool
    mode: Mode
    budget: int | None
    needs: Needs


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items_in_batch: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    memory_budget: int | None = None,
    mode: Mode = "auto",
    lora: tuple[torch.Tensor, torch.Tensor, float] | LowRank | None = None,
) -> torch.Tensor:
    """Cross-entropy of `z = softcap(logit_scale * (hidden weight^T + bias))` on shifted rows.

    hidden (..., D) floating; weight (V, D) of the same dtype (under autocast both are cast);
    labels (...) int64. Returns fp32 (float64 for float64 input): a scalar, or one loss a token for
    reduction "none" (0 at ignored ones). `num_items_in_batch` divides the sum and overrides
    "mean" and "sum". No valid token: 0 with zero gradients. `z_loss` adds `z_loss * lse^2` a token.
    `memory_budget`: bytes of workspace beyond the returned gradients. `mode`: "auto"; "chunked"
    (whole rows of logits for a chunk of tokens); "lean" (tiles only); "torch" (no Triton).
    `lora`: (A (r, D), B (V, r), scaling) or `LowRank`: an adapter on the classifier.

    Raises ValueError with one line for wrong shapes, dtypes and options. Formula: kernels.md
    section 4; peers that drop ignored terms or adapters: live-defects L16, L17, L21.
    """
    _check_options(softcap, logit_scale, reduction, label_smoothing, mode, num_items_in_batch)
    hidden, weight = _autocast(hidden, weight)
    flat = hidden.reshape(-1, hidden.shape[-1])
    labels_flat = labels.reshape(-1)
    low_rank = _low_rank(lora, flat)
    _check_inputs(flat, weight, labels_flat, bias, low_rank)
    tensors = (flat, weight, bias, low_rank.features if low_rank else None,
               low_rank.b if low_rank else None)  # fmt: skip
    on = torch.is_grad_enabled()
    needs = Needs(*(on and t is not None and t.requires_grad for t in tensors))
    form = Form(weight.shape[0], softcap, float(logit_scale), label_smoothing, z_loss)
    per_token = reduction == "none"
    job = _Job(form, ignore_index, per_token, mode, memory_budget, needs)
    divisor: torch.Tensor | None = None
    if num_items_in_batch is not None:
        divisor = torch.as_tensor(num_items_in_batch).to(flat.device, non_blocking=True)
    elif reduction == "sum":
        divisor = torch.ones((), device=flat.device)
    loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        *tensors, labels_flat, divisor, job
    )
    return loss.view(labels.shape) if per_token else loss


# traced, the chunks' host decisions would be thirty graphs, some anew for each batch
@torch.compiler.disable  # type: ignore[untyped-decorator]
def causal_lm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> torch.Tensor:
    """`linear_cross_entropy` on unshifted labels (B, S): position s predicts label s + 1.

    The one place that shifts. `shift_labels`, already shifted (as transformers passes under
    context parallelism), is used as it is.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss needs labels or shift_labels")
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden.device)
    return linear_cross_entropy(hidden, weight, shift_labels, ignore_index=ignore_index, **options)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes loss and gradients; backward only scales (recomputes in one case).

    The exception is reduction "none" with trainable parameters: their gradient sums over tokens
    with weights that only the backward knows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        features: torch.Tensor | None,
        low_rank: torch.Tensor | None,
        labels: torch.Tensor,
        divisor: torch.Tensor | None,
        job: _Job,
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            op = _operands(hidden, weight, bias, features, low_rank, labels, job)
            ctx.job, ctx.dtypes = job, _dtypes(hidden, weight, bias, features, low_rank)
            ctx.deferred = job.per_token and job.needs.parameters
            wide = accumulation_dtype(hidden.dtype)
            count = op.labels.shape[0]
            if divisor is None or job.per_token:
                factor = torch.full(
                    (),
                    1.0 if job.per_token else 1.0 / max(count, 1),
                    device=hidden.device,
                    dtype=wide,
                )
            else:
                factor = torch.reciprocal(divisor.to(wide)).reshape(())
            now = Needs() if ctx.deferred else job.needs
            losses, lse, grads = _run(op, job, now, factor)
            if ctx.deferred:
                ctx.save_for_backward(hidden, weight, bias, features, low_rank, labels, lse)
            else:
                ctx.save_for_backward(
                    grads.hidden, grads.weight, grads.bias, grads.features, grads.low_rank
                )
                ctx.rows = op.rows
        if not job.per_token:
            # A product with an infinite factor (no items at all) would turn 0 into NaN.
            return losses.sum() * factor if count else losses.new_zeros(())
        if op.rows is None:
            return losses
        return losses.new_zeros(labels.shape[0]).index_copy_(0, op.rows, losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out: tuple[torch.Tensor | None, ...]
        if ctx.deferred:
            grads = _recompute(ctx, upstream)
            out = (grads.hidden, grads.weight, grads.bias, grads.features, grads.low_rank)
        else:
            row = upstream.unsqueeze(1) if ctx.job.per_token else upstream
            keep = graph.is_kept()
            out = tuple(None if g is None else scaled(g, row, keep) for g in ctx.saved_tensors)
        cast = (
            None if g is None else g.to(dtype) for g, dtype in zip(out, ctx.dtypes, strict=True)
        )
        return (*cast, None, None, None)


def _run(
    op: Operands, job: _Job, needs: Needs, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Losses, log-sum-exp and gradients by the cheapest exact way that the mode allows."""
    if op.labels.shape[0] == 0:
        return _nothing(op, needs)
    if job.mode != "chunked" and can_defer(op, needs):
        if not needs.weight:
            tiles = tiles_for(op, job.mode, job.budget, needs, deferred=True)
            losses, hidden = deferred_pass(op, tiles, factor)
            return losses, losses, Gradients(hidden=hidden)
        chunks = kept_chunks(op, budget_of(job.mode, job.budget, needs))
        if chunks is not None:
            losses, grads = kept_pass(op, chunks, factor)
            return losses, losses, grads
    return exact_pass(op, tiles_for(op, job.mode, job.budget, needs), needs, factor)


def budget_of(mode: Mode, memory_budget: int | None, needs: Needs) -> int:
    """The caller's budget in bytes, or the default of the case."""
    default = TRAINABLE_BUDGET if needs.parameters else FROZEN_BUDGET
    default = LEAN_BUDGET if mode == "lean" else default
    return default if memory_budget is None else memory_budget


def tiles_for(
    op: Operands, mode: Mode, memory_budget: int | None, needs: Needs, deferred: bool = False
) -> Tiles:
    """Tile sizes within the caller's budget or the default of the case."""
    budget = budget_of(mode, memory_budget, needs)
    if deferred or mode == "lean" or not needs.any:
        return sliced_tiles(op, budget)
    return whole_row_tiles(op, budget)


def _nothing(op: Operands, needs: Needs) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """No valid token: zero gradients wherever one is due."""
    empty = torch.zeros(0, device=op.hidden.device, dtype=accumulation_dtype(op.hidden.dtype))
    zero = Gradients()
    for name in ("hidden", "weight", "bias", "features", "low_rank"):
        tensor = getattr(op, name)
        if getattr(needs, name) and tensor is not None:
            setattr(zero, name, torch.zeros_like(tensor))
    return empty, empty, zero


def _recompute(ctx: Any, upstream: torch.Tensor) -> Gradients:
    """Gradients under per-token upstream weights, from the saved log-sum-exp."""
    hidden, weight, bias, features, low_rank, labels, lse = ctx.saved_tensors
    job: _Job = ctx.job
    with torch.autocast(hidden.device.type, enabled=False):
        op = _operands(hidden, weight, bias, features, low_rank, labels, job)
        if op.labels.shape[0] == 0:
            return _nothing(op, job.needs)[2]
        weights = upstream if op.rows is None else upstream.index_select(0, op.rows)
        weights = weights.to(lse.dtype)
        # Tiles hold weights of order one, whatever the loss is divided by: float16 would lose them.
        largest = weights.abs().amax().clamp_min(torch.finfo(lse.dtype).tiny)
        tiles = tiles_for(op, job.mode, job.budget, job.needs)
        return exact_pass(op, tiles, job.needs, largest, lse, weights / largest)[2]


def _operands(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    features: torch.Tensor | None,
    low_rank: torch.Tensor | None,
    labels: torch.Tensor,
    job: _Job,
) -> Operands:
    """Drop ignored tokens, choose the row operations, bring the adapter to the working dtype."""
    rows: torch.Tensor | None = (labels != job.ignore_index).nonzero().squeeze(1)
    assert rows is not None
    if rows.shape[0] == labels.shape[0]:
        rows = None
    else:
        labels = labels.index_select(0, rows)
    ops, buffer_dtype = row_operations(hidden, job.mode)
    return Operands(
        hidden=hidden.contiguous(), labels=labels.contiguous(), weight=weight, form=job.form,
        ops=ops, rows=rows, bias=None if bias is None else bias.contiguous(),
        features=None if features is None else features.to(hidden.dtype).contiguous(),
        low_rank=None if low_rank is None else low_rank.to(hidden.dtype).contiguous(),
        buffer_dtype=buffer_dtype,
        gradient_dtype=None if buffer_dtype == hidden.dtype else buffer_dtype,
    )  # fmt: skip


def row_operations(hidden: torch.Tensor, mode: Mode) -> tuple[RowOperations, torch.dtype]:
    """Triton rows where they can run, torch rows elsewhere; and the dtype of the logits tile.

    The interpreter truncates on its way to bf16, so it gets fp32 tiles and gradients.
    """
    if mode != "torch" and hidden.dtype != torch.float64:
        try:
            from .cross_entropy_triton import INTERPRETED, TritonRows
        except ImportError:
            INTERPRETED = None  # type: ignore[assignment]
        if INTERPRETED is not None and (hidden.is_cuda or INTERPRETED):
            narrow = INTERPRETED and hidden.dtype == torch.bfloat16
            return TritonRows(), torch.float32 if narrow else hidden.dtype
        if mode != "auto":
            raise ValueError(
                f'mode="{mode}" needs Triton and a GPU (or TRITON_INTERPRET=1), got '
                f'{hidden.device.type}; use mode="auto" or "torch"'
            )
    return TorchRows(), hidden.dtype


def scaled(gradient: torch.Tensor, upstream: torch.Tensor, keep: bool) -> torch.Tensor:
    """The saved gradient times the upstream one; in its own storage if nobody needs it again."""
    if keep:
        return (gradient * upstream).to(gradient.dtype)
    if upstream.dim() == 0 and gradient.is_cuda and gradient.is_contiguous():
        from .cross_entropy_triton import scale_in_place

        if gradient.numel():
            scale_in_place(gradient, upstream.contiguous())
        return gradient
    return gradient.mul_(upstream.to(gradient.dtype) if upstream.dim() == 0 else upstream)


def _dtypes(*tensors: torch.Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Each tensor's dtype."""
    return tuple(None if t is None else t.dtype for t in tensors)


def _autocast(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What autocast does to the inputs of a linear layer."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype)


def _low_rank(
    lora: tuple[torch.Tensor, torch.Tensor, float] | LowRank | None, hidden: torch.Tensor
) -> LowRank | None:
    """The adapter's features, computed under autograd where only (A, B, scaling) is given."""
    if lora is None or isinstance(lora, LowRank):
        return lora
    a, b, scaling = lora
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != hidden.shape[1] or a.shape[0] != b.shape[1]:
        raise ValueError(f"lora needs A (r, {hidden.shape[1]}) and B (V, r), got "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")  # fmt: skip
    return LowRank(torch.nn.functional.linear(hidden.to(a.dtype), a) * scaling, b)


def _check_options(
    softcap: float | None,
    scale: float,
    reduction: str,
    smoothing: float,
    mode: str,
    items: object,
) -> None:
    """Reject options that name nothing or contradict each other."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if mode not in ("auto", "chunked", "lean", "torch"):
        raise ValueError(f'mode must be "auto", "chunked", "lean" or "torch", got {mode!r}')
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not scale > 0:
        raise ValueError(f"logit_scale must be positive, got {scale}")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {smoothing}")
    if reduction == "none" and items is not None:
        raise ValueError('num_items_in_batch divides a sum; it contradicts reduction="none"')


def _check_inputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    low_rank: LowRank | None,
) -> None:
    """Reject shapes, dtypes and sharded weights that would give a wrong or no result."""
    if type(weight).__name__ == "DTensor":
        raise ValueError("the classifier weight is a sharded DTensor; call inside the forward of "
                         "the module that owns it, where FSDP2 has gathered it")  # fmt: skip
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be (V, {hidden.shape[1]}), got {tuple(weight.shape)}")
    if labels.shape[0] != hidden.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden rows but {labels.shape[0]} labels")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must share a floating dtype, got {hidden.dtype} "
                         f"and {weight.dtype}")  # fmt: skip
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if low_rank is not None:
        n, v, (r, b) = hidden.shape[0], weight.shape[0], (low_rank.features, low_rank.b)
        if r.shape[0] != n or b.shape != (v, r.shape[1]):
            raise ValueError(f"lora needs features ({n}, r) and b ({v}, r), got "
                             f"{tuple(r.shape)} and {tuple(b.shape)}")  # fmt: skip
