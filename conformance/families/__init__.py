"""The model families, one file each; a new family is one new file here."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from conformance.case import Model


def _load() -> dict[str, Model]:
    names = sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_")
    models: dict[str, Model] = {}
    for name in names:
        found = getattr(import_module(f"{__name__}.{name}"), "MODELS", None)
        if found is None:
            raise ValueError(f"{name}.py has no MODELS")
        for model in found:
            if model.name in models:
                raise ValueError(f"model {model.name!r} is defined twice, again in {name}.py")
            models[model.name] = model
    return models


MODELS = _load()
