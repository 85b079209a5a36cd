"""Numbers that moved between two runs although the verdicts did not.

The thresholds are about the noise between equal runs: errors are the same to the last digit on one
machine and differ by less than a factor of two between machines; fingerprints agree to nine digits
over releases whose arithmetic did not change.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from conformance.report import Bench, Report, Row

if TYPE_CHECKING:
    from conformance.compare import Change

ERROR_GREW = 4.0  # times
ERROR_FLOOR = 1e-9  # below it an error is rounding, whatever its ratio
TOLERANCE_SHARE = 0.1  # with a tolerance: a growth matters from this share of it
FINGERPRINT = 1e-8  # relative
MEMORY_GREW = 1.05
SECONDS_GREW, SECONDS_FLOOR = 1.5, 0.5
BENCH_GREW = 1.10  # of the ratio to a peer of the same run
TIME_SUFFIXES = ("_s",)
MEMORY_UNITS = ("bytes", "MiB", "GiB")
MEMORY_SUFFIXES = ("_bytes", "_mib")


def is_fingerprint(name: str) -> bool:
    """Whether a measured number belongs to the model, not to an error."""
    return name.startswith("fingerprint")


def is_error(name: str) -> bool:
    """Whether a measured number is an error: smaller is better (see `report.py` for the names)."""
    return not name.startswith(("fingerprint", "tolerance")) and not name.endswith(
        TIME_SUFFIXES + MEMORY_SUFFIXES
    )


def drifts(old: Mapping[str, Row], new: Mapping[str, Row]) -> list[Change]:
    """Cases that pass on both sides while an error grew or a fingerprint moved."""
    from conformance.compare import Change

    found = []
    for case_id in sorted(old.keys() & new.keys()):
        before, after = old[case_id], new[case_id]
        if before.verdict != "passed" or after.verdict != "passed":
            continue
        texts = [
            text
            for name in sorted(before.measured.keys() & after.measured.keys())
            if (text := _moved(name, before.measured, after.measured))
        ]
        if texts:
            found.append(Change(case_id, "passed", "passed", "; ".join(texts), repeat=after.repeat))
    return found


def _moved(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    old, new = before[name], after[name]
    if is_fingerprint(name):
        if math.isclose(old, new, rel_tol=FINGERPRINT, abs_tol=1e-12) or _both_nan(old, new):
            return ""
        return f"{name} {old:.10g} → {new:.10g} (relative {_relative(old, new):.1e})"
    if name.startswith("tolerance"):
        return f"{name} {old:.3g} → {new:.3g}" if new > old else ""
    if name.endswith(MEMORY_SUFFIXES):
        return f"{name} {old:.4g} → {new:.4g}" if new > old * MEMORY_GREW else ""
    if name.endswith(TIME_SUFFIXES) or _both_nan(old, new):
        return ""
    if math.isfinite(old) and not math.isfinite(new):
        return f"{name} {old:.3g} → {new}"
    tolerance = after.get("tolerance")
    floor = ERROR_FLOOR if tolerance is None else TOLERANCE_SHARE * tolerance
    if new > floor and new > ERROR_GREW * old:
        held = "" if tolerance is None else f" (tolerance {tolerance:.3g})"
        return f"{name} {old:.3g} → {new:.3g}{held}"
    return ""


def _both_nan(old: float, new: float) -> bool:
    return math.isnan(old) and math.isnan(new)


def _relative(old: float, new: float) -> float:
    return abs(new - old) / max(abs(old), abs(new), 1e-300)


def speed_drifts(before: Report, after: Report) -> list[Change]:
    """Time by strategy over the common passing cases, measured seconds, and benchmark ratios."""
    return [*_durations(before, after), *_seconds(before, after), *bench_drifts(before, after)]


def _durations(before: Report, after: Report) -> list[Change]:
    """Single cases are too short to time: sums by strategy, on one kind of machine."""
    from conformance.compare import Change

    if before.hardware != after.hardware:
        return []
    old, new = before.by_id(), after.by_id()
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for case_id in old.keys() & new.keys():
        if old[case_id].verdict == new[case_id].verdict == "passed":
            total = sums[old[case_id].strategy]
            total[0] += old[case_id].duration
            total[1] += new[case_id].duration
    return [
        Change(f"strategy {name}", text=f"its cases took {was:.1f} s, now {now:.1f} s")
        for name, (was, now) in sorted(sums.items())
        if now > SECONDS_GREW * was and now - was > SECONDS_FLOOR
    ]


def _seconds(before: Report, after: Report) -> list[Change]:
    from conformance.compare import Change

    found = []
    old, new = before.by_id(), after.by_id()
    for case_id in sorted(old.keys() & new.keys()):
        for name in sorted(old[case_id].measured.keys() & new[case_id].measured.keys()):
            was, now = old[case_id].measured[name], new[case_id].measured[name]
            slower = now > SECONDS_GREW * was and now - was > SECONDS_FLOOR
            if slower and name.endswith(TIME_SUFFIXES) and not is_fingerprint(name):
                text = f"{name} {was:.2f} → {now:.2f}"
                found.append(Change(case_id, "passed", new[case_id].verdict, text))
    return found


Key = tuple[str, str, str, str, str, float]


def bench_drifts(before: Report, after: Report) -> list[Change]:
    """Benchmark cells whose ratio to their peer of the same run got worse; without a peer, the
    figure itself where the hardware is the same. Memory needs no peer."""
    from conformance.compare import Change

    old, new = _cells(before.bench), _cells(after.bench)
    same_machine = before.hardware == after.hardware
    found = []
    for key in sorted(old.keys() & new.keys()):
        if new[key].peer == new[key].provider:
            continue  # the ruler itself
        was, how = _figure(old[key], old)
        now, how_now = _figure(new[key], new)
        if how != how_now or (how == "" and not same_machine) or was <= 0 or now <= 0:
            continue
        worse = was / now if key[3].endswith("_per_s") else now / was
        limit = MEMORY_GREW if new[key].unit in MEMORY_UNITS else BENCH_GREW
        if worse > limit and not _overlap(old[key], new[key], how):
            kernel, provider, mode, metric, x_name, x = key
            text = f"{metric} {how or new[key].unit} {was:.3g} → {now:.3g} at {x_name} {x:g}"
            found.append(Change(f"{kernel} · {provider} · {mode}", text=" ".join(text.split())))
    return found


def _cells(records: Iterable[Bench]) -> dict[Key, Bench]:
    return {(r.kernel, r.provider, r.mode, r.metric, r.x_name, r.x_value): r for r in records}


def _figure(record: Bench, cells: Mapping[Key, Bench]) -> tuple[float, str]:
    """The record's median, as a ratio to its peer's where it has one, and how to call that."""
    peer = cells.get(
        (record.kernel, record.peer, record.mode, record.metric, record.x_name, record.x_value)
    )
    if peer is None or peer.median <= 0:
        return record.median, ""
    return record.median / peer.median, f"as a ratio to {record.peer}"


def _overlap(old: Bench, new: Bench, how: str) -> bool:
    """Without a peer: whether the middle ranges meet, so that noise explains the difference."""
    return not how and old.p20 <= new.p80 and new.p20 <= old.p80
