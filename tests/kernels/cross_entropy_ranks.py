"""What the cross-entropy tests run on ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from conformance.ranks import RankContext
from impl.kernels import cross_entropy_models
from impl.kernels.cross_entropy_parallel import vocabulary_parallel_cross_entropy
from tests import tiny_models


def vocabulary_parallel(context: RankContext, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loss and gradients from this rank's unequal share of the vocabulary, and the gathers made."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64).requires_grad_()
    weight, bias = torch.randn(101, 16).double(), torch.randn(101).double()
    labels = torch.randint(0, 101, (2, 9))
    labels[0, :4] = -100
    start, end = (0, 37) if context.rank == 0 else (37, 101)
    shard = weight[start:end].clone().requires_grad_()
    shard_bias = bias[start:end].clone().requires_grad_()
    gathered: list[int] = []
    original = dist.all_gather_into_tensor

    def counted(out: torch.Tensor, mine: torch.Tensor, **kwargs: Any) -> Any:
        gathered.append(mine.numel())
        return original(out, mine, **kwargs)

    dist.all_gather_into_tensor = counted
    try:
        loss = vocabulary_parallel_cross_entropy(
            hidden, shard, labels, vocabulary_start=start, vocabulary=101, bias=shard_bias,
            memory_budget=(1 << 20) + 2000, **options,
        )  # fmt: skip
        loss.backward()
    finally:
        dist.all_gather_into_tensor = original
    assert hidden.grad is not None and shard.grad is not None and shard_bias.grad is not None
    return {
        "loss": loss.detach(), "hidden": hidden.grad, "weight": shard.grad,
        "bias": shard_bias.grad, "gathered": torch.tensor(gathered),
    }  # fmt: skip


def sharded_step(context: RankContext, name: str, strategy: str, fused: bool) -> dict[str, Any]:
    """Loss and gathered gradients of one step of a tiny model under DDP or FSDP2."""
    model = tiny_models.build(name)
    enabled = cross_entropy_models.enable(model) if fused else None
    if strategy == "ddp":
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        for layer in model.modules():
            if type(layer).__name__ == tiny_models.wrap_class(name):
                fully_shard(layer)
        if strategy == "fsdp2+head":
            fully_shard(model.lm_head)
        wrapped = fully_shard(model)
    batch = {n: t.chunk(2)[context.rank] for n, t in tiny_models.rows().items()}
    loss = wrapped(**batch, num_items_in_batch=torch.tensor(30), use_cache=False).loss
    loss.backward()
    whole = {}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            whole[key] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return {"loss": loss.detach(), "grads": whole, "calls": enabled.calls if enabled else 0}
