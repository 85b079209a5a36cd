"""The bridge to the reference implementation: the only module that knows both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from conformance.implementation import Capability, Exclusion
from conformance.paths import reference_package

_ROOT = reference_package()


def _part(name: str) -> Any:
    """A module of the reference implementation, imported on first use (it needs torch)."""
    return import_module(f"{_ROOT}.{name}")


# The contract's options under the names of the specification.
_WISHES = {
    "lora_targets": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "peft_use_rslora",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
}

FSDP1_ADAPTERS = Exclusion(
    "FSDP1 keeps gradient storage for nearly the whole flat parameter, frozen weights included"
    " (98 % of it for gemma4-moe, 74 times the trainable share): use fsdp2 for adapters",
    settings=frozenset({"lora", "lora-experts", "qlora"}),
    strategies=frozenset({"fsdp1"}),
)


def _shared_in_cache(modelling: str) -> Callable[[], str | None]:
    """The probe of one family's keys and values, asked once."""
    return cache(lambda: _part("patches.shared_kv_in_cache").why_not(modelling))


SHARED_KEYS = tuple(
    Exclusion(
        "before huggingface/transformers#45242 keys and values are shared through the cache alone",
        traits=frozenset({"kv_sharing"}),
        models=frozenset(models),
        probe=_shared_in_cache(modelling),
    )
    for modelling, models in (("gemma3n", ("gemma3n",)), ("gemma4", ("gemma4-e2b", "gemma4-e4b")))
)
STATIC_CACHE = Exclusion(
    "before transformers 5.12 a static cache has no layers where none shares keys and values",
    models=frozenset({"gemma4-dense", "gemma4-moe", "gemma4-text"}),
    checks=frozenset({"A07"}),
    probe=cache(lambda: _part("patches.static_cache_without_layers").why_not()),
)

CPU_RANKS = Exclusion(
    "up to transformers 5.17 (not in 5.23) Trainer reads the optimizer to `cpu:0` on CPU ranks",
    strategies=frozenset({"ddp"}),
    checks=frozenset({"F23", "F24"}),
    probe=cache(lambda: _part("fit").no_resume_on_cpu_ranks()),
)


class Reference:
    """`impl/` through the contract."""

    name = "reference"
    capabilities = (
        Capability("plan"),
        Capability("build"),
        Capability("prepare", excludes=(*SHARED_KEYS, STATIC_CACHE)),
        Capability("parallelize", excludes=(FSDP1_ADAPTERS,)),
        Capability("collate"),
        Capability("chat"),
        Capability("loss", excludes=SHARED_KEYS),
        Capability("fit", excludes=SHARED_KEYS),
        Capability("save", excludes=SHARED_KEYS),
        Capability("load", excludes=SHARED_KEYS),
        Capability("resume", excludes=(*SHARED_KEYS, CPU_RANKS)),
        Capability("merge", excludes=SHARED_KEYS),
        Capability("experts"),
        Capability("linear_cross_entropy"),
        Capability("normalize_weight_scales"),
    )
    expectations = ()

    @property
    def refusals(self) -> tuple[type[BaseException], ...]:
        """How it declines."""
        return (_part("errors").Refused,)

    def plan(self, config: Any, setting: Any, strategy: str, **options: Any) -> Any:
        """Every decision with its reason."""
        wishes = {_WISHES.get(name, name): value for name, value in options.items()}
        return _part("plan").plan(config, setting, strategy, **wishes)

    def build(self, path: Path, plan: Any, mesh: Any = None) -> Any:
        """The model of a checkpoint directory."""
        return _part("build").build(path, plan, mesh)

    def build_key(self, plan: Any) -> Any:
        """What `build` reads of a plan."""
        return _part("build").build_key(plan)

    def prepare(self, model: Any, plan: Any) -> Any:
        """Patch, freeze, adapt, kernels, checkpointing, offload."""
        return _part("prepare").prepare(model, plan)

    def adapter_key(self, plan: Any) -> Any:
        """What attaching adapters reads of a plan; `undo` leaves them."""
        return _part("adapters").attach_key(plan)

    def undo(self, model: Any) -> None:
        """Take `prepare` back."""
        _part("prepare").undo(model)

    def parallelize(self, model: Any, plan: Any, mesh: Any) -> Any:
        """Spread a prepared model over the ranks."""
        return _part("parallel").parallelize(model, plan, mesh)

    def clip_grad_norm(self, model: Any, max_norm: float) -> Any:
        """Clip the gradients of a spread model; the norm before."""
        return _part("parallel").clip_grad_norm(model, max_norm)

    def no_sync(self, model: Any) -> Any:
        """Backward passes inside accumulate locally."""
        return _part("parallel").no_sync(model)

    def collate(self, samples: Sequence[Mapping[str, Any]], plan: Any) -> Any:
        """Samples to a batch."""
        return _part("collate").collate(samples, plan)

    def chat(self, conversations: Sequence[Any], processor: Any, plan: Any) -> Any:
        """Conversations to a batch, labelled by role."""
        return _part("multimodal_collate").collate_conversations(conversations, processor, plan)

    def loss(self, model: Any, batch: Mapping[str, Any], num_items_in_batch: Any = None) -> Any:
        """The token-weighted training loss."""
        return _part("loss").loss(model, batch, num_items_in_batch)

    def fit(self, model: Any, samples: Sequence[Any], plan: Any, **options: Any) -> Any:
        """HF Trainer, set up rightly."""
        return _part("fit").fit(model, samples, plan, **options)

    def save(self, model: Any, path: Path) -> None:
        """The adapter, or the model."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            _part("parallel").save_spread(model, path)
        else:
            _part("checkpoints").save(model, path)

    def load(self, model: Any, path: Path) -> Any:
        """What `save` wrote, into a base model."""
        return _part("checkpoints").load(model, path)

    def resume(self, model: Any, samples: Sequence[Any], plan: Any, **options: Any) -> Any:
        """Go on from a training checkpoint: `fit` with `resume=` set."""
        return _part("fit").fit(model, samples, plan, **options)

    def merge(self, model: Any) -> Any:
        """Fold the adapters into the weights."""
        return _part("checkpoints").merge(model)

    def experts(self, *args: Any, **options: Any) -> Any:
        """The experts kernel with LoRA (see `impl.kernels.experts`)."""
        lora = options.pop("lora", None)
        if lora is not None:
            (a1, b1, s1), (a2, b2, s2) = lora["gate_up"], lora["down"]
            lora = _part("kernels.experts").ExpertLora(a1, b1, s1, a2, b2, s2)
        return _part("kernels.experts").moe_lora_experts(*args, lora=lora, **options)

    def linear_cross_entropy(self, *args: Any, **options: Any) -> Any:
        """The loss from hidden states and classifier."""
        return _part("kernels.cross_entropy").linear_cross_entropy(*args, **options)

    def normalize_weight_scales(self, model: Any, rules: Any) -> Any:
        """Rescale weights whose spread drifted from their group's median."""
        return _part("weight_scales").normalize_weight_scales(model, rules)


IMPLEMENTATION = Reference()
