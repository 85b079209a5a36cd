"""Flat benchmark records (`kernels.md` §11): one figure a record, everything about it inside."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy")


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    data = torch.tensor(values, dtype=torch.float64)
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.quantile(data, points).tolist()
    return middle, low, high


def versions() -> dict[str, str]:
    """The versions of the packages that a figure depends on, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def record(
    kernel: str,
    provider: str,
    mode: str,
    metric: str,
    unit: str,
    values: list[float],
    *,
    x_name: str = "tokens",
    x_value: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """One record; ``more`` are further columns such as shape, rank and seed."""
    middle, low, high = quantiles(values)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "kernel": kernel,
        "provider": provider,
        "mode": mode,
        "metric": metric,
        "unit": unit,
        "x_name": x_name,
        "x_value": x_value,
        "median": middle,
        "p20": low,
        "p80": high,
        **more,
        "device": device,
        "clocks": "as found",
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
