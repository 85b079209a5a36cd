"""Where the stock stack shows the symptoms of the specification's tables, on ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from conformance import batches, checkpoint
from conformance.gathering import local
from conformance.rank_steps import step
from conformance.spread import Job, gradients_of, size

Seen = dict[str, Any]


def stock(job: Job, lora: bool = False) -> nn.Module:
    """The installed class, unpatched, with PEFT's adapters on queries and values where asked."""
    model: Any = checkpoint.build_stock(job.subject.model_spec)
    if lora:
        import peft

        inside = [n for n, m in model.named_modules() if type(m) is nn.Linear]
        names = [n for n in inside if n.endswith(("q_proj", "v_proj")) and "tower" not in n]
        config = peft.LoraConfig(r=2, target_modules=names, task_type=None)
        model = peft.get_peft_model(model, config)
    found: nn.Module = model
    return found


def stock_step(job: Job, model: nn.Module) -> None:
    """One backward of the model's own loss on this rank's rows."""
    batch = batches.stack(job.share(job.samples()))
    model(**batch).loss.backward()


def words(error: BaseException | None) -> str:
    """What an error says; empty for none."""
    return str(error) if error is not None else ""


def marked_twice(job: Job) -> Seen:
    """Stock DDP that looks for unused parameters over reentrant checkpoints; then the plan's."""
    from torch.nn.parallel import DistributedDataParallel

    model: Any = stock(job)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    said: BaseException | None = None
    try:
        stock_step(job, DistributedDataParallel(model, find_unused_parameters=True))
    except RuntimeError as error:
        said = error
    own = job.model(job.subject.case.setting)
    for _ in range(2):
        step(job, own, job.samples())
    return {"stock": words(said), "gradients": len(gradients_of(own))}


def hidden_config(job: Job) -> Seen:
    """Whether DDP hides `config`, and a step of a batch without type ids."""
    from torch.nn.parallel import DistributedDataParallel

    hides = not hasattr(DistributedDataParallel(stock(job)), "config")
    batch = job.batch(job.samples(), job.subject.case.setting)
    ids = [name for name in batch if name.endswith("token_type_ids")]
    own = job.model(job.subject.case.setting)
    return {"hides": hides, "type ids": ids, "loss": step(job, own, job.samples())}


def flat_gradients(job: Job) -> Seen:
    """Bytes of gradients and of trained weights under FSDP1 with stock adapters, and what it says
    when original parameters are not kept."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    def wrapped(keep: bool) -> nn.Module:
        model = stock(job, lora=True)
        layers = {
            type(m)
            for m in model.modules()
            if type(m).__name__ == job.subject.model_spec.wrap_class
        }
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=policy,
            use_orig_params=keep,
            device_id=torch.device("cpu"),
        )

    said: BaseException | None = None
    try:
        wrapped(False)
    except ValueError as error:
        said = error
    model = wrapped(True)
    kept: dict[int, int] = {}
    stock_step(job, model)
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        if handle is not None and handle.flat_param.grad is not None:
            grad = handle.flat_param.grad
            kept[id(grad)] = grad.numel() * grad.element_size()
    trained = size([local(p) for p in model.parameters() if p.requires_grad])
    return {"gradient bytes": sum(kept.values()), "trained bytes": trained, "said": words(said)}


def old_expert_flag(job: Job) -> Seen:
    """Experts on this rank where the stock loader is asked by the flag that 5.21 removed."""
    import transformers
    from transformers.distributed import DistributedConfig

    spec = job.subject.model_spec
    try:
        asked = DistributedConfig(enable_expert_parallel=True)
    except TypeError:
        return {"known": False}
    cls = getattr(transformers, spec.model_class)
    model = cls.from_pretrained(job.path, distributed_config=asked)
    found = next(p for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n)
    return {"known": True, "local": int(local(found).shape[0]), "in all": int(found.shape[0])}


def starved_adapters(model: nn.Module) -> list[str]:
    """Adapters that a backward left without gradient."""
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
