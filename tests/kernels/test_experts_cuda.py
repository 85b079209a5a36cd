"""The products in CUDA: their tiles, their compilation for Hopper, and Triton's bits on a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="unavailable: Triton has no package for this platform")

from impl.kernels import experts_compile_triton as compile_
from impl.kernels import experts_cuda_runtime as runtime
from impl.kernels import experts_products_cuda as products
from impl.kernels import experts_triton
from impl.kernels.experts_cuda_source import source
from impl.kernels.experts_plan import Native, plan_for, with_native
from impl.kernels.experts_problem import ExpertLora, Needs, Problem


def _has_compiler() -> bool:
    try:
        runtime.compiler()
    except OSError:
        return False
    return True


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


needs_compiler = pytest.mark.skipif(
    not _has_compiler(), reason="unavailable: no NVRTC (it comes with torch for CUDA)"
)
needs_hopper = pytest.mark.skipif(not _has_hopper(), reason="unavailable: no Hopper GPU")


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_tiles_cover_the_columns_within_what_an_instruction_takes(gather: bool, parts: int) -> None:
    for columns in range(64, 4097, 8):
        width = products._columns(columns, gather, parts)
        half = width // parts
        assert width % 16 == 0 and half % 8 == 0 and 144 <= width <= 256, (columns, width)
        blocks = -(-columns // half)
        assert (blocks - 1) * half < columns, (columns, width, blocks)


def test_products_without_a_gather_come_alone_and_in_clusters() -> None:
    constants = [dict(found) for found in compile_.native_constants()]
    kinds = {(c["KDIM"], c["NDIM"], c["KN"], c["GATHER"], c["EPI"], c["CL"]) for c in constants}
    # up and dh of three shapes; down and dX twice.
    assert len(kinds) == 3 * (2 + 2 * 2)
    for values in constants:
        text = source(values)
        for name, value in values.items():
            assert f"#define {name} {value}\n" in text


def test_recording_leaves_nothing_behind() -> None:
    compile_.native_constants()
    assert products.recorded() == []


@needs_compiler
def test_no_kernel_spills_or_serializes_its_products() -> None:
    for constants in compile_.native_constants():
        _, log = runtime.compile_source(source(dict(constants)), ("--ptxas-options=-v",))
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
        assert spilled, f"{constants}: no report of the compiler: {log}"
        assert max(spilled) == 0, f"{constants} spills: {log}"
        assert "C75" not in log, f"{constants}: {log}"


def _problem(tokens: int, routing: str, rank: int, act: str) -> Problem:
    experts, width, inner, top_k = 6, 320, 448, 2
    generator = torch.Generator("cuda").manual_seed(tokens + rank)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        out = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        return out.normal_(0, std, generator=generator)

    scores = torch.rand(tokens, experts, device="cuda", generator=generator)
    index = scores.topk(top_k, 1).indices
    if routing == "one expert":
        index = torch.full_like(index, 3)
    elif routing == "empty experts":
        index = index % 2 * 4
    elif routing == "sentinels":
        index[::3] = experts
    lora = ExpertLora(
        normal(rank * experts, width, std=0.05),
        normal(2 * inner, rank * experts, std=0.05),
        2.0,
        normal(rank * experts, inner, std=0.05),
        normal(width, rank * experts, std=0.05),
        2.0,
    )
    weights = torch.rand(tokens, top_k, device="cuda", generator=generator)
    return Problem(
        normal(tokens, width),
        index,
        weights,
        normal(experts, 2 * inner, width, std=0.05),
        normal(experts, width, inner, std=0.05),
        lora,
        act,
        torch.bfloat16,
    )


def _results(problem: Problem, native: Native | None) -> Iterator[Tensor]:
    plan = plan_for(problem, interpreted=False)
    rows = plan.rows if plan.native is None else 128
    plan = plan.__class__(**{**plan.__dict__, "rows": rows, "native": None})
    if native is not None:
        plan = with_native(plan, native)
    grad = torch.ones_like(problem.hidden) * 0.5 + problem.hidden
    out, saved = experts_triton.forward(problem, plan)
    yield out
    everything = Needs(True, True, False, False, True, True, True, True)
    for _ in range(2):  # a second backward finds the counter as the first did
        found = experts_triton.backward(problem, saved, grad, everything, plan)
        yield from (g for g in found.__dict__.values() if g is not None)


@needs_hopper
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "routing", "rank", "act"),
    [
        (1, "even", 16, "silu"),
        (77, "even", 8, "gelu_tanh"),
        (700, "one expert", 16, "silu"),
        (700, "empty experts", 16, "gelu_tanh"),
        (2500, "sentinels", 16, "silu"),
        (900, "even", 3, "silu"),
        (900, "even", 32, "silu"),
        (900, "even", 64, "gelu_tanh"),
    ],
)
def test_bits_are_tritons(tokens: int, routing: str, rank: int, act: str, cluster: int) -> None:
    problem = _problem(tokens, routing, rank, act)
    native = Native(cluster=cluster, stages=4, group=8)
    ours, theirs = _results(problem, native), _results(problem, None)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one, other), f"result {number}: {(one - other).abs().max()}"
