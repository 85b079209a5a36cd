"""Matrix products of the linear cross-entropy: into buffers we own, accumulated in fp32.

The vendor library does all products. `out_dtype` (torch 2.8 and newer, CUDA) gives an fp32 result
from 16-bit operands without a 16-bit rounding in between; elsewhere operands are widened.
"""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = a @ b for any floating dtypes."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out += a @ b for any floating dtypes."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """out = a @ b for the first term of a sum (out may be uninitialised), out += a @ b after it."""
    if first:
        multiply(out, a, b)
    else:
        add_product(out, a, b)
