"""A training step on ranks, seen from outside: one start a (model, setting, strategy).

Everything here reads models through torch alone (`full_tensor`, FSDP1's own summoning), so that an
implementation's own gathering is judged and not trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from conformance import prebuilt
from conformance.case import Case
from conformance.gathering import LocalOptimizer, gathered, local
from conformance.implementation import load
from conformance.observe import full
from conformance.ranks import RankContext
from conformance.settings import Setting
from conformance.strategies import SINGLE
from conformance.subject import Subject, bound
from conformance.weights import canonical_name

DATA_PARALLEL = ("ddp", "fsdp1", "fsdp2", "hsdp", "fsdp2_ep")
SHARDED_BY_TENSOR = ("tp", "tp_ep")
ROWS = 4
MAX_NORM = 0.1
TRAINING_RATE = 0.05  # of gradients clipped to MAX_NORM
IGNORE = -100
PARTS = ("accumulation", "training", "exact")
# AdamW of the parity step: an element whose gradient is the noise of float32 islands must not move
# at full rate.
RATE, EPSILON = 1e-3, 1e-6

Tensors = dict[str, Tensor]
T = TypeVar("T")


@dataclass
class Spread:
    """What one rank (or the one process of the oracle) saw.

    loss, gradients: of the first batch in the setting's dtype; items: this rank's own labels.
    once, twice: gradients of two batches, reduced at the end and after each. norm: of the first
    before clipping to MAX_NORM, as the clipping function says; clipped: the norm after.
    evaluated: the loss in evaluation mode after two steps of SGD; before (one process only),
    after: the parameters' digests. gradient_bytes, trained_bytes, storage_bytes, weight_bytes: of
    this rank. tied: groups of names that are one weight. parameters: after one AdamW step in
    float64. experts: (here, in all) of each stacked expert weight. saved: the adapter as written
    before the step. starved: trainable parameters without a gradient. fed: (rows, tokens) that the
    first layer is given. frozen: bytes here of each parameter that is not trained, and under
    "scales" those of all quantisation scales.
    """

    loss: float = 0.0
    items: int = 0
    gradients: Tensors = field(default_factory=dict)
    norm: float = 0.0
    clipped: float = 0.0
    once: Tensors = field(default_factory=dict)
    twice: Tensors = field(default_factory=dict)
    evaluated: float = 0.0
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    gradient_bytes: int = 0
    trained_bytes: int = 0
    weight_bytes: int = 0
    storage_bytes: int = 0
    tied: frozenset[frozenset[str]] = frozenset()
    parameters: Tensors = field(default_factory=dict)
    experts: dict[str, tuple[int, int]] = field(default_factory=dict)
    saved: Tensors = field(default_factory=dict)
    starved: tuple[str, ...] = ()
    fed: tuple[int, int] = (0, 0)
    frozen: dict[str, int] = field(default_factory=dict)


def mesh_of(case: Case, device: str) -> Any:
    """The device mesh of the case's strategy; None for one process."""
    shape = case.strategy.mesh
    if not shape:
        return None
    kind = device.partition(":")[0]
    return init_device_mesh(
        kind, tuple(size for _, size in shape), mesh_dim_names=tuple(name for name, _ in shape)
    )


@dataclass
class Job:
    """A case inside a rank, or in one process: its models, batches and divisor."""

    subject: Subject
    path: Path
    rank: int = 0
    ranks: int = 1
    mesh: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    _plans: dict[Setting, Any] = field(default_factory=dict, init=False)

    def plan(self, setting: Setting) -> Any:
        """The implementation's plan, asked for once a setting."""
        if setting not in self._plans:
            self._plans[setting] = self.subject.plan(setting, options=self.options)
        return self._plans[setting]

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return self.subject.case.strategy.name

    @property
    def averaged(self) -> int:
        """Over how many ranks gradients are averaged."""
        return 1 if self.strategy in (*SHARDED_BY_TENSOR, "single") else self.ranks

    def model(self, setting: Setting, anew: bool = False) -> nn.Module:
        """Built, prepared and spread, adapters filled by name. anew: loaded by this very rank."""
        subject = self.subject
        plan = self.plan(setting)
        ready = None
        if not anew:
            alone = self.mesh is None
            ready = subject.built(plan, setting) if alone else prebuilt.take(subject, plan)
        built = ready or subject.impl.build(self.path, plan, self.mesh)
        if next(built.parameters()).device.type != subject.device.partition(":")[0]:
            built = built.to(subject.device)  # `to` unties what was sharded while loading
        model = subject.adopt(built, plan, setting.tuning != "full")
        if self.mesh is None:
            return model
        spread: nn.Module = subject.impl.parallelize(model, plan, self.mesh)
        return spread

    def samples(self, seed: int = 0, kind: str | None = None) -> list[Any]:
        """The rows of all ranks."""
        return self.subject.samples(kind, seed=seed, count=ROWS)

    def share(self, samples: Sequence[Any]) -> list[Any]:
        """This rank's rows: whole samples, images with them."""
        if self.strategy not in DATA_PARALLEL:
            return list(samples)
        size = len(samples) // self.ranks
        return list(samples[self.rank * size : (self.rank + 1) * size])

    def batch(self, samples: Sequence[Any], setting: Setting) -> dict[str, Any]:
        """This rank's batch, collated from its own rows."""
        return self.subject.to(
            self.subject.collate(self.share(samples), self.plan(setting)), setting.dtype
        )

    def items(self, samples: Sequence[Any]) -> float:
        """What each rank divides its summed loss by: labelled tokens over the ranks averaged."""
        return sum(int((s["labels"][1:] != IGNORE).sum()) for s in samples) / self.averaged

    def backward(self, model: nn.Module, batch: dict[str, Any], items: float) -> float:
        """One backward; the loss over all ranks."""
        loss = self.subject.loss(model, batch, items)
        loss.backward()  # type: ignore[no-untyped-call]
        return self.mean(loss.detach())

    def mean(self, loss: Tensor) -> float:
        """The mean of a number over the ranks."""
        value = full(loss).double()
        if self.mesh is not None:
            dist.all_reduce(value)
            value /= self.ranks
        return float(value)


@contextlib.contextmanager
def summoned(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """FSDP1's parameters whole for the length of a block."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not isinstance(model, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=gradients):
        yield


def gradients_of(model: nn.Module) -> Tensors:
    """Every gradient, whole, by canonical name; all ranks call it."""
    with summoned(model, gradients=True):
        return gathered(
            {
                canonical_name(name): p.grad
                for name, p in model.named_parameters()
                if p.grad is not None and p.requires_grad
            }
        )


def parameters_of(model: nn.Module, trainable: bool = False) -> Tensors:
    """Every parameter, whole, by canonical name; all ranks call it."""
    with summoned(model):
        return gathered(
            {
                canonical_name(name): p
                for name, p in model.named_parameters()
                if p.requires_grad or not trainable
            }
        )


def size(tensors: Sequence[Tensor]) -> int:
    """Bytes of the elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def storage(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(kept.values())


def frozen_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes here of each frozen parameter by canonical name, and of all scales under "scales"."""
    found = {
        canonical_name(name): size([local(p)])
        for name, p in model.named_parameters()
        if not p.requires_grad
    }
    scales = {id(b): b for name, b in model.named_buffers() if name.endswith("absmax")}
    for owner in (*model.modules(), *model.parameters()):
        # sharding makes new parameters; bitsandbytes' layer keeps the scales of the first one
        state = getattr(owner, "quant_state", None)
        while state is not None:
            scales[id(state.absmax)] = state.absmax
            state = getattr(state, "state2", None)
    return {**found, "scales": size(list(scales.values()))}


def digest(tensor: Tensor) -> str:
    """A fingerprint of the exact values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


def tied_groups(model: nn.Module) -> frozenset[frozenset[str]]:
    """Groups of names that are one parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(canonical_name(name))
    return frozenset(frozenset(names) for names in groups.values() if len(names) > 1)


def clip(subject: Subject, model: nn.Module, limit: float) -> float:
    """The norm before clipping: by the implementation's own function, or by torch's."""
    own = getattr(subject.impl, "clip_grad_norm", None) or getattr(model, "clip_grad_norm_", None)
    if own is None:
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), limit)
    elif hasattr(subject.impl, "clip_grad_norm"):
        norm = own(model, limit)
    else:
        norm = own(limit)
    return float(full(norm))


@contextlib.contextmanager
def no_sync(subject: Subject, model: Any) -> Iterator[None]:
    """Backward passes that reduce nothing: by the implementation, or as torch spells it."""
    own = getattr(subject.impl, "no_sync", None)
    if own is not None:
        with own(model):
            yield
    elif hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def norm_of(gradients: Tensors) -> float:
    """The Euclidean norm of all gradients together."""
    return float(torch.stack([g.double().norm() for g in gradients.values()]).norm())


def saved(job: Job, model: nn.Module) -> Tensors:
    """What the implementation's `save` writes from all ranks; read on rank 0."""
    from safetensors.torch import load_file

    where = [tempfile.mkdtemp(prefix="conformance-saved-") if job.rank == 0 else ""]
    if job.mesh is not None:
        dist.broadcast_object_list(where, src=0)
    folder = Path(where[0])
    try:
        job.subject.impl.save(model, folder)
        if job.mesh is not None:
            dist.barrier()
        if job.rank:
            return {}
        files = sorted(folder.glob("*.safetensors"))
        return {name: t for file in files for name, t in load_file(file).items()}
    finally:
        if not job.rank:
            shutil.rmtree(folder, ignore_errors=True)


def watch_layer(model: nn.Module, wrap_class: str, seen: Spread) -> Any:
    """A hook that records the rows and tokens that the first decoder layer is given."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.fed = (int(hidden.shape[-3]), int(hidden.shape[-2]))  # gemma3n: (streams, B, S, H)

    layers = (m for m in model.modules() if wrap_class in {c.__name__ for c in type(m).__mro__})
    return next(layers).register_forward_pre_hook(record, with_kwargs=True)


def observe_step(job: Job, seen: Spread) -> nn.Module:
    """The step in the setting's dtype: loss, gradients, bytes, clipping."""
    setting = job.subject.case.setting
    model = job.model(setting)
    seen.tied = tied_groups(model)
    if setting.tuning != "full" and job.subject.claims("save"):
        seen.saved = saved(job, model)
    samples = job.samples()
    seen.items = sum(int((s["labels"][1:] != IGNORE).sum()) for s in job.share(samples))
    watch = watch_layer(model, job.subject.model_spec.wrap_class, seen)
    seen.loss = job.backward(model, job.batch(samples, setting), job.items(samples))
    watch.remove()
    seen.gradients = gradients_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    seen.starved = tuple(
        canonical_name(n) for n, p in model.named_parameters() if p.requires_grad and p.grad is None
    )
    parts = [local(p.grad) for p in trained if p.grad is not None]
    seen.gradient_bytes, seen.trained_bytes = size(parts), size([local(p) for p in trained])
    weights = [local(p) for p in model.parameters()]
    seen.weight_bytes, seen.storage_bytes = size(weights), storage(weights)
    if setting.tuning == "qlora":
        seen.frozen = frozen_bytes(model)
    seen.experts = {
        canonical_name(name): (local(p).shape[0], p.shape[0])
        for name, p in model.named_parameters()
        if p.dim() == 3 and "experts" in name and "lora_" not in name
    }
    return model


def observe_accumulation(job: Job, model: nn.Module, seen: Spread) -> None:
    """Two batches, reduced after each (the first was `observe_step`'s) and once at the end; the
    first one's gradients are left."""
    setting, samples = job.subject.case.setting, job.samples()
    items = job.items(samples)
    first, second = (job.batch(part, setting) for part in (samples, job.samples(1)))
    kept = [None if p.grad is None else local(p.grad).clone() for p in model.parameters()]
    job.backward(model, second, items)
    seen.twice = gradients_of(model)
    model.zero_grad(set_to_none=True)
    with no_sync(job.subject, model):
        job.backward(model, first, items)
    job.backward(model, second, items)
    seen.once = gradients_of(model)
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        if parameter.grad is not None and gradient is not None:
            local(parameter.grad).copy_(gradient)


def observe_training(job: Job, model: nn.Module, seen: Spread) -> None:
    """Clipping of the gradients that are there, two steps of SGD with clipped gradients, the loss
    in evaluation mode, and what every rank holds."""
    setting, samples = job.subject.case.setting, job.samples()
    batch, items = job.batch(samples, setting), job.items(samples)
    if job.mesh is None:
        seen.before = {name: digest(p) for name, p in parameters_of(model).items()}
    seen.norm = clip(job.subject, model, MAX_NORM)
    seen.clipped = norm_of(gradients_of(model))
    optimizer = LocalOptimizer(model, torch.optim.SGD, lr=TRAINING_RATE)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    job.backward(model, batch, items)
    clip(job.subject, model, MAX_NORM)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        seen.evaluated = job.mean(job.subject.loss(model, batch, items).detach())
    model.train()
    seen.after = {name: digest(p) for name, p in parameters_of(model).items()}


def observe_exact(job: Job, seen: Spread) -> None:
    """Every trained parameter after one AdamW step in float64."""
    setting = job.subject.case.setting.but(dtype="float64")
    model, samples = job.model(setting), job.samples()
    job.backward(model, job.batch(samples, setting), job.items(samples))
    LocalOptimizer(model, torch.optim.AdamW, lr=RATE, eps=EPSILON).step()
    seen.parameters = parameters_of(model, trainable=True)


def observe(job: Job, parts: frozenset[str] = frozenset(PARTS)) -> Spread:
    """The step in the setting's dtype and the named parts of `PARTS`; none changes another."""
    seen = Spread()
    model = observe_step(job, seen)
    if "accumulation" in parts:
        observe_accumulation(job, model, seen)
    if "training" in parts:
        observe_training(job, model, seen)
    if "exact" in parts:
        observe_exact(job, seen)
    return seen


def on_rank(
    context: RankContext,
    spec: str,
    case: Case,
    fn: Callable[[Job], T],
    path: Path,
    options: Mapping[str, Any],
) -> T:
    """What `ranks.run` calls: `fn` of this rank's job; whole tensors travel from rank 0 only."""
    with bound(load(spec), case, context.device) as subject:
        mesh = mesh_of(case, context.device)
        seen = fn(Job(subject, path, context.rank, context.world_size, mesh, options))
    if context.rank and isinstance(seen, Spread):
        for name in ("gradients", "once", "twice", "parameters"):
            setattr(seen, name, {})
    return seen


def alone(subject: Subject, fn: Callable[[Job], T], path: Path, options: Mapping[str, Any]) -> T:
    """The same in one process: the oracle."""
    case = replace(subject.case, strategy=SINGLE)
    with bound(subject.loaded, case, subject.device) as one:
        return fn(Job(one, path, options=options))
