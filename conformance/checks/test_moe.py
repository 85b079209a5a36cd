"""Mixture of experts: routing, auxiliary loss, experts implementations, storage."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import (
    Batch,
    Measured,
    Routed,
    accumulated,
    declined,
    experts_of,
    labelled,
    pinned_routers,
    routers_of,
    text_config,
    unwrapped,
    watched_routers,
    without_labels,
)
from conformance.numerics import assert_close, assert_equal, assert_same_dtype, relative_error
from conformance.oracles import experts as oracle
from conformance.oracles import routing
from conformance.oracles.auxiliary_loss import balance_loss
from conformance.subject import Subject
from conformance.tolerances import tolerance
from conformance.weights import canonical_name

AUXILIARY = ("auxiliary_loss",)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def oracle_routing(module: Any, hidden: torch.Tensor, config: Any) -> routing.Routing:
    """The oracle's answer for one router of the model, in float64."""
    x, rule = hidden.detach().double(), routing.rule_of(config)
    if hasattr(module, "per_expert_scale"):
        weight = module.proj.weight.detach().double()
        scale = module.scale.detach().double()
        logits = routing.gemma4_logits(x, weight, scale, config.rms_norm_eps)
        found = routing.route(logits, rule)
        return routing.scale_per_expert(found, module.per_expert_scale.detach().double())
    return routing.route(routing.linear_logits(x, module.weight.detach().double()), rule)


@check("R01", needs=("prepare",), traits=("moe",), settings=("-", "lora"))
def test_router_is_top_k(case: Case, subject: Subject, measured: Measured) -> None:
    """Every router chooses and weighs experts as a Python top-k over its own weights does.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3651
    """
    model = subject.model(adapters=False)
    with watched_routers(model) as seen:
        subject.eval_logits(model, subject.batch())
    assert len(seen) == len(experts_of(model)) > 0, f"{case.id}: {len(seen)} routers ran"
    for name, router in routers_of(model).items():
        if any(name.startswith(f"{other}.") for other in seen if other != name):
            continue
        want = oracle_routing(router, seen[name].hidden, text_config(model))
        wrong = int((seen[name].indices != want.indices).sum())
        measured[f"wrong choices of {canonical_name(name)}"] = wrong
        assert not wrong, f"{case.id}: {name}: {wrong} of {want.indices.numel()} choices differ"
        what = f"weights of {canonical_name(name)}"
        row = tolerance("router/weights")
        assert_close(case.id, what, seen[name].weights, want.weights, row, measured)


def with_router_logits(model: torch.nn.Module, coefficient: float | None = None) -> Any:
    """The model with its config asking for router logits, as the documentation says."""
    inner = unwrapped(model)
    for config in {id(c): c for c in (inner.config, inner.config.get_text_config())}.values():
        config.output_router_logits = True
        if coefficient is not None:
            config.router_aux_loss_coef = coefficient
    if coefficient is not None and hasattr(inner, "router_aux_loss_coef"):
        inner.router_aux_loss_coef = coefficient
    return model


def balance_of(model: torch.nn.Module, seen: dict[str, Routed], batch: Batch) -> torch.Tensor:
    """The oracle's balance loss, from the hidden states that the routers saw."""
    routers = routers_of(model)
    logits = [
        routing.linear_logits(r.hidden.detach().double(), routers[n].weight.detach().double())
        for n, r in seen.items()
    ]
    mask = batch.get("attention_mask")
    valid = None if mask is None else mask.flatten().tolist()
    return balance_loss(logits, routing.rule_of(text_config(model)).top_k, valid)


@check("R02", needs=("prepare",), traits=AUXILIARY, settings=("-", "padded"))
def test_auxiliary_loss_is_the_formula(case: Case, subject: Subject, measured: Measured) -> None:
    """The load-balancing loss is Switch Transformer's, of real tokens; balanced, it is top_k.

    https://github.com/huggingface/transformers/pull/44242
    """
    model: Any = subject.model()
    batch = without_labels(subject.batch())
    with watched_routers(model) as seen, torch.no_grad():
        out = model(**batch, output_router_logits=True, use_cache=False)
    assert len(out.router_logits) == len(routers_of(model)), f"{case.id}: router logits are missing"
    want = balance_of(model, seen, batch)
    top_k = routing.rule_of(text_config(model)).top_k
    measured["imbalance"] = float(want) - top_k
    assert abs(measured["imbalance"]) > 1e-3, f"{case.id}: the fixture's router is balanced"
    row = tolerance("loss/same-model")
    assert_close(case.id, "auxiliary loss", out.aux_loss, want, row, measured)
    for router in routers_of(model).values():
        router.weight.data.zero_()
    with torch.no_grad():
        flat = model(**batch, output_router_logits=True, use_cache=False).aux_loss
    assert_close(case.id, "balanced", flat, torch.tensor(float(top_k)), row, measured)


@check("R03", needs=("prepare", "loss"), traits=AUXILIARY, settings=("-", "kernels"))
def test_auxiliary_loss_is_wired(case: Case, subject: Subject, measured: Measured) -> None:
    """Asked for router logits, the loss grows by coefficient × balance loss; with 0 by nothing.

    https://github.com/huggingface/transformers/issues/44242
    """
    batch = subject.batch()
    off = subject.step(subject.model(), batch)
    for coefficient in (0.25, 0.0):
        model = with_router_logits(subject.model(), coefficient)
        with watched_routers(model) as seen:
            on = subject.step(model, batch)
        extra = coefficient * float(balance_of(model, seen, batch))
        assert off.loss is not None and on.loss is not None
        measured[f"extra at {coefficient}"] = on.loss - off.loss
        want = torch.tensor(off.loss + extra, dtype=torch.float64)
        what = f"loss at coefficient {coefficient}"
        row = tolerance("loss/same-model")
        got = torch.tensor(on.loss, dtype=torch.float64)
        assert_close(case.id, what, got, want, row, measured)
        routers = [n for n in off.gradients if n.endswith("gate.weight") and "shared" not in n]
        moved = max(relative_error(on.gradients[n], off.gradients[n]).frobenius for n in routers)
        measured[f"router gradient moved at {coefficient}"] = moved
        assert (moved > 1e-3) == (coefficient > 0), f"{case.id}: router gradients moved {moved:.3g}"


def captured(model: torch.nn.Module, batch: Batch) -> tuple[Any, dict[str, Routed]]:
    """The router logits that a training forward returns, and what each router said in it; the
    latter for the former where the class returns none."""
    with watched_routers(model) as seen:
        out: Any = model(**without_labels(batch), output_router_logits=True, use_cache=False)
    return getattr(out, "router_logits", seen), seen


@check(
    "R04",
    needs=("prepare",),
    traits=("moe",),
    settings=("-", "lora-experts"),
    dealt=("kernels", "lora+ckpt-nonreentrant", "ckpt-reentrant"),
)
def test_router_logits_are_captured(
    case: Case, subject: Subject, measured: Measured, unsupported: Any
) -> None:
    """Asked for router logits, a training forward returns those of every MoE layer, in their order.

    https://github.com/unslothai/unsloth/pull/4812
    """
    options = {"auxiliary_loss": True} if "auxiliary_loss" in subject.model_spec.traits else None
    if options and declined(subject, lambda: subject.plan(options=options), measured):
        options = None
    model = subject.model(options=options)
    logits, seen = captured(model, subject.batch())
    if logits is seen:
        unsupported("the class returns no router logits here")
    layers = measured["MoE layers"] = len(experts_of(model))
    assert layers == len(seen) > 0, f"{case.id}: {len(seen)} routers ran in {layers} MoE layers"
    found = measured["captured"] = len(logits or ())
    assert found == layers, f"{case.id}: router logits of {found} layers, there are {layers}"
    for number, (name, said) in enumerate(seen.items()):
        assert_equal(case.id, name, logits[number], said.scores, measured)
    if options is None:
        return  # no loss is taken of them
    weights = [p for n, p in model.named_parameters() if p.requires_grad]
    total = torch.stack([layer.float().square().sum() for layer in logits]).sum()
    assert total.requires_grad, (
        f"{case.id}: router logits without history: their loss trains nothing"
    )
    reached = [g for g in torch.autograd.grad(total, weights, allow_unused=True) if g is not None]
    assert any(g.any() for g in reached), f"{case.id}: no gradient flows through router logits"


@check("R05", needs=("prepare", "collate", "loss"), traits=AUXILIARY, settings=("-", "kernels"))
def test_auxiliary_scale_is_invariant(case: Case, subject: Subject, measured: Measured) -> None:
    """The share of the auxiliary loss does not grow with micro-batches, nor with padding.

    https://github.com/NVIDIA/Megatron-LM/pull/3672
    """
    batch = subject.batch("padded")
    items = labelled(batch)
    model = with_router_logits(subject.model(), 0.25)
    one = subject.step(model, batch, items)
    two = accumulated(subject, model, [batch, batch], 2 * items)
    plain = subject.step(subject.model(), batch, items)
    assert one.loss is not None and two.loss is not None and plain.loss is not None
    measured["auxiliary share"] = one.loss - plain.loss
    assert measured["auxiliary share"] > 0.1, f"{case.id}: the loss has no auxiliary share"
    row = tolerance("loss/same-model")
    got, want = torch.tensor(two.loss), torch.tensor(one.loss)
    assert_close(case.id, "two equal micro-batches", got, want, row, measured)
    longer = {
        name: torch.nn.functional.pad(value, (0, 3), value=-100 if name == "labels" else 0)
        for name, value in batch.items()
    }
    padded = subject.step(model, longer, items)
    got = torch.tensor(padded.loss)
    assert_close(case.id, "three more padded", got, want, row, measured)


def expert_inputs(module: Any, shape: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, indices and weights of a routing with a name; expert 1 is always empty."""
    count, size = module.gate_up_proj.shape[0], module.gate_up_proj.shape[2]
    tokens = 1 if shape == "one token" else 11
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, size, generator=generator)
    others = [e for e in range(count) if e != 1]
    rows = [[others[(t + s * 2) % len(others)] for s in range(2)] for t in range(tokens)]
    if shape == "all to one":
        rows = [[others[-1]] * 2 for _ in range(tokens)]
    weights = torch.rand(tokens, 2, generator=generator) + 0.25
    return hidden, torch.tensor(rows), weights


def expert_evidence(module: Any, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Output and gradients of an experts module for pinned routing."""
    weight = module.gate_up_proj
    hidden, scale = (x.to(weight).requires_grad_() for x in (inputs[0], inputs[2]))
    given = (hidden, scale, module.gate_up_proj, module.down_proj)
    out = module(hidden, inputs[1].to(weight.device), scale)
    up = torch.linspace(-1, 1, out.numel()).to(out).reshape(out.shape)
    names = ("hidden", "weights", "gate_up_proj", "down_proj")
    grads = torch.autograd.grad(out, given, up)
    return {"output": out.detach(), **dict(zip(names, grads, strict=True))}


class OracleExperts(torch.nn.Module):
    """The dumb experts with the weights of a module, in float64."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(module.gate_up_proj.detach().double())
        self.down_proj = torch.nn.Parameter(module.down_proj.detach().double())
        config = module.config.get_text_config()
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        self.activation = oracle.ACTIVATIONS[name]

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) of hidden (T, H), index (T, K), weight (T, K)."""
        weights = (self.gate_up_proj, self.down_proj)
        return oracle.experts(hidden, index, weight, *weights, self.activation)


@check("R06", needs=("prepare",), traits=("moe",), settings=("-", "kernels"))
def test_experts_implementations_agree(case: Case, subject: Subject, measured: Measured) -> None:
    """Every experts implementation gives the dumb loop's output and gradients, empty expert or not.

    https://github.com/huggingface/transformers/issues/48205
    """
    model = subject.model()
    module = next(iter(experts_of(model).values()))
    own = str(module.config._experts_implementation)
    for shape in ("empty expert", "one token", "all to one"):
        inputs = expert_inputs(module, shape)
        assert 1 not in inputs[1], f"{case.id}: expert 1 is not empty"
        want = expert_evidence(OracleExperts(module), inputs)
        for name in dict.fromkeys([own, *IMPLEMENTATIONS]):
            module.config._experts_implementation = name
            got = expert_evidence(module, inputs)
            for part, value in want.items():
                what = f"{name}, {shape}: {part}"
                row = tolerance("experts/float32")
                assert_close(case.id, what, got[part], value, row, measured)
        module.config._experts_implementation = own


def avoiding(count: int) -> Any:
    """A routing that never chooses expert 0, whatever the router says."""

    def choose(number: int, said: Routed) -> Routed:
        tokens, slots = said.indices.shape
        at = torch.arange(tokens * slots, device=said.indices.device).reshape(tokens, slots)
        return said._replace(indices=1 + (at + number) % (count - 1))

    return choose


@check(
    "R07",
    needs=("prepare", "loss"),
    traits=("moe",),
    settings=("-", "kernels", "lora-experts", "lora-experts+kernels"),
)
def test_unrouted_expert_has_zero_gradient(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """An expert that gets no token has gradient 0: not None, not NaN.

    https://github.com/huggingface/transformers/issues/48205
    """
    model, batch = subject.model(), subject.batch()
    count = next(iter(experts_of(model).values())).gate_up_proj.shape[0]
    with pinned_routers(model, avoiding(count)), watched_routers(model):
        step = subject.step(model, batch)
    wanted = {canonical_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    stacked = [n for n in wanted if re.search(r"\.experts\.(?!.*shared)", n)]
    assert stacked, f"{case.id}: no expert is trained"
    for name in stacked:
        gradient = step.gradients.get(name)
        assert gradient is not None, f"{case.id}: {name} has gradient None"
        assert torch.isfinite(gradient).all(), f"{case.id}: {name} has a gradient with NaN"
        by_expert = gradient
        if "lora_A" in name:
            by_expert = gradient.reshape(count, -1, gradient.shape[1])
        elif "lora_B" in name:
            by_expert = gradient.reshape(gradient.shape[0], -1, count).permute(2, 0, 1)
        size = by_expert.flatten(1).abs().amax(1)
        measured[name] = float(size[0])
        assert size[1:].min() > 0, f"{case.id}: {name}: a routed expert has no gradient"
        assert size[0] == 0, f"{case.id}: {name}: unrouted expert 0 has gradient {size[0]:.3g}"


@check("R08", needs=("prepare",), traits=("moe",), settings=("bf16",))
def test_low_precision_with_pinned_routing(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """With the routing pinned, bfloat16 logits are as near to float64 as eager bfloat16 ones.

    parallel.md §5 (bfloat16 flips routes, so unpinned comparisons prove nothing)
    """
    ids = {"input_ids": subject.batch("text")["input_ids"]}
    exact = subject.stock("float64")
    with watched_routers(exact) as seen:
        want = subject.eval_logits(exact, ids)
    routes = list(seen.values())
    assert len(routes) == len(routers_of(exact)) > 0, f"{case.id}: no router ran"

    def pinned(number: int, said: Routed) -> Routed:
        weights = routes[number].weights.to(said.weights.dtype)
        return said._replace(weights=weights, indices=routes[number].indices)

    results = []
    for model in (subject.model(), subject.stock("bfloat16")):
        assert len(routers_of(model)) == len(routes)
        with pinned_routers(model, pinned):
            results.append(subject.eval_logits(model, ids))
    assert results[0].dtype == torch.bfloat16, f"{case.id}: logits are {results[0].dtype}"
    assert_same_dtype(case.id, "logits", results[0], results[1], want, measured)


HALVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}


def per_expert(keys: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked expert weights of a state dict, put together from per-expert keys where it has them.

    gate_up (E, 2I, H) holds the gate's rows first; down (E, H, I).
    """
    found: dict[str, dict[int, dict[int, torch.Tensor]]] = {}
    stacked = {}
    for key, value in keys.items():
        match = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)\.weight", key)
        if match:
            path, expert, leaf = match[1], int(match[2]), match[3]
            name = "gate_up_proj" if leaf in HALVES else "down_proj"
            slot = found.setdefault(f"{path}.{name}", {}).setdefault(expert, {})
            slot[HALVES.get(leaf, 0)] = value
        elif re.search(r"experts\.(gate_up_proj|down_proj)$", key):
            stacked[key] = value
    for name, by_expert in found.items():
        rows = [
            torch.cat([half for _, half in sorted(by_expert[e].items())]) for e in sorted(by_expert)
        ]
        stacked[name] = torch.stack(rows)
    return {
        re.sub(r"block_sparse_moe|mlp", "mlp", canonical_name(k)): v for k, v in stacked.items()
    }


@check("R09", needs=("build", "save"), traits=("moe",))
def test_expert_storage_is_lossless(case: Case, subject: Subject, measured: Measured) -> None:
    """Stacked experts load from disk and go back to disk bit for bit, whatever the layout there.

    https://github.com/huggingface/transformers/issues/46650
    """
    from safetensors.torch import load_file

    model = subject.built(subject.plan(), case.setting)
    loaded = {canonical_name(n): p for n, p in model.named_parameters() if "experts." in n}
    loaded = {n: p for n, p in loaded.items() if p.dim() == 3}
    truth = {canonical_name(n): p for n, p in subject.stock("float32").named_parameters()}
    assert loaded, f"{case.id}: the model has no stacked experts"
    written: dict[str, torch.Tensor] = {}
    with TemporaryDirectory() as path:
        subject.impl.save(model, Path(path))
        for file in sorted(Path(path).glob("*.safetensors")):
            written |= load_file(file)
    saved = per_expert(written)
    assert saved.keys() == loaded.keys(), f"{case.id}: on disk {sorted(saved)[:2]}…"
    measured["keys on disk"] = sum("experts." in key for key in written)
    for name, parameter in loaded.items():
        assert_equal(case.id, f"{name} loaded", parameter, truth[name], measured)
        assert_equal(case.id, f"{name} saved", saved[name], truth[name], measured)
