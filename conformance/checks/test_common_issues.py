"""The specification's tables, row by row: each symptom is shown on the stock stack, and its absence
in the implementation under test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conformance import evidence, issue_steps
from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import declined
from conformance.evidence import assert_step
from conformance.subject import Subject

Measured = dict[str, float]
NEEDS = ("plan", "build", "prepare", "loss")
RANKS = (*NEEDS, "parallelize")
ISSUES = ("issues",)


def decision(subject: Subject, name: str) -> Any:
    """A value of the plan."""
    return subject.plan().decisions[name].value


@check("I01", needs=RANKS, models=("gemma4-dense",), strategies=("ddp",), marks=ISSUES)
def test_type_ids_under_ddp(case: Case, subject: Subject, measured: Measured) -> None:
    """Text without type ids trains under DDP, although the wrapper hides the model's config.

    specification, "mm_token_type_ids is required in DDP" (axolotl PR 3584; transformers >= 5.6)
    """
    seen = evidence.run(subject, issue_steps.hidden_config)[0]
    assert seen["hides"], f"{case.id}: DDP shows the model's config: the cause is gone"
    assert not seen["type ids"], f"{case.id}: the batch carries {seen['type ids']}"
    measured["loss"] = seen["loss"]
    assert seen["loss"] > 0, f"{case.id}: the loss is {seen['loss']}"


@check(
    "I02",
    needs=RANKS,
    models=("gemma4-dense",),
    settings=("ckpt-nonreentrant",),
    strategies=("ddp",),
    marks=ISSUES,
)
def test_marked_ready_twice(case: Case, subject: Subject, measured: Measured) -> None:
    """Reentrant checkpoints and a search for unused parameters end stock DDP, not the plan's.

    specification, "marked a variable ready twice in DDP" (live defect L25)
    """
    seen = evidence.run(subject, issue_steps.marked_twice)[0]
    said = seen["stock"]
    assert "mark a variable ready only once" in said, f"{case.id}: stock DDP says {said[:200]!r}"
    measured["gradients"] = seen["gradients"]
    assert seen["gradients"], f"{case.id}: the plan's DDP has no gradient after two steps"


@check("I03", needs=NEEDS, models=("gemma4-e2b",), settings=("lora",), marks=ISSUES)
def test_starting_loss_of_edge_models(case: Case, subject: Subject, measured: Measured) -> None:
    """The starting loss is the base's whatever LoRA targets; shared keys do not need the cache.

    specification, "Loss ~12 instead of ~0.5" (transformers issue 45242, peft issue 899)
    """
    import peft

    batch = subject.batch()
    base: Any = subject.stock("float32")
    with torch.no_grad():
        off = float(base(**batch, use_cache=False).loss)
        on = float(base(**batch, use_cache=True).loss)
    measured["cache on against off"] = abs(on / off - 1)
    assert measured["cache on against off"] < 1e-5, f"{case.id}: loss {on} with the cache, {off}"
    linear = [n for n, m in base.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    stock = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=linear))
    loss = stock(**batch, use_cache=False).loss
    assert abs(float(loss) / off - 1) < 1e-6, f"{case.id}: fresh adapters move the loss to {loss}"
    loss.backward()
    starved = issue_steps.starved_adapters(stock)
    measured["stock adapters without gradient"] = len(starved)
    assert starved, f"{case.id}: adapters on every linear layer all train"
    model = subject.model()
    subject.step(model, batch)
    mine = issue_steps.starved_adapters(model)
    assert not mine, f"{case.id}: {len(mine)} adapters have no gradient, such as {mine[0]}"


@check(
    "I04",
    needs=RANKS,
    reads=("exact",),
    models=("gemma4-dense",),
    strategies=("fsdp2",),
    marks=ISSUES,
)
def test_audio_layer_of_a_model_without(case: Case, subject: Subject, measured: Measured) -> None:
    """accelerate looks for layers that the model lacks; the plan names the decoder layer alone.

    specification, "FSDP2 Could not find Gemma4AudioLayer" (live defect L18)
    """
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    with pytest.raises(Exception, match="Could not find the transformer layer class"):
        plugin.set_auto_wrap_policy(subject.stock("float32"))
    wrapped = decision(subject, "fsdp_transformer_layer_cls_to_wrap")
    assert wrapped == subject.model_spec.wrap_class, f"{case.id}: the plan wraps {wrapped}"
    assert_step(subject, evidence.evidence(subject), measured)


@check("I05", needs=NEEDS, models=("gemma4-dense",), settings=("lora",), marks=ISSUES)
def test_clippable_linear(case: Case, subject: Subject, measured: Measured) -> None:
    """PEFT refuses the tower's clipped layers by a list of names; the same list trains here.

    specification, "Gemma4ClippableLinear not supported by PEFT" (live defect L6)
    """
    import peft

    names = ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match="Gemma4ClippableLinear"):
        peft.get_peft_model(subject.stock("float32"), peft.LoraConfig(r=2, target_modules=names))
    model = subject.model(options={"lora_targets": names})
    step = subject.step(model, subject.batch())
    measured["gradients"] = len(step.gradients)
    assert step.gradients, f"{case.id}: nothing trains"
    starved = issue_steps.starved_adapters(model)
    assert not starved, f"{case.id}: {len(starved)} adapters have no gradient"


@check(
    "I06",
    needs=RANKS,
    reads=("exact",),
    models=("gemma4-moe", "gemma3-vlm"),
    strategies=("ddp",),
    marks=ISSUES,
)
def test_ddp_row(case: Case, subject: Subject, measured: Measured) -> None:
    """DDP: the plan sets `ddp_find_unused_parameters`, and training equals one process.

    specification, multi-GPU table, "DDP" and "Gemma 3" (its own project skips the latter)
    """
    value = decision(subject, "ddp_find_unused_parameters")
    assert value is True, f"{case.id}: ddp_find_unused_parameters is {value}"
    assert_step(subject, evidence.evidence(subject), measured)


@check(
    "I07",
    needs=RANKS,
    reads=(),
    models=("gemma4-moe",),
    settings=("offload", "lora+ckpt-nonreentrant+offload-hidden_states"),
    strategies=("ddp", "fsdp2"),
    marks=ISSUES,
)
def test_offload_rows(case: Case, subject: Subject, measured: Measured) -> None:
    """DDP or FSDP2 with activation offloading trains as one process does.

    specification, multi-GPU table, "DDP + activation_offloading", "FSDP2 + activation_offloading"
    """
    value = subject.plan().decisions["ddp_find_unused_parameters"].value
    measured["find unused parameters"] = float(bool(value))
    assert not value, f"{case.id}: ddp_find_unused_parameters is {value} under offloading"
    assert_step(subject, evidence.evidence(subject), measured)


@check(
    "I08",
    needs=("plan",),
    models=("gemma4-moe", "gemma4-dense"),
    settings=("lora",),
    strategies=("fsdp1",),
    marks=ISSUES,
)
def test_fsdp1_row(case: Case, subject: Subject, measured: Measured) -> None:
    """FSDP1 with adapters stores gradients of frozen weights: the plan declines it, with reason.

    specification, multi-GPU table, "FSDP1: OOM ... with QLoRA" (live defect L19)
    """
    refused = declined(subject, lambda: subject.plan(), measured)
    assert refused, f"{case.id}: FSDP1 with adapters is planned"
    seen = evidence.start(subject, issue_steps.flat_gradients)[0]
    share = seen["gradient bytes"] / seen["trained bytes"]
    measured["gradient bytes per trained byte"] = share
    assert share > 10, f"{case.id}: {seen}: FSDP1 stores no more than what is trained"
    assert "uniform `requires_grad`" in seen["said"], f"{case.id}: flat parameters: {seen['said']}"


@check(
    "I09",
    needs=RANKS,
    reads=("exact",),
    models=("gemma4-moe",),
    strategies=("fsdp2",),
    marks=ISSUES,
)
def test_fsdp2_row(case: Case, subject: Subject, measured: Measured) -> None:
    """FSDP2 wraps `Gemma4TextDecoderLayer`; the class of the name without `Text` is no layer.

    specification, multi-GPU table, "FSDP2"
    """
    stock = subject.stock("float32")
    kinds = {type(module).__name__ for module in stock.modules()}
    assert "Gemma4DecoderLayer" not in kinds, f"{case.id}: the wrong name is a layer here"
    wrapped = decision(subject, "fsdp_transformer_layer_cls_to_wrap")
    assert wrapped == "Gemma4TextDecoderLayer", f"{case.id}: the plan wraps {wrapped}"
    assert_step(subject, evidence.evidence(subject), measured)


@check("I10", needs=RANKS, reads=(), models=("mixtral",), strategies=("tp_ep",), marks=ISSUES)
def test_old_expert_parallel_flag(case: Case, subject: Subject, measured: Measured) -> None:
    """`enable_expert_parallel=True` is accepted and does nothing; the working form halves experts.

    live defect L8 (documented as removed in transformers 5.21)
    """
    stock = evidence.start(subject, issue_steps.old_expert_flag)[0]
    if stock["known"]:
        assert stock["local"] == stock["in all"], f"{case.id}: the flag works: {stock}"
    seen = evidence.evidence(subject).first.experts
    assert seen, f"{case.id}: no stacked expert weight"
    for name, (here, whole) in seen.items():
        measured["experts on a rank"] = here
        assert 2 * here == whole, f"{case.id}: {name}: {here} of {whole} experts on a rank"


@check(
    "I11",
    needs=("plan",),
    models=("gemma4-dense",),
    settings=("qlora",),
    strategies=("fsdp1",),
    marks=ISSUES,
)
def test_fsdp1_of_packed_weights(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """FSDP1 holds each 4-bit unit twice while sharding, and keeps gradients of packed bytes.

    specification, multi-GPU table, "FSDP1: OOM during sharding with QLoRA" (live defect L19)
    """
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        unavailable(f"bitsandbytes: {type(error).__name__}: {error}")
    seen = evidence.start(subject, issue_steps.packed_sharding)[0]
    measured.update(seen)
    assert seen["packed"] > 0 and seen["before"] > seen["packed"], f"{case.id}: {seen}"
    assert seen["during"] >= seen["before"] + 0.4 * seen["unit"], f"{case.id}: no copy: {seen}"
    assert seen["after"] < 0.6 * seen["before"], f"{case.id}: nothing is sharded: {seen}"
    share = (seen["gradients"] - seen["trained"]) / (seen["packed"] / case.strategy.ranks)
    measured["share of packed bytes with a gradient"] = share
    assert share > 0.5, f"{case.id}: only what is trained has gradients: {seen}"
    assert declined(subject, lambda: subject.plan(), measured), f"{case.id}: it is planned"
