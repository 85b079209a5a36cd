"""The experts layer against a float64 oracle: torch, or Triton where this process interprets it.

`test_experts_interpreted.py` runs this file a second time under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from impl.kernels.experts import ExpertLora, choose_path, moe_lora_experts
from tests.kernels.experts_problems import Case, oracle

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Observed worst error over these cases, torch and interpreter: 4e-7, 1.3e-3, 7.2e-3, 9e-16.
LIMITS = {FP32: 2e-6, FP16: 3e-3, BF16: 2e-2, FP64: 1e-13}

CASES = {
    "plain": Case(),
    "gelu": Case(act="gelu_tanh"),
    "one-token": Case(tokens=1, width=40, inner=24, rank_up=0),
    "sentinels": Case(tokens=37, experts=5, width=48, inner=40, rank_up=5, rank_down=0,
                      routing="sentinels"),
    "one-expert": Case(tokens=40, experts=3, width=64, inner=48, rank_up=16, rank_down=16,
                       routing="one"),
    "duplicates": Case(tokens=12, top_k=3, experts=6, routing="duplicates", act="gelu_tanh"),
    "no-adapter": Case(tokens=21, top_k=4, experts=8, width=36, inner=20, rank_up=0, rank_down=0),
}  # fmt: skip


def run(
    case: Case, dtype: torch.dtype, *, adapter_dtype: torch.dtype | None = None, backwards: int = 1
) -> dict[str, Tensor]:
    """Output and gradients of ours, from the same rounded values as the oracle's."""
    t = case.rounded(dtype)
    if adapter_dtype is not None:
        for name in ("up_a", "up_b", "down_a", "down_b"):
            tensor = t[name]
            t[name] = None if tensor is None else tensor.detach().to(adapter_dtype).requires_grad_()
    lora = ExpertLora(
        t["up_a"], t["up_b"], case.scales[0], t["down_a"], t["down_b"], case.scales[1]
    )
    hidden, weights, gate_up, down = t["hidden"], t["weights"], t["gate_up"], t["down"]
    assert hidden is not None and weights is not None and gate_up is not None and down is not None
    out = moe_lora_experts(hidden, case.index, weights, gate_up, down, act=case.act, lora=lora)
    leaves = {name: x for name, x in t.items() if x is not None}
    for _ in range(backwards):
        grads = torch.autograd.grad(
            out, list(leaves.values()), case.upstream(dtype), retain_graph=True
        )
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def worst(got: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative Frobenius error and whose it is."""
    assert got.keys() == truth.keys()
    errors = {
        name: float((got[name].double() - x).norm() / x.norm().clamp_min(1e-30))
        for name, x in truth.items()
    }
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def test_the_expected_path_runs() -> None:
    wanted = os.environ.get("EXPERTS_EXPECT_PATH", choose_path(torch.device("cpu"), FP32))
    assert choose_path(torch.device("cpu"), FP32) == wanted


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    error, where = worst(run(CASES[name], dtype), oracle(CASES[name], dtype))
    assert error <= LIMITS[dtype], f"{name} {dtype}: {where} is off by {error:.2e}"


def test_empty_experts_get_exact_zeros() -> None:
    got = run(CASES["one-expert"], FP32)
    for name, dim in (("up_a", 0), ("down_a", 0), ("gate_up", 0), ("down", 0)):
        parts = got[name].chunk(3, dim)
        assert all(not part.any() for part in parts[:2]) and parts[2].any(), name
    for name in ("up_b", "down_b"):
        parts = got[name].view(got[name].shape[0], -1, 3)
        assert not parts[:, :, :2].any() and parts[:, :, 2].any(), name


def test_no_token_at_all() -> None:
    case = Case(tokens=0)
    t = case.rounded(FP32)
    lora = ExpertLora(t["up_a"], t["up_b"], 1.0, t["down_a"], t["down_b"], 1.0)
    args = [t[name] for name in ("weights", "gate_up", "down")]
    assert t["hidden"] is not None
    out = moe_lora_experts(t["hidden"], case.index, *args, act="silu", lora=lora)  # type: ignore[arg-type]
    assert out.shape == (0, 32)
    leaves = [x for x in t.values() if x is not None]
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_a_second_backward_and_a_second_run_repeat_every_bit() -> None:
    case = CASES["duplicates"]
    first, again, twice = run(case, FP32), run(case, FP32), run(case, FP32, backwards=2)
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, twice[name]), name


def test_scaling_zero_is_the_base_layer_bit_for_bit() -> None:
    nothing = run(Case(scales=(0.0, 0.0)), FP32)["out"]
    assert torch.equal(nothing, _base(Case()))


def _base(case: Case) -> Tensor:
    """The case's output without its adapter."""
    t = case.rounded(FP32)
    args = [t[name] for name in ("weights", "gate_up", "down")]
    out = moe_lora_experts(t["hidden"], case.index, *args, act=case.act)  # type: ignore[arg-type]
    return out.detach()


def test_adapters_in_float32_beside_bfloat16_weights() -> None:
    case = CASES["plain"]
    got = run(case, BF16, adapter_dtype=FP32)
    assert got["up_a"].dtype == got["down_b"].dtype == FP32 and got["hidden"].dtype == BF16
    error, where = worst(got, oracle(case, BF16))
    assert error <= LIMITS[BF16], f"{where} is off by {error:.2e}"


def test_autocast_and_checkpointing_change_no_bit_they_should_not() -> None:
    case = CASES["plain"]
    t = case.rounded(FP32)
    args = [t[name] for name in ("hidden", "weights", "gate_up", "down")]
    hidden, weights, gate_up, down = (x for x in args if x is not None)

    def layer(x: Tensor) -> Tensor:
        return moe_lora_experts(x, case.index, weights, gate_up, down, act=case.act)

    with torch.autocast("cpu", BF16):
        low = layer(hidden)
    assert low.dtype == FP32
    upstream = case.upstream(FP32)
    (low_grad,) = torch.autograd.grad(low, hidden, upstream)
    plain = layer(hidden)
    (grad,) = torch.autograd.grad(plain, hidden, upstream)
    assert 0 < float((low_grad - grad).norm() / grad.norm()) < LIMITS[BF16]
    again = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    (again_grad,) = torch.autograd.grad(again, hidden, upstream)
    assert torch.equal(again, plain) and torch.equal(again_grad, grad)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    case = CASES["plain"]
    full = run(case, FP32)
    for wanted in (("up_b",), ("down_a",), ("hidden",), ("up_a", "weights"), ("down_b", "down")):
        t = case.rounded(FP32)
        for name, tensor in t.items():
            if tensor is not None:
                tensor.requires_grad_(name in wanted)
        lora = ExpertLora(
            t["up_a"], t["up_b"], case.scales[0], t["down_a"], t["down_b"], case.scales[1]
        )
        args = [t[name] for name in ("weights", "gate_up", "down")]
        out = moe_lora_experts(t["hidden"], case.index, *args, act=case.act, lora=lora)  # type: ignore[arg-type]
        out.backward(case.upstream(FP32))
        for name, tensor in t.items():
            if tensor is None or name not in wanted:
                assert tensor is None or tensor.grad is None, (wanted, name)
            else:
                assert tensor.grad is not None
                assert torch.allclose(tensor.grad, full[name], rtol=1e-5, atol=1e-6), (wanted, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act": "relu"}, "activation 'relu'"),
        ({"index": torch.full((9, 2), 5)}, "spans"),
        ({"index": torch.zeros(9, 2)}, "int64"),
        ({"index": torch.zeros(8, 2, dtype=torch.long)}, "must both be"),
        ({"path": "cuda"}, "path 'cuda'"),
        ({"lora": ExpertLora(gate_up_a=torch.zeros(8, 32))}, "given together"),
        ({"lora": ExpertLora(torch.zeros(7, 32), torch.zeros(32, 7))}, "are not"),
    ],
)
def test_bad_input_is_one_clear_line(change: dict[str, object], words: str) -> None:
    case = Case()
    t = {name: x.detach() for name, x in case.rounded(FP32).items() if x is not None}
    options = {"act": "silu", "index": case.index, **change}
    index = options.pop("index")
    with pytest.raises(ValueError, match=words) as caught:
        moe_lora_experts(
            t["hidden"],
            index,
            t["weights"],
            t["gate_up"],
            t["down"],
            **options,  # type: ignore[arg-type]
        )
    assert "\n" not in str(caught.value)
