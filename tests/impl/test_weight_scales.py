"""Weight-scale normalisation: the algorithm, and each hole of the original closed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from impl.errors import Refused
from impl.weight_scales import normalize_weight_scales

PATTERN = r"conv\.weight"


class Layer(nn.Module):
    def __init__(self, std: float, mean: float = 0.0, shape: tuple[int, ...] = (4, 5)) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        values = torch.randn(shape, generator=draw)
        if values.numel() > 1:
            values = (values - values.mean()) / values.std()
        self.conv = nn.Module()
        self.conv.weight = nn.Parameter(values * std + mean)


def stack(*stds: float, **options: Any) -> nn.ModuleList:
    return nn.ModuleList(Layer(std, **options) for std in stds)


def spreads(model: nn.Module) -> list[float]:
    return [round(float(p.detach().float().std()), 5) for p in model.parameters()]


def run(model: nn.Module, **rule: Any) -> Any:
    return normalize_weight_scales(model, [{"name_pattern": PATTERN, **rule}])


def test_outliers_get_the_upper_median() -> None:
    model = stack(1.0, 1.1, 3.0, 1.2, 0.2, 1.3)  # upper median of six: 1.2
    assert run(model) == 2
    assert spreads(model) == [1.0, 1.1, 1.2, 1.2, 1.2, 1.3]
    assert run(model) == 0, "not idempotent"


def test_the_threshold_is_strict_and_can_be_given() -> None:
    assert run(stack(1.0, 1.0, 1.5)) == 0
    assert run(stack(1.0, 1.0, 1.4), threshold=1.3) == 1
    for bad in (1.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="above 1"):
            run(stack(1.0, 1.0, 1.0), threshold=bad)


def test_dry_run_changes_nothing_and_counts_nothing() -> None:
    model = stack(1.0, 1.0, 1.0, 4.0)
    report = run(model, dry_run=True)
    assert report == 0 and spreads(model)[-1] == 4.0
    assert [f.action for f in report.findings] == ["kept"] * 3 + ["would rescale"]
    assert report.findings[-1].ratio == pytest.approx(4) and "would rescale 3.conv" in str(report)


def test_the_mean_is_kept() -> None:
    model = stack(1.0, 1.0, 1.0)
    model.append(Layer(4.0, mean=2.0))
    assert run(model) == 1
    assert float(model[3].conv.weight.mean()) == pytest.approx(2.0, rel=1e-5)  # type: ignore[union-attr]


def test_fewer_than_three_are_left_alone() -> None:
    assert run(stack(1.0, 9.0)) == 0
    assert run(stack(1e-12, 1e-12, 1e-11)) == 0, "median near zero"


def test_constant_single_and_broken_tensors_neither_fail_nor_count() -> None:
    model = stack(1.0, 1.0, 1.0, 5.0)
    model.append(Layer(0.0, mean=3.0))
    model.append(Layer(1.0, shape=(1,)))
    broken = Layer(1.0)
    with torch.no_grad():
        broken.conv.weight[0, 0] = float("nan")  # type: ignore[index, operator]
    model.append(broken)
    report = run(model)
    assert report == 1 and spreads(model)[:4] == [1.0, 1.0, 1.0, 1.0]
    assert float(model[4].conv.weight[0, 0]) == 3.0  # type: ignore[union-attr, index]
    skipped = {f.name.split(".")[0]: f.reason for f in report.findings if f.action == "skipped"}
    assert set(skipped) == {"4", "5", "6"} and skipped["4"] == "constant"


def test_adapters_and_quantised_weights_are_skipped() -> None:
    class Odd(nn.Module):
        def __init__(self, name: str, value: nn.Parameter) -> None:
            super().__init__()
            self.register_parameter(name, value)

    model = stack(1.0, 1.0, 1.0)
    quantised = nn.Parameter(torch.zeros(4, 5, dtype=torch.uint8), requires_grad=False)
    model.append(Odd("conv_weight", quantised))
    model.append(Odd("lora_A_conv_weight", nn.Parameter(torch.randn(4, 5) * 9)))
    report = normalize_weight_scales(model, [{"name_pattern": r"conv[._]weight"}])
    assert report == 0
    assert [f.reason for f in report.findings if f.action == "skipped"] == [
        "quantised",
        "an adapter",
    ]


def test_shapes_are_compared_among_themselves() -> None:
    model = stack(1.0, 1.0, 1.0)
    model.extend(stack(0.1, 0.1, 0.1, shape=(8, 8)))
    assert run(model) == 0
    model.append(Layer(0.5, shape=(8, 8)))
    assert run(model) == 1 and spreads(model)[-1] == 0.1


def test_bad_rules_and_meta_tensors_are_named() -> None:
    with pytest.warns(UserWarning, match="without name_pattern"):
        assert normalize_weight_scales(stack(1.0), [{"threshold": 2}]) == 0
    with pytest.raises(ValueError, match="'pattern'"):
        normalize_weight_scales(stack(1.0), [{"pattern": "x"}])
    with pytest.raises(ValueError, match="name_pattern"):
        normalize_weight_scales(stack(1.0), [{"name_pattern": "("}])
    with torch.device("meta"):
        model = stack(1.0, 1.0, 1.0)
    with pytest.raises(Refused, match="meta device"):
        run(model)


def test_half_precision_is_measured_in_single() -> None:
    model = stack(1.0, 1.0, 1.0, 3.0).to(torch.bfloat16)
    assert run(model) == 1
    assert next(reversed(list(model.parameters()))).dtype == torch.bfloat16
    assert spreads(model)[-1] == pytest.approx(1.0, rel=5e-3)


def test_rules_run_in_order_on_a_real_model() -> None:
    from conformance import checkpoint
    from tests.impl.plans import spec

    model = checkpoint.build_stock(spec("qwen3_5_moe-text"))
    rule = {"name_pattern": r"linear_attn\.conv1d\.weight", "threshold": 1.3}
    convs = [p for n, p in model.named_parameters() if "conv1d.weight" in n]
    assert len(convs) >= 3 and normalize_weight_scales(model, [rule]) == 0
    with torch.no_grad():
        convs[-1].mul_(1.4)
    report = normalize_weight_scales(model, [rule, rule])
    assert report == 1 and [f.action for f in report.findings].count("rescaled") == 1
