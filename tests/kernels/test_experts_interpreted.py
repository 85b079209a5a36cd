"""The Triton kernels of the experts layer, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="unavailable: Triton has no package for this platform")

ROOT = Path(__file__).resolve().parents[2]


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python at the root with the interpreter on."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "EXPERTS_EXPECT_PATH": "triton",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def test_the_same_tests_pass_under_the_interpreter() -> None:
    done = interpreted(
        "-m", "pytest", "-v", "-x", "tests/kernels/test_experts.py",
        "-k", "not float64",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout


def test_routing_and_descriptor_kernels() -> None:
    done = interpreted("-m", "tests.kernels.experts_interpreted")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "all good" in done.stdout
