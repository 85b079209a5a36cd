"""The implementation under test, bound to one case: what a check has in its hands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from conformance import batches, checkpoint
from conformance.case import Case, Model
from conformance.implementation import Loaded
from conformance.module_copy import Original
from conformance.observe import Step
from conformance.settings import Setting
from conformance.weights import canonical_name, fill_adapters

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float64")}

# Models as built and, by a longer key, with their adapters: a copy costs a tenth of making one.
_built: dict[tuple[Any, ...], Original] = {}
_asked: set[tuple[Any, ...]] = set()
_KEPT = 256  # tiny models of a megabyte each
_remembered: dict[tuple[Any, ...], Any] = {}
T = TypeVar("T")


def forget_models() -> None:
    """Drop the built models, so that the next case loads its own."""
    _built.clear()
    _asked.clear()
    _remembered.clear()


def remember(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What `make` gave for this key the first time: evidence that several cases compare with."""
    if key not in _remembered:
        _remembered[key] = make()
    found: T = _remembered[key]
    return found


@dataclass(frozen=True)
class Unplanned:
    """What an implementation without `plan` gets in a plan's place: the case itself."""

    setting: Setting
    strategy: str
    options: Mapping[str, Any]
    decisions: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass
class Subject:
    """One implementation on one case; every model it hands out is fresh and undone at the end."""

    loaded: Loaded
    case: Case
    device: str = "cpu"
    _prepared: list[nn.Module] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The implementation's name."""
        return self.loaded.name

    @property
    def impl(self) -> Any:
        """The adapter itself, for the contract's own methods."""
        return self.loaded.impl

    @property
    def refusals(self) -> tuple[type[BaseException], ...]:
        """The exception types by which the implementation declines loudly."""
        return self.loaded.refusals

    def declines(self, *others: type[BaseException]) -> tuple[type[BaseException], ...]:
        """The refusals and other exception types that count as a loud answer, for `except`."""
        return (*others, *self.loaded.refusals)

    @property
    def model_spec(self) -> Model:
        """The case's model; only cases of `per_model` checks have one."""
        assert self.case.model is not None, f"{self.case.id} has no model"
        return self.case.model

    @property
    def numerics(self) -> frozenset[str]:
        """What chooses a tolerance row: the model's traits, and "gpu" where it runs on one."""
        return self.model_spec.traits | ({"gpu"} if self.device == "cuda" else frozenset())

    def claims(self, capability: str) -> bool:
        """Whether the implementation has a capability at all."""
        return capability in self.loaded.capabilities

    def setting(self, **changes: str) -> Setting:
        """The case's setting with some dimensions changed."""
        return self.case.setting.but(**changes)

    def plan(
        self,
        setting: Setting | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        **changes: str,
    ) -> Any:
        """The implementation's plan for the case's model; `options` are passed on to it."""
        setting = (setting or self.case.setting).but(**changes)
        if not self.claims("plan"):
            return Unplanned(setting, self.case.strategy.name, dict(options or {}))
        asked = {**(options or {})}
        key = ("plan", self.name, self.model_spec.name, setting, self.case.strategy, repr(asked))
        return remember(
            key,
            lambda: self.impl.plan(
                checkpoint.build_config(self.model_spec),
                setting,
                self.case.strategy.name,
                **asked,
            ),
        )

    def built(self, plan: Any, setting: Setting) -> nn.Module:
        """The unprepared model, loaded by the implementation from a checkpoint on disk."""
        spec = self.model_spec
        key = self._build_key(plan, setting)
        if key not in _built:
            path = checkpoint.checkpoint(spec, "float32")
            if self.claims("build"):
                model: nn.Module = self.impl.build(path, plan)
            else:
                # as from_pretrained picks; eager gives NaN for a padded query in float64
                model = checkpoint.build_stock(spec, DTYPES[setting.dtype], "sdpa")
            _keep(key, model.to(self.device))
        return _copy(key)

    def _build_key(self, plan: Any, setting: Setting) -> tuple[Any, ...]:
        """By the adapter's word what its `build` reads of a plan, else all of it."""
        who = (self.name, self.model_spec.name, self.device)
        key = self.impl.build_key(plan) if hasattr(self.impl, "build_key") else None
        if key is not None:
            return (*who, key)
        if self.claims("build"):
            return (*who, setting, repr(getattr(plan, "decisions", None)))
        return (*who, setting.dtype)

    def _unprepared(self, plan: Any, setting: Setting, recurs: bool) -> nn.Module:
        """The built model, or a copy of one that has got its adapters already.

        Attaching them takes ten times as long as a copy. The first model of a key goes through
        `prepare` bare; from the second on they are copies of one that was prepared and undone.
        recurs: they are from the first on, once one of the same tuning has gone bare.
        """
        adapter = getattr(self.impl, "adapter_key", lambda _: None)(plan)
        if adapter is None:
            return self.built(plan, setting)
        key = (*self._build_key(plan, setting), adapter)
        alike = (self.name, self.model_spec.name, setting.tuning, self.device)
        if key not in _asked and not (recurs and alike in _asked):
            _asked.update((key, alike))
            return self.built(plan, setting)
        if key not in _built:
            model = self.impl.prepare(self.built(plan, setting), plan)
            self.impl.undo(model)
            _keep(key, model)
        return _copy(key)

    def model(
        self,
        setting: Setting | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        plan: Any = None,
        adapters: bool = True,
        **changes: str,
    ) -> nn.Module:
        """A fresh model, built and prepared, in train mode.

        adapters: fill LoRA's A and B by name (B is zero when fresh, which hides its errors).
        """
        setting = (setting or self.case.setting).but(**changes)
        recurs = plan is None and not options
        if plan is None:
            plan = self.plan(setting, options=options)
        model = self._unprepared(plan, setting, recurs)
        return self.adopt(model, plan, adapters and setting.tuning != "full")

    def adopt(self, model: nn.Module, plan: Any, adapters: bool = True) -> nn.Module:
        """Prepare a built model by the plan; it is undone when the case ends."""
        if self.claims("prepare"):
            model = self.impl.prepare(model, plan)
            self._prepared.append(model)
        if adapters:
            fill_adapters(model)
        return model if _trains(model) else model.train()

    def stock(
        self, dtype: str = "float64", attn: str = "eager", experts: str = "eager"
    ) -> nn.Module:
        """The installed class, unpatched, weights by name: the model of the oracles."""
        key = ("stock", self.model_spec.name, self.device, dtype, attn, experts)
        if key not in _built:
            model = checkpoint.build_stock(self.model_spec, DTYPES[dtype], attn, experts)
            _keep(key, model.to(self.device))
        return _copy(key)

    def samples(self, kind: str | None = None, **options: Any) -> list[dict[str, Any]]:
        """Deterministic samples of a kind (the setting's own by default)."""
        return batches.samples(self.model_spec, kind or self.case.setting.batch, **options)

    def collate(self, samples: Sequence[Mapping[str, Any]], plan: Any) -> dict[str, Any]:
        """A batch by the implementation's own collation, or by the suite's where it claims none."""
        if self.claims("collate"):
            return dict(self.impl.collate(samples, plan))
        if self.case.setting.batch == "packed":
            return batches.pack([dict(s) for s in samples])
        return batches.stack([dict(s) for s in samples])

    def batch(
        self, kind: str | None = None, *, dtype: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """A collated batch of a kind, floating inputs in the setting's dtype, on the device."""
        kind = kind or self.case.setting.batch
        setting = self.case.setting.but(batch=kind) if kind != "mixed" else self.case.setting
        batch = self.collate(self.samples(kind, **options), self.plan(setting))
        return self.to(batch, dtype or self.case.setting.dtype)

    def to(self, batch: Mapping[str, Any], dtype: str) -> dict[str, Any]:
        """The batch on the case's device with its floating tensors in `dtype`."""
        return {
            key: _moved(value, self.device, DTYPES[dtype]) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }

    def loss(self, model: nn.Module, batch: Mapping[str, Any], n: Any = None) -> torch.Tensor:
        """The training loss: the implementation's own, or the model's where it claims none."""
        if self.claims("loss"):
            found = self.impl.loss(model, batch, n)
        else:
            extra = {} if n is None else {"num_items_in_batch": n}
            found = model(**batch, **extra).loss
        assert torch.is_tensor(found), f"{self.case.id}: loss is {type(found)}, not a tensor"
        return found

    def step(self, model: nn.Module, batch: Mapping[str, Any], n: Any = None) -> Step:
        """One forward and backward: the loss and every gradient, by canonical name."""
        model.zero_grad(set_to_none=True)
        loss = self.loss(model, batch, n)
        loss.backward()  # type: ignore[no-untyped-call]
        return Step(loss=float(loss.detach()), gradients=gradients(model), parameters={})

    def plain_step(self, **changes: str) -> Step:
        """The step of the case's setting with some dimensions changed, on that setting's batch.

        It is taken once, since many cases compare with training without what they ask for.
        """
        setting = self.case.setting.but(**changes)
        key = ("step", self.name, self.model_spec.name, setting, self.case.strategy, self.device)
        return remember(key, lambda: self.step(self.model(setting), self.batch(setting.batch)))

    def eval_logits(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Logits in evaluation mode without gradient, labels left out: (B, S, V)."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        modes = [(vars(module), module.training) for module in every_module(model)]
        model.eval()
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        for own, training in modes:
            own["training"] = training
        assert torch.is_tensor(logits)
        return logits

    def close(self) -> None:
        """Take back everything global that was done for this case."""
        while self._prepared:
            self.impl.undo(self._prepared.pop())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient by canonical parameter name; a trainable parameter without one is left out."""
    return {
        canonical_name(name): parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, each once, in a third of the time of `model.modules()`, which makes
    names; what has a `train` of its own is entered too."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting.extend(child for child in module._modules.values() if child is not None)


def _trains(model: nn.Module) -> bool:
    """Whether `model.train()` would change nothing; a module with a `train` of its own decides."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if "train" in vars(module):
            continue
        if not module.training:
            return False
        waiting.extend(child for child in module._modules.values() if child is not None)
    return True


def _keep(key: tuple[Any, ...], model: nn.Module) -> None:
    if len(_built) > _KEPT:
        _built.clear()
    _built[key] = Original(model)


def _copy(key: tuple[Any, ...]) -> nn.Module:
    model: nn.Module = _built[key].copy()
    return model


def _moved(tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.to(device, dtype)
    return tensor.to(device)


@contextmanager
def bound(
    loaded: Loaded, case: Case, device: str, register: Callable[[Subject], None] | None = None
) -> Iterator[Subject]:
    """A Subject that is closed when the case ends, however it ends."""
    if device == "cpu":  # manual_seed notes a traceback for each device that is absent
        torch.default_generator.manual_seed(0)
    else:
        torch.manual_seed(0)
    torch.set_num_threads(1)
    subject = Subject(loaded, case, device)
    if register:
        register(subject)
    try:
        yield subject
    finally:
        subject.close()
