"""Mixture-of-experts with unfolded LoRA: one differentiable function over two implementations.

``W + s B A`` is never formed: rounding it to the weight's dtype loses small updates, and its
backward would compute the full gradient of W. The Triton path runs on CUDA devices of capability
8.0 and up, and in Triton's interpreter on a CPU; everything else takes the grouped torch path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import experts_torch
from .experts_problem import ACTIVATIONS, ExpertLora, Gradients, Needs, Problem, check

__all__ = ["ACTIVATIONS", "ExpertLora", "choose_path", "moe_lora_experts"]

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def choose_path(device: torch.device, dtype: torch.dtype) -> str:
    """``"triton"`` where Triton runs or interprets this dtype on the device, else ``"torch"``."""
    if dtype not in _TRITON_DTYPES:
        return "torch"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "torch"
    from . import experts_triton

    if device.type == "cpu":
        return "triton" if experts_triton.INTERPRETED else "torch"
    if device.type != "cuda" or torch.version.hip is not None:
        return "torch"
    return "triton" if torch.cuda.get_device_capability(device) >= (8, 0) else "torch"


def moe_lora_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    act: str,
    lora: ExpertLora | None = None,
    path: str = "auto",
    check_index: bool | None = None,
) -> Tensor:
    """Run a mixture-of-experts layer with LoRA on both expert weights, without folding it in.

    Per expert: ``GU = X Wᵀ + s (X Aᵀ) Bᵀ``, ``h = act(gate) * up``, ``y = h W₂ᵀ + s₂ (h A₂ᵀ) B₂ᵀ``;
    ``out[t] = Σ_k weights[t, k] * y[t, k]``, summed in at least float32, in the dtype of hidden.

    Args:
        hidden: ``(T, H)``, T >= 0.
        top_k_index: ``(T, K)`` int64 expert of each slot; ``E`` marks a slot that another rank
            serves: it adds nothing and gets zero gradients. A token may name an expert twice.
        top_k_weights: ``(T, K)``, used as given.
        gate_up_proj: ``(E, 2I, H)``, gate rows first. Its gradient is computed if it requires one.
        down_proj: ``(E, H, I)``, likewise.
        act: ``"silu"`` or ``"gelu_tanh"``.
        lora: the adapter's factors, see `ExpertLora`; None for the base layer.
        path: ``"auto"``, ``"triton"`` or ``"torch"``. Triton's path
            takes its large products in CUDA on Hopper, but for EXPERTS_CUDA=0 in the environment.
        check_index: raise on indices outside ``[0, E]``. Default: on a CPU, or where the
            environment variable EXPERTS_CHECK_INDEX is 1 (on a GPU it synchronises); unchecked
            ones act as ``E``.

    Returns:
        ``(T, H)`` in the dtype of ``hidden``. Under autocast products take the autocast dtype.

    Raises:
        ValueError: shapes, dtypes, activation or checked indices are off, or the path cannot run.

    Contract: spec `kernels.md` §3. Bitwise repeatable; a second backward gives the same bits.
    """
    lora = lora or ExpertLora()
    dtype = _compute_dtype(hidden.device.type, gate_up_proj.dtype)
    problem = Problem(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj, lora, act, dtype)
    if check_index is None:
        check_index = hidden.device.type == "cpu" or os.environ.get("EXPERTS_CHECK_INDEX") == "1"
    check(problem, check_index=check_index)
    best = choose_path(hidden.device, dtype)
    if path == "auto":
        path = best
    elif path not in ("triton", "torch") or (path == "triton" and best != "triton"):
        raise ValueError(f"path {path!r} does not run {dtype} on {hidden.device.type}")
    out: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        hidden,
        top_k_weights,
        gate_up_proj,
        down_proj,
        lora.gate_up_a,
        lora.gate_up_b,
        lora.down_a,
        lora.down_b,
        top_k_index,
        (act, dtype, path, lora.gate_up_scale, lora.down_scale),
    )
    return out


def _compute_dtype(device_type: str, weight_dtype: torch.dtype) -> torch.dtype:
    """The autocast dtype where autocast is on (float64 stays), else the weight's dtype."""
    if torch.is_autocast_enabled(device_type) and weight_dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight_dtype


class _Experts(torch.autograd.Function):
    """Autograd over either path; saves inputs, GU and small products. A backward that cannot come
    again overwrites GU, once it has read it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, static = args
        problem = _problem(tensors, static)
        with _quiet(problem.hidden.device):
            out: Tensor
            out, saved = _module(static[2]).forward(problem)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*tensors, *saved)
            ctx.static = static
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        everything = list(ctx.saved_tensors)  # checkpointing lets them be unpacked once only
        tensors, saved = everything[:9], everything[9:]
        problem, needed = _problem(tensors, ctx.static), ctx.needs_input_grad
        needs = Needs(
            hidden=needed[0],
            weights=needed[1],
            gate_up=needed[2],
            down=needed[3],
            gate_up_a=needed[4],
            gate_up_b=needed[5],
            down_a=needed[6],
            down_b=needed[7],
        )
        with _quiet(grad.device):
            g: Gradients = _module(ctx.static[2]).backward(problem, saved, grad, needs)
        small = (g.gate_up_a, g.gate_up_b, g.down_a, g.down_b)
        return (g.hidden, g.weights, g.gate_up, g.down, *small, None, None)


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Autocast off, and launches on the tensors' own device."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield


def _module(path: str) -> Any:
    """The module with ``forward`` and ``backward`` of a path; Triton is imported only when used."""
    if path == "torch":
        return experts_torch
    from . import experts_triton

    return experts_triton


def _problem(tensors: list[Any], static: tuple[str, torch.dtype, str, float, float]) -> Problem:
    """Rebuild the call from autograd's flat arguments."""
    hidden, weights, gate_up, down, up_a, up_b, down_a, down_b, index = tensors
    act, dtype, _, up_scale, down_scale = static
    lora = ExpertLora(up_a, up_b, up_scale, down_a, down_b, down_scale)
    return Problem(hidden, index, weights, gate_up, down, lora, act, dtype)
