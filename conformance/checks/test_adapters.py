"""PEFT: what an adapter specification adapts, and what adapters do to the model."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from conformance.case import Case
from conformance.check import check
from conformance.lora import (
    PROJECTIONS,
    adapted_modules,
    adapters,
    base_parameters,
    decoder_projections,
    expert_modules,
    is_adapter,
)
from conformance.numerics import assert_close, assert_differs, assert_equal
from conformance.oracles.adapters import merged, scaling
from conformance.subject import Subject
from conformance.tolerances import tolerance
from conformance.weights import canonical_name

LORA = ("lora",)
BOTH = ("lora", "lora-experts")
BY_NAME = {"lora_targets": list(PROJECTIONS)}
Measured = dict[str, float]


@check("P01", needs=("plan", "prepare"), settings=LORA)
def test_documented_targets_are_accepted(case: Case, subject: Subject) -> None:
    """The target lists that the guides print are accepted and adapt something.

    https://github.com/huggingface/peft/pull/3129
    """
    for targets in (["q_proj", "v_proj"], list(PROJECTIONS), "all-linear"):
        model = subject.model(options={"lora_targets": targets})
        assert adapted_modules(model), f"{case.id}: {targets} adapted no module"


@check("P02", needs=("plan", "prepare"), settings=LORA)
def test_names_adapt_the_decoder_only(case: Case, subject: Subject, measured: Measured) -> None:
    """A list of projection names adapts exactly the decoder's linear layers of those names.

    https://github.com/huggingface/peft/issues/3711
    """
    want = decoder_projections(subject.stock("float32"), subject.model_spec)
    assert want, f"{case.id}: the model has no projection of these names"
    got = adapted_modules(subject.model(options=BY_NAME))
    routed = expert_modules(subject.stock("float32"))
    got -= {m for m in got if any(m == e or m.startswith(f"{e}.") for e in routed)}
    measured["adapted"] = len(got)
    missing, extra = sorted(want - got), sorted(got - want)
    assert not missing, f"{case.id}: {len(missing)} not adapted, such as {missing[:2]}"
    assert not extra, f"{case.id}: {len(extra)} adapted beyond the list, such as {extra[:2]}"


@check("P03", needs=("plan", "prepare"), settings=LORA, traits=("moe",))
def test_expert_names_reach_the_experts(case: Case, subject: Subject) -> None:
    """A list that names expert leaves adapts the routed experts, or says that it does not.

    https://github.com/huggingface/peft/issues/3009
    """
    routed = expert_modules(subject.stock("float32"))
    assert routed, f"{case.id}: the model has no routed experts"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = subject.plan(options=BY_NAME)
        model = subject.adopt(subject.built(plan, case.setting), plan)  # a copy says nothing
    said = [str(w.message) for w in caught] + list(plan.warnings)
    got = adapted_modules(model)
    reached = {e for e in routed if any(m == e or m.startswith(f"{e}.") for m in got)}
    assert reached == routed or any("expert" in text for text in said), (
        f"{case.id}: {len(reached)} of {len(routed)} expert modules adapted, and no warning of it"
    )


@check("P04", needs=("prepare",), settings=BOTH, dealt=("bf16+lora",))
def test_fresh_adapter_is_no_op(case: Case, subject: Subject, measured: Measured) -> None:
    """A fresh adapter leaves every logit bit-equal.

    An invariant kept without a thread: LoRA's B starts at zero.
    """
    batch = subject.batch()
    base = subject.eval_logits(subject.model(tuning="full"), batch)
    model = subject.model(adapters=False)
    assert adapters(model), f"{case.id}: nothing was adapted"
    fresh = subject.eval_logits(model, batch)
    assert_equal(case.id, "logits", fresh, base, measured)


@check("P05", needs=("prepare", "loss"), settings=(*BOTH, "lora+images"))
def test_every_trainable_parameter_gets_a_gradient(case: Case, subject: Subject) -> None:
    """No trainable parameter is left without a gradient on a batch of the supported kind.

    https://github.com/huggingface/peft/issues/899
    """
    model = subject.model()
    subject.loss(model, subject.batch()).backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable, f"{case.id}: nothing is trainable"
    without = [name for name, p in trainable.items() if p.grad is None]
    assert not without, (
        f"{case.id}: {len(without)} of {len(trainable)} trainable parameters have no gradient,"
        f" such as {without[0]}"
    )


@check("P06", needs=("prepare", "save", "load", "merge"), settings=LORA)
def test_trained_head_survives(case: Case, subject: Subject, tmp_path: Any) -> None:
    """A trained copy of the head (`modules_to_save`) survives saving, loading and merging.

    https://github.com/huggingface/peft/issues/2777
    """
    options = {"modules_to_save": ["lm_head"]}
    plan = subject.plan(options=options)
    model = subject.model(plan=plan)
    head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n)
    with torch.no_grad():
        head.add_(0.1)
    batch = subject.batch()
    want = subject.eval_logits(model, batch)
    subject.impl.save(model, tmp_path / "adapter")
    base = subject.model(tuning="full")
    before = subject.eval_logits(base, batch)
    assert not torch.equal(before, want), f"{case.id}: the trained head changed nothing"
    again = subject.impl.load(base, tmp_path / "adapter")
    limit = tolerance("logits/reloaded", subject.numerics)
    assert_close(case.id, "reloaded", subject.eval_logits(again, batch), want, limit, {})
    merged_model = subject.impl.merge(model)
    limit = tolerance("logits/merged", subject.numerics)
    assert_close(case.id, "merged", subject.eval_logits(merged_model, batch), want, limit, {})


@check("P07", needs=("prepare", "merge"), settings=BOTH)
def test_merged_equals_unmerged(case: Case, subject: Subject, measured: Measured) -> None:
    """Merging gives W + s·B·A, per expert too, and leaves the logits where they were.

    https://github.com/huggingface/peft/issues/3083
    """
    plan = subject.plan(options={"lora_r": 3, "lora_alpha": 8})
    model = subject.model(plan=plan)
    batch = subject.batch()
    want = subject.eval_logits(model, batch)
    base = subject.eval_logits(subject.model(tuning="full"), batch)
    assert_differs(case.id, "adapter", want, base, {})
    factors = {name: p.detach().clone() for name, p in adapters(model).items()}
    weights = dict(subject.model(tuning="full").named_parameters())
    result = subject.impl.merge(model)
    limit = tolerance("weights/merged", subject.numerics)
    for name, weight, a, b in expected_merges(factors, weights):
        expected = merged(weight.detach(), a, b, scaling(8, 3))
        got = dict(result.named_parameters())[name]
        assert_close(case.id, f"merged {name}", got, expected, limit, {})
    got = subject.eval_logits(result, batch)
    assert_close(case.id, "logits", got, want, tolerance("logits/merged"), measured)


def expected_merges(
    factors: dict[str, torch.Tensor], weights: dict[str, torch.nn.Parameter]
) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(weight name, weight, A, B) of every adapted weight, matched by the module path and shape."""
    found: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for name, a in factors.items():
        if ".lora_A." not in name:
            continue
        b = factors[name.replace(".lora_A.", ".lora_B.")]
        path = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
        module = path.replace(".base_layer", "")
        for weight_name, weight in weights.items():
            owner, _, leaf = weight_name.rpartition(".")
            linear = leaf == "weight" and weight.dim() == 2 and not leaf.startswith("experts")
            experts = weight.dim() == 3 and leaf in ("gate_up_proj", "down_proj")
            if owner != module or not (linear or experts):
                continue
            if weight.shape[-1] == a.shape[1] and weight.shape[-2] == b.shape[0]:
                found.append((weight_name, weight, a, b))
    assert len(found) == len(factors) // 2, f"{len(found)} of {len(factors) // 2} factors matched"
    return found


@check(
    "P11", needs=("plan", "prepare"), settings=("lora-experts",), dealt=("lora-experts+kernels",)
)
def test_rank_and_alpha_patterns_on_fused_weights(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """A rank and an alpha of their own for one expert weight act there, and nowhere else.

    https://github.com/huggingface/peft/issues/3083
    """
    name = "experts.gate_up_proj"
    patterns = {"rank_pattern": {name: 5}, "alpha_pattern": {name: 20}}
    options = {"lora_r": 3, "lora_alpha": 6, **patterns}
    try:
        model = subject.model(options=options)
    except subject.refusals:
        measured["declined"] = 1.0
        return
    batch, base = subject.batch(), subject.model(tuning="full")
    before = subject.eval_logits(base, batch)
    factors = {n: p.detach().clone() for n, p in adapters(model).items()}
    weights = dict(base.named_parameters())
    for weight_name, weight, a, b in expected_merges(factors, weights):
        special = weight_name.endswith(name)
        count = weight.shape[0] if weight.dim() == 3 else 1
        rank, alpha = (5, 20) if special else (3, 6)
        measured[f"rank of {weight_name}"] = a.shape[0] / count
        assert a.shape[0] == rank * count == b.shape[1], (
            f"{case.id}: {weight_name}: rank {a.shape[0] / count:g}, asked for {rank}"
        )
        weight.data = merged(weight.detach(), a, b, scaling(alpha, rank))
    want = subject.eval_logits(base, batch)
    assert_differs(case.id, "adapter", want, before, {})
    row = tolerance("logits/merged", subject.numerics)
    assert_close(case.id, "logits", subject.eval_logits(model, batch), want, row, measured)


@check("P08", needs=("prepare",), settings=LORA)
def test_two_adapters(case: Case, subject: Subject, measured: Measured) -> None:
    """Of two adapters the active one acts; disabling gives the base; deleting gives the first.

    https://github.com/huggingface/peft/releases/tag/v0.21.2
    """
    model: Any = subject.model()
    batch = subject.batch()
    first = subject.eval_logits(model, batch)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    base = subject.eval_logits(subject.model(tuning="full"), batch)
    assert_differs(case.id, "adapter", first, base, {})
    assert_equal(case.id, "fresh second", subject.eval_logits(model, batch), base, measured)
    model.set_adapter("default")
    assert_equal(case.id, "first again", subject.eval_logits(model, batch), first, measured)
    with model.disable_adapter():
        assert_equal(case.id, "disabled", subject.eval_logits(model, batch), base, measured)
    model.delete_adapter("second")
    assert_equal(case.id, "after delete", subject.eval_logits(model, batch), first, measured)


@check("P15", needs=("plan", "prepare"), settings=("lora-experts",), traits=("moe",))
def test_dropout_on_expert_parameters_is_refused(case: Case, subject: Subject) -> None:
    """Dropout on adapters of 3-D parameters is refused: nothing applies it there.

    https://github.com/huggingface/peft/pull/2638
    """
    assert adapters(subject.model()), f"{case.id}: without dropout nothing was adapted"
    said = ""
    try:
        subject.model(options={"lora_dropout": 0.1})
    except subject.declines(ValueError) as error:
        said = str(error)
    assert "dropout" in said, f"{case.id}: dropout of 0.1 was accepted, or refused as {said!r}"


@check("P09", needs=("prepare", "loss"), settings=BOTH, dealt=("lora+ckpt-nonreentrant",))
def test_base_is_unchanged_by_training(case: Case, subject: Subject, measured: Measured) -> None:
    """Two optimizer steps on the adapters leave every base weight bit-equal.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3800
    """
    model = subject.model()
    before = {name: p.detach().clone() for name, p in base_parameters(model).items()}
    factors = {name: p.detach().clone() for name, p in adapters(model).items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    batch = subject.batch()
    for _ in range(2):
        optimizer.zero_grad()
        subject.loss(model, batch).backward()
        optimizer.step()
    moved = sum(not torch.equal(p, factors[n]) for n, p in adapters(model).items())
    assert moved, f"{case.id}: no adapter moved"
    changed = [n for n, p in base_parameters(model).items() if not torch.equal(p, before[n])]
    measured["changed"] = len(changed)
    assert not changed, f"{case.id}: {len(changed)} base weights changed, such as {changed[0]}"


@check("P10", needs=("prepare",), settings=("bf16+lora", "bf16+lora-experts"))
def test_adapter_dtype(case: Case, subject: Subject) -> None:
    """All adapters of a model have one dtype, and no base weight was cast for them.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3090
    """
    model = subject.model()
    dtypes = {p.dtype for p in adapters(model).values()}
    assert len(dtypes) == 1, f"{case.id}: adapters in {sorted(map(str, dtypes))}"
    plain = {n: p.dtype for n, p in subject.model(tuning="full").named_parameters()}
    base = {canonical_name(n): p.dtype for n, p in base_parameters(model).items()}
    cast = [n for n, dtype in plain.items() if base.get(canonical_name(n)) != dtype]
    assert not cast, f"{case.id}: {len(cast)} base weights were cast, such as {cast[0]}"


@check(
    "P13",
    needs=("prepare", "loss"),
    settings=("lora+ckpt-nonreentrant", "lora-experts+ckpt-nonreentrant"),
)
def test_checkpointed_adapters_learn(case: Case, subject: Subject, measured: Measured) -> None:
    """With checkpointing, every fresh lora_B gets a nonzero gradient.

    https://github.com/axolotl-ai-cloud/axolotl/pull/2928
    """
    model = subject.model(adapters=False)
    subject.loss(model, subject.batch()).backward()
    tower = set(subject.model_spec.freeze)
    seconds = {
        n: p
        for n, p in model.named_parameters()
        if is_adapter(n) and ".lora_B" in n and not tower & set(n.split("."))
    }
    assert seconds, f"{case.id}: no lora_B"
    still = [n for n, p in seconds.items() if p.grad is None or not p.grad.any()]
    measured["without_gradient"] = len(still)
    assert not still, f"{case.id}: {len(still)} of {len(seconds)} lora_B do not learn: {still[0]}"


class Identity(torch.nn.Module):
    """A parametrization that changes nothing, as a dequantising one looks to PEFT."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight itself."""
        return weight.clone()


@check("P14", needs=("plan", "build", "prepare"), settings=("lora-experts",), traits=("moe",))
def test_adapters_do_not_pile_up(case: Case, subject: Subject, measured: Measured) -> None:
    """Forward after forward gives the same logits when an expert weight is parametrized.

    Every quantised expert weight is; PEFT 0.21 leaves its own parametrization behind (L13).
    """
    routed = expert_modules(subject.stock("float32"))
    names = [f"{path}.gate_up_proj" for path in sorted(routed)]
    plan = subject.plan(options={"lora_target_parameters": names})
    model = subject.built(plan, case.setting)
    for path in routed:
        experts = model.get_submodule(path)
        torch.nn.utils.parametrize.register_parametrization(experts, "gate_up_proj", Identity())
    model = subject.adopt(model, plan)
    assert routed <= adapted_modules(model), f"{case.id}: the experts were not adapted"
    batch = subject.batch()
    logits = [subject.eval_logits(model, batch) for _ in range(3)]
    base = subject.eval_logits(subject.model(tuning="full"), batch)
    assert_differs(case.id, "adapter", logits[0], base, {})
    assert_equal(case.id, "third forward", logits[2], logits[0], measured)
