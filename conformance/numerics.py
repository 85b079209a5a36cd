"""Error measures, and the assertions that record what they measured.

Every assertion writes its value into `measured` before it judges, so that a report shows drift
that still passes, and its message carries the case id, the worst place, the value and the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from conformance.tolerances import EPS_SHARE, FROBENIUS_RATIO, GLOBAL_SHARE, MAX_RATIO, Tolerance

Measured = MutableMapping[str, float]
Gradients = Mapping[str, Tensor]

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


class Error(NamedTuple):
    """Relative errors: by the Frobenius norm, and the largest entry by the largest entry."""

    frobenius: float
    maximum: float


class Evidence(Protocol):
    """What a step leaves behind: its loss and its gradients by parameter name."""

    @property
    def loss(self) -> Any:
        """A number, a scalar tensor, or None where it was not seen."""

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """By canonical parameter name."""


def relative_error(x: Tensor, ref: Tensor, floor: float = 0.0) -> Error:
    """‖x − ref‖ / max(‖ref‖, floor), and max|x − ref| / max(max|ref|, floor), in float64.

    Both are inf where x has a NaN or infinity that ref has not, 0 for two zero or empty tensors.
    Raises ValueError when the shapes differ.
    """
    got, want = _pair(x, ref)
    if got.numel() == 0 or torch.equal(got, want):
        return Error(0.0, 0.0)
    difference = got - want
    if not bool(torch.isfinite(difference).all()):
        return Error(math.inf, math.inf)
    return Error(
        _ratio(float(difference.norm()), max(float(want.norm()), floor)),
        _ratio(float(difference.abs().max()), max(float(want.abs().max()), floor)),
    )


def errors_along(x: Tensor, ref: Tensor, dim: int = 0, floor: float = 0.0) -> list[Error]:
    """`relative_error` of each slice along a dimension: per token row, or per expert."""
    pairs = zip(x.unbind(dim), ref.unbind(dim), strict=True)
    return [relative_error(got, want, floor) for got, want in pairs]


def signed_mean(x: Tensor, ref: Tensor) -> float:
    """mean(x − ref) / rms(ref): near 0 for rounding, one-sided for truncation or lost terms."""
    got, want = _pair(x, ref)
    if got.numel() == 0:
        return 0.0
    return _ratio(float((got - want).mean()), float(want.square().mean().sqrt()))


def ulps(x: Tensor, ref: Tensor) -> int:
    """The largest distance in units in the last place between two tensors of one float dtype.

    −0 and +0 are neighbours at distance 0; a NaN against a number is 2^bits. Raises ValueError for
    other dtypes or different shapes.
    """
    if x.dtype != ref.dtype or x.dtype not in _BITS or x.shape != ref.shape:
        raise ValueError(f"ulps: {x.dtype} {tuple(x.shape)} against {ref.dtype} {tuple(ref.shape)}")
    if bool((x.isnan() != ref.isnan()).any()):
        return int(2 ** torch.iinfo(_BITS[x.dtype]).bits)
    keep = ~x.isnan()
    places = zip(_ordinals(x[keep]), _ordinals(ref[keep]), strict=True)
    return max((abs(a - b) for a, b in places), default=0)


def global_norm(gradients: Gradients) -> float:
    """The Euclidean norm over all gradients together, in float64."""
    return math.sqrt(sum(float(g.detach().double().square().sum()) for g in gradients.values()))


def gradient_errors(got: Gradients, want: Gradients) -> dict[str, float]:
    """‖got − want‖ / max(‖want‖, 1e-4 × global norm of want), per parameter.

    A parameter that only one side has counts as inf. An empty `want` gives no entries.
    """
    floor = GLOBAL_SHARE * global_norm(want)
    errors = dict.fromkeys(got.keys() ^ want.keys(), math.inf)
    for name in got.keys() & want.keys():
        errors[name] = relative_error(got[name], want[name], floor).frobenius
    return errors


def worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """The name and value of the largest error; ("", 0.0) when there is none."""
    return max(errors.items(), key=lambda item: (item[1], item[0]), default=("", 0.0))


def assert_close(
    case_id: str, what: str, got: Tensor, want: Tensor, tolerance: Tolerance, measured: Measured
) -> None:
    """The relative Frobenius error is within tolerance; recorded as `what`. A row of limit 0 asks
    for bitwise equality."""
    error = relative_error(got, want).frobenius
    measured[what] = error
    assert error <= tolerance.limit, (
        f"{case_id}: {what} is off by {error:.3g} (relative), tolerance {tolerance.limit:g} "
        f"({tolerance.name}, noise {tolerance.observed:g})"
    )


def assert_equal(case_id: str, what: str, got: Tensor, want: Tensor, measured: Measured) -> None:
    """Bitwise equality; the largest absolute difference is recorded as `what`."""
    difference = _largest_difference(got, want)
    measured[what] = difference
    assert difference == 0, f"{case_id}: {what} differs by {difference:.3g}, tolerance 0 (exact)"


def assert_differs(case_id: str, what: str, got: Tensor, want: Tensor, measured: Measured) -> None:
    """The sanity assertion of a metamorphic check: the change did change something."""
    difference = _largest_difference(got, want)
    measured[what] = difference
    assert difference > 0, f"{case_id}: {what} changed nothing, so the check proves nothing"


def assert_close_gradients(
    case_id: str,
    got: Gradients,
    want: Gradients,
    tolerance: Tolerance,
    measured: Measured,
    what: str = "gradients",
) -> None:
    """Every gradient is within tolerance (`gradient_errors`); the worst is recorded as `what`."""
    assert want, f"{case_id}: {what}: the oracle has no gradient, so the check proves nothing"
    errors = gradient_errors(got, want)
    name, value = worst(errors)
    measured[what] = value
    over = sum(error > tolerance.limit for error in errors.values())
    reason = _missing(name, got, want)
    assert value <= tolerance.limit, (
        f"{case_id}: {what}: worst parameter {name} is off by {value:.3g}{reason}, tolerance "
        f"{tolerance.limit:g} ({tolerance.name}, noise {tolerance.observed:g}); "
        f"{over} of {len(errors)} parameters are out"
    )


def assert_close_step(
    case_id: str,
    got: Evidence,
    want: Evidence,
    tolerance: Tolerance,
    measured: Measured,
    what: str = "step",
) -> None:
    """Loss and every gradient of two steps agree; recorded as `what`.loss and `what`.gradients."""
    loss, reference = float(got.loss), float(want.loss)
    error = _ratio(abs(loss - reference), abs(reference))
    measured[f"{what}.loss"] = error
    assert_close_gradients(
        case_id, got.gradients, want.gradients, tolerance, measured, f"{what}.gradients"
    )
    assert error <= tolerance.limit, (
        f"{case_id}: {what}: loss {loss:.9g} against {reference:.9g}, off by {error:.3g}, "
        f"tolerance {tolerance.limit:g} ({tolerance.name}, noise {tolerance.observed:g})"
    )


def assert_same_dtype(
    case_id: str,
    what: str,
    got: Tensor,
    eager: Tensor,
    oracle: Tensor,
    measured: Measured,
    working: torch.dtype | None = None,
) -> None:
    """In low precision, no worse than eager code in that dtype, both against a float64 oracle.

    Frobenius ≤ 1.5 × eager's + eps/4, max ≤ 2 × eager's + eps/4, all relative to the oracle; eps of
    `working`, by default eager's dtype (a float32 loss of bfloat16 inputs works in bfloat16).
    Recorded as `what`.frobenius, `what`.max and the eager ones beside them.
    """
    mine, theirs = relative_error(got, oracle), relative_error(eager, oracle)
    floor = EPS_SHARE * torch.finfo(working or eager.dtype).eps
    rules = (
        ("frobenius", mine.frobenius, theirs.frobenius, FROBENIUS_RATIO),
        ("max", mine.maximum, theirs.maximum, MAX_RATIO),
    )
    for measure, value, yardstick, _ in rules:
        measured[f"{what}.{measure}"] = value
        measured[f"{what}.{measure}.eager"] = yardstick
    for measure, value, yardstick, ratio in rules:
        limit = ratio * yardstick + floor
        assert value <= limit, (
            f"{case_id}: {what}: {measure} error {value:.3g}, tolerance {limit:.3g} "
            f"({ratio:g} × {yardstick:.3g} of eager {eager.dtype} + {floor:.3g})"
        )


def _pair(x: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != ref.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} against {tuple(ref.shape)}")
    return x.detach().double(), ref.detach().to(x.device).double()


def _ratio(value: float, denominator: float) -> float:
    if value == 0:
        return 0.0
    return value / denominator if denominator > 0 else math.inf


def _largest_difference(got: Tensor, want: Tensor) -> float:
    x, ref = _pair(got, want)
    if x.numel() == 0:
        return 0.0
    if not torch.equal(x.isnan(), ref.isnan()):
        return math.inf
    difference = torch.where(x == ref, torch.zeros_like(x), (x - ref).abs())
    return float(difference.nan_to_num(0.0, posinf=math.inf).max())


def _ordinals(x: Tensor) -> list[int]:
    bits = x.detach().contiguous().view(_BITS[x.dtype]).flatten().tolist()
    low = torch.iinfo(_BITS[x.dtype]).min
    return [int(b) if b >= 0 else int(low - b) for b in bits]


def _missing(name: str, got: Gradients, want: Gradients) -> str:
    if name in got and name not in want:
        return " (the oracle has no gradient for it)"
    if name in want and name not in got:
        return " (it has no gradient)"
    if name in got and not bool(torch.isfinite(got[name]).all()):
        return " (its gradient is not finite)"
    return ""
