"""Gradient of the classifier weight: fp32 sums that share storage with the 16-bit result.

Before the sums exist their storage is free: `kept_tiles` puts a chunk's logits there.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from .cross_entropy_products import accumulation_dtype, product_into


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

    def slices(self, width: int) -> list[tuple[int, torch.Tensor]]:
        """(first row, fp32 rows) of cuts of at most `width` rows, equal within each piece."""
        found = []
        for start, piece in self.pieces:
            rows = piece.shape[0]
            step = -(-rows // -(-rows // width))
            found += [(start + low, piece[low : low + step]) for low in range(0, rows, step)]
        return found

    def kept_tiles(
        self, tokens: int, width: int, last: torch.Tensor
    ) -> list[tuple[int, torch.Tensor]]:
        """(first column, uninitialised tile) of every slice: logits of a first chunk of tokens.

        Tile s lies where the sums of slice s + 1 will be, the last one in `last`: so the sums of
        slice s may be written, in order, as soon as the tiles before it are spent.
        """
        cuts = self.slices(width)
        tiles = []
        for (low, rows), (_, room) in pairwise(cuts):
            flat = room.reshape(-1).view(last.dtype)
            tiles.append((low, flat[: tokens * rows.shape[0]].view(tokens, rows.shape[0])))
        low, rows = cuts[-1]
        return [*tiles, (low, last[:tokens, : rows.shape[0]])]

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
