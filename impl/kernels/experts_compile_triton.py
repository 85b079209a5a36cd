"""What the experts layer compiles: ahead of a first call, and at the published shapes for CI."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import experts_products_cuda as products
from .experts_cuda_runtime import Constants
from .experts_plan import Native, Plan, plan_for, with_native
from .experts_problem import ExpertLora, Needs, Problem
from .experts_triton import backward, forward
from .launch import CompileSpec, compile_ahead, recording, spec_of

# Tokens, experts, width, inner width, slots of a token, activation.
SHAPES: dict[str, tuple[int, int, int, int, int, str]] = {
    "gemma4": (8192, 128, 2816, 704, 8, "gelu_tanh"),
    "qwen3_5": (8192, 256, 2048, 512, 8, "silu"),
    "mixtral": (4096, 8, 4096, 14336, 2, "silu"),
}
_compiled: set[tuple[object, ...]] = set()


def compile_once(problem: Problem, plan: Plan) -> None:
    """Before the first call of a kind compile its kernels, forward and backward, side by side."""
    p = problem
    tensors = (p.hidden, p.index, p.weights, p.gate_up, p.down, *_factors(p.lora))
    kinds = [None if t is None else (t.dtype, t.shape[1:], t.requires_grad) for t in tensors]
    key = (p.hidden.device, p.experts, p.top_k, p.act, p.dtype, plan, *kinds)
    if key in _compiled:
        return
    _compiled.add(key)
    meta = [None if t is None else torch.empty_like(t, device="meta") for t in tensors]
    hidden, index, weights, gate_up, down, a_up, b_up, a_down, b_down = meta
    lora = ExpertLora(a_up, b_up, p.lora.gate_up_scale, a_down, b_down, p.lora.down_scale)
    needs = [t is not None and t.requires_grad for t in tensors]
    del needs[1]
    twin = Problem(hidden, index, weights, gate_up, down, lora, p.act, p.dtype)  # type: ignore[arg-type]
    with recording() as records:
        out, saved = forward(twin, plan)
        if any(needs):
            backward(twin, saved, torch.empty_like(out), Needs(*needs), plan)
    with ThreadPoolExecutor(4) as pool:
        native = [
            pool.submit(products.compile_one, p.hidden.device, constants)
            for constants in products.recorded()
        ]
        compile_ahead(records, p.hidden.device)
        for one in native:
            one.result()


def _factors(lora: ExpertLora) -> tuple[Tensor | None, ...]:
    return lora.gate_up_a, lora.gate_up_b, lora.down_a, lora.down_b


def specs() -> list[CompileSpec]:
    """Every kernel of a forward and backward at the published shapes, for the check in CI."""
    found: dict[str, CompileSpec] = {}
    for label, (tokens, experts, width, inner, top_k, act) in SHAPES.items():
        for spec in specs_of(label, meta_problem(tokens, experts, width, inner, top_k, act)):
            found.setdefault(repr(spec.key), spec)
    return list(found.values())


def meta_problem(
    tokens: int,
    experts: int,
    width: int,
    inner: int,
    top_k: int,
    act: str,
    rank: int = 16,
) -> Problem:
    """A problem without memory: bfloat16 weights, float32 adapters and routing weights."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = torch.float32
    lora = ExpertLora(
        meta(rank * experts, width, dtype=wide),
        meta(2 * inner, rank * experts, dtype=wide),
        2.0,
        meta(rank * experts, inner, dtype=wide),
        meta(width, rank * experts, dtype=wide),
        2.0,
    )
    return Problem(
        meta(tokens, width),
        meta(tokens, top_k, dtype=torch.int64),
        meta(tokens, top_k, dtype=wide),
        meta(experts, 2 * inner, width),
        meta(experts, width, inner),
        lora,
        act,
        torch.bfloat16,
    )


def native_constants() -> list[Constants]:
    """What the products in CUDA are compiled for at the published shapes, alone and in clusters."""
    found: dict[Constants, None] = {}
    for tokens, experts, width, inner, top_k, act in SHAPES.values():
        problem = meta_problem(tokens, experts, width, inner, top_k, act)
        for cluster in (1, 2):
            native = Native(cluster=cluster, stages=4, group=8)
            plan = with_native(plan_for(problem, interpreted=False), native)
            with recording():
                out, saved = forward(problem, plan)
                everything = Needs(True, True, False, False, True, True, True, True)
                backward(problem, saved, torch.empty_like(out), everything, plan)
            found |= dict.fromkeys(products.recorded())
    return list(found)


def specs_of(label: str, problem: Problem) -> list[CompileSpec]:
    """Record one forward and backward of a problem on the meta device."""
    everything = Needs(True, True, False, False, True, True, True, True)
    with recording() as records:
        out, saved = forward(problem)
        backward(problem, saved, torch.empty_like(out), everything)
    return [spec_of(record, label) for record in records]
