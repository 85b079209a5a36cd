"""The workflows' steps: what they name exists, and the steps that judge do what they promise.

There is no runner here, so the `run:` steps are taken out of the files and given to bash as it
would: `bash -e`, with the step's environment, `GITHUB_OUTPUT` and `GITHUB_STEP_SUMMARY`.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from conformance.report import Report, Row, write
from tests.test_ci_matrix import small

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "workflows"
EXPRESSION = re.compile(r"\$\{\{.*?\}\}")


def steps() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(workflow, job, step) of every step."""
    for path in sorted(FOLDER.glob("*.yml")):
        for job, data in yaml.safe_load(path.read_text())["jobs"].items():
            for step in data["steps"]:
                yield path.stem, job, step


RUN = [(f"{w}-{j}-{i}", s) for i, (w, j, s) in enumerate(steps()) if "run" in s]


@cache
def help_of(*command: str) -> str:
    """What a command's help says."""
    return subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    ).stdout  # fmt: skip


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a step, as words; continuation lines joined."""
    text = EXPRESSION.sub("X", text).replace("\\\n", " ")
    text = re.sub(r"(?m)^\s*#.*$|\s#\s.*$", "", text)
    for part in re.split(r"\n|&&|\|\||;|\||\$\(|\bif\b|\bthen\b|\belse\b|\bdo\b", text):
        words = [word.strip("\"')") for word in part.split()]
        if words:
            yield words


def options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]


@pytest.mark.parametrize(("name", "step"), RUN, ids=[name for name, _ in RUN])
def test_a_step_is_bash_and_what_it_names_exists(name: str, step: Mapping[str, Any]) -> None:
    text = EXPRESSION.sub("X", step["run"])
    subprocess.run(["bash", "-n", "-c", text], check=True)
    for path in re.findall(r"(?<![\w./])(?:\.?ci|conformance)/[\w/.]+", text):
        assert (ROOT / path).exists(), f"{name}: {path}"
    for words in commands(step["run"]):
        for module in [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]:
            if module.startswith("conformance."):
                known = help_of("-m", module)
                assert all(option in known for option in options(words)), words
        if "conformance" in words[:1]:
            known = help_of("-m", "conformance", words[1])
            assert all(option in known for option in options(words)), words
        if words[0].endswith("ci/run") or "pytest" in words[:3]:
            known = help_of("-m", "pytest")
            assert all(option in known for option in options(words)), words
        if words[0] in ("python", ".venv/bin/python") and words[1:2] and words[1].endswith(".py"):
            known = help_of(words[1])
            assert all(option in known for option in options(words)), words


def test_tox_environments_of_a_workflow_exist() -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    known = {section.removeprefix("testenv:") for section in tox}
    data = yaml.safe_load((FOLDER / "ci.yml").read_text())
    assert set(data["jobs"]["versions"]["strategy"]["matrix"]["environment"]) <= known


def test_every_artefact_that_is_asked_for_is_made() -> None:
    for workflow, job, step in steps():
        if "upload-artifact" not in step.get("uses", ""):
            continue
        made = "\n".join(
            s["run"] for w, j, s in steps() if (w, j) == (workflow, job) and "run" in s
        )
        made += (ROOT / "ci" / "run").read_text() if workflow == "ci" else ""
        for name in step["with"]["path"].split():
            stem = EXPRESSION.sub("", name).partition("*")[0] or name.replace("*", "")
            loops = any(kind in stem for kind in ("cpu", "gpu", "bench")) and "$kind" in made
            assert stem in made or loops, f"{workflow}: {job}: {name}"


def step_of(workflow: str, name: str) -> str:
    found = [s["run"] for w, _, s in steps() if w == workflow and s.get("name") == name]
    assert len(found) == 1
    return str(found[0])


PYTHON = """#!/bin/sh
case "$*" in
*"-m pytest"*) cp "$FAKE_REPORT" report.json 2>/dev/null; exit "$FAKE_STATUS" ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def runner(tmp_path: Path) -> Any:
    """Runs a step in a folder of its own; pytest is a stand-in that brings a prepared report."""
    tools, work = tmp_path / "tools", tmp_path / "work"
    tools.mkdir()
    work.mkdir()
    for name, text in (
        ("python", PYTHON.format(python=sys.executable)),
        ("conformance", f'#!/bin/sh\nexec {sys.executable} -m conformance "$@"\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    shutil.copytree(ROOT / "ci", work / "ci", ignore=shutil.ignore_patterns("__pycache__"))

    def run(step: str, report: Report | None = None, status: int = 0) -> tuple[int, str, str]:
        if report is not None:
            write(report, tmp_path / "fake.json")
        else:
            (tmp_path / "fake.json").unlink(missing_ok=True)
        for name in ("output", "summary"):
            (tmp_path / name).write_text("")
        done = subprocess.run(
            ["bash", "-e", "-c", step], cwd=work, capture_output=True, text=True, check=False,
            env={
                **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                "IMPL": "a:b", "MATRIX": "default", "DEVICE": "cpu", "MARKERS": "",
                "FAKE_REPORT": str(tmp_path / "fake.json"), "FAKE_STATUS": str(status),
                "GITHUB_OUTPUT": str(tmp_path / "output"),
                "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
            },
        )  # fmt: skip
        said = (tmp_path / "summary").read_text() + done.stdout + done.stderr
        return done.returncode, said, (tmp_path / "output").read_text()

    run.work = work  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("job", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("status", "writes", "verdict"), [(0, 1, 0), (1, 1, 0), (5, 0, 0), (3, 0, 1)]
)
def test_a_shard_fails_only_without_a_report(
    job: str, status: int, writes: int, verdict: int, tmp_path: Path
) -> None:
    step = next(
        s["run"]
        for w, j, s in steps()
        if (w, j) == ("nightly", job) and "set -f" in s.get("run", "")
    )
    (tmp_path / "ci").mkdir()
    stand_in = tmp_path / "ci" / "run"
    stand_in.write_text(
        "#!/bin/sh\nfor word; do last=${word#--report=}; done\n"
        f'[ {writes} = 1 ] && touch "$last"\nprintf "%s\\n" "$@" > words\nexit {status}\n'
    )
    stand_in.chmod(0o755)
    variables = {"IMPL": "reference", "NAME": "x", "OPTIONS": "--case=*/a/*/ddp --case=*/b/*/ddp"}
    environment = {**os.environ, **variables}
    done = subprocess.run(["bash", "-e", "-c", step], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == verdict
    words = (tmp_path / "words").read_text().splitlines()
    assert "--case=*/a/*/ddp" in words and f"--report={job}-x.json" in words


def test_the_reusable_workflow_judges_against_the_last_run(runner: Any) -> None:
    step = step_of("conformance", "run, show, compare")
    good, bad = small({"M01": "passed", "M02": "failed"}), small({"M01": "failed", "M02": "failed"})
    status, said, output = runner(step, None, 3)
    assert status == 3 and output == "", "a run without a report is that run's failure"
    status, said, output = runner(step, good, 1)
    assert (status, output) == (1, "broken=true\n"), "the first run fails on any failure"
    status, said, output = runner(step, good, 1)
    assert (status, output) == (0, "broken=false\n") and "nothing broke" in said
    status, said, output = runner(step, bad, 1)
    assert (status, output) == (1, "broken=true\n") and "BROKEN" in said
    status, said, output = runner(step, bad, 1)
    assert (status, output) == (0, "broken=false\n"), "what broke is reported once"
    assert all((runner.work / name).exists() for name in ("report.html", "compare.html"))
    other = replace(good, selection="-m 'gemma4'", rows=good.rows[:1])
    status, said, output = runner(step, other, 0)
    assert (status, output) == (0, "broken=false\n") and "selection differs" in said
    status, said, output = runner(step, other, 0)
    assert status == 0 and "nothing broke" in said, "after that it compares again"


def shard(work: Path, name: str, verdict: str) -> None:
    (work / "shards").mkdir(exist_ok=True)
    rows = (Row(f"M01/{name}/-/single", verdict),)
    write(replace(small({}), rows=rows, matrix="full"), work / "shards" / f"{name}.json")


def test_the_nightly_verdict_joins_compares_and_fails_on_broken_only(runner: Any) -> None:
    step, work = step_of("nightly", "join the shards, show them, compare"), runner.work
    for name, verdict in (("cpu-a", "passed"), ("cpu-b", "failed"), ("gpu-a", "passed")):
        shard(work, name, verdict)
    status, said, _ = runner(step)
    assert status == 0, said
    assert {p.name for p in (work / "last").iterdir()} == {"cpu.json", "gpu.json"}
    assert (work / "index.html").read_text().startswith("<!doctype html>")
    status, said, _ = runner(step)
    assert status == 0 and said.count("nothing broke") == 2
    shard(work, "gpu-a", "failed")
    status, said, _ = runner(step)
    assert status == 1 and said.count("BROKEN") == 1
    assert (work / "gpu-compare.html").exists() and (work / "cpu-compare.md").exists()
    for path in (work / "shards").glob("gpu-*"):
        path.unlink()
    status, said, _ = runner(step)
    assert status == 0, "without GPU hosts the processors' verdict stands alone"


def test_the_shards_of_a_night_are_what_the_matrix_says(tmp_path: Path) -> None:
    """`shards` writes two matrices that the jobs read by `fromJSON`."""
    step = next(
        s["run"] for w, j, s in steps() if (w, j, s.get("id")) == ("nightly", "shards", "matrix")
    )
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / "ci").symlink_to(ROOT / "ci")
    (tmp_path / "conformance").symlink_to(ROOT / "conformance")
    output = tmp_path / "output"
    environment = {**os.environ, "GITHUB_OUTPUT": str(output)}
    subprocess.run(["bash", "-e", "-c", step], cwd=tmp_path, env=environment, check=True)
    values = dict(line.partition("=")[::2] for line in output.read_text().splitlines())
    assert set(values) == {"cpu", "gpu"}
    for kind, text in values.items():
        entries = yaml.safe_load(text)["include"]
        assert all({"name", "options", "runner"} <= entry.keys() for entry in entries)
        assert {entry["runner"] for entry in entries} == (
            {"cpu"} if kind == "cpu" else {"gpu-1", "gpu-2", "gpu-4"}
        )
