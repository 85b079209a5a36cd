"""Models that the forkserver has loaded: a rank has its own copy from the fork, untouched.

Only what `build` loads alike on every rank is kept here, by the adapter's own word (`build_key`);
what an adapter shards while loading, and what a check wants loaded on the rank, is loaded there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from conformance.case import Model
from conformance.checkpoint import build_config, write
from conformance.implementation import Loaded
from conformance.module_copy import copied
from conformance.settings import Setting
from conformance.subject import Subject

DTYPES = ("float32", "float64")  # of the step, and of the parameters after it
Key = tuple[str, str, Any]
_kept: dict[Key, nn.Module] = {}


def build_key(loaded: Loaded, plan: Any) -> Any:
    """What the adapter's `build` reads of a plan; None where it does not say, or where the ranks
    matter."""
    claimed = {"plan", "build"} <= set(loaded.capabilities)
    return loaded.impl.build_key(plan) if claimed and hasattr(loaded.impl, "build_key") else None


def load_for_ranks(loaded: Loaded, model: Model) -> None:
    """Load a model in each of `DTYPES`, as it is planned without a setting; and prepare a copy
    once, since an implementation may keep what it finds out about a class."""
    config = build_config(model)
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        path = write(model, Path(folder))
        for dtype in DTYPES:
            plan = loaded.impl.plan(config, Setting(dtype=dtype), "single")
            key = build_key(loaded, plan)
            if key is None:
                return
            built = loaded.impl.build(path, plan)
            _kept[loaded.spec, model.name, key] = built
            if dtype == DTYPES[0] and "prepare" in loaded.capabilities:
                loaded.impl.undo(loaded.impl.prepare(copied(built), plan))


def take(subject: Subject, plan: Any) -> nn.Module | None:
    """The subject's model, loaded for such a plan, once: whoever takes it may change it."""
    key = build_key(subject.loaded, plan) if _kept else None
    where = (subject.loaded.spec, subject.model_spec.name, key)
    return None if key is None else _kept.pop(where, None)
