"""What several checks look at: who reaches whom inside a layer, routers, the head, label counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import hypothesis
import torch
from torch import Tensor, nn

from conformance.case import Case, Model
from conformance.numerics import global_norm
from conformance.observe import Step
from conformance.oracles import masks
from conformance.subject import Subject, gradients

Batch = dict[str, Any]
Measured = dict[str, float]
TYPE_IDS = ("mm_token_type_ids", "token_type_ids")
IGNORE = -100


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside an adapter's wrapper."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def text_config(model: nn.Module) -> Any:
    """The decoder's own config."""
    return unwrapped(model).config.get_text_config()


def decoder(model: nn.Module, spec: Model) -> Any:
    """The module that holds the decoder layers and the final norm."""
    return unwrapped(model).get_submodule(spec.layers.rpartition(".")[0])


def layers_of(model: nn.Module, spec: Model) -> list[nn.Module]:
    """The decoder layers."""
    return list(unwrapped(model).get_submodule(spec.layers))


def layer_types(model: nn.Module, spec: Model) -> list[str]:
    """The attention type of each decoder layer; full attention where the config does not say."""
    config = text_config(model)
    given = getattr(config, "layer_types", None)
    return list(given) if given else ["full_attention"] * len(layers_of(model, spec))


def labelled(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are predicted and scored, after the shift."""
    return int((batch["labels"][..., 1:] != IGNORE).sum())


def without_labels(batch: Mapping[str, Any]) -> Batch:
    """The forward's inputs alone."""
    return {name: value for name, value in batch.items() if name != "labels"}


def changed(batch: Mapping[str, Any], row: int, position: int, spec: Model) -> Batch:
    """The batch with another text token at one position."""
    ids = batch["input_ids"].clone()
    ids[row, position] = 3 + (int(ids[row, position]) + 1) % (spec.text_vocab - 3)
    return {**batch, "input_ids": ids}


# Drawn alike in every run; an example is a step, so there are few.
drawn = hypothesis.settings(
    derandomize=True,
    max_examples=12,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def sample_of(ids: torch.Tensor, labelled: Sequence[bool]) -> Batch:
    """The first tokens of `ids` as a sample; those not `labelled` are not trained on."""
    kept = torch.tensor(labelled)
    ids = ids[: len(labelled)]
    return {"input_ids": ids, "labels": ids.masked_fill(~kept, IGNORE)}


def accumulated(subject: Subject, model: nn.Module, parts: Sequence[Batch], n: Any) -> Step:
    """The evidence of several micro-batches, each scaled by the same number of items."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for part in parts:
        loss = subject.loss(model, part, n)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return Step(loss=total, gradients=gradients(model))


def declined(subject: Subject, act: Callable[[], None], measured: Measured) -> bool:
    """Whether the implementation declined loudly, by its own refusals, to do something."""
    try:
        act()
    except subject.refusals:
        measured["declined"] = 1.0
        return True
    measured["declined"] = 0.0
    return False


def documents_of(batch: Mapping[str, Any]) -> list[list[int]]:
    """Document ids of each row, by restarting position ids; a row is one document without them."""
    ids = batch["input_ids"]
    positions = batch.get("position_ids")
    if positions is None:
        return [[0] * ids.shape[1]] * ids.shape[0]
    rows = positions[0] if positions.dim() == 3 else positions
    return masks.documents_of(rows.tolist())


def expected_reach(model: nn.Module, spec: Model, batch: Mapping[str, Any]) -> list[Tensor]:
    """The mask oracle's (B, S, S) of each decoder layer, from the facts of its config."""
    config = text_config(model)
    types = next((batch[name].tolist() for name in TYPE_IDS if name in batch), None)
    blocks = masks.image_blocks(types) if types is not None else None
    bidirectional = masks.bidirectional_layer_types(
        str(config.model_type), getattr(config, "use_bidirectional_attention", None)
    )
    mask = batch.get("attention_mask")
    found = {}
    for kind in set(layer_types(model, spec)):
        found[kind] = masks.allowed(
            batch["input_ids"].shape[1],
            batch=batch["input_ids"].shape[0],
            window=int(config.sliding_window) if kind == "sliding_attention" else None,
            valid=None if mask is None else mask.tolist(),
            documents=documents_of(batch),
            blocks=blocks if kind in bidirectional else None,
        )
    return [found[kind] for kind in layer_types(model, spec)]


def layer_reach(model: nn.Module, spec: Model, batch: Mapping[str, Any]) -> list[Tensor]:
    """Which inputs (B, Q, K) each decoder layer's outputs depend on, by exact nonzero gradients.

    Every layer's input is cut off from the layer below; shared keys and values still lead back to
    the layer that made them, so that a consumer's reach is that of its keys.
    """
    leaves: list[Tensor] = []
    outputs: list[Tensor] = []

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        leaves.append(hidden)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = []
    for layer in layers_of(model, spec):
        handles.append(layer.register_forward_pre_hook(cut, with_kwargs=True))
        handles.append(layer.register_forward_hook(keep))
    try:
        model(**without_labels(batch), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [_reach_of(output, leaves) for output in outputs]


def _reach_of(output: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """(B, Q, K), of states (B, S, H) or stacks of them (N, B, S, H); rows of a batch are apart."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand(output.shape[-1], generator=generator, dtype=torch.float64).to(output) + 0.5
    sources = [leaf for leaf in leaves if leaf.shape[:-1] == output.shape[:-1]]
    queries = output.shape[-2]
    told = torch.zeros(queries, *output.shape).to(output)  # of one query each
    for query in range(queries):
        told[query].select(-2, query).copy_(probe.expand_as(output.select(-2, query)))
    hits = [
        (gradient != 0).any(-1).reshape(queries, -1, *gradient.shape[-3:-1])
        for gradient in _gradients_by_query(output, sources, told)
    ]
    return torch.cat(hits, 1).any(1).transpose(0, 1).cpu()


def _gradients_by_query(
    output: Tensor, sources: Sequence[Tensor], told: Tensor
) -> Iterator[Tensor]:
    """The gradients (Q, …) of the sources that the output depends on, for each row of `told`."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(output, sources, told, is_grads_batched=True, **options)
    except RuntimeError:  # a backward that someone wrote by hand takes one at a time
        rows = [torch.autograd.grad(output, sources, each, **options) for each in told]
        found = tuple(
            None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
        )
    yield from (gradient for gradient in found if gradient is not None)


def assert_reach(
    case: Case, model: nn.Module, batch: Mapping[str, Any], measured: Measured, kinds: Sequence[str]
) -> None:
    """Every layer of these types reaches exactly what the mask oracle allows (padding aside)."""
    assert case.model is not None
    got = layer_reach(model, case.model, batch)
    want = expected_reach(model, case.model, batch)
    types = layer_types(model, case.model)
    mask = batch.get("attention_mask")
    real = torch.ones_like(want[0][..., 0]) if mask is None else mask.bool().cpu()
    checked = [i for i, kind in enumerate(types) if kind in kinds]
    assert checked, f"{case.id}: the model has no layer of {', '.join(kinds)}"
    wrong = {i: ((got[i] != want[i]) & real[..., None]).nonzero() for i in checked}
    measured["layers"] = len(checked)
    measured["wrong pairs"] = sum(len(pairs) for pairs in wrong.values())
    for layer, pairs in wrong.items():
        if len(pairs):
            row, query, key = pairs[0].tolist()
            seen = "sees" if got[layer][row, query, key] else "does not see"
            raise AssertionError(
                f"{case.id}: layer {layer} ({types[layer]}): token {query} {seen} token {key} of "
                f"row {row}; {len(pairs)} wrong pairs, tolerance 0"
            )


class Head(NamedTuple):
    """States (B, S, H) that go into the head, and the loss's gradient of them."""

    hidden: Tensor
    gradient: Tensor
    weight: Tensor
    bias: Tensor | None
    loss: float


def head_evidence(subject: Subject, model: nn.Module, batch: Batch, n: Any = None) -> Head:
    """The final states of a training step, and the gradient that the loss sends back to them."""
    caught: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        state = output.detach().requires_grad_()
        caught.append(state)
        return state

    norm = decoder(model, subject.model_spec).norm
    handle = norm.register_forward_hook(keep)
    try:
        loss = subject.loss(model, batch, n)
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(loss, caught[-1])
    head = unwrapped(model).get_output_embeddings()
    return Head(caught[-1].detach(), gradient, head.weight, head.bias, float(loss.detach()))


def routers_of(model: nn.Module) -> dict[str, Any]:
    """The routers, by name: modules beside experts that return (scores, weights, indices)."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Router") and "altup" not in name
    }


def experts_of(model: nn.Module) -> dict[str, Any]:
    """The modules that hold stacked expert weights, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        and module.gate_up_proj.dim() == 3
    }


class Routed(NamedTuple):
    """What went into a router, and the three things that it returned."""

    hidden: Tensor
    scores: Tensor
    weights: Tensor
    indices: Tensor


@contextmanager
def watched_routers(model: nn.Module) -> Iterator[dict[str, Routed]]:
    """What each router saw and said in the last forward inside the context, by its name."""
    seen: dict[str, Routed] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = args[0].reshape(-1, args[0].shape[-1])
            seen[name] = Routed(hidden, *output)

        return keep

    handles = [m.register_forward_hook(hook(n)) for n, m in routers_of(model).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pinned_routers(model: nn.Module, choose: Callable[[int, Routed], Routed]) -> Iterator[None]:
    """Every router's answer replaced by `choose(its number, its answer)`."""

    def hook(number: int) -> Any:
        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = args[0].reshape(-1, args[0].shape[-1])
            return tuple(choose(number, Routed(hidden, *output))[1:])

        return replace

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(routers_of(model).values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def finite(step: Step) -> bool:
    """Whether the loss and every gradient of a step are finite."""
    whole = step.loss is not None and torch.isfinite(torch.tensor(step.loss)).item()
    return bool(whole) and torch.isfinite(torch.tensor(global_norm(step.gradients))).item() is True
