"""Which tiles the experts kernels use: a hand-picked table by device class, no search at run time.

The figures behind the choices are in NOTES.md.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch

from .experts_cuda_source import UNITS
from .experts_problem import Problem


@dataclass(frozen=True)
class Tiles:
    """Block sizes and compile options of one product kernel."""

    bn: int
    bk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Native:
    """The products in CUDA (`experts_cuda_source`) instead of Triton."""

    cluster: int  # blocks that share a tile's weights, in the products without a gather
    stages: int
    group: int  # row tiles of an expert that share their column blocks in time

    rows = 64 * UNITS  # of a block's tile


@dataclass(frozen=True)
class Plan:
    """Everything the launches of one call depend on besides the shapes."""

    rows: int  # rows of a tile's main block
    half_rows: bool  # run tiles at most half full at half height
    descriptors: bool  # weights (and contiguous operands) through tensor descriptors
    group: int  # row tiles that share their column blocks in time
    up: Tiles  # bn counts columns of gate, the product is twice as wide
    down: Tiles
    d_hidden: Tiles
    d_input: Tiles
    chunk: int  # rows of a partial sum
    column_groups: int  # most parts into which the middle kernel cuts the inner width
    middle_rows: int
    middle_columns: int
    middle_warps: int
    middle_stages: int
    middle_registers: int  # 0: as many as the compiler likes
    rank_in_middle: bool  # dGU B inside the middle kernel, else as a product of its own
    skinny_rows: int
    skinny_bk: int
    skinny_stages: int
    sum_rows: int
    sum_columns: int
    sum_warps: int
    sum_stages: int
    output_rows: int
    output_columns: int
    output_warps: int
    output_stages: int
    input_blocks: int  # column blocks of dX that pass through a buffer of its own; 0: half of them
    keep_factors: bool  # save lora_B by expert for the backward rather than swap it again
    native: Native | None = None  # then `rows` is its tile and half_rows, group do not matter


_HOPPER = Plan(
    rows=128,
    half_rows=True,
    descriptors=True,
    group=8,
    up=Tiles(128, 64, 8, 4),
    down=Tiles(256, 64, 8, 4),
    d_hidden=Tiles(256, 64, 8, 4),
    d_input=Tiles(256, 64, 8, 4),
    chunk=1024,
    column_groups=16,
    middle_rows=32,
    middle_columns=64,
    middle_warps=4,
    middle_stages=1,
    middle_registers=168,
    rank_in_middle=True,
    skinny_rows=64,
    skinny_bk=128,
    skinny_stages=3,
    sum_rows=64,
    sum_columns=128,
    sum_warps=4,
    sum_stages=3,
    output_rows=32,
    output_columns=256,
    output_warps=4,
    output_stages=3,
    input_blocks=0,
    keep_factors=True,
)
_PORTABLE_TILES = Tiles(128, 32, 8, 3)
_WIDE_TILES = Tiles(64, 32, 4, 2)  # float32 operands
_INTERPRETER_TILES = Tiles(64, 64, 4, 2)


def plan_for(problem: Problem, *, interpreted: bool) -> Plan:
    """The plan for this problem on its device; meta tensors get the Hopper plan."""
    device, dtype = problem.hidden.device, problem.dtype
    hopper = device.type == "meta"
    if device.type == "cuda":
        hopper = torch.cuda.get_device_capability(device)[0] == 9
    if interpreted:
        return _small(_INTERPRETER_TILES, rows=32, columns=64)
    if dtype == torch.float32:
        return _small(_WIDE_TILES, rows=64, columns=32)
    if not hopper or problem.width % 8 or problem.inner % 8:
        return _small(_PORTABLE_TILES, rows=128, columns=64)
    plan = _hopper(problem)
    if device.type == "cuda" and _native_fits(problem):
        plan = with_native(plan, _native(problem))
    return plan


def with_native(plan: Plan, native: Native) -> Plan:
    """The plan with its products in CUDA."""
    return replace(plan, rows=native.rows, native=native)


def _native(problem: Problem) -> Native:
    """The largest cluster whose tiles an expert's rows fill as well as those of one block."""
    units = problem.slots / problem.experts / 64 + 0.5  # an expert's last unit is half full

    def blocks(cluster: int) -> int:
        return cluster * math.ceil(units / (cluster * UNITS))

    cluster = max(n for n in (1, 2) if blocks(n) <= 1.05 * blocks(1))
    return Native(cluster=cluster, stages=4, group=8)


def _native_fits(problem: Problem) -> bool:
    """Whether the products run in CUDA; EXPERTS_CUDA=0 in the environment keeps Triton's."""
    if os.environ.get("EXPERTS_CUDA") == "0":
        return False
    from . import experts_cuda_runtime, experts_products_cuda

    return experts_products_cuda.fits(problem) and experts_cuda_runtime.available()


def _hopper(problem: Problem) -> Plan:
    """Hopper's table, adapted to how many rows an expert has and how large its weights are."""
    rows = problem.slots / problem.experts
    changes = {"chunk": max(1024, 1 << max(0, round(rows) - 1).bit_length())}
    if problem.inner > 4096:
        # Few rows, many columns: a program for every column block of the middle, no reading back.
        # GU and its gradient fill the memory; six blocks of dX at a time are whole waves.
        changes |= {"rank_in_middle": False, "column_groups": 256, "chunk": 1024}
        changes |= {"input_blocks": 6, "keep_factors": False}
    return Plan(**{**_HOPPER.__dict__, **changes})


def _small(tiles: Tiles, *, rows: int, columns: int) -> Plan:
    """A plan without descriptors, one tile shape for every product."""
    up = Tiles(max(16, tiles.bn // 2), tiles.bk, tiles.warps, tiles.stages)
    return Plan(
        rows=rows,
        half_rows=rows > 32,
        descriptors=False,
        group=4,
        up=up,
        down=tiles,
        d_hidden=tiles,
        d_input=tiles,
        chunk=1024,
        column_groups=16,
        middle_rows=32,
        middle_columns=columns,
        middle_warps=4,
        middle_stages=2,
        middle_registers=0,
        rank_in_middle=True,
        skinny_rows=min(32, rows),
        skinny_bk=64,
        skinny_stages=2,
        sum_rows=32,
        sum_columns=columns,
        sum_warps=4,
        sum_stages=2,
        output_rows=32,
        output_columns=2 * columns,
        output_warps=4,
        output_stages=2,
        input_blocks=0,
        keep_factors=True,
    )
