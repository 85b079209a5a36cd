"""Where the reference implementation and the committed data lie, in a checkout and in a wheel."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def reference_package() -> str:
    """`conformance.impl` where the suite is installed, `impl` in a checkout."""
    return "conformance.impl" if find_spec("conformance.impl") else "impl"


def fixtures() -> Path:
    """The folder of committed data: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).parent
    inside = package / "fixtures"
    return inside if inside.is_dir() else package.parent / "fixtures"
