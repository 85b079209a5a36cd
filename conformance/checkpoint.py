"""Tiny models of the installed transformers: configs, stock models and checkpoint directories."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from conformance.case import Model
from conformance.weights import fill

_written: dict[tuple[int, str, str], Path] = {}
_roots: dict[int, Path] = {}


def available(model: Model) -> str | None:
    """Why the installed transformers cannot build `model`, in one line; None where it can."""
    for name in (model.config_class, model.model_class):
        if not hasattr(transformers, name):
            return f"transformers {transformers.__version__} has no {name}"
    try:
        importlib.import_module(model.modelling)
    except ImportError as error:
        return f"transformers {transformers.__version__} cannot import {model.modelling}: {error}"
    return None


def build_config(model: Model, attn: str = "eager", experts: str = "eager") -> Any:
    """The tiny configuration as an instance of the installed config class.

    attn, experts: names of the attention and experts implementations written into it.
    """
    config = copy.deepcopy(_tiny_config(model))
    config._attn_implementation = attn
    audio = getattr(config, "audio_config", None)
    if audio is not None and not _has_sdpa(audio):
        audio._attn_implementation = "eager"  # asking such a tower for sdpa is an error
    config._experts_implementation = experts
    return config


_configs: dict[str, tuple[Model, Any]] = {}


def _tiny_config(model: Model) -> Any:
    """Made once: a copy takes a tenth of the time."""
    known, config = _configs.get(model.name, (None, None))
    if known is not model:
        config = getattr(transformers, model.config_class)(**copy.deepcopy(dict(model.tiny)))
        _configs[model.name] = (model, config)
    return config


def _has_sdpa(config: Any) -> bool:
    """Whether the tower of a sub-configuration, if it has one, takes `sdpa`."""
    tower = transformers.AutoModel._model_mapping.get(type(config), None)
    return bool(getattr(tower, "_supports_sdpa", True))


def build_stock(
    model: Model,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    experts: str = "eager",
) -> nn.Module:
    """The installed class, unpatched, training, with weights by name: the oracle's model."""
    missing = available(model)
    if missing:
        raise ValueError(f"model {model.name}: {missing}")
    kind = getattr(transformers, model.model_class)
    with _quiet():
        built = kind._from_config(build_config(model, attn, experts), dtype=dtype)
    fill(built)
    assert isinstance(built, nn.Module)
    return built.train()


def checkpoint(model: Model, dtype: str = "float32") -> Path:
    """A checkpoint directory of the tiny model, written once per process and removed at its end.

    dtype: the name of a torch dtype. The directory appears under its name only when it is complete;
    forked ranks read what their parent wrote. float32 holds every weight exactly.
    """
    for pid in (os.getpid(), os.getppid()):
        found = _written.get((pid, model.name, dtype))
        if found is not None and found.is_dir():
            return found
    root = _root()
    unfinished = write(model, Path(tempfile.mkdtemp(prefix=f"{model.name}-", dir=root)), dtype)
    finished = root / f"{model.name}-{dtype}"
    unfinished.rename(finished)
    _written[os.getpid(), model.name, dtype] = finished
    return finished


def write(model: Model, folder: Path, dtype: str = "float32") -> Path:
    """Write a checkpoint of the tiny model into an empty folder."""
    built = build_stock(model, getattr(torch, dtype))
    with _quiet():
        built.save_pretrained(folder)  # type: ignore[operator]
    return folder


def _root() -> Path:
    pid = os.getpid()
    if pid not in _roots:
        _roots[pid] = Path(tempfile.mkdtemp(prefix="conformance-"))
        # runs in the process that made it only, forked worker processes included
        Finalize(None, shutil.rmtree, args=(_roots[pid], True), exitpriority=0)
    return _roots[pid]


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice from transformers while a tiny model is built (it is meant to be tiny)."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
