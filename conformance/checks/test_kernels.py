"""The experts kernel and the linear cross-entropy, against float64 oracles and eager code.

The same cases judge the torch path on a CPU, the Triton path under its interpreter
(`TRITON_INTERPRET=1`) and the real kernel on a GPU (`--device cuda`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Case
from conformance.check import check
from conformance.kernel_problems import (
    ROUTINGS,
    ExpertsProblem,
    HeadProblem,
    experts_problem,
    head_problem,
)
from conformance.numerics import (
    assert_equal,
    assert_same_dtype,
    relative_error,
    signed_mean,
)
from conformance.subject import Subject
from conformance.tolerances import FROBENIUS_RATIO, tolerance

Measured = dict[str, float]
DTYPES = ("-", "bf16", "fp64")
# Triton's interpreter needs a second or two for a problem.
EXAMPLES = 5 if os.environ.get("TRITON_INTERPRET") == "1" else 25
KERNEL: dict[str, Any] = {"per_model": False, "marks": ("kernels",)}
EXPERTS: dict[str, Any] = {"needs": ("experts",), **KERNEL}
HEAD: dict[str, Any] = {"needs": ("linear_cross_entropy",), **KERNEL}


def judge(
    case: Case,
    what: str,
    got: Tensor,
    eager: Tensor,
    oracle: Tensor,
    measured: Measured,
    floor: str = "",
) -> None:
    """Against eager code in the same dtype; in float32 and float64 the noise of summation, which
    an ill-conditioned gradient magnifies for both, is the floor of that yardstick."""
    if case.setting.dtype == "bfloat16":
        assert_same_dtype(case.id, what, got, eager, oracle, measured, torch.bfloat16)
        return
    row = tolerance(floor or f"kernels/{case.setting.dtype}")
    error = relative_error(got, oracle).frobenius
    limit = max(row.limit, FROBENIUS_RATIO * relative_error(eager, oracle).frobenius)
    measured["worst"] = max(measured.get("worst", 0.0), error)
    assert error <= limit, f"{case.id}: {what} is off by {error:.3g}, tolerance {limit:.3g}"


def experts_of(subject: Subject, problem: ExpertsProblem) -> dict[str, Tensor]:
    """The implementation's output and gradients for a problem."""
    return problem.run(subject.impl.experts)


@check("K07", settings=DTYPES, **EXPERTS)
def test_experts_are_as_exact_as_eager(case: Case, subject: Subject, measured: Measured) -> None:
    """Output and every gradient are no further from float64 than eager code in the same dtype.

    Every routing by itself: an empty expert, one token, all on one, duplicates, sentinels
    """
    for routing in ROUTINGS:
        problem = experts_problem(routing, case.setting.dtype, subject.device)
        oracle, eager, got = problem.oracle(), problem.eager(), experts_of(subject, problem)
        assert any(t.any() for t in oracle.values()) or routing == "nothing here", case.id
        for name, value in got.items():
            label = f"{routing} {name}"
            judge(case, label, value, eager[name], oracle[name], measured)
            bias = abs(signed_mean(value, oracle[name]))
            floor = abs(signed_mean(eager[name], oracle[name]))
            measured["bias"] = max(measured.get("bias", 0.0), bias)
            # the oracle rounds too: a mean of n entries with the noise of float64 moves this much
            noise = 4 * tolerance("kernels/float64").observed / value.numel() ** 0.5
            limit = 4 * floor + max(float(torch.finfo(value.dtype).eps), noise)
            assert bias <= limit, f"{case.id}: {label} is biased by {bias:.3g}, tolerance {limit:g}"


@check("K09", settings=DTYPES, **EXPERTS)
def test_experts_repeat_bit_for_bit(case: Case, subject: Subject, measured: Measured) -> None:
    """Two runs, and a second backward over the same graph, give the same bits.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3800
    """
    problem = experts_problem("duplicates", case.setting.dtype, subject.device)
    first, second = experts_of(subject, problem), experts_of(subject, problem)
    twice = problem.run(subject.impl.experts, backwards=2)
    assert first["output"].any(), f"{case.id}: the output is zero"
    for name, value in first.items():
        assert_equal(case.id, f"{name} again", second[name], value, measured)
        assert_equal(case.id, f"{name} of a second backward", twice[name], value, measured)


@check("K10", settings=DTYPES, **EXPERTS)
def test_zero_scaling_is_the_base(case: Case, subject: Subject, measured: Measured) -> None:
    """With scaling 0 the output equals that without an adapter, bit for bit.

    An invariant kept without a thread: the adapter's columns add nothing else
    """
    problem = experts_problem("even", case.setting.dtype, subject.device)
    adapted = experts_of(subject, problem)["output"]
    base = experts_of(subject, problem.without_lora())["output"]
    nothing = experts_of(subject, problem.scaled(0.0))["output"]
    assert not torch.equal(adapted, base), f"{case.id}: the adapter changes nothing"
    assert_equal(case.id, "output", nothing, base, measured)


@check("K11", **EXPERTS)
def test_experts_of_any_shape(case: Case, subject: Subject, measured: Measured) -> None:
    """Any number of tokens, experts, choices and ranks gives the oracle's output and gradients.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3865
    """

    @settings(
        derandomize=True,
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        tokens=st.integers(1, 17),
        experts=st.integers(1, 9),
        top_k=st.integers(1, 3),
        rank=st.integers(1, 6),
        seed=st.integers(0, 99),
    )
    def compare(tokens: int, experts: int, top_k: int, rank: int, seed: int) -> None:
        problem = experts_problem(
            "random", "float32", subject.device, tokens, experts, top_k, rank, seed
        )
        oracle, eager = problem.oracle(), problem.eager()
        for name, value in experts_of(subject, problem).items():
            judge(case, name, value, eager[name], oracle[name], measured, "experts/any shape")

    compare()


@check("K17", settings=("-", "bf16"), **EXPERTS)
def test_experts_of_several_tiles(case: Case, subject: Subject, measured: Measured) -> None:
    """Widths and experts of several tiles, the last of each ragged, are as exact as eager code.

    kernels.md §7.3: the kernels of published widths are others than those of tiny ones
    """
    # An expert has more rows than a tile, of which Triton's interpreter needs seconds for each.
    tokens, routings = (403, ROUTINGS) if subject.device == "cuda" else (35, ("all on one",))
    for routing in routings:
        problem = experts_problem(
            routing, case.setting.dtype, subject.device, tokens, widths=(320, 448)
        )
        oracle, eager, got = problem.oracle(), problem.eager(), experts_of(subject, problem)
        assert oracle["output"].any(), f"{case.id}: {routing}: the oracle's output is zero"
        for name, value in got.items():
            judge(case, f"{routing} {name}", value, eager[name], oracle[name], measured)


@check("K12", settings=DTYPES, **EXPERTS)
def test_trained_expert_weights_get_their_gradient(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """Expert weights that train get their gradient, never zeros, or the request is refused.

    live-defects.md L23: a frozen-weight assumption that returns zeros
    """
    problem = experts_problem("even", case.setting.dtype, subject.device, trained=True)
    try:
        got = experts_of(subject, problem)
    except subject.declines(NotImplementedError):
        return
    oracle, eager = problem.oracle(), problem.eager()
    for name in ("gate_up", "down"):
        assert oracle[name].any(), f"{case.id}: the oracle's gradient of {name} is zero"
        judge(case, name, got[name], eager[name], oracle[name], measured)


@check("K01", settings=DTYPES, **HEAD)
def test_linear_cross_entropy(case: Case, subject: Subject, measured: Measured) -> None:
    """Loss and gradients are no further from float64 than full logits in the same dtype.

    https://github.com/apple/ml-cross-entropy/pull/53
    """
    for kind in ("flat", "peaked", "saturated", "extreme", "one token", "last label", "bias"):
        problem = head_problem(kind, case.setting.dtype, subject.device)
        compare_head(case, subject, problem, measured, kind)


def compare_head(
    case: Case, subject: Subject, problem: HeadProblem, measured: Measured, kind: str
) -> None:
    """Judge one problem of the head by the same-dtype rule."""
    oracle, eager = problem.oracle(), problem.eager()
    got = problem.run(subject.impl.linear_cross_entropy)
    assert float(oracle["loss"].sum()) > 0, f"{case.id}: {kind}: the oracle's loss is zero"
    for name, value in got.items():
        judge(case, f"{kind} {name}", value, eager[name], oracle[name], measured)


@check("K08", settings=DTYPES, **HEAD)
def test_no_gradient_is_filtered(case: Case, subject: Subject, measured: Measured) -> None:
    """On a flat softmax with a common direction no gradient is dropped.

    https://github.com/apple/ml-cross-entropy/issues/14
    """
    problem = head_problem("common direction", case.setting.dtype, subject.device)
    compare_head(case, subject, problem, measured, "common direction")


@check("K13", settings=DTYPES, **HEAD)
def test_unreduced_losses(case: Case, subject: Subject, measured: Measured) -> None:
    """With reduction "none" and unequal upstream gradients, every token has its own share.

    kernels.md §4: an unknown upstream gradient is folded in at the backward
    """
    problem = head_problem("unreduced", case.setting.dtype, subject.device)
    assert len(set(problem.upstream.tolist())) > 2, f"{case.id}: the upstream gradients are equal"
    compare_head(case, subject, problem, measured, "unreduced")


@check("K14", settings=DTYPES, **HEAD)
def test_no_label_gives_zero(case: Case, subject: Subject, measured: Measured) -> None:
    """Without a single label the loss is zero and every gradient is zero, not NaN.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3033
    """
    problem = head_problem("no label", case.setting.dtype, subject.device)
    assert (problem.labels == -100).all(), f"{case.id}: there is a label"
    for name, value in problem.run(subject.impl.linear_cross_entropy).items():
        measured[name] = float(value.abs().max())
        assert measured[name] == 0, f"{case.id}: {name} is {measured[name]:.3g}, not 0"


@check("K15", settings=("-", "fp64"), **HEAD)
def test_logit_gradients_sum_to_zero(case: Case, subject: Subject, measured: Measured) -> None:
    """With a classifier of ones the hidden gradient is zero: each row of dlogits sums to zero.

    kernels.md §4, the row-sum identity
    """
    problem = head_problem("ones", case.setting.dtype, subject.device)
    got = problem.run(subject.impl.linear_cross_entropy)
    assert float(got["loss"]) > 0, f"{case.id}: the loss is zero"
    largest = float(got["hidden"].abs().max())
    measured["hidden"] = largest
    limit = tolerance("head/row sum").limit
    assert largest <= limit, f"{case.id}: the hidden gradient is {largest:.3g}, tolerance {limit:g}"


@check("K16", settings=DTYPES, **HEAD)
def test_head_second_backward(case: Case, subject: Subject, measured: Measured) -> None:
    """A second backward over the same graph gives the same gradients, bit for bit.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3800
    """
    problem = head_problem("peaked", case.setting.dtype, subject.device)

    def halved(*args: Any, **options: Any) -> Tensor:
        # An upstream gradient of 1 would hide that a saved gradient was scaled where it lies.
        loss: Tensor = 0.5 * subject.impl.linear_cross_entropy(*args, **options)
        return loss

    first, twice = problem.run(halved), problem.run(halved, backwards=2)
    assert first["hidden"].any(), f"{case.id}: the gradient is zero"
    for name, value in first.items():
        assert_equal(case.id, name, twice[name], value, measured)
