"""The forkserver of a run: what it imports, when it starts, and how xdist's workers share one.

`multiprocessing` starts a forkserver for each process that asks. Its imports take as long as many
cases, so the controller starts one for all workers (`told`, `use`); a worker that cannot reach it
starts its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any

BASE_MODULES = (
    "conformance.torchvision_ops",  # before transformers
    "numpy",
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.utils.checkpoint",
    "transformers",
    "transformers.modeling_utils",
    "transformers.distributed",
    "peft",
    "accelerate",
    "pytest",
    "conformance.rank_process",
    "conformance.subject",
    "conformance.rank_steps",
    "conformance.rank_failures",
    "conformance.numerics",
    "conformance.implementations.reference",
    "conformance.implementations.transformers",
    *(
        f"{package}.{part}"
        for package in ("impl", "conformance.impl")
        for part in (
            "parallel",
            "parallel_tensor",
            "plan",
            "prepare",
            "build",
            "collate",
            "loss",
            "detect_class",
            "checkpoints",
        )
    ),
)
"""Imported once by the forkserver; a module that an older stack lacks is passed over."""

_FAMILIES = (
    "gemma4 gemma4_unified gemma3 gemma3n qwen3_5 qwen3_5_moe qwen3_next qwen3_moe qwen2_moe"
    " mixtral siglip"
)
MODELLING_MODULES = tuple(
    f"transformers.models.{name}.modeling_{name}" for name in _FAMILIES.split()
)
"""The default of `preload`: every modelling module that the suite's families use."""

_context = multiprocessing.get_context("forkserver")
_started = False
_another: bool = False  # the server is another process's
_modules: tuple[str, ...] = (*BASE_MODULES, *MODELLING_MODULES)
_models: tuple[str, ...] = ()
_implementation = ""


def preload(modules: Iterable[str], base: Iterable[str] = BASE_MODULES) -> None:
    """Name the modelling modules that the forkserver imports beside `base`, before the first start.

    Raises RuntimeError once the forkserver runs: they would silently not be preloaded.
    """
    global _modules
    if _started:
        raise RuntimeError("preload() comes before the first ranks.run() or warm()")
    _modules = (*base, *modules)


def expect(models: Iterable[str], implementation: str) -> None:
    """Name the suite's models that will be spread, and by what: the forkserver loads them once for
    all ranks."""
    global _models, _implementation
    _models, _implementation = tuple(models), implementation


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the length of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def warm() -> None:
    """Start the forkserver in the background, so that the first case does not wait for its
    imports."""
    global _started
    if _started:
        return
    modules = ["conformance.rank_devices", *_modules, "conformance.rank_warmth"]
    _context.set_forkserver_preload(modules)
    # Threads do not survive a fork, and the CUDA runtime must not be touched before one.
    with _environment(
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        PYTORCH_NVML_BASED_CUDA_CHECK="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        CONFORMANCE_EXPECTED_MODELS=",".join(_models),
        CONFORMANCE_EXPECTED_IMPLEMENTATION=_implementation,
        PYTHONPATH=os.pathsep.join(path for path in sys.path if path),
    ):
        forkserver.ensure_running()
    _started = True


def told() -> dict[str, str | bytes]:
    """Where this process's forkserver listens, and the key to it where Python has one; empty if
    none runs."""
    known = vars(_singleton()) if _started else {}
    return {
        name: value
        for name, value in known.items()
        if name.startswith("_forkserver_") and isinstance(value, (str, bytes))
    }


def use(where: Mapping[str, str | bytes]) -> None:
    """Fork from the server that another process of this run started and `told` of."""
    global _started, _another
    if _started or not os.path.exists(where.get("_forkserver_address", "")):
        return
    server = _singleton()
    vars(server).update(where)
    server._forkserver_alive_fd = os.open(
        os.devnull, os.O_RDONLY
    )  # its end is not ours to wait for
    server.ensure_running = lambda: None  # only its parent can ask how it is
    _started = _another = True


def begin(process: ForkServerProcess) -> None:
    """Start a process from the forkserver; from one of our own where the shared one is gone."""
    try:
        process.start()
    except OSError:
        if not _another:
            raise
        _leave()
        warm()
        process.start()


def _leave() -> None:
    """Forget the shared server."""
    global _started, _another
    server = _singleton()
    os.close(server._forkserver_alive_fd)
    for name in [n for n in vars(server) if n.startswith("_forkserver_")]:
        setattr(server, name, None)
    del server.ensure_running
    _started = _another = False


def _singleton() -> Any:
    """multiprocessing's own record of the server (3.11 to 3.14)."""
    return forkserver._forkserver  # type: ignore[attr-defined]
