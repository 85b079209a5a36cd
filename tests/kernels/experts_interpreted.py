"""Run as a module under TRITON_INTERPRET=1: what the public function does not reach on a CPU.

The routing maps against sorting in torch, and the Hopper plan's branches (tensor descriptors, half
tiles, half column blocks, grouped order, several chunks an expert) at a small tile.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from impl.kernels import experts_triton
from impl.kernels.experts import moe_lora_experts
from impl.kernels.experts_plan import Plan, Tiles, plan_for
from impl.kernels.experts_problem import ExpertLora, Needs, Problem
from impl.kernels.experts_routing_triton import route
from tests.kernels.experts_problems import Case, oracle


def check_routing(tokens: int, top_k: int, experts: int) -> None:
    """Order, positions, offsets and all maps agree with a stable sort."""
    index = torch.randint(0, experts + 1, (tokens, top_k))
    weights = torch.rand(tokens, top_k)
    got = route(index, weights, experts, 32, 64, cluster=3)
    flat = index.flatten()
    order = torch.argsort(flat, stable=True)[: int((flat < experts).sum())]
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    rows = len(order)
    position = torch.full((flat.numel(),), -1)
    position[order] = torch.arange(rows)
    assert torch.equal(got.order[:rows].long(), order)
    assert torch.equal(got.position.long(), position)
    assert torch.equal(got.offsets.long(), offsets)
    assert torch.equal(got.weights[:rows], weights.flatten()[order])
    for size, least, experts_of, rows_of in (
        (32, 0, got.tile_expert, got.tile_row),
        (64, 1, got.chunk_expert, got.chunk_row),
        (96, 0, got.wide_expert, got.wide_row),
    ):
        wanted = [
            (e, int(offsets[e]) + size * n)
            for e in range(experts)
            for n in range(max(least, -(-int(counts[e]) // size)))
        ]
        found = list(zip(experts_of.tolist(), rows_of.tolist(), strict=True))
        assert found[: len(wanted)] == wanted
        assert all(e == -1 for e, _ in found[len(wanted) :])


def check_plan(case: Case, change: dict[str, object]) -> None:
    """A forward and backward under a changed plan agree with the oracle."""
    t = {name: None if x is None else x.detach() for name, x in case.rounded(torch.float32).items()}
    lora = ExpertLora(
        t["up_a"], t["up_b"], case.scales[0], t["down_a"], t["down_b"], case.scales[1]
    )
    args = (t["hidden"], case.index, t["weights"], t["gate_up"], t["down"])
    problem = Problem(*args, lora, case.act, torch.float32)  # type: ignore[arg-type]
    plan: Plan = replace(plan_for(problem, interpreted=True), **change)  # type: ignore[arg-type]
    out, saved = experts_triton.forward(problem, plan)
    needs = Needs(*[True] * 8)  # type: ignore[call-arg]
    got = experts_triton.backward(problem, saved, case.upstream(torch.float32), needs, plan)
    truth = oracle(case, torch.float32)
    names = {"up_a": "gate_up_a", "up_b": "gate_up_b"}
    for name, wanted in truth.items():
        value = out if name == "out" else getattr(got, names.get(name, name))
        error = float((value.double() - wanted).norm() / wanted.norm())
        assert error < 2e-6, f"{change}: {name} is off by {error:.2e}"


def check_reuse() -> None:
    """GU's storage takes dX only in a backward that cannot come again; the gradients are equal."""
    index = torch.arange(10).view(5, 2) % 3
    weights, down = torch.rand(5, 2), torch.randn(3, 48, 40)
    gate_up = torch.randn(3, 80, 48)
    hidden = torch.randn(5, 48, requires_grad=True)
    out = moe_lora_experts(hidden, index, weights, gate_up, down, act="silu", path="triton")
    saved = next(t for t in out.grad_fn.saved_tensors if t is not None and t.shape == (10, 80))
    before = saved.clone()
    (first,) = torch.autograd.grad(out.sum(), hidden, retain_graph=True)
    assert torch.equal(saved, before), "a backward that may come again overwrote GU"
    (second,) = torch.autograd.grad(out.sum(), hidden)
    assert not torch.equal(saved, before), "the last backward has a buffer of its own"
    assert torch.equal(first, second)


def main() -> None:
    """Run everything."""
    torch.manual_seed(0)
    for sizes in ((64, 2, 8), (1, 8, 128), (300, 2, 5), (150, 4, 130)):
        check_routing(*sizes)
    case = Case(tokens=45, top_k=2, experts=3, width=72, inner=56, rank_up=3, rank_down=4)
    wide = Tiles(32, 16, 4, 2)
    small = Tiles(32, 16, 4, 2)
    tiles = {"up": wide, "down": small, "d_hidden": small, "d_input": small}
    check_plan(case, {**tiles, "half_rows": True, "descriptors": True, "group": 2, "chunk": 16})
    check_plan(case, {**tiles, "rank_in_middle": False, "column_groups": 1, "middle_columns": 16})
    check_plan(case, {"column_groups": 2, "middle_columns": 16, "keep_factors": False})
    check_plan(case, {**tiles, "input_blocks": 1, "output_columns": 16})
    check_reuse()
    print("all good")


if __name__ == "__main__":
    main()
