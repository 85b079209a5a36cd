"""Gradient of the classifier weight: fp32 sums that share storage with the 16-bit result.

Before the sums exist their storage is free, and holds the logits of a first chunk of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cross_entropy_products import accumulation_dtype, product_into
from .cross_entropy_rows import RowOperations


class WeightGradient:
    """Gradient of the classifier weight (V, D): accumulated in fp32, returned in its own dtype.

    For a 16-bit weight the fp32 sums need twice the gradient's bytes. Half of them live in the
    storage of the tensor that is returned, so the peak is the fp32 accumulator and nothing more,
    and between forward and backward only the 16-bit gradient remains. `spare` bytes are allocated
    behind the other half: see `tail` and `first_tiles`.
    """

    def __init__(self, weight: torch.Tensor, spare: int = 0) -> None:
        vocabulary, dim = weight.shape
        self.wide = accumulation_dtype(weight.dtype)
        self.out = torch.empty(vocabulary, dim, device=weight.device, dtype=weight.dtype)
        self.split = vocabulary
        if self.wide != weight.dtype:
            self.split = vocabulary // 2 if (vocabulary * dim) % 2 == 0 else 0
        rest = (vocabulary - self.split) * dim * self.wide.itemsize
        self.arena = torch.empty(rest + spare, device=weight.device, dtype=torch.uint8)
        pieces = [(0, self._view(_bytes(self.out), 0, self.split, dim, self.wide))]
        pieces += [(self.split, self._view(self.arena, 0, vocabulary - self.split, dim, self.wide))]
        self.pieces = [(start, piece) for start, piece in pieces if piece.numel()]
        self._rest = rest

    @staticmethod
    def _view(
        store: torch.Tensor, at: int, rows: int, columns: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """(rows, columns) in the bytes of `store` from `at`."""
        size = rows * columns * dtype.itemsize
        return store[at : at + size].view(dtype).view(rows, columns)

    def tail(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Whole rows of logits (tokens, V) in the spare bytes, each of whole 64 elements."""
        vocabulary = self.out.shape[0]
        rows = self._view(self.arena, self._rest, tokens, padded(vocabulary), dtype)
        return rows[:, :vocabulary]

    def first_tiles(self, room: Room) -> list[tuple[int, torch.Tensor]]:
        """(first column, uninitialised tile) in the order in which `add` may take them, each once.

        A tile's sums never overlap a tile that is still to be added: tiles lie at the end of their
        storage and sums grow from its beginning (`Room`).
        """
        (tokens, width), dtype = (room.tokens, room.width), room.dtype
        out, arena = _bytes(self.out), self.arena
        lows = list(range(0, self.out.shape[0], width))
        homes = [(out, out.numel() - (room.inside - i) * room.tile) for i in range(room.inside)]
        others = len(lows) - room.inside
        homes += [(arena, arena.numel() - (others - i) * room.tile) for i in range(others)]
        return [
            (low, self._view(store, at, tokens, width, dtype))
            for low, (store, at) in zip(lows, homes, strict=True)
        ]

    def add(self, offset: int, gradient: torch.Tensor, hidden: torch.Tensor, first: bool) -> None:
        """Add gradient^T @ hidden to the rows from `offset`; gradient is (tokens, width)."""
        end = offset + gradient.shape[1]
        for start, piece in self.pieces:
            low, high = max(offset, start), min(end, start + piece.shape[0])
            if low < high:
                part = gradient[:, low - offset : high - offset].t()
                product_into(piece[low - start : high - start], part, hidden, first)

    def result(self, factor: torch.Tensor, ops: RowOperations) -> torch.Tensor:
        """The gradient times a one-element factor, in the weight's dtype; frees the fp32 sums."""
        if self.wide == self.out.dtype:
            return self.out.mul_(factor.to(self.out.dtype))
        for start, piece in self.pieces:
            if start < self.split:
                self._narrow_in_place(piece, factor, ops)
            else:
                ops.scale(piece, factor, self.out[start:])
        self.pieces.clear()
        self.arena = self.arena[:0].clone()
        return self.out

    def _narrow_in_place(
        self, wide: torch.Tensor, factor: torch.Tensor, ops: RowOperations
    ) -> None:
        """Narrow fp32 rows that share the result's storage, in row ranges that double.

        Row r moves from byte 4rD to byte 2rD, so rows [a, 2a) land before the source's row a and
        after everything already moved; only the first range needs a temporary.
        """
        low = max(1, wide.shape[0] // 64)
        self.out[:low].copy_(torch.mul(wide[:low], factor))
        while low < wide.shape[0]:
            high = min(2 * low, wide.shape[0])
            ops.scale(wide[low:high], factor, self.out[low:high])
            low = high


@dataclass(frozen=True)
class Room:
    """Where the logits of a first chunk of tokens lie in the storage of the weight's gradient.

    The vocabulary is cut into slices of `width` columns; a slice's logits take `tile` bytes, its
    sums `sums` bytes. `inside` tiles lie in the result's storage, the others in the arena, which
    needs `spare` bytes behind its sums.
    """

    tokens: int
    width: int
    dtype: torch.dtype
    inside: int
    tile: int
    spare: int

    @classmethod
    def plan(
        cls, weight: torch.Tensor, tokens: int, slices: int, dtype: torch.dtype
    ) -> Room | None:
        """The layout for so many slices; None where they are not equal, or rows not aligned."""
        vocabulary, dim = weight.shape
        wide = accumulation_dtype(weight.dtype)
        halves = 1 if wide == weight.dtype else 2
        width = vocabulary // slices
        aligned = slices == halves or width * dtype.itemsize % 16 == 0
        if vocabulary % slices or slices % halves or not aligned:
            return None
        tile = -(-tokens * width * dtype.itemsize // 16) * 16
        sums, mine = width * dim * wide.itemsize, slices // halves
        store = mine * sums
        # The first sums end before the first tile, the last ones before the last tile.
        inside = max(0, min(mine, (store - sums) // tile, _before(store - tile, sums, mine)))
        over, rest = mine - inside, slices - mine
        spare = (over + rest) * tile - rest * sums
        if rest:
            spare = max(spare, sums + rest * tile - rest * sums, tile)
        return cls(tokens, width, dtype, inside, tile, max(spare, 0))


def _before(end: int, sums: int, most: int) -> int:
    """How many sums fit before `end`, at most `most`."""
    return max(0, min(most, end // sums))


def padded(columns: int) -> int:
    """Columns rounded up to whole lines of 128 bytes (64 elements of 16 bits)."""
    return -(-columns // 64) * 64


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's storage, byte by byte."""
    return tensor.view(-1).view(torch.uint8)
