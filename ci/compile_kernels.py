"""Compile every kernel for Hopper without a GPU; fail on spills or serialized wgmma.

Usage: ``python ci/compile_kernels.py [WORD ...]`` compiles what has a WORD in its name. A kernels
module takes part by having ``compile_specs()``, whose entries are `launch.CompileSpec`s or tuples
``(kernel, signature, constants, options)``; the products in CUDA C++ do where NVRTC is installed
(the package nvidia-cuda-nvrtc). A spill is memory traffic in a loop as a rule, and ptxas's C7515
means that products wait for each other: both are invisible in results and cost up to half the
speed (`kernels.md` §7.3).
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

MODULES = ("impl.kernels.experts_triton", "impl.kernels.cross_entropy_triton")
ARCHITECTURE = 90
# Bytes that may spill: under a register cap that was measured to pay (impl/kernels/NOTES.md), and
# in the one small program of the routing.
ALLOWED_SPILLS = {"middle_kernel": 32, "scan_kernel": 32}


@dataclass(frozen=True)
class Result:
    """What one compilation came to."""

    name: str
    seconds: float
    registers: int
    spilled: int
    shared: int
    serialized: bool
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether the kernel must not be shipped like this."""
        allowed = ALLOWED_SPILLS.get(self.name.rsplit(":", 1)[-1], 0)
        return bool(self.error) or self.serialized or self.spilled > allowed

    def line(self) -> str:
        """One line of the table."""
        verdict = "FAILED" if self.failed else "ok"
        text = f"{self.name:42s} {self.seconds:5.1f} s {self.registers:4d} registers "
        text += f"{self.spilled:5d} B spilled {self.shared:7d} B shared  {verdict}"
        return (
            text + (" C7515" if self.serialized else "") + (f" {self.error}" if self.error else "")
        )


def specs() -> Iterator[
    tuple[str, Any, dict[str, str], dict[str, Any], dict[Any, Any], dict[str, Any]]
]:
    """Every module's specs as (name, kernel, signature, constants, attributes, options)."""
    for path in MODULES:
        for spec in importlib.import_module(path).compile_specs():
            if isinstance(spec, tuple):
                kernel, signature, constants, options = spec
                name, attributes = f"{path.rsplit('.', 1)[-1]}:{kernel.__name__}", {}
                signature = {
                    arg: "constexpr" if arg in constants else signature[arg]
                    for arg in kernel.arg_names
                }
            else:
                name, kernel, signature = spec.name, spec.kernel, spec.signature
                constants, attributes, options = spec.constants, spec.attributes, spec.options
            yield name, kernel, signature, constants, attributes, options


def compile_one(
    name: str,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    attributes: dict[Any, Any],
    options: dict[str, Any],
) -> Result:
    """Compile one kernel to PTX and on to machine code; never raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.time()
    try:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options
        )
        log = assemble(compiled.asm["ptx"])
    except Exception as error:  # one kernel's failure must not hide the others'
        text = str(error).strip().splitlines() or [type(error).__name__]
        return Result(name, time.time() - start, 0, 0, 0, False, text[-1][:200])
    return Result(
        name,
        time.time() - start,
        _number(r"Used (\d+) registers", log),
        _number(r"(\d+) bytes spill stores", log),
        int(compiled.metadata.shared),
        "C7515" in log,
    )


def native() -> Iterator[tuple[str, dict[str, int]]]:
    """The products in CUDA that plans launch, as (name, constants), where they can be compiled."""
    from impl.kernels import experts_compile_triton, experts_cuda_runtime

    try:
        experts_cuda_runtime.compiler()
    except OSError as error:
        print(f"the products in CUDA were not compiled: {error}", flush=True)
        return
    for found in experts_compile_triton.native_constants():
        c = dict(found)
        if c["CL"] == 1:  # no plan has clusters
            shown = (f"{key}{c[key]}" for key in ("KDIM", "NDIM", "KN", "EPI"))
            yield f"experts_cuda:{' '.join(shown)}", c


def compile_native(name: str, constants: dict[str, int]) -> Result:
    """Compile one set of constants with NVRTC; never raises."""
    from impl.kernels.experts_cuda_runtime import compile_source
    from impl.kernels.experts_cuda_source import source

    start = time.time()
    try:
        _, log = compile_source(source(constants), ("--ptxas-options=-v",))
    except Exception as error:  # as above
        return Result(name, time.time() - start, 0, 0, 0, False, str(error).strip()[-200:])
    registers, spilled = (
        _number(pattern, log) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    return Result(name, time.time() - start, registers, spilled, 0, "C75" in log)


def assemble(ptx: str) -> str:
    """The verbose log of the first bundled ptxas that knows this PTX version."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for tool in ("ptxas", "ptxas-blackwell"):
            if not (tools / tool).exists():
                continue
            target = f"--gpu-name=sm_{ARCHITECTURE}a"
            command = [str(tools / tool), "-v", target, str(source), "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "Unsupported .version" in done.stderr:
                continue
            if done.returncode:
                raise RuntimeError(f"{tool}: {done.stderr.strip()}")
            return done.stderr
    raise RuntimeError("no bundled ptxas takes this PTX version")


def _number(pattern: str, text: str) -> int:
    return max((int(found) for found in re.findall(pattern, text)), default=0)


def main(words: list[str]) -> int:
    """Compile, print the table, return the number of failures as far as an exit status can."""
    start, failures, count = time.time(), 0, 0
    work = [(spec[0], partial(compile_one, *spec)) for spec in specs()]
    work += [(name, partial(compile_native, name, constants)) for name, constants in native()]
    for name, compile_it in work:
        if words and not any(word in name for word in words):
            continue
        result = compile_it()
        failures, count = failures + result.failed, count + 1
        print(result.line(), flush=True)
    print(f"{count} kernels, {failures} failed, {time.time() - start:.0f} s")
    return min(failures, 125)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    raise SystemExit(main(sys.argv[1:]))
