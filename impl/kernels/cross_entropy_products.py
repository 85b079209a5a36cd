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


class WeightGradient:
    """Gradient of the classifier weight (V, D): accumulated in fp32, returned in its own dtype.

    For a 16-bit weight the fp32 sums need twice the gradient's bytes. Half of them live in the
    storage of the tensor that is returned, so the peak is the fp32 accumulator and nothing more,
    and between forward and backward only the 16-bit gradient remains.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        vocabulary, dim = weight.shape
        wide = accumulation_dtype(weight.dtype)
        self.out = torch.empty(vocabulary, dim, device=weight.device, dtype=weight.dtype)
        self.split = 0
        pieces: list[tuple[int, torch.Tensor]] = []
        if wide == weight.dtype:
            pieces.append((0, self.out))
        else:
            if (vocabulary * dim) % 2 == 0 and vocabulary > 1:
                self.split = vocabulary // 2
                inner = self.out.view(-1).view(wide)[: self.split * dim].view(self.split, dim)
                pieces.append((0, inner))
            rest = torch.empty(vocabulary - self.split, dim, device=weight.device, dtype=wide)
            pieces.append((self.split, rest))
        self.pieces = pieces

    def add(self, offset: int, gradient: torch.Tensor, hidden: torch.Tensor, first: bool) -> None:
        """Add gradient^T @ hidden to the rows from `offset`; gradient is (tokens, width)."""
        end = offset + gradient.shape[1]
        for start, piece in self.pieces:
            low, high = max(offset, start), min(end, start + piece.shape[0])
            if low < high:
                part = gradient[:, low - offset : high - offset].t()
                product_into(piece[low - start : high - start], part, hidden, first)

    def result(self, factor: torch.Tensor) -> torch.Tensor:
        """The gradient times a one-element factor, in the weight's dtype; frees the fp32 sums."""
        start, last = self.pieces[-1]
        if self.out is last:
            return self.out.mul_(factor.to(self.out.dtype))
        if self.split:
            self._narrow_in_place(self.pieces[0][1], factor)
        torch.mul(last, factor, out=self.out[start:])
        self.pieces.clear()
        return self.out

    def _narrow_in_place(self, wide: torch.Tensor, factor: torch.Tensor) -> None:
        """Narrow fp32 rows that share the result's storage, in row ranges that double.

        Row r moves from byte 4rD to byte 2rD, so rows [a, 2a) land before the source's row a and
        after everything already moved; only the first range needs a temporary.
        """
        low = max(1, wide.shape[0] // 64)
        self.out[:low].copy_(torch.mul(wide[:low], factor))
        while low < wide.shape[0]:
            high = min(2 * low, wide.shape[0])
            torch.mul(wide[low:high], factor, out=self.out[low:high])
            low = high
