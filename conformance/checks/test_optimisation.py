"""Optimisation: a known loss curve, one batch learnt by heart, weights back to scale."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from conformance import curves, scale_drift
from conformance.case import Case
from conformance.check import check
from conformance.numerics import relative_error
from conformance.oracles import weight_scales as oracle
from conformance.subject import Subject
from conformance.tolerances import tolerance

Measured = dict[str, float]
CONV = r"linear_attn\.conv1d\.weight"
RARE = 56  # steps between gradients of the layer that a rarely routed expert feeds
BETAS = (0.9, 0.7)  # β1² > β2: a gradient that stays away leaves a step that grows


@check("B03", needs=("prepare", "collate", "loss"), marks=("training",))
def test_loss_curve(case: Case, subject: Subject, measured: Measured) -> None:
    """Twenty AdamW steps give the committed loss curve of the unpatched class in float64.


    https://github.com/axolotl-ai-cloud/axolotl/issues/2224
    """
    golden = curves.read(subject.model_spec)["losses"]
    assert golden[-1] < golden[0] - 0.1, f"{case.id}: the golden curve does not fall: {golden}"
    plan = subject.plan()

    def batch_of(step: int) -> Any:
        samples = curves.samples(subject.model_spec, step)
        return subject.to(subject.collate(samples, plan), case.setting.dtype)

    got = curves.train(subject.model(), subject.loss, batch_of)
    errors = [abs(a - b) for a, b in zip(got, golden, strict=True)]
    measured["max Δ"], measured["mean Δ"] = max(errors), sum(errors) / len(errors)
    for name in ("max Δ", "mean Δ"):
        limit = tolerance(f"curve/{name}", subject.numerics)
        assert measured[name] <= limit.limit, (
            f"{case.id}: {name} {measured[name]:.3g} from the golden curve, tolerance "
            f"{limit.limit:g} ({limit.name}, noise {limit.observed:g}); losses {got}"
        )


@check("B04", needs=("prepare", "loss"), marks=("training",))
def test_one_batch_is_learnt_by_heart(case: Case, subject: Subject, measured: Measured) -> None:
    """Training on one batch drives its loss below 0.1: nothing holds the weights back.

    An invariant kept without a thread: whatever is detached, frozen or masked shows as a floor.
    """
    model, batch = subject.model(), subject.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    loss, steps = math.inf, 0
    while loss >= 0.1 and steps < 80:
        optimizer.zero_grad(set_to_none=True)
        value = subject.loss(model, batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss, steps = float(value.detach()), steps + 1
        measured.setdefault("first loss", loss)
    measured["loss"], measured["steps"] = loss, steps
    assert measured["first loss"] > 1.0, f"{case.id}: starts at {measured['first loss']:.3g}"
    assert loss < 0.1, f"{case.id}: the loss is {loss:.3g} after {steps} steps, limit 0.1"


def group(*stds: float, shape: tuple[int, ...] = (4, 5), mean: float = 0.5) -> nn.ModuleDict:
    """Layers with a `conv` parameter of these deviations about `mean`, in order."""
    layers = nn.ModuleDict()
    for index, std in enumerate(stds):
        rng = torch.Generator().manual_seed(index)
        noise = torch.randn(shape, generator=rng, dtype=torch.float64)
        layer = nn.Module()
        layer.conv = nn.Parameter((noise / max(float(noise.std()), 1e-9) * std + mean).float())
        layers[f"layer{index}"] = layer
    return layers


GROUPS: dict[str, tuple[float, ...]] = {
    "one late outlier": (1.0, 1.1, 0.9, 4.0),
    "upper median of an even number": (1.0, 1.0, 1.6, 1.6),
    "too small and too large": (1.0, 0.2, 1.1, 5.0, 0.9),
    "two are no group": (1.0, 9.0),
    "a constant beside others": (1.0, 0.0, 1.1, 4.0),
    "median near zero": (1e-12, 1e-12, 1.0),
    "all alike": (1.0, 1.1, 1.2),
}


@check("W01", needs=("normalize_weight_scales",), per_model=False, marks=("training",))
def test_weight_scales_follow_the_algorithm(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """Rescaled are the parameters that the specified algorithm names, to the values it gives.

    families.md §1.1, the branch weight-scale-norm of axolotl
    """
    rescaled, worst = 0, 0.0
    for what, stds in GROUPS.items():
        for threshold in (1.3, 1.5):
            model = group(*stds)
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            want = oracle.normalized(before, r"conv$", threshold)
            rule = {"name_pattern": r"conv$", "threshold": threshold}
            count = int(subject.impl.normalize_weight_scales(model, [rule]))
            where = f"{case.id}: {what}, threshold {threshold}"
            assert count == len(want), f"{where}: {count} rescaled, not {sorted(want)}"
            for name, parameter in model.named_parameters():
                error = relative_error(parameter, want.get(name, before[name])).maximum
                worst = max(worst, error)
                limit = tolerance("weights/merged").limit if name in want else 0.0
                assert error <= limit, f"{where}: {name} is off by {error:.3g}, limit {limit:g}"
            rescaled += count
    measured["rescaled"], measured["worst"] = rescaled, worst
    assert rescaled > 4, f"{case.id}: only {rescaled} parameters were out of line"


@check("W02", needs=("normalize_weight_scales",), per_model=False, marks=("training",))
def test_weight_scales_at_the_edges(case: Case, subject: Subject, measured: Measured) -> None:
    """Shapes are not mixed, single elements, NaN and adapters are left alone, twice is once.

    families.md §1.1, what a reference must define
    """
    rule = {"name_pattern": "conv|lora", "threshold": 1.5}
    run = subject.impl.normalize_weight_scales
    model = group(1.0, 1.1, 0.9, 4.0)
    assert int(run(model, [{**rule, "dry_run": True}])) == 0, f"{case.id}: a dry run rescales"
    mixed = nn.ModuleList([group(1.0, 1.1, 0.9), group(9.0, 9.5, 8.8, shape=(3, 2))])
    assert int(run(mixed, [rule])) == 0, f"{case.id}: parameters of two shapes were compared"
    for name, extra in {
        "one element": torch.ones(1),
        "NaN": torch.full((4, 5), math.nan),
        "adapter": torch.randn(4, 5) * 9,
    }.items():
        model = group(1.0, 1.1, 0.9, 4.0)
        setattr(model.layer0, "lora_A" if name == "adapter" else "conv2", nn.Parameter(extra))
        before = extra.clone()
        count = int(run(model, [rule]))
        assert count == 1, f"{case.id}: {name}: {count} rescaled, not 1"
        assert torch.equal(extra.nan_to_num(), before.nan_to_num()), f"{case.id}: {name} changed"
        assert int(run(model, [rule])) == 0, f"{case.id}: {name}: a second time changes again"
    measured["edges"] = 3
    with pytest.raises((ValueError, *subject.refusals)):
        run(model, [{**rule, "threshold": 0.5}])


@check(
    "W03",
    needs=("prepare", "loss", "normalize_weight_scales"),
    models=("qwen3_5_moe-text",),
    marks=("training",),
)
def test_runaway_scale_is_repaired(case: Case, subject: Subject, measured: Measured) -> None:
    """A late recurrent layer whose gradient is rare runs away under AdamW; the rule repairs it.

    Its gradient is dropped on the steps in which the expert that feeds it gets no token.
    https://docs.axolotl.ai/docs/models/qwen3_5.html
    """
    model = subject.model()
    names = [n for n, _ in model.named_parameters() if re.search(CONV, n)]
    further(subject, model, RARE, rate=5e-3, betas=BETAS, starved=names[-1])
    stds = [oracle.deviation(model.get_parameter(n))[1] for n in names]
    measured["ratio"] = stds[-1] / sorted(stds)[len(stds) // 2]
    assert measured["ratio"] > 1.3, f"{case.id}: no drift: ratio {measured['ratio']:.3g}"
    left = copy.deepcopy(model)
    rule = {"name_pattern": CONV, "threshold": 1.3}
    count = int(subject.impl.normalize_weight_scales(model, [rule]))
    assert count == 1, f"{case.id}: {count} parameters rescaled, not the one that ran away"
    got, want = (further(subject, m, 10, rate=1e-3, betas=(0.9, 0.999)) for m in (model, left))
    measured["loss, repaired"], measured["loss, left"] = got, want
    assert got <= want + 0.02, f"{case.id}: loss {got:.4g} after the repair, {want:.4g} without"


@check(
    "W04",
    needs=("normalize_weight_scales",),
    models=("qwen3_5_moe-text",),
    marks=("training",),
    nightly=True,
    correctness=False,  # it takes a minute; its mutants are those of W03
)
def test_a_rarely_fed_layer_runs_away(
    case: Case, subject: Subject, measured: Measured, curve: Any
) -> None:
    """Under plain AdamW a late recurrent layer that a rare expert feeds runs away by itself; the
    rule finds that layer alone, repairs it, and training goes on no worse.

    https://docs.axolotl.ai/docs/models/qwen3_5.html
    """
    model, ratios = scale_drift.drifted()
    every = 10
    curve("scale of the last conv1d weight", "std over the median", "AdamW", ratios[::every], every)
    measured["ratio"], measured["steps"] = ratios[-1], len(ratios)
    assert ratios[-1] > scale_drift.THRESHOLD, f"{case.id}: no drift: ratio {ratios[-1]:.3g}"
    left = copy.deepcopy(model)
    rule = {"name_pattern": scale_drift.CONV, "threshold": scale_drift.THRESHOLD}
    count = int(subject.impl.normalize_weight_scales(model, [rule]))
    measured["ratio, repaired"] = scale_drift.ratio(model)
    assert count == 1, f"{case.id}: {count} parameters rescaled, not the one that ran away"
    assert abs(measured["ratio, repaired"] - 1) < 1e-3, f"{case.id}: {measured}"
    for what, each in (("repaired", model), ("left", left)):
        measured[f"loss, {what}"] = scale_drift.mean_loss(each, scale_drift.stock_loss)
        scale_drift.train(each, scale_drift.stock_loss, 30, seed=9, rate=1e-3)
        measured[f"loss later, {what}"] = scale_drift.mean_loss(each, scale_drift.stock_loss)
    got, want = measured["loss later, repaired"], measured["loss later, left"]
    assert got <= want + 0.02, f"{case.id}: loss {got:.4g} after the repair, {want:.4g} without"


def further(
    subject: Subject, model: nn.Module, steps: int, rate: float, betas: Any, starved: str = ""
) -> float:
    """The mean loss of two batches after AdamW steps on them in turn; `starved`: the parameter that
    has a gradient at the first step only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.0)
    batches = [subject.batch("text", seed=seed) for seed in range(2)]
    for step in range(steps):
        subject.loss(model, batches[step % 2]).backward()  # type: ignore[no-untyped-call]
        for parameter in [model.get_parameter(starved)] if starved and step else []:
            if parameter.grad is not None:
                parameter.grad.zero_()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(float(subject.loss(model, b).detach()) for b in batches) / 2
