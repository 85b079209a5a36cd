"""The contract with an implementation: its methods, what it claims, and how it is loaded.

An *adapter* is one module with an object that has the methods of the capabilities it claims. The
suite never asks which implementation it has: it asks for capabilities. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conformance.case import Case
from conformance.expectation import Expectation

if TYPE_CHECKING:
    import torch
    from torch import nn

# capability -> the methods an adapter must have to claim it
METHODS: dict[str, tuple[str, ...]] = {
    "plan": ("plan",),
    "build": ("build",),
    "prepare": ("prepare", "undo"),
    "parallelize": ("parallelize",),
    "collate": ("collate",),
    "chat": ("chat",),
    "loss": ("loss",),
    "fit": ("fit",),
    "save": ("save",),
    "load": ("load",),
    "resume": ("resume",),
    "merge": ("merge",),
    "experts": ("experts",),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "normalize_weight_scales": ("normalize_weight_scales",),
}


@dataclass(frozen=True)
class Exclusion:
    """A part of the matrix that a capability does not cover, and why.

    Every non-empty field must match: traits (the model has them all), settings (a token of the
    setting is in it), strategies (the case's is in it), checks (the check's id is in it).
    probe: returns why the installed versions are so limited, or None where they are not; without
    one the part is excluded everywhere. `reason` says it for the documents, the probe for a case.
    """

    reason: str
    traits: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()
    strategies: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    checks: frozenset[str] = frozenset()
    probe: Callable[[], str | None] | None = None

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("an exclusion needs a reason")

    def covers(self, case: Case) -> bool:
        """Whether a case lies in the excluded part."""
        has = case.model.traits if case.model else frozenset()
        return (
            has >= self.traits
            and (not self.settings or bool(self.settings & set(case.setting.tokens)))
            and (not self.strategies or case.strategy.name in self.strategies)
            and (not self.models or (case.model is not None and case.model.name in self.models))
            and (not self.checks or case.check.id in self.checks)
        )

    def against(self, case: Case) -> str | None:
        """Why a case is excluded by the installed versions, or None if it is not."""
        if not self.covers(case):
            return None
        return self.reason if self.probe is None else self.probe()


@dataclass(frozen=True)
class Capability:
    """Something an implementation claims to do, narrowed by exclusions.

    probe: returns None when the installed versions allow it, or the reason why not; asked once.
    """

    name: str
    excludes: tuple[Exclusion, ...] = ()
    probe: Callable[[], str | None] | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"unknown capability {self.name!r}; known: {', '.join(METHODS)}")


class Decision(Protocol):
    """One value of a plan and why it was chosen."""

    value: Any
    reason: str


class TrainingPlan(Protocol):
    """What the suite reads of a plan; an implementation's own may hold more.

    decisions: keyed by the specification's names (`gradient_checkpointing_kwargs`,
        `ddp_find_unused_parameters`, `fsdp_transformer_layer_cls_to_wrap`, `sample_packing`, …).
    warnings: what was changed or left out against the user's wish, one sentence each.
    """

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """Values by the specification's names."""

    @property
    def warnings(self) -> Sequence[str]:
        """Sentences, each about one change."""


class Implementation(Protocol):
    """The thing under test. Only the methods of the claimed capabilities need exist.

    refusals: exception types by which it declines, loudly, what it cannot do rightly.
    """

    name: str
    capabilities: Sequence[Capability]
    expectations: Sequence[Expectation]
    refusals: tuple[type[BaseException], ...]

    def plan(self, config: Any, setting: Any, strategy: str, **options: Any) -> TrainingPlan:
        """What a user would write for this model config (a transformers config or its dict).

        options, all optional: lora_targets (a PEFT spec: "all-linear", a list of names, a regex),
        lora_target_parameters (full paths), lora_r, lora_alpha, lora_dropout, use_rslora,
        rank_pattern and alpha_pattern (a pattern of names, as PEFT matches it, to a number),
        modules_to_save, freeze_mm_modules, auxiliary_loss (asks for the router's loss),
        attn_implementation (a name of transformers', such as "flash_attention_2"),
        experts_implementation (a name of transformers', such as "sonicmoe"), and for `chat`
        train_on_inputs, roles_to_train, train_on_eos ("turn", "all", "last", "none").
        """

    def build(self, path: Path, plan: TrainingPlan, mesh: Any = None) -> nn.Module:
        """The model of a checkpoint directory as the stack loads it (class, dtype, quantisation;
        sharded over `mesh` where the stack shards while loading).

        An adapter may also have `build_key(plan)`: what `build` reads of a plan, or None where it
        depends on the ranks. The suite copies a model that was built by an equal key, and ranks are
        forked with it; without a key, every setting and every rank loads its own.
        """

    def prepare(self, model: nn.Module, plan: TrainingPlan) -> nn.Module:
        """Patch, freeze, adapt, kernels, checkpointing, offload; ready to train."""

    def undo(self, model: nn.Module) -> None:
        """Take back everything global that `prepare` did.

        An adapter may also have `adapter_key(plan)`: what attaching adapters reads of a plan, None
        if there are none. It says so that a model, prepared and undone, still has its adapters and
        may be prepared again by a plan of an equal key; the suite then copies such models.
        """

    def parallelize(self, model: nn.Module, plan: TrainingPlan, mesh: Any) -> nn.Module:
        """Spread a prepared model over the ranks of a device mesh."""

    def collate(
        self, samples: Sequence[Mapping[str, Any]], plan: TrainingPlan
    ) -> dict[str, torch.Tensor]:
        """A batch from samples (see `conformance.batches`): padded or packed, labels included."""

    def chat(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], processor: Any, plan: Any
    ) -> dict[str, torch.Tensor]:
        """A batch of conversations (see `conformance.processors`) through a processor or, of text
        alone, a tokenizer: labels on the assistant's turns and their stop tokens, and on nothing of
        padding, pictures, videos, sounds and what begins and ends them. Declines what it cannot
        read or match, and names the conversation or the file.
        """

    def loss(
        self, model: nn.Module, batch: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The training loss of a batch: summed over labelled tokens / `num_items_in_batch`, or the
        mean over labelled tokens when that is None.
        """

    def fit(
        self, model: nn.Module, samples: Sequence[Any], plan: TrainingPlan, **options: Any
    ) -> None:
        """The stack's own training loop. options: steps, batch_size, accumulation, lr, output_dir,
        resume (a checkpoint directory or None), max_grad_norm, label_smoothing, processor (then
        samples are conversations, which the loop itself makes batches of, as `chat` does).
        """

    def save(self, model: nn.Module, path: Path) -> None:
        """Write what a user would keep: the adapter if there is one, else the model."""

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Load what `save` wrote into a freshly built base model."""

    def experts(
        self,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        *,
        act: str,
        lora: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]] | None = None,
    ) -> torch.Tensor:
        """Mixture of experts with LoRA: hidden (T, H), index and weights (T, K), gate_up_proj
        (E, 2I, H), down_proj (E, H, I); act "silu" or "gelu_tanh"; lora maps "gate_up" and "down"
        to (A (r·E, in) expert-major, B (out, r·E) rank-major, scaling). Index E: adds nothing."""

    def linear_cross_entropy(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Loss of hidden (N, D) and classifier (V, D) for labels (N) that are already shifted.
        options: bias, softcap, logit_scale, num_items_in_batch, reduction ("mean", "none")."""

    def merge(self, model: nn.Module) -> nn.Module:
        """The model with its adapters folded into the weights."""


@dataclass
class Loaded:
    """An implementation that was checked against its own claims."""

    impl: Any
    name: str
    capabilities: dict[str, Capability]
    expectations: tuple[Expectation, ...]
    refusals: tuple[type[BaseException], ...]
    spec: str = ""  # how a rank loads the same implementation
    _probed: dict[str, str | None] = field(default_factory=dict)

    def unsupported(self, case: Case) -> str | None:
        """Why a case is `unsupported`, or None when every capability it needs is claimed for it."""
        tuning = case.setting.tuning
        if "fit" in case.check.needs and "prepare" not in self.capabilities and tuning != "full":
            return f"{self.name} does not claim 'prepare', which {tuning} needs"
        for need in case.check.needs:
            capability = self.capabilities.get(need)
            if capability is None:
                return f"{self.name} does not claim {need!r}"
            if need not in self._probed:
                self._probed[need] = capability.probe() if capability.probe else None
            if self._probed[need]:
                return f"{need}: {self._probed[need]}"
            for exclusion in capability.excludes:
                against = exclusion.against(case)
                if against:
                    return f"{need}: {against}"
        return None


class AdapterError(Exception):
    """The adapter cannot be used; the message is one line and says what to change."""


def load(spec: str) -> Loaded:
    """Load `reference`, `transformers` (an adapter shipped here), or `package.module:attribute`.

    Raises AdapterError when the module, the attribute or a claimed method is missing.
    """
    module_name, _, attribute = spec.partition(":")
    if "." not in module_name and not attribute:
        module_name, attribute = f"conformance.implementations.{module_name}", "IMPLEMENTATION"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise AdapterError(
            f"--impl {spec}: no module {error.name!r}; give `reference`, `transformers`"
            " or `package.module:attribute`"
        ) from error
    except Exception as error:
        raise AdapterError(f"--impl {spec}: importing {module_name} failed: {error}") from error
    impl = getattr(module, attribute or "IMPLEMENTATION", None)
    if impl is None:
        raise AdapterError(f"--impl {spec}: {module_name} has no attribute {attribute!r}")
    return adopt(impl, spec)


def adopt(impl: Any, spec: str = "") -> Loaded:
    """Check an adapter object against its claims (AdapterError) and wrap it."""
    where = f"--impl {spec}" if spec else "adapter"
    name = getattr(impl, "name", None)
    if not isinstance(name, str) or not name:
        raise AdapterError(f"{where}: the adapter has no `name`")
    capabilities: dict[str, Capability] = {}
    for capability in getattr(impl, "capabilities", ()):
        if not isinstance(capability, Capability):
            raise AdapterError(f"{where}: {capability!r} in `capabilities` is not a Capability")
        lacking = [m for m in METHODS[capability.name] if not callable(getattr(impl, m, None))]
        if lacking:
            raise AdapterError(
                f"{where}: {name} claims {capability.name!r} but has no method {', '.join(lacking)}"
            )
        capabilities[capability.name] = capability
    if not capabilities:
        raise AdapterError(f"{where}: {name} claims no capability; fill `capabilities`")
    expectations = tuple(getattr(impl, "expectations", ()))
    refusals = tuple(getattr(impl, "refusals", ()))
    return Loaded(impl, name, capabilities, expectations, refusals, spec)
