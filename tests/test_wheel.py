"""The built wheel: one top-level name, everything inside it, and it works beside nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
INDEX_ANSWERS_NOT = ("No matching distribution found for hatchling", "Failed to establish")
WANTED = (
    "conformance/impl/plan.py",
    "conformance/impl/kernels/experts.py",
    "conformance/fixtures/published/gemma4-26b-a4b.json",
    "conformance/annotations.toml",
    "conformance/page.css",
    "conformance/page.js",
    "conformance/page.html.j2",
    "conformance/compare.html.j2",
    "conformance/reproduce.py.j2",
    "conformance/report_schema.json",
    "conformance/checks/test_smoke.py",
)
STRANGER = '''"""A stranger's adapter, in a package of its own."""

from conformance.implementation import Capability


class Stranger:
    """Claims a loss, the model's own."""

    name = "stranger"
    capabilities = (Capability("loss"),)

    def loss(self, model, batch, num_items_in_batch=None):
        """As transformers computes it."""
        return model(**batch).loss


ADAPTER = Stranger()
'''


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path | str:
    """The wheel of this checkout, or pip's words where the index cannot be reached."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir"]
    result = subprocess.run(
        [*command, str(out), str(ROOT)], capture_output=True, text=True, check=False
    )
    if any(words in result.stderr for words in INDEX_ANSWERS_NOT):
        return result.stderr.strip().splitlines()[-1]
    assert result.returncode == 0, result.stderr[-2000:]
    (found,) = out.glob("finetune_conformance-*.whl")
    return found


@pytest.fixture
def built(wheel: Path | str, unavailable: Callable[[str], None]) -> Path:
    """The wheel; `unavailable` where nothing can be built here."""
    if isinstance(wheel, str):
        unavailable(f"the build backend cannot be had here: {wheel}")
    assert isinstance(wheel, Path)
    return wheel


@pytest.fixture
def installed(built: Path, tmp_path: Path) -> dict[str, str]:
    """Process environment in which the wheel, in a folder of its own, is all there is of us."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(site), str(built)], check=True, capture_output=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    return inherited | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(words: list[str], environment: dict[str, str], cwd: Path) -> str:
    """The output of a command that must succeed."""
    result = subprocess.run(
        [sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_one_name_at_top_level(built: Path) -> None:
    names = [PurePosixPath(name) for name in zipfile.ZipFile(built).namelist()]
    top = {name.parts[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"conformance"}
    assert built.stat().st_size < 10 << 20, f"{built.stat().st_size} bytes"


def test_everything_is_inside(built: Path) -> None:
    names = set(zipfile.ZipFile(built).namelist())
    assert not [name for name in WANTED if name not in names]
    sources = [*(ROOT / "conformance").rglob("*"), *(ROOT / "impl").rglob("*")]
    for path in sources:
        if path.is_file() and path.suffix in (".py", ".json", ".toml", ".j2", ".css", ".js"):
            relative = path.relative_to(ROOT).as_posix()
            inside = relative if relative.startswith("conformance/") else f"conformance/{relative}"
            assert inside in names, f"{relative} is not in the wheel"
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_reference_passes_where_it_is_installed(installed: dict[str, str], tmp_path: Path) -> None:
    cases = ["--case", "H0[125]/*", "--case", "C04/*"]
    impl = ["--impl", "conformance.implementations.reference:IMPLEMENTATION"]
    words = ["-m", "pytest", "-q", "--pyargs", "conformance", *impl, *cases]
    said = run([*words, "--report=report.json"], installed, tmp_path)
    assert "passed" in said and "failed" not in said, said[-2000:]
    where = "import conformance.paths as p; print(p.__file__, p.reference_package())"
    place, _, package = run(["-c", where], installed, tmp_path).strip().partition(" ")
    assert place.startswith(str(tmp_path)) and package == "conformance.impl"


def test_console_works_where_it_is_installed(installed: dict[str, str], tmp_path: Path) -> None:
    config = ROOT / "fixtures" / "published" / "gemma4-26b-a4b.json"
    words = ["-m", "conformance", "plan", str(config), "--strategy", "fsdp2"]
    assert "fsdp" in run(words, installed, tmp_path)


def test_strangers_adapter_is_judged(installed: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "their_stack.py").write_text(STRANGER)
    environment = installed | {"PYTHONPATH": f"{installed['PYTHONPATH']}{os.pathsep}{tmp_path}"}
    words = ["-m", "pytest", "-q", "--pyargs", "conformance", "--impl", "their_stack:ADAPTER"]
    said = run([*words, "--case", "H05/*"], environment, tmp_path)
    assert " passed" in said, said[-2000:]
