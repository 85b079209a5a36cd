"""What `test_parallel.py` runs on ranks: a step under a strategy, against the same step in one
process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from conformance.ranks import RankContext
from impl import context_parallel, parallel, parallel_tensor
from impl.errors import Refused
from impl.parallel_plan import ParallelPlan
from tests import tiny_models

Evidence = dict[str, Any]
EPSILON = 1e-6
"""Of AdamW: an element whose gradient is the noise of float32 islands (1e-9) must not move at full
rate."""


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
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    targets = context_parallel.local_targets(model, shifted)
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
    model = tiny_models.build(
        name, options.get("dtype", torch.float32), **options.get("config", {})
    )
    for part in options.get("freeze", ()):
        getattr(model.model, part).requires_grad_(False)
    if options.get("checkpointing"):
        reentrant = options["checkpointing"] == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if options.get("lora"):
        model = tiny_models.lora(model, options["lora"], options.get("lora_parameters"))
    return model


def single(name: str, options: dict[str, Any], batch: dict[str, torch.Tensor]) -> Evidence:
    """The oracle: one process."""
    return measure(prepared(name, options), batch, ParallelPlan("single"), None)


Job = tuple[str, str, dict[str, Any], dict[str, torch.Tensor]]
"""Tiny model, strategy, options, batch."""


def steps(context: RankContext, jobs: list[Job]) -> list[Evidence]:
    """One step of each job: strategies that spread a prepared model."""
    results = []
    for name, strategy, options, batch in jobs:
        wrap = (tiny_models.wrap_class(name),)
        plan = ParallelPlan.of(strategy, wrap, context.world_size, **options.get("plan", {}))
        mesh = mesh_of(strategy, context.world_size)
        model = parallel.parallelize(prepared(name, options), plan, mesh)
        evidence = measure(model, batch, plan, mesh)
        if options.get("save"):
            parallel.save_adapter(model, Path(options["save"]))
        results.append(evidence if context.rank == 0 else fingerprint(evidence))
    return results


def fingerprint(evidence: Evidence) -> Evidence:
    """What other ranks return: enough to see that they agree with rank 0."""
    gradients = {name: tensor.double().sum() for name, tensor in evidence["gradients"].items()}
    parameters = {name: tensor.double().sum() for name, tensor in evidence["parameters"].items()}
    return {**evidence, "gradients": gradients, "parameters": parameters}


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


def loaded_single(
    name: str, path: Path, options: dict[str, Any], batch: dict[str, torch.Tensor]
) -> Evidence:
    """The oracle of a strategy that shards while loading: the same checkpoint in one process."""
    plan = ParallelPlan("single")
    return measure(loaded(name, path, options, plan), batch, plan, None)


def sharded_steps(context: RankContext, path: Path, jobs: list[Job]) -> list[Evidence]:
    """One step of each job: strategies that shard while loading, all from one checkpoint."""
    results = []
    for name, strategy, options, batch in jobs:
        plan = ParallelPlan.of(strategy, (tiny_models.wrap_class(name),), context.world_size)
        model = loaded(name, path, options, plan)
        evidence = measure(model, batch, plan, None)
        evidence["experts"] = parallel_tensor.local_expert_counts(model)
        results.append(evidence if context.rank == 0 else fingerprint(evidence))
    return results


def accumulated(context: RankContext, strategy: str, synced: bool) -> dict[str, torch.Tensor]:
    """Gradients of two micro-batches, reduced once or twice."""
    plan = ParallelPlan.of(strategy, (tiny_models.wrap_class("mixtral"),), context.world_size)
    mesh = mesh_of(strategy, context.world_size)
    model = parallel.parallelize(tiny_models.build("mixtral"), plan, mesh)
    batch = share(tiny_models.rows(8), plan, context.rank)
    scale = parallel.reduce_loss_scale(parallel.count_items(batch["labels"]), plan, mesh)
    first, second = ({k: v.chunk(2)[i] for k, v in batch.items()} for i in range(2))
    with contextlib.nullcontext() if synced else parallel.no_sync(model):
        loss_of(model, first, scale).backward()
    loss_of(model, second, scale).backward()
    return parallel.full_gradients(model)


def clipped(context: RankContext, strategy: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The norm before clipping to 0.1, and the gradients after."""
    plan = ParallelPlan.of(strategy, (tiny_models.wrap_class("mixtral"),), context.world_size)
    mesh = mesh_of(strategy, context.world_size) if strategy != "single" else None
    model = parallel.parallelize(tiny_models.build("mixtral"), plan, mesh)
    mine = share(tiny_models.rows(), plan, context.rank)
    scale = parallel.reduce_loss_scale(parallel.count_items(mine["labels"]), plan, mesh)
    loss_of(model, mine, scale).backward()
    norm = parallel.clip_grad_norm(model, 0.1, plan)
    return norm, parallel.full_gradients(model)


def own_loss(context: RankContext, name: str, strategy: str) -> torch.Tensor:
    """The loss that the model itself computes from labels, over all ranks."""
    plan = ParallelPlan.of(strategy, (tiny_models.wrap_class(name),), context.world_size)
    mesh = mesh_of(strategy, context.world_size)
    model = parallel.parallelize(tiny_models.build(name), plan, mesh)
    mine = share(tiny_models.rows(), plan, context.rank)
    scale = parallel.reduce_loss_scale(parallel.count_items(mine["labels"]), plan, mesh)
    return parallel.global_loss(model(**mine, num_items_in_batch=scale).loss, plan)


def refusal(context: RankContext, name: str, strategy: str, options: dict[str, Any]) -> str:
    """What `parallelize` and a forward say, empty if they do not refuse."""
    plan = ParallelPlan.of(
        strategy, options.pop("wrap", (tiny_models.wrap_class(name),)), context.world_size
    )
    try:
        model = parallel.parallelize(prepared(name, options), plan, mesh_of(strategy, 2))
        model(**options.get("batch", tiny_models.rows()))
    except Refused as reason:
        return str(reason)
    return ""


def local_bytes(
    context: RankContext, name: str, strategies: list[str], path: Path
) -> list[tuple[int, int]]:
    """Bytes of weights and gradients that this rank holds after a backward, by strategy."""
    results = []
    for strategy in strategies:
        plan = ParallelPlan.of(strategy, (tiny_models.wrap_class(name),), context.world_size)
        if strategy in ("tp", "tp_ep", "fsdp2_ep"):
            model = loaded(name, path, {}, plan)
        else:
            mesh = mesh_of(strategy, context.world_size)
            model = parallel.parallelize(tiny_models.build(name), plan, mesh)
        loss_of(model, tiny_models.rows(), torch.tensor(1.0)).backward()
        local = [parallel._local(p) for p in model.parameters()]
        grads = [parallel._local(p.grad) for p in model.parameters() if p.grad is not None]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in local)
        results.append((weights, sum(g.numel() * g.element_size() for g in grads)))
    return results
