"""Golden artefacts: what older versions wrote, read without executing anything.

An adapter lies beside the logits that it gave under the version that made it; a trainer's state is
kept as safetensors and JSON, and put back into the files that a trainer reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.fidelity import fixtures_dir

PARAMETERS = "parameters.safetensors"
STATE = ("trainer_state.json", "config.json", "adapter_config.json")
# The golden training: steps in all, the step after which its state was kept, what `fit` is given.
TOTAL, KEPT = 4, 2
OPTIONS: dict[str, Any] = {"batch_size": 1, "lr": 1e-2, "schedule": "linear"}
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class Golden:
    """An artefact's folder, the environment that made it, and what was seen there."""

    folder: Path
    environment: dict[str, str]

    @property
    def made_by(self) -> str:
        """The environment's name, such as `peft-0.18.1`."""
        return self.folder.parent.name

    @property
    def expected(self) -> dict[str, Tensor]:
        """`input_ids`, `logits`, and for adapters `base`: the logits without it."""
        return load_file(self.folder / "expected.safetensors")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The adapter's own tensors, by their names on disk."""
        return load_file(self.folder / "adapter_model.safetensors")


def golden_dir() -> Path:
    """Where the artefacts lie."""
    return fixtures_dir() / "golden"


def golden_adapters(kinds: tuple[str, ...]) -> list[Golden]:
    """The adapters of these kinds (folder names), of each environment that could make them and
    whose PEFT, or the package that it is named for, is not newer than the installed one."""
    found = []
    for environment in sorted(golden_dir().glob("*-*/environment.json")):
        facts = json.loads(environment.read_text(encoding="utf-8"))
        if not _is_newer(facts, "peft", environment.parent.name.partition("-")[0]):
            folders = [environment.parent / kind for kind in kinds]
            found += [Golden(f, facts) for f in folders if (f / "adapter_config.json").exists()]
    return found


def _is_newer(facts: dict[str, str], *packages: str) -> bool:
    return any(Version(facts[p]) > Version(version(p)) for p in packages if p in facts)


def golden_checkpoints(model: str) -> list[Golden]:
    """The whole checkpoints of a model, one for each layout of keys, none of a newer version."""
    found = []
    for file in sorted(golden_dir().glob("checkpoint-*/environment.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["model"] == model and not _is_newer(facts, "transformers"):
            found.append(Golden(file.parent, facts))
    return found


@contextmanager
def subject_of_trainer() -> Iterator[tuple[Any, Any, Any, dict[str, Any]]]:
    """The reference on the golden training: subject, samples, plan and options for `fit`."""
    from conformance.case import Case, Check
    from conformance.families import MODELS
    from conformance.implementation import load
    from conformance.settings import Setting
    from conformance.subject import bound

    case = Case(Check("C12"), MODELS["gemma3-text"], Setting.parse("lora"))
    with bound(load("reference"), case, "cpu") as subject:
        yield subject, subject.samples("text", count=TOTAL), trainer_plan(subject), dict(OPTIONS)


def trainer_plan(subject: Any) -> Any:
    """The plan of the golden training, its targets spelt out: a stack's own choice may change."""
    return subject.plan(options={"lora_targets": ["q_proj", "v_proj"]})


def pack_state(checkpoint: Path, out: Path) -> None:
    """A trainer's checkpoint as safetensors and JSON; random states are left out (no dropout)."""
    out.mkdir(parents=True)
    for name in (*STATE, *WEIGHTS):
        if (checkpoint / name).exists():
            shutil.copy(checkpoint / name, out / name)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).clone()
        for index, slots in optimizer["state"].items()
        for name, value in slots.items()
    }
    save_file(tensors, out / "optimizer.safetensors")
    scheduler = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    data = {"param_groups": optimizer["param_groups"], "scheduler": scheduler}
    (out / "optimizer.json").write_text(json.dumps(data, indent=1, default=list) + "\n")


def unpack_state(golden: Path, checkpoint: Path) -> None:
    """The files that a trainer resumes from, made of what `pack_state` kept."""
    checkpoint.mkdir(parents=True)
    for name in (*STATE, *WEIGHTS):
        if (golden / name).exists():
            shutil.copy(golden / name, checkpoint / name)
    data = json.loads((golden / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(golden / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer = {"state": state, "param_groups": data["param_groups"]}
    torch.save(optimizer, checkpoint / "optimizer.pt")
    torch.save(data["scheduler"], checkpoint / "scheduler.pt")
