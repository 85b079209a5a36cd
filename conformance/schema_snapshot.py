"""What the installed versions expose of each model, as a snapshot to commit and to compare.

Config fields and defaults, forward signatures, module trees, parameter names and shapes in memory
and on disk, tied keys, parallel plans, what each LoRA spec adapts, default dtype. Layer numbers are
folded (`layers.*`): a snapshot says what a version is, not how large a tiny model is.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.errors import InputError
from conformance.report import Report, load_json, one_line

if TYPE_CHECKING:
    from conformance.case import Model

HERE = Path(__file__).parent
VOLATILE = {"transformers_version", "_name_or_path", "id2label", "label2id", "torch_dtype"}
Snapshot = dict[str, Any]
MANY = 4  # names with one beginning are counted beyond this

# The LoRA specs that users write, by name: arguments of peft.LoraConfig.
LORA_SPECS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "projections": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    },
    "peft's default": {},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}


def schema_folder() -> Path:
    """Where the committed snapshots lie: beside the package in a checkout, inside it in a wheel."""
    inside = HERE / "fixtures" / "schema"
    return inside if inside.exists() else HERE.parent / "fixtures" / "schema"


def snapshot() -> Snapshot:
    """The snapshot of the active environment (imports torch; some ten seconds)."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    from conformance.checkpoint import available
    from conformance.families import MODELS

    models: dict[str, Any] = {}
    for name, model in sorted(MODELS.items()):
        missing = available(model)
        models[name] = {"unavailable": missing} if missing else _of_model(model)
    return {"versions": _versions(), "models": models}


def _versions() -> dict[str, str]:
    found = {}
    for name in ("transformers", "peft", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def part(model: Model, name: str) -> Any:
    """One part of a model's snapshot in the active environment, as its JSON file has it."""
    found: Any = json.loads(json.dumps(PARTS[name](model)))
    return found


def _of_model(model: Model) -> dict[str, Any]:
    return {name: part(model, name) for name in PARTS}


@lru_cache(maxsize=4)
def _built(model: Model) -> Any:
    from conformance.checkpoint import build_stock

    return build_stock(model)


def _kind(model: Model) -> Any:
    import transformers

    return getattr(transformers, model.model_class)


def _config_fields(model: Model) -> dict[str, Any]:
    """Every field of a default instance, nested ones dotted."""
    import transformers

    try:
        data = getattr(transformers, model.config_class)().to_dict()
    except Exception as error:
        return {"(default instance)": f"{type(error).__name__}: {one_line(str(error), 120)}"}
    return dict(sorted(_flat(data, "")))


def _flat(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if name in VOLATILE:
            continue
        if isinstance(value, Mapping) and value and prefix.count(".") < 3:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, default=str, sort_keys=True)
            yield f"{prefix}{name}", value if len(text) < 120 else text[:117] + "..."


def _forward(model: Model) -> list[str]:
    """The forward's parameters with their defaults."""
    parameters = inspect.signature(inspect.unwrap(_kind(model).forward)).parameters.values()
    empty = inspect.Parameter.empty
    return [str(p.replace(annotation=empty)) for p in parameters if p.name != "self"]


def _modules(model: Model) -> dict[str, list[Any]]:
    return _folded((n, type(m).__name__) for n, m in _built(model).named_modules() if n)


def _no_split(model: Model) -> list[str]:
    return sorted(getattr(_built(model), "_no_split_modules", None) or ())


def _in_memory(model: Model) -> dict[str, list[Any]]:
    return _folded((n, list(p.shape)) for n, p in _built(model).named_parameters())


def _folded(pairs: Any) -> dict[str, list[Any]]:
    """Values by name, numbers of layers and experts folded into `*`, distinct values kept."""
    found: dict[str, list[Any]] = {}
    for name, value in pairs:
        values = found.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), [])
        if value not in values:
            values.append(value)
    return {name: sorted(values, key=str) for name, values in sorted(found.items())}


def _tied(model: Model) -> Any:
    keys = getattr(_kind(model), "_tied_weights_keys", None) or {}
    return dict(sorted(keys.items())) if isinstance(keys, Mapping) else sorted(keys)


def _on_disk(model: Model) -> dict[str, list[Any]]:
    """Names, shapes and dtypes of what `save_pretrained` writes, read off the files' headers."""
    pairs: list[tuple[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        _built(model).save_pretrained(folder)
        for path in sorted(Path(folder).glob("*.safetensors")):
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            pairs += [(name, [entry["dtype"], *entry["shape"]]) for name, entry in header.items()]
    return _folded(pairs)


def _plans(model: Model) -> dict[str, Any]:
    """Tensor, expert and pipeline plans of the config, its decoder's, and the class."""
    config = _built(model).config
    found: dict[str, Any] = {}
    for label, owner in (("", config), ("text.", config.get_text_config())):
        for name in ("base_model_tp_plan", "base_model_ep_plan", "base_model_pp_plan"):
            plan = getattr(owner, name, None)
            if plan:
                found[label + name] = {key: str(value) for key, value in sorted(plan.items())}
    for name in ("_tp_plan", "_ep_plan"):
        plan = getattr(_kind(model), name, None)
        if isinstance(plan, Mapping) and plan:
            found[name] = {key: str(value) for key, value in sorted(plan.items())}
    return found


def _lora(model: Model) -> dict[str, Any]:
    return {name: _adapted(model, spec) for name, spec in LORA_SPECS.items()}


def _adapted(model: Model, spec: Mapping[str, Any]) -> Any:
    """Folded paths of the modules that a spec adapts, or how PEFT refuses it."""
    from conformance.checkpoint import build_stock
    from conformance.lora import adapted_modules

    if "target_parameters" in spec and "moe" not in model.traits:
        return None
    try:
        import peft

        adapted = peft.get_peft_model(build_stock(model), peft.LoraConfig(r=2, **spec))
        return sorted(_folded((name, 0) for name in adapted_modules(adapted)))
    except Exception as error:
        return f"{type(error).__name__}: {one_line(str(error).split('.')[0], 160)}"


def _default_dtype(model: Model) -> str:
    """The dtype that `from_pretrained` without a dtype gives a bfloat16 checkpoint."""
    import torch

    from conformance.checkpoint import build_stock

    with tempfile.TemporaryDirectory() as folder:
        built: Any = build_stock(model, torch.bfloat16)
        built.save_pretrained(folder)
        return str(_kind(model).from_pretrained(folder).dtype).removeprefix("torch.")


def _conversation(model: Model) -> Any:
    from conformance.processor_snapshot import conversation

    return conversation(model)


def _processor(model: Model) -> Any:
    from conformance.processor_snapshot import processing

    return processing(model)


PARTS: dict[str, Callable[[Model], Any]] = {
    "config": _config_fields,
    "forward": _forward,
    "modules": _modules,
    "no_split": _no_split,
    "tied": _tied,
    "parameters": _in_memory,
    "disk": _on_disk,
    "plans": _plans,
    "lora": _lora,
    "default_dtype": _default_dtype,
    "conversation": _conversation,
    "processor": _processor,
}


def part_differences(model: Model, names: tuple[str, ...]) -> list[str] | None:
    """How some parts of a model differ from the committed snapshot of the installed transformers;
    None where no snapshot of this version is committed or it lacks the model or a part,
    and where a part cannot be taken here."""
    path = schema_folder() / f"transformers-{_versions().get('transformers')}.json"
    if not path.exists():
        return None
    committed = _committed(path)["models"].get(model.name)
    if committed is None or "unavailable" in committed or not set(names) <= set(committed):
        return None
    found = {name: part(model, name) for name in names}
    if any(found[name] is None is not committed[name] for name in names):
        return None  # what torchvision is needed for, for one
    return [line for name in names for line in _part(name, committed[name], found[name])]


@lru_cache(maxsize=2)
def _committed(path: Path) -> Snapshot:
    return read_snapshot(path)


def differences(old: Snapshot, new: Snapshot) -> list[str]:
    """What changed from one snapshot to the other: one line a change, equal lines of several
    models joined."""
    lines: dict[str, list[str]] = {}
    for name in sorted({*old["models"], *new["models"]}):
        before, after = old["models"].get(name), new["models"].get(name)
        for line in _lines(before, after):
            lines.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def _lines(before: Any, after: Any) -> Iterator[str]:
    if before is None or after is None:
        yield "model added to the suite" if before is None else "model gone from the suite"
        return
    if "unavailable" in before or "unavailable" in after:
        if "unavailable" not in after:
            yield "model now available"
        elif "unavailable" not in before:
            yield f"model no longer available: {after['unavailable']}"
        return
    for part in sorted(before.keys() & after.keys()):  # older snapshots lack the newer parts
        yield from _part(part, before[part], after[part])


def _part(label: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        gone = {name: old[name] for name in old if name not in new}
        come = {name: new[name] for name in new if name not in old}
        yield from _names(label, "removed", gone)
        yield from _names(label, "added", come)
        for name in sorted(old.keys() & new.keys()):
            yield from _part(f"{label}: {name}", old[name], new[name])
    elif isinstance(old, list) and isinstance(new, list):
        parts = [f"- {_brief(item)}" for item in old if item not in new]
        parts += [f"+ {_brief(item)}" for item in new if item not in old]
        yield f"{label}: {', '.join(parts) or 'order changed'}"
    else:
        yield f"{label}: {_brief(old)} → {_brief(new)}"


def _names(label: str, what: str, entries: Mapping[str, Any]) -> Iterator[str]:
    """Names that came or went: one by one, or by their common beginning where there are many."""
    groups: dict[str, list[str]] = {}
    for name in sorted(entries):
        groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
    for beginning, names in groups.items():
        if len(names) > MANY:
            yield f"{label}: {len(names)} names under {beginning} {what} (such as {names[0]})"
        else:
            for name in names:
                yield f"{label}: {name} {what} ({_brief(entries[name])})"


def _brief(value: Any) -> str:
    return one_line(value if isinstance(value, str) else json.dumps(value, default=str), 160)


def read_snapshot(path: Path) -> Snapshot:
    """A snapshot from its file. Raises ReportError or InputError in one line."""
    data = load_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("models"), dict):
        raise InputError(f"{path}: not a schema snapshot: no object `models`")
    if not all(isinstance(model, dict) for model in data["models"].values()):
        raise InputError(f"{path}: not a schema snapshot: a model that is no object")
    return data


def dump(data: Snapshot) -> str:
    """A snapshot as text: sorted, one entry a line."""
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def command(against: Path | None) -> str:
    """The active environment's snapshot as JSON, or its differences to a committed one."""
    if against is None:
        return dump(snapshot())
    old = read_snapshot(against)
    current = json.loads(dump(snapshot()))
    return "\n".join(differences(old, current) or ["no difference"]) + "\n"


def committed_difference(before: Report, after: Report) -> list[str]:
    """Differences of the committed snapshots of two reports' transformers versions, for the models
    that the reports ask about; a version without a snapshot is said."""
    numbers = [r.versions.get("transformers", "") for r in (before, after)]
    if numbers[0] == numbers[1] or not all(re.fullmatch(r"[\w.]+", n, re.ASCII) for n in numbers):
        return []
    paths = [schema_folder() / f"transformers-{number}.json" for number in numbers]
    lacking = [number for number, path in zip(numbers, paths, strict=True) if not path.exists()]
    if lacking:
        return [
            f"not compared: no snapshot of transformers {number} is committed; to see what moved:"
            " `conformance schema --out FILE` there, `conformance schema --against FILE` here"
            for number in lacking
        ]
    asked = {row.model for report in (before, after) for row in report.rows}
    old, new = (read_snapshot(path) for path in paths)
    for data in (old, new):
        data["models"] = {name: m for name, m in data["models"].items() if name in asked}
    return differences(old, new)
