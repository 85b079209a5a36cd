"""CUDA kernels compiled at run time: NVRTC, the driver's launch and tensor maps, through ctypes.

NVRTC comes with every CUDA build of torch, the driver with the device. Where one of them cannot be
loaded, or is too old to compile for Hopper, `available` is False and Triton's kernels run.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .experts_cuda_source import UNITS, source

Constants = tuple[tuple[str, int], ...]


class Args(ctypes.Structure):
    """The kernel's struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "order", "weights", "out", "h")),
        *((name, ctypes.c_void_p) for name in ("tile_expert", "tile_row", "offsets", "counter")),
        *((name, ctypes.c_int) for name in ("tiles", "first_block", "blocks")),
    ]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


def _attribute(number: int, *values: int) -> _Attribute:
    return _Attribute(number, 0, (ctypes.c_int * 16)(*values))


# Blocks of a cluster (4), programmatic dependent launch (6; last, so that it can be left out).
_ATTRIBUTES = {
    1: (_Attribute * 1)(_attribute(6, 1)),
    2: (_Attribute * 2)(_attribute(4, 2, 1, 1), _attribute(6, 1)),
}


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel and how to launch it."""

    function: ctypes.c_void_p
    threads: int
    shared: int
    blocks: int  # that run at a time
    cluster: int


@cache
def driver() -> Any:
    """The CUDA driver; OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def compiler() -> Any:
    """NVRTC of torch's CUDA version, or any that is installed; OSError where there is none."""
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libnvrtc.so.{major}"] if major else []
    packages = find_spec("nvidia")  # a namespace: one folder for each place of installed packages
    for folder in packages.submodule_search_locations or () if packages else ():
        found = sorted(Path(folder).glob("*/lib/libnvrtc.so.*"), reverse=True)
        names += [str(path) for path in found]
    for name in (*names, "libnvrtc.so"):
        try:
            for part in Path(name).parent.glob("libnvrtc-builtins.so.*") if "/" in name else ():
                ctypes.CDLL(str(part))  # which NVRTC looks for where the linker does
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("no NVRTC library was found")


@cache
def available() -> bool:
    """Whether kernels can be compiled for Hopper and launched here."""
    try:
        count = ctypes.c_int()
        compiler().nvrtcGetNumSupportedArchs(ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        compiler().nvrtcGetSupportedArchs(known)
        return 90 in known and hasattr(driver(), "cuTensorMapEncodeTiled")
    except (OSError, AttributeError):
        return False


def _check(result: int, what: str) -> None:
    if result:
        raise RuntimeError(f"{what} failed with CUDA error {result}")


def compile_source(text: str, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """The binary for sm_90a, and the compiler's log; RuntimeError with the log if it fails."""
    rtc, program, size = compiler(), ctypes.c_void_p(), ctypes.c_size_t()
    _check(
        rtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"experts.cu", 0, None, None),
        "nvrtcCreateProgram",
    )
    flags = ["--gpu-architecture=sm_90a", "--std=c++17", *options]
    flags_c = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
    failed = rtc.nvrtcCompileProgram(program, len(flags), flags_c)
    rtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    rtc.nvrtcGetProgramLog(program, log)
    if failed:
        raise RuntimeError(f"NVRTC: {log.value.decode()}")
    _check(rtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    binary = ctypes.create_string_buffer(size.value)
    _check(rtc.nvrtcGetCUBIN(program, binary), "nvrtcGetCUBIN")
    rtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw, log.value.decode()


@cache
def kernel(device: int, constants: Constants) -> Kernel:
    """Compile and load the kernel for these constants on the current device."""
    values = dict(constants)
    binary, _ = compile_source(source(values))
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver().cuModuleLoadData(ctypes.byref(module), binary), "cuModuleLoadData")
    _check(
        driver().cuModuleGetFunction(ctypes.byref(function), module, b"product"),
        "cuModuleGetFunction",
    )
    boxed = values["KN"] or values["CL"] > 1
    columns = -(-values["NT"] // 64) * 64 if boxed else values["NT"]
    shared = values["STAGES"] * (64 * UNITS + columns) * 128 + 1024
    _check(driver().cuFuncSetAttribute(function, 8, shared), "cuFuncSetAttribute")
    cluster, threads = values["CL"], 128 * (UNITS + 1)
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    if cluster > 1:
        found = ctypes.c_int()
        config = _config(blocks // cluster * cluster, threads, shared, 0, cluster, False)
        _check(
            driver().cuOccupancyMaxActiveClusters(
                ctypes.byref(found), function, ctypes.byref(config)
            ),
            "cuOccupancyMaxActiveClusters",
        )
        blocks = found.value * cluster
    return Kernel(function, threads, shared, blocks, cluster)


def _config(
    blocks: int, threads: int, shared: int, stream: int, cluster: int, dependent: bool
) -> _Config:
    """A launch configuration."""
    attributes = _ATTRIBUTES[cluster]
    return _Config(
        (blocks, 1, 1),
        (threads, 1, 1),
        shared,
        stream,
        ctypes.addressof(attributes),
        len(attributes) - (0 if dependent else 1),
    )


@lru_cache(maxsize=256)
def tensor_map(
    pointer: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> Any:
    """A bfloat16 tensor map, innermost dimension first; ``strides`` in elements but the first."""
    raw = (ctypes.c_byte * 192)()
    shift = -ctypes.addressof(raw) % 64
    rank = len(sizes)
    failed = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(raw) + shift),
        9,  # bfloat16
        rank,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*[2 * stride for stride in strides]),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,  # not interleaved
        3,  # 128-byte swizzle
        3,  # 256-byte sectors
        0,  # zeros outside
    )
    _check(failed, f"cuTensorMapEncodeTiled of {sizes}, {box}")
    return raw, shift


def rows_map(a: Tensor) -> Any:
    """64 rows by 64 columns of a matrix."""
    return tensor_map(a.data_ptr(), (a.shape[1], a.shape[0]), (a.stride(0),), (64, 64))


def weight_map(w: Tensor, columns: int, *, transposed: bool, pair: bool, cluster: int) -> Any:
    """64 inner by ``columns`` outer of one expert; ``pair``: half of them of gate, half of up."""
    experts, rows, inner = w.shape
    pointer, size = w.data_ptr(), rows * inner
    if pair:
        half = rows // 2
        shape, strides = (inner, half, 2 * experts), (inner, half * inner)
        return tensor_map(pointer, shape, strides, (64, columns // 2, 2))
    box = (64, 64 if transposed or cluster > 1 else columns, 1)
    return tensor_map(pointer, (inner, rows, experts), (inner, size), box)


def start(found: Kernel, maps: list[Any], args: Args, tiles: int, *, dependent: bool) -> None:
    """Launch on the current stream."""
    pointers = [ctypes.addressof(raw) + shift for raw, shift in maps]
    params = (ctypes.c_void_p * 5)(*pointers, ctypes.addressof(args))
    grid = min(found.blocks, tiles * found.cluster)
    stream = torch.cuda.current_stream().cuda_stream
    config = _config(grid, found.threads, found.shared, stream, found.cluster, dependent)
    result = driver().cuLaunchKernelEx(ctypes.byref(config), found.function, params, None)
    _check(result, "cuLaunchKernelEx")
