"""The compile check of CI: its verdicts, and that it knows every kernel of the experts layer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="unavailable: Triton has no package for this platform")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """ci/compile_kernels.py as a module."""
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "ci/compile_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["compile_kernels"] = module
    spec.loader.exec_module(module)
    return module


def test_spills_serialized_products_and_errors_fail(script: ModuleType) -> None:
    def result(name: str, spilled: int = 0, serialized: bool = False, error: str = "") -> object:
        return script.Result(name, 1.0, 100, spilled, 0, serialized, error)

    assert not result("a:down_kernel").failed  # type: ignore[attr-defined]
    assert result("a:down_kernel", spilled=8).failed  # type: ignore[attr-defined]
    assert result("a:down_kernel", serialized=True).failed  # type: ignore[attr-defined]
    assert result("a:down_kernel", error="no").failed  # type: ignore[attr-defined]


def test_every_kernel_of_the_experts_layer_takes_part(script: ModuleType) -> None:
    names = {spec[0].split(":")[1] for spec in script.specs()}
    files = (ROOT / "impl/kernels").glob("experts_*_triton.py")
    text = "".join(path.read_text() for path in files)
    kernels = {
        word.split("(")[0].removeprefix("def ")
        for word in text.splitlines()
        if word.startswith("def ") and word.split("(")[0].endswith("_kernel")
    }
    assert len(kernels) > 10
    # weight_gradient_kernel runs only where the expert weights train.
    assert kernels - names <= {"weight_gradient_kernel"}


def test_one_small_kernel_compiles_for_hopper(script: ModuleType) -> None:
    spec = next(spec for spec in script.specs() if spec[0].endswith(":combine_kernel"))
    result = script.compile_one(*spec)
    assert not result.failed, result.line()
    assert result.registers > 0
