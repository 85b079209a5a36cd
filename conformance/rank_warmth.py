"""Imported last by the forkserver: what every rank would otherwise compute anew, computed once.

No thread, no process group and no CUDA context may come of it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import pkgutil
import re
from importlib import import_module

from conformance.rank_devices import ask_again
from conformance.rank_process import quiet_progress_bars


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
    """What the implementation finds out about a model's class, and the model itself."""
    from conformance.families import MODELS
    from conformance.implementation import load
    from conformance.prebuilt import load_for_ranks

    with contextlib.suppress(Exception):
        load_for_ranks(load(os.environ["CONFORMANCE_EXPECTED_IMPLEMENTATION"]), MODELS[name])


warm_key_conversions()
for _package in ("impl.patches", "conformance.impl.patches"):
    warm_parts(_package)
quiet_progress_bars()
for _model in filter(None, os.environ.get("CONFORMANCE_EXPECTED_MODELS", "").split(",")):
    warm_model(_model)
ask_again()
gc.collect()
gc.freeze()  # a collection in a rank would touch, and so copy, every page of the imports
atexit.register(os._exit, 0)  # there is nothing to tidy up, and that takes a second
