"""Imported last by the forkserver: what every rank would otherwise compute anew, computed once.

No thread, no process group and no CUDA context may come of it.
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
import re
from importlib import import_module


def warm_key_conversions() -> None:
    """transformers compiles a thousand patterns of checkpoint keys on the first load, and again on
    every further one: twice as many as `re` remembers."""
    for limit in ("_MAXCACHE", "_MAXCACHE2"):
        if hasattr(re, limit):
            setattr(re, limit, 1 << 14)
    with contextlib.suppress(Exception):
        import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("gemma4")


def warm_parts(package: str) -> None:
    """The modules of the reference implementation that are imported on first use."""
    with contextlib.suppress(Exception):
        root = import_module(package)
        for name in [info.name for info in pkgutil.iter_modules(root.__path__)]:
            import_module(f"{package}.{name}")


def warm_model(name: str) -> None:
    """What the reference finds out about a model's class (on the meta device), which it keeps."""
    from conformance.checkpoint import build_config
    from conformance.families import MODELS
    from conformance.implementations.reference import IMPLEMENTATION
    from conformance.settings import Setting

    with contextlib.suppress(Exception):
        IMPLEMENTATION.plan(build_config(MODELS[name]), Setting(), "single")


warm_key_conversions()
for _package in ("impl.patches", "conformance.impl.patches"):
    warm_parts(_package)
for _model in filter(None, os.environ.get("CONFORMANCE_EXPECTED_MODELS", "").split(",")):
    warm_model(_model)
