"""Launching Triton kernels, or recording the launches to compile them later without a device.

Every kernel of this package goes through `launch`. Inside `recording`, launches are collected
instead of run, so that a whole forward and backward over meta tensors yields the exact signatures
that a device would compile: the compile check in CI needs no list of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

_RECORDER: list[Launch] | None = None

_TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
}


# Whether a kernel may be launched while the one before it drains; None: where the device can.
DEPENDENT_LAUNCH: bool | None = None


@triton.jit  # type: ignore[untyped-decorator]
def begin(PDL: tl.constexpr) -> None:
    """First statement of every kernel: let the next one be launched, wait for the one before.

    Every kernel waits, so that what a kernel reads was written by any of those before it. See
    `launch`; the wait is what makes programmatic dependent launch equal to stream order.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the function, its grid, its arguments by name, its compile options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class CompileSpec:
    """What `triton.compile` needs for one kernel: see `spec_of`."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for launches that share a compilation."""
        return (self.kernel.__name__, self.signature, self.constants, self.attributes, self.options)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    warps: int,
    stages: int,
    registers: int = 0,
    **arguments: Any,
) -> None:
    """Run ``kernel[grid](**arguments)``; an empty grid runs nothing; when recording, only note it.

    ``registers`` caps the registers of a thread, 0 leaves them to the compiler. On devices of
    capability 9.0 and up the launch is a programmatic dependent one (see `begin`): it fills the
    multiprocessors that the kernel before leaves idle at its end.
    """
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if registers:
        options["maxnreg"] = registers
    arguments["PDL"] = _launches_dependents(kernel)
    if arguments["PDL"]:
        options["launch_pdl"] = True
    if _RECORDER is not None:
        _RECORDER.append(Launch(kernel, grid, arguments, options))
        return
    if not all(grid):
        return
    modes = _modes.get(id(kernel)) or _modes_of(kernel)
    if modes is None:
        kernel[grid](**arguments, **options)
        return
    values = [arguments[name] for name in modes]
    # What selects the compilation; at least as fine as Triton's own distinction, which looks at
    # every argument anew and takes longer than the smaller kernels run.
    key: list[object] = [id(kernel), torch.cuda.current_device(), warps, stages, registers]
    for value, mode in zip(values, modes.values(), strict=True):
        if isinstance(value, torch.Tensor):
            key += (value.dtype, value.data_ptr() & 15 == 0)
        elif mode == _CONSTANT or value is None:
            key.append(value)
        elif isinstance(value, float):
            key.append(float)
        elif isinstance(value, int):
            key.append(abs(value) < 2**31 if mode == _PLAIN else value)
        else:
            key += (value.base.dtype, *value.block_shape)
    found = tuple(key)
    compiled = _compiled.get(found)
    if compiled is None:
        _compiled[found] = kernel[grid](**arguments, **options)
    else:
        compiled[(*grid, 1, 1)[:3]](*values)


_compiled: dict[tuple[object, ...], Any] = {}
_dependents: dict[int, bool] = {}


def _launches_dependents(kernel: Any) -> bool:
    """Whether launches on the current device are dependent ones; recording stands for Hopper."""
    if not isinstance(kernel, triton.runtime.JITFunction):
        return False
    if DEPENDENT_LAUNCH is not None:
        return DEPENDENT_LAUNCH
    if _RECORDER is not None and not torch.cuda.is_available():
        return True
    device = torch.cuda.current_device()
    found = _dependents.get(device)
    if found is None:
        found = _dependents[device] = torch.cuda.get_device_capability(device) >= (9, 0)
    return found


_CONSTANT, _PLAIN, _SPECIAL = range(3)


_modes: dict[int, dict[str, int]] = {}


def _modes_of(kernel: Any) -> dict[str, int] | None:
    """How each argument enters a kernel's compilation; None where Triton interprets it."""
    if not isinstance(kernel, triton.runtime.JITFunction):
        return None
    _modes[id(kernel)] = {
        p.name: _CONSTANT if p.is_constexpr else _PLAIN if p.do_not_specialize else _SPECIAL
        for p in kernel.params
    }
    return _modes[id(kernel)]


def is_recording() -> bool:
    """Whether launches are being collected."""
    return _RECORDER is not None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; tensors may live on the meta device."""
    global _RECORDER
    previous, _RECORDER = _RECORDER, []
    try:
        yield _RECORDER
    finally:
        _RECORDER = previous


def compile_ahead(records: list[Launch], device: torch.device, workers: int = 8) -> None:
    """Compile the recorded launches on several threads, rather than one by one in the first call.

    Most of a compilation is LLVM, ptxas and a C compiler, which do not hold the interpreter's lock.
    What fails here is compiled, or reported, by the launch itself.
    """
    unique = {repr(spec_of(record, "").key): record for record in records}

    def build(record: Launch) -> None:
        with suppress(Exception):
            torch.cuda.set_device(device)
            compiled = record.kernel.warmup(grid=record.grid, **record.arguments, **record.options)
            _ = compiled.run  # loads the binary and builds its launcher

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(build, unique.values()))


def spec_of(record: Launch, label: str) -> CompileSpec:
    """The compile signature Triton's JIT would derive from the launch's arguments."""
    names = list(record.kernel.arg_names)
    constexprs = {p.name for p in record.kernel.params if p.is_constexpr}
    plain = {p.name for p in record.kernel.params if p.do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(names):
        value = record.arguments[name]
        kind = "constexpr" if name in constexprs or value is None else _type_of(value)
        if isinstance(value, int) and value == 1 and name not in plain:
            kind = "constexpr"
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif name in plain:
            continue
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return CompileSpec(
        f"{label}:{record.name}",
        record.kernel,
        signature,
        constants,
        attributes,
        record.options,
    )


def _type_of(value: Any) -> str:
    """Triton's name for the type of a runtime argument."""
    if isinstance(value, torch.Tensor):
        return "*" + _TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    block = ",".join(str(size) for size in value.block_shape)
    return f"tensordesc<{_TYPE_NAMES[value.base.dtype]}[{block}]>"


def next_power(value: int, least: int = 1) -> int:
    """The next power of two that is at least ``value`` and ``least``."""
    return max(least, 1 << max(0, value - 1).bit_length())


def cdiv(value: int, by: int) -> int:
    """``value / by``, rounded up."""
    return -(-value // by)
