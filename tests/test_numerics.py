"""Error measures and assertions: values by hand, and each assertion's refusal and record."""

from __future__ import annotations

import math

import pytest
import torch

from conformance import numerics
from conformance.numerics import Error
from conformance.observe import Step
from conformance.tolerances import EXACT, TOLERANCES, Tolerance, tolerance

LOOSE = Tolerance("loose", 1e-2, 5e-3, "for these tests")


def test_relative_error_by_hand() -> None:
    ref = torch.tensor([3.0, 4.0])
    found = numerics.relative_error(torch.tensor([3.0, 4.5]), ref)
    assert found == Error(pytest.approx(0.1), pytest.approx(0.125))
    assert numerics.relative_error(ref * 0 + 1e-8, ref * 0, floor=1.0).maximum < 2e-8
    assert numerics.relative_error(ref * 0 + 1e-8, ref * 0) == Error(math.inf, math.inf)
    assert numerics.relative_error(ref[:0], ref[:0]) == Error(0.0, 0.0)
    with pytest.raises(ValueError, match="shapes differ"):
        numerics.relative_error(ref, ref[:1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_is_never_close(bad: float) -> None:
    got, ref = torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0])
    assert numerics.relative_error(got, ref).frobenius == math.inf
    with pytest.raises(AssertionError, match="inf"):
        numerics.assert_close("X/m/-/single", "logits", got, ref, LOOSE, {})
    with pytest.raises(AssertionError):
        numerics.assert_equal("X/m/-/single", "logits", got, ref, {})


def test_errors_along_find_the_one_bad_expert() -> None:
    ref = torch.ones(4, 100, 100)
    got = ref.clone()
    got[2, 0] = 0  # 1 % of one expert's entries
    found = numerics.errors_along(got, ref)
    assert [e.frobenius for e in found] == pytest.approx([0, 0, 0.1, 0])
    assert numerics.relative_error(got, ref).frobenius == pytest.approx(0.05)


def test_signed_mean_tells_truncation_from_rounding() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).abs().double() + 1
    rounded = x.bfloat16()
    bits = x.float().view(torch.int32) & -65536
    truncated = bits.view(torch.float32)
    assert abs(numerics.signed_mean(rounded, x)) < 1e-4
    assert numerics.signed_mean(truncated, x) < -1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ulps(dtype: torch.dtype) -> None:
    one = torch.tensor([1.0], dtype=dtype)
    step = torch.tensor([1.0 + torch.finfo(dtype).eps], dtype=dtype)
    assert numerics.ulps(one, one) == 0
    assert numerics.ulps(step, one) == numerics.ulps(-step, -one) == 1
    zero = torch.zeros(1, dtype=dtype)
    assert numerics.ulps(zero, -zero) == 0
    tiny = torch.tensor([torch.finfo(dtype).smallest_normal], dtype=dtype)
    assert numerics.ulps(tiny, -tiny) == 2 * numerics.ulps(tiny, zero) > 0
    assert numerics.ulps(one, one * math.nan) > 2**15
    with pytest.raises(ValueError, match="ulps"):
        numerics.ulps(one, torch.ones(2, dtype=dtype))


def gradients(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([value]) for name, value in values.items()}


def test_small_gradients_are_measured_against_the_global_norm() -> None:
    want = gradients(big=1.0, small=1e-7)
    errors = numerics.gradient_errors(gradients(big=1.0, small=2e-7), want)
    assert errors["small"] == pytest.approx(1e-3, rel=1e-3)
    assert numerics.worst(errors) == ("small", errors["small"])


def test_missing_and_extra_gradients_are_infinitely_wrong() -> None:
    want = gradients(a=1.0, b=1.0)
    for got, text in ((gradients(a=1.0), "has no gradient"), ({**want, "c": want["a"]}, "oracle")):
        measured: dict[str, float] = {}
        with pytest.raises(AssertionError, match=text):
            numerics.assert_close_gradients("X/m/-/single", got, want, LOOSE, measured)
        assert measured["gradients"] == math.inf
    with pytest.raises(AssertionError, match="proves nothing"):
        numerics.assert_close_gradients("X/m/-/single", {}, {}, LOOSE, {})


def test_messages_carry_case_parameter_value_and_tolerance() -> None:
    measured: dict[str, float] = {}
    want = gradients(good=1.0, bad=1.0)
    with pytest.raises(AssertionError) as caught:
        numerics.assert_close_gradients(
            "M05/m/lora/single", gradients(good=1.0, bad=1.5), want, LOOSE, measured
        )
    for part in ("M05/m/lora/single", "bad", "0.5", "0.01", "loose", "0.005", "1 of 2"):
        assert part in str(caught.value)
    assert measured == {"gradients": pytest.approx(0.5)}


def test_steps_compare_loss_and_gradients() -> None:
    want = Step(loss=2.0, gradients=gradients(a=1.0))
    measured: dict[str, float] = {}
    numerics.assert_close_step(
        "X/m/-/single", Step(2.01, gradients(a=1.005)), want, LOOSE, measured
    )
    assert measured == {
        "step.loss": pytest.approx(5e-3),
        "step.gradients": pytest.approx(5e-3, rel=1e-3),
    }
    with pytest.raises(AssertionError, match="loss 4 against 2"):
        numerics.assert_close_step("X/m/-/single", Step(4.0, want.gradients), want, LOOSE, measured)


def test_exact_means_bitwise() -> None:
    ref = torch.ones(3)
    numerics.assert_close("X/m/-/single", "y", ref, ref.clone(), EXACT, {})
    for call in (numerics.assert_equal, numerics.assert_differs):
        args = ("X/m/-/single", "y", ref + (1e-7 if call is numerics.assert_equal else 0), ref, {})
        with pytest.raises(AssertionError, match="X/m/-/single: y"):
            call(*args)
    infinite = torch.tensor([math.inf, -math.inf])
    numerics.assert_equal("X/m/-/single", "y", infinite, infinite.clone(), {})
    with pytest.raises(AssertionError):
        numerics.assert_equal("X/m/-/single", "y", infinite, infinite.flip(0), {})


def test_same_dtype_rule_accepts_rounding_and_refuses_twice_its_error() -> None:
    oracle = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).double()
    eager = oracle.bfloat16()
    measured: dict[str, float] = {}
    numerics.assert_same_dtype("K07/m/bf16/single", "out", eager, eager, oracle, measured)
    assert set(measured) == {"out.frobenius", "out.frobenius.eager", "out.max", "out.max.eager"}
    twice = oracle + 3 * (eager.double() - oracle)
    with pytest.raises(AssertionError, match="frobenius error .* of eager torch.bfloat16"):
        numerics.assert_same_dtype("K07/m/bf16/single", "out", twice, eager, oracle, {})
    one_off = eager.clone()
    one_off[0, 0] += 0.25
    with pytest.raises(AssertionError, match="max error|frobenius error"):
        numerics.assert_same_dtype("K07/m/bf16/single", "out", one_off, eager, oracle, {})


def test_every_row_is_two_to_ten_times_its_noise() -> None:
    for name, row in TOLERANCES.items():
        assert row.name == name and row.why
        assert row.limit == 0 or 2 <= row.limit / row.observed <= 10
    for limit, observed in ((1e-3, 9e-4), (1e-3, 1e-5), (0.0, 1e-9), (1e-9, 0.0)):
        with pytest.raises(ValueError, match="2 to 10 times"):
            Tolerance("bad", limit, observed, "")


def test_rows_are_chosen_by_family_class() -> None:
    plain = tolerance("gradients/data-parallel", {"moe"})
    linear = tolerance("gradients/data-parallel", {"moe", "linear_attention"})
    assert linear.limit > plain.limit
    assert tolerance("exact", {"linear_attention"}) is EXACT
    with pytest.raises(KeyError, match="no tolerance 'speed'"):
        tolerance("speed")
