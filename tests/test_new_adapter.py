"""The skeleton of an adapter: its loop is judged by claiming `fit` alone, and rightly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conformance.new_adapter import write_adapter

ROOT = Path(__file__).parent.parent
CASES = ("L02/gemma4-e2b/*", "L03/mixtral/*", "H06/*")


def judged(folder: Path) -> tuple[int, str]:
    """Status and output of a run that judges `mine.py` in a folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--impl"]
    command += ["mine:IMPLEMENTATION", str(ROOT / "conformance/checks/test_loss.py")]
    command += [str(ROOT / "conformance/checks/test_smoke.py")]
    command += [word for case in CASES for word in ("--case", case)]
    paths = os.pathsep.join((str(ROOT), str(folder)))
    environment = dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stdout + result.stderr


def test_the_skeleton_trains_rightly(tmp_path: Path) -> None:
    write_adapter(tmp_path / "mine.py")
    status, output = judged(tmp_path)
    assert status == 0, output
    assert "4 passed" in output


def test_a_mean_over_micro_batches_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    write_adapter(path)
    right = "model(**batch, num_items_in_batch=tokens).loss.backward()"
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, "(model(**batch).loss / len(window)).backward()"))
    status, output = judged(tmp_path)
    assert status == 1, output
    assert "L02/gemma4-e2b/fp64/single: gradients: worst parameter" in output
