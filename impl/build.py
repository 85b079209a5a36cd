"""The model of a checkpoint directory, loaded as it should be, or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, Refused
from .prepare import STOCK_EXPERTS
from .training_plan import TrainingPlan


def build(path: Path | str, plan: TrainingPlan, mesh: Any = None) -> nn.Module:
    """Load a checkpoint directory by its config's `architectures`, in the plan's dtype.

    attention and experts implementation are the plan's (one of our own experts kernels is switched
    on by `prepare`); float64 runs the experts eagerly, since grouped_mm refuses it. A plan with a
    4-bit LoRA quantises linear layers and 3-D expert weights while loading.
    mesh: a DeviceMesh where the strategy shards while loading (tp, tp_ep, fsdp2_ep); else unused.
    Raises ConfigError for a directory that cannot be read, Refused for missing or unexpected keys
    and for a request that did not take effect.
    """
    config, cls = _config_and_class(Path(path))
    kwargs: dict[str, Any] = {"dtype": getattr(torch, plan.dtype), "config": config}
    if plan.attn_implementation:
        kwargs["attn_implementation"] = _attention(config, plan.attn_implementation)
    experts = _experts(plan)
    if experts:
        kwargs["experts_implementation"] = experts
    if plan.lora is not None and plan.lora.quantize_4bit:
        from .quantize import load_4bit

        return load_4bit(cls, Path(path), plan, kwargs)
    if mesh is not None:
        return _sharded(cls, Path(path), plan, kwargs)
    return load_loudly(cls, Path(path), kwargs)


def build_key(plan: TrainingPlan) -> tuple[Any, ...] | None:
    """What `build` reads of a plan: plans of one key load the same model from a checkpoint.

    None where the strategy shards while loading: each rank has its own part.
    """
    from .plan_draft import SHARDED_WHILE_LOADING

    if plan.strategy in SHARDED_WHILE_LOADING:
        return None
    quantised = plan.strategy if plan.lora is not None and plan.lora.quantize_4bit else None
    return (plan.dtype, plan.attn_implementation, _experts(plan), quantised)


def _attention(config: Any, wanted: str) -> str | dict[str, str]:
    """Per part where one part has no such form: the audio tower of gemma4 is eager only."""
    if wanted == "eager" or getattr(config, "audio_config", None) is None:
        return wanted
    return {"": wanted, "audio_config": "eager"}


def load_loudly(cls: Any, path: Path, kwargs: dict[str, Any]) -> nn.Module:
    """`from_pretrained` that refuses missing, unexpected and mismatched keys."""
    model, info = cls.from_pretrained(path, output_loading_info=True, **kwargs)
    wrong = {
        kind: sorted(map(str, info.get(kind) or ()))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    }
    for kind, keys in wrong.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise Refused(f"{path}: {kind.replace('_', ' ')}: {keys[0]}{more}")
    assert isinstance(model, nn.Module)
    return model


def _config_and_class(path: Path) -> tuple[Any, Any]:
    import transformers

    file = path / "config.json"
    try:
        written = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    names = written.get("architectures") or []
    cls = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if cls is None:
        raise ConfigError(f"{file}: architectures {names} name no class of this transformers")
    return cls.config_class.from_pretrained(path), cls


def _experts(plan: TrainingPlan) -> str | None:
    wanted = plan.experts_implementation
    if plan.dtype == "float64" and (wanted == "grouped_mm" or wanted not in STOCK_EXPERTS):
        return "eager"  # also until `prepare` switches to a kernel of our own
    return wanted if wanted in STOCK_EXPERTS else None


def _sharded(cls: Any, path: Path, plan: TrainingPlan, kwargs: dict[str, Any]) -> nn.Module:
    """Tensor or expert parallel, sharded by transformers while it loads."""
    import torch.distributed as dist

    from .parallel_plan import ParallelPlan
    from .parallel_tensor import load_sharded
    from .plan_draft import SHARDED_WHILE_LOADING

    if plan.strategy not in SHARDED_WHILE_LOADING:
        return load_loudly(cls, path, kwargs)
    spread = ParallelPlan.of(plan.strategy, plan.wrap_classes, dist.get_world_size())
    return load_sharded(cls, path, spread, **kwargs)
