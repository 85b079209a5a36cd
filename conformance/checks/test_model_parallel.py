"""Tensor, expert and context parallel against one process, and adapters saved from ranks."""

from __future__ import annotations

from functools import partial
from tempfile import TemporaryDirectory

import torch

from conformance import evidence, rank_steps
from conformance.case import Case
from conformance.check import check
from conformance.evidence import assert_number, assert_parity, assert_step, row_of
from conformance.numerics import relative_error, worst
from conformance.spread import parameters_of
from conformance.subject import Subject
from conformance.tolerances import tolerance

Measured = dict[str, float]
NEEDS = ("plan", "build", "prepare", "parallelize", "loss")
EXACT = ("exact",)  # post-step parameters
EXPERTS = ("eager", "grouped_mm", "batched_mm")
LORA_MODELS = ("gemma4-moe", "gemma4-e2b", "gemma3-vlm", "qwen3_5_moe", "mixtral")
PACKED = ("gemma4-e2b", "gemma3-text", "qwen3_5_moe", "qwen3_next", "mixtral")
SPREAD = ("ddp", "fsdp1", "fsdp2", "hsdp", "fsdp2_ep", "tp", "tp_ep", "cp")


@check("F07", needs=NEEDS, reads=EXACT, strategies=("tp",))
def test_tensor_parallel_is_one_process(case: Case, subject: Subject, measured: Measured) -> None:
    """Tensor parallel gives the step of one process, and each rank holds a part of the weights.

    https://github.com/huggingface/transformers/issues/39648
    """
    seen = evidence.evidence(subject)
    held = seen.first.weight_bytes / seen.single.weight_bytes
    measured["share of the weights"] = held
    assert held < 0.9, f"{case.id}: a rank holds {held:.2f} of the weights: nothing is sharded"
    assert_step(subject, seen, measured)


@check("F08", needs=NEEDS, reads=EXACT, traits=("moe",), strategies=("tp_ep", "fsdp2_ep"))
def test_expert_parallel_is_one_process(case: Case, subject: Subject, measured: Measured) -> None:
    """Expert parallel gives the step of one process, and each rank holds its share of experts.

    https://github.com/huggingface/transformers/issues/45621
    """
    seen = evidence.evidence(subject)
    assert seen.first.experts, f"{case.id}: the model has no stacked expert weight"
    for name, (here, whole) in seen.first.experts.items():
        assert 2 * here == whole, f"{case.id}: {name}: {here} of {whole} experts on a rank"
    assert_step(subject, seen, measured)


@check(
    "F18",
    needs=NEEDS,
    models=("gemma4-moe", "mixtral", "qwen3_moe"),
    strategies=("tp_ep", "fsdp2_ep"),
)
def test_expert_steps_in_poisoned_memory(case: Case, subject: Subject, measured: Measured) -> None:
    """Three steps stay finite and right with each experts implementation, fresh memory being NaN.

    https://github.com/huggingface/transformers/issues/48205
    """
    whole = evidence.run_alone(subject, rank_steps.expert_steps)[""]
    assert whole["poisoned"], f"{case.id}: fresh memory is not poisoned"
    row = tolerance("loss/several steps")
    ranks = evidence.run(subject, partial(rank_steps.expert_steps, names=EXPERTS))
    for name in EXPERTS:
        assert all(rank[name]["finite"] for rank in ranks), f"{case.id}: {name}: not finite"
        found = ranks[0][name]["losses"]
        for number, (got, want) in enumerate(zip(found, whole["losses"], strict=True)):
            assert_number(subject, got, want, row, measured, f"loss {number}, {name}")


@check("F09", needs=NEEDS, reads=EXACT, strategies=("cp",))
def test_context_parallel_is_one_process(case: Case, subject: Subject, measured: Measured) -> None:
    """Rows split over ranks give the step of one process, sliding windows across the cut too.

    https://github.com/huggingface/accelerate/issues/4177
    """
    assert_step(subject, evidence.evidence(subject), measured)


@check(
    "F19", needs=NEEDS, reads=(), models=PACKED, settings=("packed", "lora+ckpt-nonreentrant"),
    strategies=("cp",),
)  # fmt: skip
def test_context_parallel_of_packed_rows(case: Case, subject: Subject, measured: Measured) -> None:
    """Packed documents across the cut, and recomputed layers, give one process's gradients.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3572
    """
    seen = evidence.evidence(subject)
    assert_step(subject, seen, measured)


@check("F20", needs=NEEDS, reads=(), traits=("vision",), settings=("images",), strategies=("cp",))
def test_context_parallel_of_images(case: Case, subject: Subject, measured: Measured) -> None:
    """Images across the cut and in one rank's slice give one process's gradients, or a refusal.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3498
    """
    seen = evidence.evidence(subject)
    batch = subject.batch()
    assert "pixel_values" in batch, f"{case.id}: the batch has no image"
    assert_step(subject, seen, measured)


@check("F22", needs=NEEDS, reads=(), strategies=SPREAD)
def test_spreading_takes_effect(case: Case, subject: Subject, measured: Measured) -> None:
    """Each rank has the share of rows, tokens, weights and experts that its strategy promises.

    live defect L8 (expert parallel that was asked for and ignored)
    """
    seen, strategy = evidence.evidence(subject), case.strategy
    (rows, tokens), (all_rows, all_tokens) = seen.first.fed, seen.single.fed
    held = seen.first.weight_bytes / seen.single.weight_bytes
    measured["share of the weights"] = held
    assert all_rows >= strategy.ranks and all_tokens > 1, f"{case.id}: nothing to spread"
    shared = strategy.name in ("tp", "tp_ep", "cp")
    assert rows * (1 if shared else strategy.ranks) == all_rows, f"{case.id}: {rows} rows a rank"
    pieces = [rank.fed[1] for rank in seen.ranks] if strategy.name == "cp" else [tokens]
    assert sum(pieces) == all_tokens or strategy.name != "cp", f"{case.id}: {pieces} tokens"
    assert max(pieces) < all_tokens or strategy.name != "cp", f"{case.id}: {pieces} tokens"
    whole = strategy.name in ("ddp", "cp")
    assert (held > 0.99) == whole, f"{case.id}: a rank holds {held:.2f} of the weights"
    local, in_all = next(iter(seen.first.experts.values()), (0, 0))
    if strategy.name.endswith("_ep"):
        assert 0 < local * strategy.ranks == in_all, f"{case.id}: {local} of {in_all} experts"


@check("L05", needs=NEEDS, reads=("training",), one_a_family=True, strategies=("tp", "tp_ep", "cp"))
def test_loss_scale_of_shared_rows(case: Case, subject: Subject, measured: Measured) -> None:
    """Ranks that share rows do not multiply the loss, the norm, or the gradients.

    https://github.com/huggingface/transformers/issues/45994
    """
    seen = evidence.evidence(subject)
    single = seen.single
    assert single.loss > 0 and single.norm > 0, f"{case.id}: one process trains nothing"
    row = tolerance("loss/spread")
    assert_number(subject, seen.first.loss, single.loss, row, measured, "loss")
    assert_number(subject, seen.first.norm, single.norm, tolerance("norm/spread"), measured, "norm")


@check("R13", needs=NEEDS, models=("mixtral", "qwen3_moe"), strategies=("ddp", "fsdp2"))
def test_auxiliary_loss_over_ranks(case: Case, subject: Subject, measured: Measured) -> None:
    """The load-balancing loss of ranks is that of their rows taken in turn, weighted by token.

    https://github.com/NVIDIA/Megatron-LM/pull/3672
    """
    options = {"auxiliary_loss": True}
    seen = evidence.run(subject, rank_steps.auxiliary, options)[0]
    whole = evidence.run_alone(subject, rank_steps.auxiliary, options)
    plain = evidence.run_alone(subject, rank_steps.auxiliary)
    measured["share"] = whole["loss"] / plain["loss"] - 1
    assert measured["share"] > 1e-4, f"{case.id}: the auxiliary loss adds nothing"
    row = tolerance("loss/spread")
    assert_number(subject, seen["loss"], whole["loss"], row, measured, "loss")
    got, want = seen["gradients"], whole["gradients"]
    assert_parity(subject, got, want, row_of(subject), measured, "gradients")


@check(
    "C08",
    needs=(*NEEDS, "save"),
    reads=(),
    models=LORA_MODELS,
    settings=("lora", "lora-experts"),
    strategies=("ddp", "fsdp2", "tp", "tp_ep", "fsdp2_ep", "cp"),
)
def test_adapter_is_gathered(case: Case, subject: Subject, measured: Measured) -> None:
    """The adapter saved from ranks is bitwise the one that one process saves.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3779
    """
    got, want = evidence.saved_adapter(subject)
    evidence.assert_saved(subject, got, want, measured)


@check(
    "C09",
    needs=(*NEEDS, "save", "load"),
    models=("gemma4-moe", "mixtral"),
    settings=("-", "lora"),
    strategies=("ddp", "fsdp2"),
)
def test_resuming_in_another_world(case: Case, subject: Subject, measured: Measured) -> None:
    """What two ranks trained and saved goes on in one process with the same weights.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3444
    """
    with TemporaryDirectory(prefix="conformance-resumed-") as folder:
        saving = partial(rank_steps.train_and_save, folder=folder)
        want = evidence.run(subject, saving)[0]["parameters"]
        resuming = partial(rank_steps.resume_and_step, folder=folder)
        seen = evidence.run_alone(subject, resuming)
    fresh = parameters_of(subject.model(), trainable=True)
    moved = [name for name in want if not torch.equal(want[name], fresh[name])]
    assert moved, f"{case.id}: the step changed nothing, so nothing is shown"
    lost = sorted(set(want) ^ set(seen["parameters"]))
    assert not lost, f"{case.id}: parameters {lost[:3]} on one side only"
    errors = {n: relative_error(seen["parameters"][n], p).frobenius for n, p in want.items()}
    name, value = worst(errors)
    measured["parameters"] = value
    assert value == 0, f"{case.id}: {name} came back off by {value:.3g}"
    assert seen["gradients"], f"{case.id}: no gradient after resuming"


@check(
    "C14",
    needs=(*NEEDS, "save", "load"),
    models=("gemma4-moe",),
    settings=("lora",),
    strategies=("hsdp",),
)
def test_resuming_on_four_ranks(case: Case, subject: Subject, measured: Measured) -> None:
    """Weights and AdamW state of two ranks go on on four as if one process had taken both steps.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3444
    """
    options = evidence.oracle_options(subject)
    with TemporaryDirectory(prefix="conformance-resumed-") as folder:
        saving = partial(rank_steps.train_and_keep, folder=folder)
        evidence.run(evidence.under(subject, "fsdp2"), saving, options)
        resuming = partial(rank_steps.resume_and_train, folder=folder)
        got = evidence.run(subject, resuming, options)[0]
    want = evidence.run_alone(subject, rank_steps.two_steps, options)
    anew = evidence.run_alone(subject, partial(rank_steps.two_steps, forget=True), options)
    told = max(relative_error(anew[name], p).frobenius for name, p in want.items())
    row = row_of(subject, "parameters")
    assert told > 100 * row.limit, f"{case.id}: a fresh optimizer is off by {told:.3g} only"
    evidence.assert_parameters(subject, got, want, row, measured)
