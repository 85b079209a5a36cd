"""Find and repair weights whose spread has drifted from that of their like in other layers.

The algorithm is that of axolotl's unmerged branch `weight-scale-norm` (f608d263a): a group of
parameters, the upper median of their standard deviations, and a factor beyond which one is rescaled
to the median. Its holes are closed here; each is named where it is.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Refused

THRESHOLD = 1.5
FEWEST = 3  # a median of two says nothing
SMALLEST_MEDIAN = 1e-10
_KEYS = {"name_pattern", "threshold", "dry_run"}


@dataclass(frozen=True)
class Finding:
    """One parameter that a rule looked at.

    std, median: unbiased standard deviations, of it and of its group. action: "kept", "rescaled",
    "would rescale" (dry run), or "skipped", with the reason.
    """

    name: str
    pattern: str
    std: float
    median: float
    action: str
    reason: str = ""

    @property
    def ratio(self) -> float:
        """The parameter's spread over its group's."""
        return self.std / self.median if self.median else math.nan


class ScaleReport(int):
    """The number of rescaled parameters, with `findings`: what every rule found."""

    findings: tuple[Finding, ...]

    def __new__(cls, rescaled: int, findings: Iterable[Finding] = ()) -> ScaleReport:
        """The count, with what led to it."""
        report = super().__new__(cls, rescaled)
        report.findings = tuple(findings)
        return report

    def __str__(self) -> str:
        """One line a change."""
        changed = [f for f in self.findings if f.action in ("rescaled", "would rescale")]
        lines = [f"{f.action} {f.name}: std {f.std:.4g}, group {f.median:.4g}" for f in changed]
        return "\n".join([f"{int(self)} of {len(self.findings)} parameters rescaled", *lines])


def normalize_weight_scales(model: nn.Module, rules: Iterable[Mapping[str, Any]]) -> ScaleReport:
    """Rescale, rule by rule, each parameter whose spread is out of line; returns how many (an int).

    rules: mappings of `name_pattern` (a regular expression, searched in the name; without it the
    rule is skipped with a warning), `threshold` (1.5; above 1) and `dry_run` (False).
    A parameter is out of line if std / median > threshold or < 1 / threshold, strictly. It is
    scaled about its mean, which is kept, so that doing it twice changes nothing more. Compared are
    parameters of one shape, at least three of them; skipped, with the reason in the report, are
    adapters, quantised weights, single elements, and constant or non-finite ones.
    Sharded parameters are measured whole, so that all ranks decide alike.
    Raises ValueError for a malformed rule, Refused for a parameter without storage (meta device).
    """
    findings: list[Finding] = []
    checked = [_rule(rule) for rule in rules]
    for pattern, threshold, dry_run in checked:
        if pattern is not None:
            findings += _apply(model, pattern, threshold, dry_run)
    return ScaleReport(sum(f.action == "rescaled" for f in findings), findings)


def _rule(rule: Mapping[str, Any]) -> tuple[str | None, float, bool]:
    unknown = set(rule) - _KEYS
    if unknown:
        raise ValueError(f"normalize_weight_scales: unknown key {sorted(unknown)[0]!r} in a rule")
    pattern = rule.get("name_pattern")
    threshold = float(rule.get("threshold", THRESHOLD))
    if not threshold > 1:
        raise ValueError(f"normalize_weight_scales: threshold {threshold} must be above 1")
    if not pattern:
        warnings.warn("normalize_weight_scales: rule without name_pattern skipped", stacklevel=3)
        return None, threshold, False
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"normalize_weight_scales: name_pattern {pattern!r}: {error}") from error
    return str(pattern), threshold, bool(rule.get("dry_run", False))


def _apply(model: nn.Module, pattern: str, threshold: float, dry_run: bool) -> list[Finding]:
    findings: list[Finding] = []
    groups: dict[tuple[int, ...], list[tuple[str, Tensor, float]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not re.search(pattern, name):
            continue
        if parameter.is_meta:
            raise Refused(f"normalize_weight_scales: {name} is on the meta device; load it first")
        reason, std = _measure(name, parameter)
        if reason:
            findings.append(Finding(name, pattern, std, math.nan, "skipped", reason))
        else:
            groups[tuple(parameter.shape)].append((name, parameter, std))
    for members in groups.values():
        findings += _judge(members, pattern, threshold, dry_run)
    return findings


def _measure(name: str, parameter: Tensor) -> tuple[str, float]:
    """Why a parameter is not compared ("" if it is), and its standard deviation."""
    if "lora_" in name or ".modules_to_save." in name:
        return "an adapter", math.nan
    if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
        return "quantised", math.nan
    if parameter.numel() < 2:
        return "a single element has no spread", math.nan
    std = _spread(parameter.detach())[1]
    if not math.isfinite(std):
        return "its values are not finite", std
    # dividing by it would give infinities
    return ("constant", std) if std == 0 else ("", std)


def _spread(tensor: Tensor) -> tuple[Tensor, float]:
    """The mean, as a scalar tensor, and the unbiased standard deviation, in float32 or wider."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    mean = _whole(wide.sum()) / tensor.numel()
    local = wide.to_local() if hasattr(wide, "to_local") else wide
    if local is wide:
        return mean, float((wide - mean).square().sum().div(tensor.numel() - 1).sqrt())
    centred = (wide - _like(wide, mean)).square().sum()
    return mean, float(_whole(centred).div(tensor.numel() - 1).sqrt())


def _whole(scalar: Any) -> Tensor:
    """A scalar over all shards."""
    full = scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar
    assert isinstance(full, Tensor)
    return full


def _like(sharded: Any, scalar: Tensor) -> Any:
    """The scalar, replicated over the mesh of a sharded tensor."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    return DTensor.from_local(scalar, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _judge(
    members: list[tuple[str, Tensor, float]], pattern: str, threshold: float, dry_run: bool
) -> list[Finding]:
    stds = sorted(std for _, _, std in members)
    median = stds[len(stds) // 2]  # the upper one of an even number
    if len(members) < FEWEST or median < SMALLEST_MEDIAN:
        few = f"fewer than {FEWEST} of its shape" if len(members) < FEWEST else "median near zero"
        return [Finding(name, pattern, std, median, "skipped", few) for name, _, std in members]
    findings = []
    for name, parameter, std in members:
        ratio, action = std / median, "kept"
        if ratio > threshold or ratio < 1 / threshold:
            action = "would rescale" if dry_run else "rescaled"
            if not dry_run:
                _rescale(parameter, median / std)
        findings.append(Finding(name, pattern, std, median, action))
    return findings


@torch.no_grad()
def _rescale(parameter: Tensor, factor: float) -> None:
    """Scale about the mean, in float32 or wider; in place."""
    wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    mean = _spread(parameter)[0]
    if hasattr(wide, "device_mesh"):
        mean = _like(wide, mean)
    parameter.copy_((wide - mean) * factor + mean)
