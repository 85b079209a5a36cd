"""Where the stock stack shows the symptoms of the specification's tables, on ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from conformance import batches, checkpoint
from conformance.gathering import local
from conformance.rank_steps import step
from conformance.spread import Job, gradients_of, size, storage

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


def fsdp1(job: Job, model: nn.Module, keep: bool = True) -> nn.Module:
    """Stock FSDP1 by decoder layer. keep: original parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    name = job.subject.model_spec.wrap_class
    layers = {type(m) for m in model.modules() if type(m).__name__ == name}
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=keep, device_id=torch.device("cpu")
    )


def flat_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of this rank's flat parameters, and of their gradients."""
    handles = [getattr(module, "_handle", None) for module in model.modules()]
    flat = {id(h.flat_param): h.flat_param for h in handles if h is not None}
    gradients = [p.grad for p in flat.values() if p.grad is not None]
    return size(list(flat.values())), size(gradients)


def flat_gradients(job: Job) -> Seen:
    """Bytes of gradients and of trained weights under FSDP1 with stock adapters, and what it says
    when original parameters are not kept."""
    said: BaseException | None = None
    try:
        fsdp1(job, stock(job, lora=True), keep=False)
    except ValueError as error:
        said = error
    model = fsdp1(job, stock(job, lora=True))
    stock_step(job, model)
    trained = size([local(p) for p in model.parameters() if p.requires_grad])
    return {
        "gradient bytes": flat_bytes(model)[1],
        "trained bytes": trained,
        "said": words(said),
    }


def packed(job: Job) -> nn.Module:
    """The installed class in four bits, packed into float32 as FSDP needs it, with adapters."""
    import peft
    import transformers

    model: Any = getattr(transformers, job.subject.model_spec.model_class).from_pretrained(
        job.path,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=torch.float32,
        ),
    )
    names = [
        n for n, m in model.named_modules() if hasattr(getattr(m, "weight", None), "quant_state")
    ]
    config = peft.LoraConfig(
        r=2, target_modules=[n for n in names if n.endswith(("q_proj", "v_proj"))]
    )
    found: nn.Module = peft.get_peft_model(model, config)
    return found


def packed_sharding(job: Job) -> Seen:
    """Bytes before, during and after FSDP1 shards a 4-bit model with adapters, and of a step."""
    from torch.distributed.fsdp import _flat_param

    handle: Any = _flat_param.FlatParamHandle
    model = packed(job)
    frozen = [p for p in model.parameters() if hasattr(p, "quant_state")]
    seen: Seen = {"packed": size(frozen), "before": storage(list(model.parameters())), "during": 0}
    flatten: Any = handle.flatten_tensors

    def watched(self: Any, tensors: list[torch.Tensor], *args: Any) -> torch.Tensor:
        flat: torch.Tensor = flatten(self, tensors, *args)
        held = storage([*model.parameters(), flat])
        seen["during"] = max(seen["during"], held)
        seen["unit"] = max(seen.get("unit", 0), size([flat]))
        return flat

    handle.flatten_tensors = watched
    try:
        spread = fsdp1(job, model)
    finally:
        handle.flatten_tensors = flatten
    seen["after"] = flat_bytes(spread)[0]
    stock_step(job, spread)
    trained = [p for p in spread.parameters() if p.requires_grad]
    return {
        **seen,
        "gradients": flat_bytes(spread)[1],
        "trained": size([local(p) for p in trained]),
    }


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
