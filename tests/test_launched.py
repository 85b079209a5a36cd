"""The suite itself under a launcher: two `torchrun` agents side by side stand for two hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.launched import LAUNCHER, command, free_port

ROOT = Path(__file__).resolve().parent.parent
CASES = ("F01/mixtral/-/ddp", "F02/mixtral/-/fsdp2", "F10/mixtral/-/hsdp", "F17/-/-/-")


def agent(node: int, port: int, report: Path) -> subprocess.Popen[str]:
    """One agent of two with one rank, running the suite's cases in place."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "suite"]
    here = ["--local-addr", "127.0.0.1", "--node-rank", str(node)]
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    wanted = [part for case in CASES for part in ("--case", case)]
    suite = ["-m", "pytest", "conformance/checks", "-p", "no:cacheprovider", *wanted]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    return subprocess.Popen(
        [sys.executable, *launch, *meet, *here, *suite, "--report", str(report)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.launch
def test_the_suite_runs_in_place_on_two_hosts(tmp_path: Path) -> None:
    """All ranks collect the same cases, cases of another world are unavailable, rank 0 reports."""
    port = free_port()
    reports = [tmp_path / f"report.{node}.json" for node in range(2)]
    agents = [agent(node, port, report) for node, report in enumerate(reports)]
    try:
        said = [process.communicate(timeout=120)[0] for process in agents]
    finally:
        for process in agents:
            process.kill()
    assert [process.returncode for process in agents] == [0, 0], said[0][-2000:]
    written = [report for report in reports if report.exists()]
    assert len(written) == 1, "rank 0 reports, and no other"
    rows = {row["case_id"]: row for row in json.loads(written[0].read_text())["results"]}
    assert rows["F01/mixtral/-/ddp"]["verdict"] == "passed"
    assert rows["F02/mixtral/-/fsdp2"]["measured"]["gradients"] < 1e-5
    for case in ("F10/mixtral/-/hsdp", "F17/-/-/-"):
        assert rows[case]["verdict"] == "unavailable", rows[case]
    assert "needs 4 ranks, the launcher started 2" in rows["F10/mixtral/-/hsdp"]["reason"]


def test_launchers_are_called_as_documented() -> None:
    """The command lines name the module, the ranks, and for accelerate its several-device form."""
    torchrun = command("torchrun", ["spec"], 2)
    accelerate = command("accelerate", ["spec"], 2)
    assert torchrun[-3:] == accelerate[-3:] == ["-m", "conformance.launched", "spec"]
    assert "--nproc-per-node" in torchrun and "localhost:0" in torchrun
    assert "--multi_gpu" in accelerate, "without it accelerate starts one process on a CPU"
