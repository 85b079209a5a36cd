"""Model, Case and Check: what is tested, as frozen data (no torch is imported here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conformance.settings import Setting
from conformance.strategies import SINGLE, Strategy

# What a model can have. `experts_in_layer`: experts beside a dense MLP in the decoder layer itself.
TRAITS = frozenset(
    {
        "moe",
        "shared_expert",
        "experts_in_layer",
        "vision",
        "audio",
        "bidirectional_images",
        "kv_sharing",
        "per_layer_inputs",
        "linear_attention",
        "sliding_window",
        "attention_k_eq_v",
        "tied_embeddings",
        "softcap",
        "auxiliary_loss",
    }
)


@dataclass(frozen=True)
class ImageInputs:
    """What one image of a tiny model is: the tensors, the placeholders, the type-id argument.

    `pixel_values` is the shape of one image's `pixel_values` (batch dimension excluded);
    `extra` maps further per-image forward arguments to the name of their maker in `batches.py`.
    """

    token_id: int
    tokens_per_image: int
    pixel_values: tuple[int, ...]
    extra: tuple[str, ...] = ()
    type_ids: str | None = None  # "mm_token_type_ids", "token_type_ids" or None
    begin_id: int | None = None
    end_id: int | None = None


@dataclass(frozen=True)
class Model:
    """A member of a family with its own tiny configuration.

    `tiny` holds the keyword arguments of `config_class` (nested sub-configs as dicts);
    `published` is the stem of a file in `fixtures/published/`; classes are names in `transformers`.
    """

    name: str
    family: str
    config_class: str
    model_class: str
    modelling: str
    tiny: Mapping[str, Any] = field(hash=False, compare=False)
    published: str
    traits: frozenset[str]
    wrap_class: str
    layers: str  # path of the decoder layers, such as "model.language_model.layers"
    images: ImageInputs | None = None
    text_model: str | None = None  # name of the text-only twin with the same decoder, if any
    text_vocab: int = 90  # ids below this are text; placeholders lie above
    freeze: tuple[str, ...] = ()  # children of `model` that are no language model

    def __post_init__(self) -> None:
        unknown = self.traits - TRAITS
        if unknown:
            raise ValueError(f"model {self.name}: unknown traits {sorted(unknown)}")

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The keyword arguments of the decoder's own configuration."""
        nested = self.tiny.get("text_config", self.tiny)
        assert isinstance(nested, Mapping)
        return nested


@dataclass(frozen=True)
class Check:
    """One claim: what it needs of an implementation, and the cases over which it is asked.

    needs: capabilities, the narrowest that can show the claim (empty: the suite's own data or
        the installed libraries are judged).
    traits / without: the model must have all of the first and none of the second; `any_of`: one.
    settings: setting ids asked for on every model. dealt: ids of which the default matrix asks
        each on one model of a family, in turn, and the full one on every model: combinations whose
        two halves are asked of every model, by this check and another one.
    varies: dimensions over which the pairwise array is asked too. pairs_over: whether that array
        holds each pair of values, and of a value and a model, ("model"), or each pair of values in
        each family ("family"), or once ("all", where the claim is about the stack).
    strategies: names. per_model: False for a check that has no model.
    tier: "process", "ranks", "kernels", "vision", "training" ... becomes a marker.
    correctness: True if it judges numbers or behaviour, and so owes a mutant.
    nightly: asked in the full matrix only, being long.
    lone_rank: every strategy on one rank, its mesh all ones, as one GPU can hold it.
    one_a_family: the default matrix asks each strategy of the first model of each family that can
        have it, the full one of all.
    reads: the parts of a start's evidence beside the step (`spread.PARTS`); None for a check that
        reads no such evidence.
    """

    id: str
    needs: tuple[str, ...] = ()
    traits: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    any_of: frozenset[str] = frozenset()
    models: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("-",)
    dealt: tuple[str, ...] = ()
    varies: tuple[str, ...] = ()
    pairs_over: str = "model"
    strategies: tuple[str, ...] = ("single",)
    per_model: bool = True
    marks: tuple[str, ...] = ()
    hardware: str = "cpu"  # "cpu", "gpu", "gpus"
    correctness: bool = True
    nightly: bool = False
    lone_rank: bool = False
    one_a_family: bool = False
    reads: tuple[str, ...] | None = None
    name: str = ""
    claim: str = ""
    motivation: str = ""

    def asks(self, model: Model) -> bool:
        """Whether the check applies to a model, by its traits (or, rarely, its name)."""
        if self.models:
            return model.name in self.models
        has = model.traits
        return (
            has >= self.traits
            and not (has & self.without)
            and bool(not self.any_of or has & self.any_of)
        )


@dataclass(frozen=True)
class Case:
    """Check × Model × Setting × Strategy."""

    check: Check
    model: Model | None = None
    setting: Setting = Setting()
    strategy: Strategy = SINGLE

    @property
    def id(self) -> str:
        """`check/model/setting/strategy`: public, and the only key on which reports join."""
        model = self.model.name if self.model else "-"
        strategy = self.strategy.name if self.model else "-"
        return f"{self.check.id}/{model}/{self.setting.id}/{strategy}"

    @property
    def marks(self) -> tuple[str, ...]:
        """Marker names: family, model, traits, setting tokens, strategy, tier; `launch` alone."""
        found = list(self.check.marks)
        if self.model and "launch" not in found:  # a launch costs seconds: by its own name only
            found += [self.model.family, self.model.name, *sorted(self.model.traits)]
            found += [*self.setting.tokens, self.strategy.name]
            if self.strategy.ranks > 1:
                found.append("ranks")
        if self.check.hardware != "cpu":
            found.append("gpu")
        return tuple(dict.fromkeys(found))
