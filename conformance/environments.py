"""Environments beside the active one, which is never touched: a layer that holds what differs.

A layer is a directory filled by `pip install --target --no-deps` and put first on PYTHONPATH: a few
seconds where a full environment takes minutes. Everything is resolved and checked before anything
is installed, and a layer appears under its final name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from conformance.errors import InputError
from conformance.report import PACKAGES, one_line, write_atomically

Pins = dict[str, str]  # canonical name -> exact version
CRASHED = "ERROR: Exception:"  # then a traceback of pip's own, whose last line tells
BUILDING = ".building-"  # then the builder's process id
STACK = (*PACKAGES, "finetune-conformance")


@dataclass(frozen=True)
class Environment:
    """A Python to run the suite with. layer: a directory to put first on PYTHONPATH, or None;
    versions: of every distribution that it sees."""

    python: str
    layer: Path | None
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        """A hash of every exact version, and the interpreter's."""
        facts = [
            sys.version,
            sys.platform,
            *(f"{n}=={v}" for n, v in sorted(self.versions.items())),
        ]
        return digest("\n".join(facts))

    def variables(self, threads: int = 1) -> dict[str, str]:
        """The process environment to run it with: the layer first, the hub off."""
        found = dict(os.environ)
        paths = [str(self.layer)] if self.layer else []
        paths += [path for path in (found.get("PYTHONPATH"),) if path]
        if paths:
            found["PYTHONPATH"] = os.pathsep.join(paths)
        found.update(
            OMP_NUM_THREADS=str(threads),
            OPENBLAS_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            PYTHONDONTWRITEBYTECODE="" if self.layer else "1",
            COLUMNS="200",
        )
        return found


def digest(text: str) -> str:
    """A short hash for cache names."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def cache_root() -> Path:
    """Where layers and reports are kept: CONFORMANCE_CACHE, else the user's cache directory."""
    own = os.environ.get("CONFORMANCE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "finetune-conformance"


@contextmanager
def on_disk(what: str) -> Iterator[None]:
    """A place that cannot be written (full, read-only) is one line."""
    try:
        yield
    except OSError as error:
        raise InputError(one_line(f"{what}: {error.strerror or error}")) from error


def parse_pins(texts: Sequence[str], option: str) -> Pins:
    """Exact versions from `"transformers==5.17.0 peft==0.20.0"` or several such texts.

    Raises InputError naming the option and the word that is not `NAME==VERSION`.
    """
    pins: Pins = {}
    for word in " ".join(texts).replace(",", " ").split():
        try:
            requirement = Requirement(word)
        except InvalidRequirement:
            raise InputError(f"{option}: {one_line(word, 80)!r} is not NAME==VERSION") from None
        found = list(requirement.specifier)
        exact = len(found) == 1 and found[0].operator == "==" and not found[0].version.endswith("*")
        if not exact or requirement.extras or requirement.url or requirement.marker:
            raise InputError(
                f"{option}: {one_line(word, 80)!r} needs one exact version: NAME==VERSION"
            )
        name = canonicalize_name(requirement.name)
        if pins.get(name, found[0].version) != found[0].version:
            raise InputError(f"{option}: two versions of {name}")
        pins[name] = found[0].version
    if not pins:
        raise InputError(f"{option}: give at least one NAME==VERSION")
    return pins


def active_versions() -> Pins:
    """Every distribution of the active environment."""
    found: Pins = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def complete(pins: Pins, other: Pins) -> Pins:
    """The pins, and for what only the other side names the active version.

    Raises InputError for a package that is neither pinned nor installed.
    """
    found = dict(pins)
    for name in other.keys() - pins.keys():
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            raise InputError(f"{name} is pinned on one side only and is not installed") from None
    return found


def resolve(pins: Pins, root: Path | None = None) -> Pins:
    """What must differ from the active environment so that the pins hold: the pins themselves and
    the dependencies that the installed versions do not satisfy.

    Asks the package index, installs nothing. What it answered is kept for the active environment as
    it is, so that a judgement repeated is the same one and needs no index. Raises InputError:
    unknown name, no such version, conflict.
    """
    wanted = [f"{name}=={number}" for name, number in sorted(pins.items())]
    active = [f"{name}=={number}" for name, number in sorted(active_versions().items())]
    facts = digest("\n".join([sys.version, *active, "->", *wanted]))
    kept = (root or cache_root()) / "resolutions" / f"{facts}.json"
    layer = _kept(kept)
    if layer is None:
        layer = _ask_index(wanted)
        _refuse_conflicts(layer)
        with on_disk(str(kept.parent)):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(layer, sort_keys=True))
    return layer


def _kept(path: Path) -> Pins | None:
    """An answer of before, if there is one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _ask_index(wanted: Sequence[str]) -> Pins:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "report.json"
        result = _pip("install", "--dry-run", "--report", str(out), *wanted)
        if result.returncode or not out.exists():
            raise InputError(explain_pip(f"{result.stdout}\n{result.stderr}", wanted))
        entries = json.loads(out.read_text(encoding="utf-8"))["install"]
    return {
        str(canonicalize_name(e["metadata"]["name"])): e["metadata"]["version"] for e in entries
    }


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    command[4:4] = ["--disable-pip-version-check", "--no-input"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"pip cannot be started: {error.strerror}") from error
    if "No module named pip" in result.stderr:
        raise InputError("pip is not in this environment; `python -m ensurepip` adds it")
    return result


def explain_pip(said: str, wanted: Sequence[str]) -> str:
    """One line for what pip says in many."""
    names = " ".join(wanted)
    broken = re.search(r"connection broken by '?(\w+)|Could not fetch URL ", said)
    if broken:
        return f"{names}: the package index does not answer ({broken[1] or 'no connection'})"
    missing = re.search(r"No matching distribution found for (\S+)", said)
    if missing:
        text = missing.group(1).rstrip(";")
        listed = re.search(r"from versions: ([^)]*)\)", said)
        known = [] if not listed or listed.group(1) == "none" else listed.group(1).split(", ")
        if not known:
            return (
                f"{one_line(text, 80)}: no such package on the index (or none for this Python, or"
                " the index does not answer)"
            )
        return (
            f"{one_line(text, 80)}: not on the index; the newest there is {one_line(known[-1], 40)}"
        )
    if "conflicting dependencies" in said or "ResolutionImpossible" in said:
        words = (" depends on ", "The user requested ")
        lines = [line.strip() for line in said.splitlines() if any(w in line for w in words)]
        lines = lines or [line for line in said.splitlines() if line.startswith("ERROR")]
        return one_line(f"{names}: conflicting: {'; '.join(lines[:3])}", 400)
    lines = [line for line in said.splitlines() if line.strip()] or ["nothing"]
    errors = [line for line in lines if line.startswith("ERROR") and line != CRASHED] or lines[-1:]
    return one_line(f"{names}: pip says: {errors[-1].removeprefix('ERROR: ')}", 400)


def _refuse_conflicts(layer: Pins) -> None:
    """What stays installed must accept what the layer brings; pip's dry run does not ask."""
    for name in STACK:
        if canonicalize_name(name) in layer:
            continue
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue
        for text in needs:
            need = Requirement(text)
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            brought = layer.get(canonicalize_name(need.name))
            if brought and not need.specifier.contains(brought, prereleases=True):
                raise InputError(
                    f"conflicting: installed {name} {version(name)} needs {need.name}"
                    f"{need.specifier}, not {brought}; pin {name} as well"
                )


def build_layer(pins: Pins, root: Path | None = None) -> Environment:
    """The environment in which the pins hold, over the active one; kept and reused by exact
    versions. pins: as `resolve` returned them.

    Raises InputError when pip fails or the layer does not take effect; nothing half-made stays.
    """
    if not pins:
        return Environment(sys.executable, None, active_versions())
    wanted = [f"{name}=={number}" for name, number in sorted(pins.items())]
    home = (root or cache_root()) / "layers"
    final = home / digest("\n".join([sys.version, *wanted]))
    if not (final / "layer.json").exists():
        with on_disk(str(home)):
            home.mkdir(parents=True, exist_ok=True)
            _sweep(home)
            scratch = Path(tempfile.mkdtemp(dir=home, prefix=f"{BUILDING}{os.getpid()}-"))
        try:
            result = _pip("install", "--quiet", "--no-deps", "--no-compile", "--target",
                          str(scratch), *wanted)  # fmt: skip
            if result.returncode:
                raise InputError(explain_pip(result.stderr, wanted))
            with on_disk(str(home)):
                (scratch / "layer.json").write_text(json.dumps(pins, sort_keys=True))
            _verify(Environment(sys.executable, scratch, {}), pins)
            with on_disk(str(home)):
                shutil.rmtree(final, ignore_errors=True)
                os.replace(scratch, final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Environment(sys.executable, final, {**active_versions(), **pins})


def _sweep(home: Path) -> None:
    """Remove half-made layers of processes that were killed."""
    for path in home.glob(f"{BUILDING}*"):
        owner = path.name.removeprefix(BUILDING).partition("-")[0]
        if not owner.isdigit() or not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


_VERIFY = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def _verify(environment: Environment, pins: Pins) -> None:
    """That a fresh interpreter sees the layer's versions, as the packages themselves will."""
    command = [environment.python, "-c", _VERIFY, *pins]
    result = subprocess.run(
        command, env=environment.variables(), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise InputError(f"the layer does not start: {one_line(result.stderr[-300:])}")
    seen = json.loads(result.stdout)
    for name, number in pins.items():
        if Version(seen[name]) != Version(number):
            raise InputError(f"the layer holds {name} {number}, yet Python sees {seen[name]}")


def build_full(pins: Pins, root: Path | None = None) -> Environment:
    """A full environment of its own (minutes): the active versions of the stack, then the pins.
    Made with uv where it is found, else with venv and pip. Raises InputError."""
    active = active_versions()
    stack = {n: active[n].partition("+")[0] for n in PACKAGES if n in active}
    tools = ["hypothesis", "jinja2", "packaging", "pillow", "rich", "typer"]
    extra = {name: active[name] for name in tools if name in active}
    versions: Pins = {**extra, **stack, **pins}
    wanted = [f"{name}=={number}" for name, number in sorted(versions.items())]
    final = (root or cache_root()) / "environments" / digest("\n".join([sys.version, *wanted]))
    python = final / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (final / "complete").exists():
        shutil.rmtree(final, ignore_errors=True)
        try:
            with on_disk(str(final)):
                _make_full(final, python, wanted)
                (final / "complete").touch()
        except BaseException:
            shutil.rmtree(final, ignore_errors=True)
            raise
    return Environment(str(python), None, versions)


def _make_full(place: Path, python: Path, wanted: Sequence[str]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    uv = shutil.which("uv")
    if uv:
        steps = [
            [uv, "venv", "--quiet", "--python", sys.executable, str(place)],
            [uv, "pip", "install", "--quiet", "--python", str(python), *wanted],
        ]
    else:
        steps = [
            [sys.executable, "-m", "venv", str(place)],
            [str(python), "-m", "pip", "install", "--quiet", *wanted],
        ]
    environment = {**torch_build(active_versions().get("torch", "")), **os.environ}
    for step in steps:
        result = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise InputError(explain_pip(result.stderr, wanted))


def torch_build(active: str) -> dict[str, str]:
    """uv's variable for the build of torch that is active (`2.13.0+cpu`), or that CONFORMANCE_TORCH
    names as for `ci/run`; without it uv takes the index's default, gigabytes on Linux."""
    build = os.environ.get("CONFORMANCE_TORCH") or active.partition("+")[2]
    return {"UV_TORCH_BACKEND": build} if build not in ("", "index") else {}


def releases_between(name: str, low: str, high: str) -> list[str]:
    """Released versions above `low` up to `high`, ascending, pre-releases left out.

    Raises InputError when the index does not answer.
    """
    result = _pip("index", "versions", name)
    listed = re.search(r"Available versions: (.+)", result.stdout)
    if result.returncode or not listed:
        raise InputError(f"{name}: the index lists no versions")
    bottom, top = Version(low), Version(high)
    found = {Version(text) for text in listed.group(1).split(", ")}
    return [str(v) for v in sorted(found) if bottom < v <= top and not v.is_prerelease]
