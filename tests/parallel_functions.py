"""What `test_parallel.py` runs on ranks: a step under a strategy, against the same step in one process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from conformance.ranks import RankContext
from impl import context_parallel, parallel, parallel_tensor
from impl.parallel_plan import ParallelPlan
from tests import tiny_models

Evidence = dict[str, Any]
EPSILON = 1e-6
"""Of AdamW: an element whose gradient is the noise of float32 islands (1e-9) must not move at full rate."""


def mesh_of(strategy: str, world: int) -> Any:
    """The device mesh of a strategy."""
    if strategy == "hsdp":
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world,), mesh_dim_names=("ranks",))


def share(batch: dict[str, torch.Tensor], plan: ParallelPlan, rank: int) -> dict[str, torch.Tensor]:
    """This rank's rows; the whole batch where ranks share it."""
    if plan.data == 1:
        return batch
    return {name: value.chunk(plan.data)[rank] for name, value in batch.items()}


def loss_of(model: Any, batch: dict[str, torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy over `scale`, in the logits' own dtype (transformers' is float32)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    handle = context_parallel.handle_of(model)
    if handle is not None:
        targets = handle.split_labels(batch["labels"])
    else:
        targets, logits = batch["labels"][:, 1:], logits[:, :-1]
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / scale


def measure(model: Any, batch: dict[str, torch.Tensor], plan: ParallelPlan, mesh: Any) -> Evidence:
    """Loss, gradients, and parameters after one AdamW step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = share(batch, plan, rank)
    items = parallel.count_items(mine["labels"])
    scale = parallel.reduce_loss_scale(items, plan, mesh)
    loss = loss_of(model, mine, scale)
    loss.backward()
    evidence: Evidence = {
        "loss": parallel.global_loss(loss, plan),
        "gradients": parallel.full_gradients(model),
    }
    norm = parallel.clip_grad_norm(model, 1e9, plan)
    evidence["norm"] = norm
    torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPSILON).step()
    evidence["parameters"] = parallel.full_parameters(model)
    return evidence


def prepared(name: str, options: dict[str, Any]) -> Any:
    """A model in a setting: dtype, checkpointing, adapters, frozen towers."""
    model = tiny_models.build(name, options.get("dtype", torch.float32), **options.get("config", {}))
    for part in options.get("freeze", ()):
        getattr(model.model, part).requires_grad_(False)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if options.get("lora"):
        model = tiny_models.lora(model, options["lora"], options.get("lora_parameters"))
    return model


def single(name: str, options: dict[str, Any], batch: dict[str, torch.Tensor]) -> Evidence:
    """The oracle: one process."""
    return measure(prepared(name, options), batch, ParallelPlan("single"), None)


def step(
    context: RankContext, name: str, strategy: str, options: dict[str, Any], batch: dict[str, torch.Tensor]
) -> Evidence:
    """One step under a strategy that spreads a prepared model."""
    wrap = (tiny_models.wrap_class(name),)
    plan = ParallelPlan.of(strategy, wrap, context.world_size, **options.get("plan", {}))
    mesh = mesh_of(strategy, context.world_size)
    model = parallel.parallelize(prepared(name, options), plan, mesh)
    return measure(model, batch, plan, mesh)


def checkpoint(name: str, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a tiny model to a directory."""
    tiny_models.build(name, dtype).save_pretrained(path)


def loaded(name: str, path: Path, options: dict[str, Any], plan: ParallelPlan) -> Any:
    """The checkpoint's model, sharded if the plan says so, with the adapter asked for."""
    extra = {k: options[k] for k in ("dtype", "experts_implementation") if k in options}
    model_class = type(tiny_models.build(name))
    if plan.strategy == "single":
        model = model_class.from_pretrained(path, **extra)
    else:
        model = parallel_tensor.load_sharded(model_class, path, plan, **extra)
    model.train()
    if options.get("lora"):
        model = tiny_models.lora(model, options["lora"], options.get("lora_parameters"))
    return parallel.parallelize(model, plan)


def loaded_single(name: str, path: Path, options: dict[str, Any], batch: dict[str, torch.Tensor]) -> Evidence:
    """The oracle of a strategy that shards while loading: the same checkpoint in one process."""
    plan = ParallelPlan("single")
    return measure(loaded(name, path, options, plan), batch, plan, None)


def sharded_step(
    context: RankContext, name: str, strategy: str, path: Path, options: dict[str, Any], batch: dict[str, torch.Tensor]
) -> Evidence:
    """One step under a strategy that shards while loading."""
    plan = ParallelPlan.of(strategy, (tiny_models.wrap_class(name),), context.world_size)
    model = loaded(name, path, options, plan)
    evidence = measure(model, batch, plan, None)
    evidence["experts"] = parallel_tensor.local_expert_counts(model)
    return evidence
