"""What single checks run on ranks, each a function of a `Job`; the same in one process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from conformance.gathering import LocalOptimizer, local
from conformance.observe import full
from conformance.spread import (
    EPSILON,
    RATE,
    Job,
    Tensors,
    digest,
    gradients_of,
    norm_of,
    parameters_of,
    saved,
)
from conformance.weights import canonical_name

Seen = dict[str, Any]


def step(job: Job, model: nn.Module, samples: list[Any], kind: str | None = None) -> float:
    """One backward on this rank's share of the samples; the loss over all ranks."""
    setting = job.subject.case.setting
    if kind is not None:
        setting = setting.but(batch=kind)
    return job.backward(model, job.batch(samples, setting), max(job.items(samples), 1.0))


def complaint(job: Job) -> tuple[str, bool]:
    """DDP's words when it is not told to look for unused parameters, and whether the plan's own
    form finishes two steps."""
    from torch.nn.parallel import DistributedDataParallel

    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "INFO"
    dist.set_debug_level_from_env()  # type: ignore[attr-defined]
    subject, said = job.subject, ""
    setting, samples = subject.case.setting, job.samples()
    plan = subject.plan(setting, options=job.options)
    model = subject.adopt(subject.impl.build(job.path, plan, job.mesh), plan, False)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    try:
        for _ in range(2):
            step(job, wrapped, samples)
    except RuntimeError as error:
        said = str(error)
    own = job.model(setting)
    for _ in range(2):
        step(job, own, samples)
    return said, bool(gradients_of(own))


def mixed_precision(job: Job) -> Seen:
    """A step in bfloat16: FSDP2 casts parameters and forward inputs; one process is bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    subject = job.subject
    setting = subject.case.setting
    if job.mesh is None:
        model = job.model(setting.but(dtype="bfloat16"))
    else:
        plan = subject.plan(setting, options=job.options)
        model = subject.adopt(subject.impl.build(job.path, plan, job.mesh), plan, False)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
        for module in list(model.modules()):
            if type(module).__name__ == subject.model_spec.wrap_class:
                fully_shard(module, mesh=job.mesh, mp_policy=policy)
        fully_shard(model, mesh=job.mesh, mp_policy=policy)
    before = {n: (str(b.dtype), digest(b)) for n, b in model.named_buffers()}
    kinds: list[str] = []
    handle = model.register_forward_hook(lambda m, a, out: kinds.append(str(out.logits.dtype)))
    samples = job.samples()
    loss = step(job, model, samples)
    handle.remove()
    after = {n: (str(b.dtype), digest(b)) for n, b in model.named_buffers()}
    gradients = gradients_of(model)
    return {
        "loss": loss,
        "norm": norm_of(gradients),
        "with gradient": set(gradients),
        "buffers": {n: (before[n], after[n]) for n in before},
        "logits": kinds[0],
    }


def loaded_state(job: Job) -> dict[str, tuple[str, str]]:
    """dtype and digest of every whole parameter and buffer after spreading, before any step."""
    model = job.model(job.subject.case.setting, anew=True)
    found = parameters_of(model)
    found |= {canonical_name(n): b.detach() for n, b in model.named_buffers()}
    return {name: (str(t.dtype), digest(t)) for name, t in found.items()}


def unlabelled(job: Job) -> Seen:
    """A batch of which the first half of the rows has no label, then one without any."""
    model = job.model(job.subject.case.setting)
    samples = job.samples()
    for sample in samples[: len(samples) // 2]:
        sample["labels"] = torch.full_like(sample["labels"], -100)
    own = sum(int((s["labels"][1:] != -100).sum()) for s in job.share(samples))
    step(job, model, samples)
    gradients = gradients_of(model)
    model.zero_grad(set_to_none=True)
    for sample in samples:
        sample["labels"] = torch.full_like(sample["labels"], -100)
    empty = step(job, model, samples)
    finite = all(bool(torch.isfinite(g).all()) for g in gradients_of(model).values())
    return {"gradients": gradients, "items": own, "empty": empty, "finite": finite}


def router_logits(job: Job) -> Seen:
    """The router logits of each layer over all ranks' tokens, as root mean squares."""
    setting = job.subject.case.setting
    model = job.model(setting)
    batch = job.batch(job.samples(), setting)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        found = model(**inputs, output_router_logits=True, use_cache=False).router_logits
    squares = [job.mean(full(layer).float().square().mean()) ** 0.5 for layer in found]
    return {"layers": len(squares), "logits": squares}


def images_on_one_rank(job: Job) -> Seen:
    """Rank 0's rows have images, the others' none; towers are trained."""
    setting = job.subject.case.setting.but(batch="images")
    model = job.model(setting)
    pictures, text = job.samples(kind="images")[:2], job.samples(kind="text")[:2]
    samples = pictures + text
    images = sum("pixel_values" in s for s in job.share(samples))
    step(job, model, samples, "images")
    return {"images": images, "gradients": gradients_of(model)}


def auxiliary(job: Job) -> Seen:
    """A step with the router's load-balancing loss; one process takes the ranks' rows in turn."""
    setting = job.subject.case.setting
    model = job.model(setting)
    samples = job.samples()
    if job.mesh is not None:
        return {"loss": step(job, model, samples), "gradients": gradients_of(model)}
    items, half = job.items(samples), len(samples) // 2
    parts = [samples[:half], samples[half:]]
    loss = sum(job.backward(model, job.batch(part, setting), items) for part in parts)
    return {"loss": loss, "gradients": gradients_of(model)}


def expert_steps(job: Job, names: tuple[str, ...] = (), steps: int = 3) -> dict[str, Seen]:
    """Several AdamW steps while fresh memory is filled with NaN, with each experts implementation
    (the plan's own where none is named)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        if not names:
            return {"": _expert_steps(job, steps)}
        return {
            name: _expert_steps(replace(job, options={"experts_implementation": name}), steps)
            for name in names
        }
    finally:
        torch.use_deterministic_algorithms(False)


def _expert_steps(job: Job, steps: int) -> Seen:
    """The steps with one implementation."""
    model, samples = job.model(job.subject.case.setting), job.samples()
    poisoned = bool(torch.empty(64).isnan().all())
    optimizer = LocalOptimizer(model, torch.optim.AdamW, lr=1e-4)
    losses = []
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        losses.append(step(job, model, samples))
        optimizer.step()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    finite = all(bool(torch.isfinite(local(g)).all()) for g in grads)
    return {"losses": losses, "poisoned": poisoned, "finite": finite}


def saved_adapter(job: Job) -> Tensors:
    """What `save` writes from all ranks, before any step; the adapter's factors are by name."""
    return saved(job, job.model(job.subject.case.setting))


def train_and_save(job: Job, folder: str) -> Seen:
    """One step of SGD, then `save`; the trained parameters as they are in memory."""
    model = job.model(job.subject.case.setting)
    step(job, model, job.samples())
    LocalOptimizer(model, torch.optim.SGD, lr=0.01).step()
    kept = parameters_of(model, trainable=True)
    job.subject.impl.save(model, Path(folder))
    if job.mesh is not None:
        dist.barrier()
    return {"parameters": kept if job.rank == 0 else {}}


def resume_and_step(job: Job, folder: str) -> Seen:
    """Load what was saved into a fresh base in one process, and take the gradients of a step."""
    subject = job.subject
    plan = subject.plan(options=job.options)
    base = subject.impl.build(job.path, plan)
    model = subject.impl.load(subject.adopt(base, plan, False), Path(folder))
    model.train()
    step(job, model, job.samples())
    return {"parameters": parameters_of(model, trainable=True), "gradients": gradients_of(model)}


def _exact_step(job: Job, model: nn.Module, optimizer: Any, seed: int) -> None:
    """One AdamW step in float64 on a batch of its own."""
    setting, samples = job.subject.case.setting.but(dtype="float64"), job.samples(seed)
    model.zero_grad(set_to_none=True)
    job.backward(model, job.batch(samples, setting), job.items(samples))
    optimizer.step()


def _adamw(model: nn.Module) -> Any:
    """The optimizer of a user: on the parameters as they are, DTensors among them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, eps=EPSILON)


def train_and_keep(job: Job, folder: str) -> None:
    """A step, then the weights by the implementation and the optimizer's state by torch."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
    )

    model = job.model(job.subject.case.setting.but(dtype="float64"))
    optimizer = _adamw(model)
    _exact_step(job, model, optimizer, 0)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=whole)
    job.subject.impl.save(model, Path(folder))
    if job.rank == 0:
        torch.save(state, Path(folder) / "optimizer.pt")
    dist.barrier()


def resume_and_train(job: Job, folder: str) -> Tensors:
    """The second step of `two_steps`, from what another number of ranks kept."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_optimizer_state_dict,
    )

    subject = job.subject
    plan = job.plan(subject.case.setting.but(dtype="float64"))
    base = subject.adopt(subject.impl.build(job.path, plan, job.mesh), plan, False)
    loaded = subject.impl.load(base, Path(folder)).train()
    model = subject.impl.parallelize(loaded, plan, job.mesh)
    optimizer = _adamw(model)
    state = torch.load(Path(folder) / "optimizer.pt")
    whole = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=whole)
    _exact_step(job, model, optimizer, 1)
    return parameters_of(model, trainable=True)


def two_steps(job: Job, forget: bool = False) -> Tensors:
    """Two AdamW steps on two batches; forget: by a fresh optimizer for the second."""
    model = job.model(job.subject.case.setting.but(dtype="float64"))
    optimizer = _adamw(model)
    _exact_step(job, model, optimizer, 0)
    _exact_step(job, model, _adamw(model) if forget else optimizer, 1)
    return parameters_of(model, trainable=True)
