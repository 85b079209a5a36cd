"""Where the reference implementation is imported from: in a wheel it lies inside this package."""

from __future__ import annotations

from importlib.util import find_spec


def reference_package() -> str:
    """`conformance.impl` where the suite is installed, `impl` in a checkout."""
    return "conformance.impl" if find_spec("conformance.impl") else "impl"
