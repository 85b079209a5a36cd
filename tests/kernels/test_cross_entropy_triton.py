"""The Triton rows in the interpreter (on a GPU they are judged by the conformance checks)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.cross_entropy_cases import CASES

pytest.importorskip("triton")

MODES = ("lean", "chunked", "auto")


@pytest.fixture(scope="module")
def errors() -> dict[str, Any]:
    """Every case in every mode, from one process with the interpreter on."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.cross_entropy_cases", *MODES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return table


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_float32(errors: dict[str, Any], name: str, mode: str) -> None:
    """No further from float64 than 1.5 times full logits in float32, second backward bitwise."""
    for key, (ours, eager) in errors[mode][name].items():
        limit = 1.5 * eager + 3e-6
        assert ours <= limit, f"{mode} {name} {key}: {ours:.1e}, eager {eager:.1e}"
