"""report.json: one run of the suite, written atomically and read as untrusted input.

No torch is imported here. Measured numbers are named freely; the name says what they are:

* `fingerprint.*` — a value of the model itself (float64 loss, gradient norm, probed logit), which
  must not move between versions;
* `*_s` seconds, `*_bytes` / `*_mib` memory;
* `tolerance*` — what an error was held against;
* anything else — an error: smaller is better.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from conformance import __version__
from conformance.errors import InputError
from conformance.json_schema import violation

SCHEMA_VERSION = 1
VERDICTS = (
    "passed",
    "failed",
    "error",
    "timeout",
    "xfailed",
    "xpassed",
    "unsupported",
    "unavailable",
)
BAD = frozenset({"failed", "error", "timeout", "xpassed"})  # a run with one of these fails
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "triton",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "numpy",
    "trl",
    "axolotl",
    "pytest",
)
MAX_BYTES = 256 * 2**20
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class ReportError(InputError):
    """A report cannot be read or written; the message is one line: the file, where, what."""


@dataclass(frozen=True)
class Row:
    """What became of one case.

    case_id: `check/model/setting/strategy`. reason: why unsupported, unavailable or expected to
    fail. issue: a link. expected: the pattern of the expectation that covers the case, or empty.
    duration: seconds. message: the failure in one line. where: `file:line`. measured: see the
    module. repeat: the one command that repeats the case.
    """

    case_id: str
    verdict: str
    reason: str = ""
    issue: str = ""
    expected: str = ""
    duration: float = 0.0
    message: str = ""
    where: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    repeat: str = ""

    def __post_init__(self) -> None:
        for name in ("reason", "issue", "expected", "message", "where", "repeat"):
            object.__setattr__(self, name, one_line(str(getattr(self, name) or ""), 4000))
        object.__setattr__(self, "measured", _cleaned(self.measured))

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """check, model, setting, strategy."""
        check, model, setting, strategy = self.case_id.split("/")
        return check, model, setting, strategy

    @property
    def check(self) -> str:
        """The check's id."""
        return self.parts[0]

    @property
    def model(self) -> str:
        """The model's name, or `-`."""
        return self.parts[1]

    @property
    def setting(self) -> str:
        """The setting's id, or `-`."""
        return self.parts[2]

    @property
    def strategy(self) -> str:
        """The strategy's name, or `-`."""
        return self.parts[3]


@dataclass(frozen=True)
class Bench:
    """One flat benchmark record; `median`, `p20` and `p80` are in `unit` (smaller is better unless
    the metric's name ends in `_per_s`). peer: the provider of the same run to take ratios to."""

    kernel: str
    provider: str
    mode: str
    metric: str
    unit: str
    x_name: str
    x_value: float
    median: float
    p20: float
    p80: float
    peer: str = ""
    device: str = ""
    time: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            if isinstance(value, str):
                object.__setattr__(self, name, _cleaned(value))


@dataclass(frozen=True)
class Report:
    """One run: who was judged, where, and every case. `selection` is what narrowed it (`-m`, `-k`,
    `--case`, single modules); `checks` maps a check id to (claim, motivation); `uncollected` says
    which modules of checks could not be imported, and why."""

    implementation: str
    rows: tuple[Row, ...] = ()
    suite_version: str = __version__
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=lambda: hardware())
    matrix: str = "default"
    started: str = ""
    selection: str = ""
    wall_s: float = 0.0
    exit: int = 0
    bench: tuple[Bench, ...] = ()
    checks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    uncollected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("implementation", "suite_version", "versions", "hardware", "matrix", "started",
                     "selection", "checks", "uncollected"):  # fmt: skip
            object.__setattr__(self, name, _cleaned(getattr(self, name)))

    @property
    def counts(self) -> dict[str, int]:
        """Cases by verdict, zero counts left out."""
        found = Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}

    def by_id(self) -> dict[str, Row]:
        """The rows by case id."""
        return {row.case_id: row for row in self.rows}


def versions() -> dict[str, str]:
    """The installed versions that a report names, and Python's; no package is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: str = "cpu", name: str = "") -> dict[str, Any]:
    """The header's hardware. device: `cpu` or `cuda`; name: the accelerator's own name, asked by
    the caller (nothing here may start a device)."""
    return {
        "device": device,
        "name": name or _cpu_name(),
        "cpu_count": os.cpu_count() or 0,
        "platform": f"{sys.platform}-{platform.machine()}",
    }


@cache
def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.machine()


def now() -> str:
    """The current time for `started`: UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def one_line(text: str, limit: int = 500) -> str:
    """The text with every control character and line break made a space, cut to `limit`: safe for
    a terminal (no escape sequences) and for a line-based log."""
    joined = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return joined if len(joined) <= limit else joined[: limit - 1] + "…"


def _cleaned(value: Any) -> Any:
    """A value with every text in it made one line; a name of nothing but blanks becomes `?`."""
    if isinstance(value, str):
        return one_line(value, 4000) or ("?" if value else "")
    if isinstance(value, Mapping):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    return tuple(map(_cleaned, value)) if isinstance(value, (tuple, list)) else value


def write(report: Report, path: Path | str) -> None:
    """Write a report: atomic (a reader never sees half of it), sorted, one row a line.

    Raises ReportError when two rows share a case id, a value breaks the schema, or the place
    cannot be written.
    """
    target = Path(path)
    data = to_json(report)
    _validate(data, str(target))
    head = {name: data[name] for name in ("header", "footer", "checks") if name in data}
    parts = [f'"{name}": {_dump(value)}' for name, value in head.items()]
    for name in ("results", "bench"):
        if name in data:
            lines = ",\n".join(_dump(entry) for entry in data[name])
            parts.append(f'"{name}": [\n{lines}\n]')
    write_atomically(target, "{\n" + ",\n".join(parts) + "\n}\n")


def write_atomically(target: Path, text: str) -> None:
    """Replace a file by new text in one step; ReportError names the place on failure."""
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ReportError(f"{target}: cannot be written: {error.strerror}") from error


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON values, rows sorted by case id."""
    rows = sorted(report.rows, key=lambda row: row.case_id)
    data: dict[str, Any] = {
        "header": {
            "schema": SCHEMA_VERSION,
            "suite_version": report.suite_version,
            "implementation": report.implementation,
            "versions": dict(report.versions),
            "hardware": dict(report.hardware),
            "matrix": report.matrix,
            "started": report.started,
            "selection": report.selection,
        },
        "results": [_row_to_json(row) for row in rows],
        "footer": {"counts": report.counts, "wall_s": report.wall_s, "exit": report.exit},
    }
    if report.uncollected:
        data["footer"]["uncollected"] = list(report.uncollected)
    if report.checks:
        data["checks"] = {
            name: {"claim": claim, "motivation": motivation}
            for name, (claim, motivation) in report.checks.items()
        }
    if report.bench:
        data["bench"] = sorted((_special(asdict(b)) for b in report.bench), key=_dump)
    return data


def _row_to_json(row: Row) -> dict[str, Any]:
    check, model, setting, strategy = row.parts
    parts = {"check": check, "model": model, "setting": setting, "strategy": strategy}
    own = {f.name: getattr(row, f.name) for f in fields(row)}
    return own | parts | {"measured": _special(row.measured)}


def _special(values: Mapping[str, Any]) -> dict[str, Any]:
    """Non-finite floats as the strings that the schema knows."""
    return {
        name: str(float(v)) if isinstance(v, float) and not math.isfinite(v) else v
        for name, v in values.items()
    }


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=True)


def read(path: Path | str) -> Report:
    """Read and validate a report (untrusted input). Raises ReportError, one line."""
    return from_json(load_json(path), str(path))


def load_json(path: Path | str) -> Any:
    """The decoded JSON of a file that nobody vouches for: bounded, no NaN, no duplicate key.

    Raises ReportError.
    """
    source = Path(path)
    shown = one_line(str(path))
    try:
        size = source.stat().st_size
        if size > MAX_BYTES:
            raise ReportError(f"{shown}: {size} bytes; a report has at most {MAX_BYTES}")
        with source.open("rb") as file:  # a pipe or a device tells no size
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ReportError(f"{shown}: longer than {MAX_BYTES} bytes, which no report is")
        text = raw.decode("utf-8")
    except OSError as error:
        raise ReportError(f"{shown}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ReportError(f"{shown}: byte {error.start} is not UTF-8") from error
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ReportError(f"{shown}: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ReportError(f"{shown}:{error.lineno}: not JSON: {one_line(error.msg)}") from error
    except ValueError as error:
        raise ReportError(f"{shown}: {one_line(str(error), 200)}") from error


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f'{text} is no JSON number; a report writes it as a string ("nan")')


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"key {twice!a} twice in one object")
    return found


def from_json(data: Any, source: str = "report") -> Report:
    """A Report from decoded JSON. Raises ReportError naming the source, the place and the fault."""
    _validate(data, source)
    header = {name: value for name, value in data["header"].items() if name != "schema"}
    return Report(
        **header,
        rows=tuple(_row_from_json(row) for row in data["results"]),
        wall_s=float(data["footer"]["wall_s"]),
        exit=int(data["footer"]["exit"]),
        uncollected=tuple(data["footer"].get("uncollected", ())),
        bench=tuple(_bench_from_json(entry) for entry in data.get("bench", ())),
        checks={
            name: (entry["claim"], entry["motivation"])
            for name, entry in data.get("checks", {}).items()
        },
    )


def _row_from_json(data: Mapping[str, Any]) -> Row:
    own = {f.name: data[f.name] for f in fields(Row)}
    return Row(**own | {"measured": {n: _number(v) for n, v in data["measured"].items()}})


def _bench_from_json(data: Mapping[str, Any]) -> Bench:
    numbers = {name: _number(data[name]) for name in ("x_value", "median", "p20", "p80")}
    return Bench(**{**data, **numbers})


def _number(value: Any) -> float:
    return _SPECIAL[value] if isinstance(value, str) else float(value)


@cache
def schema() -> dict[str, Any]:
    """The published JSON Schema of report.json."""
    text = Path(__file__).with_name("report_schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _validate(data: Any, source: str) -> None:
    fault = violation(data, schema()) or _unencodable(data) or _inconsistent(data)
    if fault:
        raise ReportError(one_line(f"{source}: {fault}"))


def _unencodable(data: Any) -> str | None:
    """Lone surrogates decode from JSON but can be written nowhere; integers may exceed a float."""
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
        for row in data["results"]:
            for value in (row["duration"], *row["measured"].values()):
                _number(value)
        for entry in data.get("bench", ()):
            for name in ("x_value", "median", "p20", "p80"):
                _number(entry[name])
        float(data["footer"]["wall_s"])
    except UnicodeEncodeError:
        return "a string with half a surrogate pair"
    except (ValueError, OverflowError):
        return "a number that is no finite float"
    return None


def _inconsistent(data: Mapping[str, Any]) -> str | None:
    """What a schema cannot say: ids agree with their parts, are unique, and are counted rightly."""
    seen: set[str] = set()
    for index, row in enumerate(data["results"]):
        identity = row["case_id"]
        if identity in seen:
            return f"results[{index}]: case {identity} twice"
        seen.add(identity)
        parts = "/".join(row[name] for name in ("check", "model", "setting", "strategy"))
        if parts != identity:
            return f"results[{index}]: case {identity} is inconsistent with its parts {parts}"
    counts = Counter(row["verdict"] for row in data["results"])
    for verdict in {*counts, *data["footer"]["counts"]}:
        said = data["footer"]["counts"].get(verdict, 0)
        if said != counts[verdict]:
            return f"footer.counts: {said} {verdict}, the results have {counts[verdict]}"
    return None


def merge_rows(groups: Iterable[Iterable[Row]]) -> tuple[Row, ...]:
    """The rows of several shards or processes of one run, in case order (a later row wins)."""
    found = {row.case_id: row for group in groups for row in group}
    return tuple(found[name] for name in sorted(found))
