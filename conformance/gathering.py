"""Whole tensors from shards in a few collectives, and optimizers that step each rank's own part.

`DTensor.full_tensor` is one collective a tensor, and an optimizer on DTensors plans the sharding of
every single operation: on tiny models these two cost more than all forward and backward passes. So
shards of one layout travel together and are put together here, by the definition of `Shard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conformance.observe import full


def local(tensor: Tensor) -> Tensor:
    """This rank's part; the same storage, no graph."""
    part: Any = tensor
    if hasattr(tensor, "to_local"):
        with torch.no_grad():  # else it is an operation of its own, as `DTensor.detach` is
            part = part.to_local()
    found: Tensor = part.detach()
    return found


def gathered(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor whole, a CPU copy of its own, in the given order. All ranks of a layout call it
    with the same names."""
    found: dict[str, Tensor] = {}
    bunches: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in named.items():
        where = _sharded_over(tensor)
        if where is None:
            found[name] = full(tensor)
        else:
            bunches.setdefault((*where, tensor.dtype), []).append(name)
    for (mesh, dim, _), names in bunches.items():
        found |= _together({name: named[name] for name in names}, mesh, dim)
    return {name: found[name] for name in named}


def _sharded_over(tensor: Tensor) -> tuple[Any, int] | None:
    """The mesh and its one dimension over which a tensor is evenly cut, if that is its layout."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(tensor, DTensor):
        return None
    cut = [d for d, p in enumerate(tensor.placements) if type(p) is Shard]
    rest = [p for d, p in enumerate(tensor.placements) if d not in cut]
    if len(cut) != 1 or not all(p.is_replicate() for p in rest):
        return None
    return tensor.device_mesh, cut[0]


def _together(named: Mapping[str, Tensor], mesh: Any, dim: int) -> dict[str, Tensor]:
    """Tensors sharded over one mesh dimension, through one collective."""
    group, ranks = mesh.get_group(dim), mesh.size(dim)
    shapes = {name: _shapes(tensor, dim, ranks) for name, tensor in named.items()}
    sizes = [sum(s[rank].numel() for s in shapes.values()) for rank in range(ranks)]
    mine = torch.cat([local(tensor).reshape(-1) for tensor in named.values()])
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
    rows = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(rows, padded, group=group)
    parts = [
        torch.split(row[: sizes[rank]].cpu(), [s[rank].numel() for s in shapes.values()])
        for rank, row in enumerate(rows)
    ]
    found = {}
    for index, (name, tensor) in enumerate(named.items()):
        pieces = [parts[r][index].view(shapes[name][r]) for r in range(ranks)]
        placement: Any = tensor.placements[dim]  # type: ignore[attr-defined]
        found[name] = torch.cat(pieces, placement.dim)
    return found


def _shapes(tensor: Any, dim: int, ranks: int) -> list[torch.Size]:
    """The shape of each rank's part: as `torch.chunk` cuts, empty where nothing is left."""
    axis = tensor.placements[dim].dim % tensor.dim()
    whole = tensor.shape[axis]
    chunk = -(-whole // ranks)
    lengths = [max(0, min(chunk, whole - rank * chunk)) for rank in range(ranks)]
    return [torch.Size((*tensor.shape[:axis], n, *tensor.shape[axis + 1 :])) for n in lengths]


class LocalOptimizer:
    """An elementwise optimizer on each rank's own part of the trainable parameters."""

    def __init__(self, model: nn.Module, kind: Any, **options: Any) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.parts = [nn.Parameter(local(p)) for p in self.parameters]
        self.optimizer = kind(self.parts, foreach=True, **options)

    def step(self) -> None:
        """One step with the gradients that the parameters have now."""
        for parameter, part in zip(self.parameters, self.parts, strict=True):
            part.data = local(parameter)  # FSDP1 makes its views anew
            part.grad = None if parameter.grad is None else local(_laid_out_as(parameter))
        self.optimizer.step()


def _laid_out_as(parameter: Any) -> Tensor:
    """A parameter's gradient, cut as the parameter is (a head's may be whole beside its shard)."""
    gradient: Any = parameter.grad
    wanted = getattr(parameter, "placements", None)
    if wanted is None or getattr(gradient, "placements", None) in (None, wanted):
        found: Tensor = gradient
    else:
        found = gradient.redistribute(parameter.device_mesh, wanted)
    return found
