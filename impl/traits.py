"""What a model is, as frozen facts: the vocabulary of detection and planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


def _empty() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True)
class ExpertFacts:
    """The routed experts of a model.

    num: experts E. top_k: experts a token. width: intermediate size I of one expert (0: unknown).
    layers: indices of the layers that have experts. path: the experts module inside a decoder layer
    (`mlp.experts`, `experts`). parameters: names of its 3-D weights, empty if every expert is a
    module. layout: "fused" (E, 2I, H) and (E, H, I), "transposed" (E, H, 2I), "modules", or
    "unknown" (no class). interleaved: gate and up rows alternate. bias, gated: of an expert.
    activation: its name; activation_key: the config field that holds it. router: the router inside
    a decoder layer. shared: a shared expert beside the routed ones. in_layer: the experts hang on
    the decoder layer itself, beside a dense MLP. obstacle: why the fused
    kernel does not run them, if so. auxiliary_loss: the class can add a load-balancing loss.
    """

    num: int
    top_k: int
    width: int = 0
    layers: tuple[int, ...] = ()
    path: str = ""
    parameters: tuple[str, ...] = ()
    layout: str = "unknown"
    interleaved: bool = False
    bias: bool = False
    gated: bool = True
    activation: str = ""
    activation_key: str = ""
    router: str = ""
    shared: bool = False
    in_layer: bool = False
    obstacle: str = ""
    auxiliary_loss: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """The PEFT `target_parameters` that mean "every routed expert"."""
        leaf = self.path.rpartition(".")[2] or "experts"
        return tuple(f"{leaf}.{name}" for name in self.parameters)


@dataclass(frozen=True)
class Linear:
    """A linear layer of the decoder layers: its name inside a layer, its sizes, how many there are.

    Sizes are those of the largest, since they may differ from layer to layer.
    """

    name: str
    inputs: int
    outputs: int
    count: int = 1


@dataclass(frozen=True)
class ClassFacts:
    """What only the class that is loaded can tell; read from an instance on the meta device.

    name: class. auto_class: the auto class that gives it. layers: path of the decoder layers.
    layer_classes: their classes. components: path components beside the language model.
    linears: of the decoder layers. model_linears: of the language model outside its layers, by
    path. wrapped: classes of linear wrappers in the towers, which PEFT does not know. forward:
    argument names of `forward`. recurrent: layers with a state along the sequence, recurrent_path
    its module in the layer, delta_rule whether that is a gated delta rule, recurrent_heads its
    per-head decays. keyless: layers that have queries but no keys of their own. reads_type_ids: the
    inner model uses `token_type_ids`. lm_head: whether the head is a plain linear layer without
    bias. accepts_loss_kwargs: the class attribute (None: unset). rowwise: leaf names that the
    tensor-parallel plan shards by their input. tp_plan, ep_plan: keys of the
    plans. numel: parameters; layer_numel: those of the largest decoder layer. complete: False when
    the class could not be instantiated and these facts come from its text part.
    """

    name: str
    auto_class: str
    layers: str
    layer_classes: tuple[str, ...]
    components: tuple[str, ...] = ()
    linears: tuple[Linear, ...] = ()
    model_linears: tuple[str, ...] = ()
    wrapped: tuple[str, ...] = ()
    forward: frozenset[str] = frozenset()
    reads_type_ids: bool = False
    lm_head: bool = True
    tied: bool = False
    accepts_loss_kwargs: bool | None = None
    tp_plan: tuple[str, ...] = ()
    rowwise: tuple[str, ...] = ()
    ep_plan: tuple[str, ...] = ()
    no_split: tuple[str, ...] = ()
    attention: tuple[str, ...] = ("eager",)
    recurrent: tuple[int, ...] = ()
    recurrent_path: str = ""
    delta_rule: bool = False
    recurrent_heads: int = 0
    keyless: tuple[int, ...] = ()
    experts: ExpertFacts | None = None
    numel: int = 0
    layer_numel: int = 0
    complete: bool = True


@dataclass(frozen=True)
class Traits:
    """The facts of a model on which every decision rests.

    model_type: as the config says. known: the installed transformers has a class (else `cls` is
    None and every fact comes from the config's fields). layer_types: one a layer. window: of the
    sliding layers, or None. kv_source: consumer layer → producer layer of shared keys and values.
    bidirectional: "" or the layers that see image blocks both ways ("all", "sliding").
    per_layer_inputs: their width, 0 for none. kv_heads: every number of key/value heads that
    occurs. head_width: of the widest attention head. logit_scale: the config field that scales the
    logits, if any. type_ids: the forward argument that marks image tokens, if any. notes: what
    could not be found out, and why.
    """

    model_type: str
    known: bool
    hidden_size: int
    num_layers: int
    vocab_size: int
    heads: int
    kv_heads: tuple[int, ...]
    layer_types: tuple[str, ...]
    vision: bool = False
    audio: bool = False
    multimodal: bool = False
    window: int | None = None
    kv_source: Mapping[int, int] = field(default_factory=dict, hash=False)
    per_layer_inputs: int = 0
    linear_layers: tuple[int, ...] = ()
    tied_embeddings: bool = False
    softcap: float | None = None
    attention_softcap: float | None = None
    head_width: int = 0
    logit_scale: str = ""
    bidirectional: str = ""
    attention_k_eq_v: bool = False
    bypassed: tuple[str, ...] = ()
    experts: ExpertFacts | None = None
    wants_auxiliary_loss: bool = False
    type_ids: str | None = None
    dtype: str | None = None
    cls: ClassFacts | None = None
    notes: tuple[str, ...] = ()

    @property
    def kv_sharing(self) -> bool:
        """Whether some layers reuse the keys and values of another layer."""
        return bool(self.kv_source)

    @property
    def layers(self) -> str:
        """Path of the decoder layers, such as `model.language_model.layers`."""
        return self.cls.layers if self.cls else "model.layers"

    @property
    def layer_class(self) -> str | None:
        """Class name of the decoder layers: the FSDP unit."""
        return self.cls.layer_classes[0] if self.cls else None

    @property
    def language_model(self) -> str:
        """Path of the module that holds the decoder layers."""
        return self.layers.rpartition(".")[0]

    @property
    def components(self) -> tuple[str, ...]:
        """Path components of everything beside the language model: what freezing means."""
        return self.cls.components if self.cls and self.multimodal else ()

    @property
    def names(self) -> frozenset[str]:
        """The traits by their names in the suite (`moe`, `vision`, `kv_sharing`, …)."""
        experts = self.experts
        has = {
            "moe": experts is not None,
            "shared_expert": experts is not None and experts.shared,
            "experts_in_layer": experts is not None and experts.in_layer,
            "auxiliary_loss": experts is not None and experts.auxiliary_loss,
            "vision": self.vision,
            "audio": self.audio,
            "bidirectional_images": bool(self.bidirectional),
            "kv_sharing": self.kv_sharing,
            "per_layer_inputs": self.per_layer_inputs > 0,
            "linear_attention": bool(self.linear_layers),
            "sliding_window": self.window is not None,
            "attention_k_eq_v": self.attention_k_eq_v,
            "tied_embeddings": self.tied_embeddings,
            "softcap": self.softcap is not None,
        }
        return frozenset(name for name, present in has.items() if present)
