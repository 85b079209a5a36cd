"""Bytes that stay alive, counted from outside: on a GPU the allocator's own, on a CPU by storages.

On a CPU every storage that an operation returns is remembered weakly while the watch is open, the
copies of an offloader among them; what nobody holds any more is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageWatch(TorchDispatchMode):
    """Remembers what is allocated by operations inside the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()  # of every tensor with a storage of its own
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and _address(tensor) not in given:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._made[storage._cdata] = (reference, storage.nbytes())
                self.shapes.add(tuple(tensor.shape))
        return result

    def alive(self) -> int:
        """Bytes of the storages made since the watch was opened that someone still holds."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
