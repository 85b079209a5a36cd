"""4-bit base weights on ranks: what each rank holds, computes and saves, and what is declined."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conformance import evidence, rank_steps, spread
from conformance.case import Case
from conformance.check import check
from conformance.checks.test_quantization import meant, required
from conformance.evidence import assert_step
from conformance.lora import adapted_modules
from conformance.numerics import assert_close, assert_equal
from conformance.subject import Subject
from conformance.tolerances import tolerance

Measured = dict[str, float]
NEEDS = ("plan", "build", "prepare", "parallelize", "loss")
QLORA: dict[str, Any] = {"settings": ("qlora",), "marks": ("quantization",)}
MODELS = ("gemma4-moe", "gemma4-dense", "qwen3_5_moe-text")
PADDED = 16  # bytes a weight: what does not divide by the ranks


@check("Q05", needs=NEEDS, reads=(), models=MODELS, strategies=("ddp", "fsdp2"), **QLORA)
def test_packed_weights_on_ranks_are_one_process(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """Loss and every adapter gradient over 4-bit weights on ranks are those of one process.

    https://github.com/axolotl-ai-cloud/axolotl/issues/3374
    """
    required(unavailable)
    seen = evidence.evidence(subject)
    stray = [name for name in seen.single.gradients if "lora_" not in name]
    assert not stray, f"{case.id}: {stray[:1]} is trained beside the adapters"
    assert_step(subject, seen, measured)


@check("Q06", needs=NEEDS, reads=(), models=MODELS, strategies=("ddp", "fsdp2"), **QLORA)
def test_bytes_of_a_rank_are_within_the_budget(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """A rank holds half a byte a value under DDP, its share of that under FSDP2, and the scales.

    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849
    """
    required(unavailable)
    seen = evidence.evidence(subject)
    numel = meant(subject)
    assert len(numel) > 10, f"{case.id}: {len(numel)} weights are no decoder"
    parts = 1 if case.strategy.name == "ddp" else case.strategy.ranks
    want = sum(numel.values()) / 2 / parts + PADDED * len(numel) * (parts > 1)
    for number, rank in enumerate(seen.ranks):
        lost = sorted(set(numel) - set(rank.frozen))
        assert not lost, f"{case.id}: rank {number} holds no {lost[0]}"
        got = sum(rank.frozen[name] for name in numel)
        measured["weights of budget"] = got / want
        assert got <= want, f"{case.id}: rank {number}: {got} bytes, the budget is {want:.0f}"
        scales, whole = rank.frozen["scales"], seen.single.frozen["scales"]
        measured["scales per weight byte"] = scales / got
        assert 0 < scales <= whole, f"{case.id}: {scales} bytes of scales, one process has {whole}"


@check(
    "Q07",
    needs=(*NEEDS, "save", "load", "merge"),
    models=("gemma4-moe",),
    strategies=("ddp", "fsdp2"),
    **QLORA,
)
def test_adapters_of_ranks_come_back_and_merge(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """Adapters trained over 4-bit weights on ranks load into one process's, equal, and merge.

    https://github.com/axolotl-ai-cloud/axolotl/issues/3771
    """
    required(unavailable)
    with TemporaryDirectory(prefix="conformance-packed-") as folder:
        saving = partial(rank_steps.train_and_save, folder=folder)
        want = evidence.run(subject, saving)[0]["parameters"]
        one = evidence.under(subject, "single")
        fresh = one.adopt(one.built(one.plan(), case.setting), one.plan(), adapters=False)
        model = subject.impl.load(fresh, Path(folder))
    got = {n: p for n, p in spread.parameters_of(model).items() if "lora_" in n}
    assert set(got) == set(want) and adapted_modules(model), f"{case.id}: other adapters"
    for name, parameter in want.items():
        assert bool(parameter.any()), f"{case.id}: {name} is zero"
        assert_equal(case.id, name, got[name], parameter, {})
    measured["adapters"] = len(want)
    batch = one.batch("text")
    before = one.eval_logits(model, batch)
    after = one.eval_logits(subject.impl.merge(model), batch)
    assert_close(case.id, "merged", after, before, tolerance("logits/merged"), measured)


@check("Q09", needs=NEEDS, models=("gemma4-moe",), strategies=("ddp", "fsdp2"), **QLORA)
def test_adapters_of_packed_experts_on_ranks(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """Adapters on 4-bit expert weights get one process's gradients on ranks.

    https://github.com/huggingface/peft/pull/3083
    """
    required(unavailable)
    options = {"lora_target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    step = partial(spread.observe, parts=frozenset())
    single = evidence.run_alone(subject, step, options)
    ranks = evidence.run(subject, step, options)
    held = [n for n in single.gradients if ".experts." in n or n.startswith("experts")]
    measured["adapters of experts"] = len(held)
    assert held, f"{case.id}: no expert is adapted"
    assert_step(subject, evidence.Evidence(tuple(ranks), single), measured)


@check(
    "Q08",
    needs=NEEDS,
    reads=(),
    models=("gemma4-moe",),
    strategies=("tp", "tp_ep", "fsdp2_ep"),
    **QLORA,
)
def test_cut_weights_are_declined_or_right(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """4-bit weights that a strategy would cut while loading are declined by the plan, or right.

    https://github.com/huggingface/transformers/issues/39648
    """
    required(unavailable)
    whole = subject.plan(subject.setting(tuning="lora"))
    assert whole is not None, f"{case.id}: the strategy is declined anyway"
    try:
        subject.plan()
    except subject.declines(ValueError) as error:
        text = str(error)
        measured["declined"] = 1
        assert "4" in text and case.strategy.name in text, f"{case.id}: no reason: {text}"
        return
    try:
        seen = evidence.evidence(subject)
    except subject.refusals as error:
        raise AssertionError(f"{case.id}: planned, and then declined: {error}") from error
    assert_step(subject, seen, measured)
