"""Adapters of expert parameters: one layout on disk, whatever order PEFT nests them in.

Two adapted parameters of one experts module become two nested wrappers, told apart in the keys only
by `.base_layer`. PEFT nests them as the class defines them, but alphabetically where they carry a
parametrization (packed weights): the same key then means another parameter (axolotl#3483).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def _chains(adapted: nn.Module) -> Iterator[tuple[str, list[str], list[str]]]:
    """Outermost wrapper's name, its parameters outermost first, and those in the disk's order."""
    for name, module in adapted.named_modules():
        if not hasattr(module, "parameter_name") or name.endswith(".base_layer"):
            continue
        nested: list[str] = []
        inner: Any = module
        while hasattr(inner, "parameter_name"):
            nested.append(str(inner.parameter_name))
            inner = inner.base_layer
        defined = [*getattr(inner, "parametrizations", ()), *inner._parameters]
        yield name, nested, sorted(nested, key=defined.index, reverse=True)


def _renames(adapted: nn.Module) -> dict[str, str]:
    """Key prefix of a wrapper in this model → on disk, where they differ."""
    renames = {}
    for name, nested, written in _chains(adapted):
        for depth, parameter in enumerate(nested):
            here, there = (
                name + ".base_layer" * d + ".lora_" for d in (depth, written.index(parameter))
            )
            if here != there:
                renames[here] = there
    return renames


def _renamed(tensors: Mapping[str, Tensor], renames: Mapping[str, str]) -> dict[str, Tensor]:
    def rename(key: str) -> str:
        for here, there in renames.items():
            if key.startswith(here):
                return there + key[len(here) :]
        return key

    return {rename(key): value for key, value in tensors.items()}


def from_disk(adapted: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the keys of the disk, by those of this model."""
    return _renamed(tensors, {there: here for here, there in _renames(adapted).items()})


def mend_file(adapted: nn.Module, folder: Path) -> None:
    """Bring an adapter that PEFT just wrote to the layout of the disk, if it is not."""
    from safetensors.torch import load_file, save_file

    renames, file = _renames(adapted), folder / "adapter_model.safetensors"
    if not renames or not file.exists():
        return
    save_file(_renamed(load_file(file), renames), file, metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    full = config.get("target_parameters") or ()
    config["target_parameters"] = sorted({".".join(name.split(".")[-2:]) for name in full})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
