"""Is the adapter sane, apart from being right? One case a capability, a few seconds in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conformance import checkpoint
from conformance.case import Case
from conformance.check import check
from conformance.observe import observe
from conformance.subject import Subject

SANE: dict[str, Any] = {
    "models": ("gemma4-text",),
    "marks": ("smoke",),
    "correctness": False,
}


@check("H01", needs=("plan",), **SANE)
def test_plan_is_a_plan(case: Case, subject: Subject) -> None:
    """`plan` returns decisions by name, each with a reason, and a list of warnings.

    CONTRIBUTING.md, the recipe of an adapter
    """
    plan = subject.plan()
    assert plan.decisions, f"{case.id}: plan() returned no decision"
    for name, decision in plan.decisions.items():
        assert str(decision.reason).strip(), f"{case.id}: decision {name!r} has no reason"
    assert not isinstance(plan.warnings, str), f"{case.id}: warnings is one string, not a list"


@check("H02", needs=("build",), **SANE)
def test_build_loads_the_checkpoint(case: Case, subject: Subject) -> None:
    """`build` returns a module that holds the checkpoint's weights.

    CONTRIBUTING.md, the recipe of an adapter
    """
    model = subject.impl.build(checkpoint.checkpoint(subject.model_spec, "float32"), subject.plan())
    assert isinstance(model, torch.nn.Module), f"{case.id}: build() returned {type(model)}"
    stock = dict(subject.stock("float32").named_parameters())
    name, parameter = next(iter(model.named_parameters()))
    assert torch.equal(parameter.cpu(), stock[name].cpu()), (
        f"{case.id}: {name} is not what the file holds"
    )


@check("H03", needs=("prepare",), settings=("lora",), **SANE)
def test_prepare_returns_a_trainable_model(case: Case, subject: Subject) -> None:
    """`prepare` returns a module with trainable and frozen parameters, and `undo` takes it.

    CONTRIBUTING.md, the recipe of an adapter
    """
    plan = subject.plan()
    model = subject.impl.prepare(subject.built(plan, case.setting), plan)
    assert isinstance(model, torch.nn.Module), f"{case.id}: prepare() returned {type(model)}"
    flags = {p.requires_grad for p in model.parameters()}
    subject.impl.undo(model)
    assert flags == {True, False}, f"{case.id}: with LoRA, requires_grad is {flags} throughout"


@check("H04", needs=("collate",), **SANE)
def test_collate_returns_tensors(case: Case, subject: Subject) -> None:
    """`collate` returns a mapping of tensors with `input_ids` and `labels`.

    CONTRIBUTING.md, the recipe of an adapter
    """
    batch = subject.impl.collate(subject.samples("text"), subject.plan())
    wrong = [k for k, v in batch.items() if not isinstance(v, torch.Tensor)]
    assert not wrong, f"{case.id}: not tensors: {wrong}"
    assert {"input_ids", "labels"} <= set(batch), f"{case.id}: the batch has {sorted(batch)}"


@check("H05", needs=("loss",), **SANE)
def test_loss_has_a_gradient(case: Case, subject: Subject, measured: dict[str, float]) -> None:
    """`loss` returns a finite scalar from which gradients flow.

    CONTRIBUTING.md, the recipe of an adapter
    """
    model = subject.model()
    loss = subject.loss(model, subject.batch())
    measured["loss"] = float(loss.detach())
    assert loss.numel() == 1, f"{case.id}: the loss has shape {tuple(loss.shape)}"
    assert torch.isfinite(loss), f"{case.id}: the loss is {loss}"
    loss.backward()  # type: ignore[no-untyped-call]
    assert any(p.grad is not None for p in model.parameters()), f"{case.id}: no gradient flows"


@check("H06", needs=("fit",), **SANE)
def test_fit_steps(case: Case, subject: Subject, tmp_path: Path) -> None:
    """`fit` makes as many optimizer steps as it was asked for, on the model that it was given.

    CONTRIBUTING.md, the recipe of an adapter
    """
    model = subject.model()
    with observe(model) as seen:
        subject.impl.fit(
            model,
            subject.samples("text", count=4),
            subject.plan(),
            steps=2,
            batch_size=1,
            accumulation=1,
            lr=1e-3,
            output_dir=tmp_path,
        )
    assert len(seen.steps) == 2, f"{case.id}: {len(seen.steps)} optimizer steps were seen, not 2"
    assert seen.steps[0].gradients, f"{case.id}: the first step had no gradient"


@check("H07", needs=("save", "load"), settings=("lora",), **SANE)
def test_save_writes_and_load_reads(case: Case, subject: Subject, tmp_path: Path) -> None:
    """`save` leaves files behind and `load` takes them.

    CONTRIBUTING.md, the recipe of an adapter
    """
    subject.impl.save(subject.model(), tmp_path)
    assert list(tmp_path.iterdir()), f"{case.id}: save() wrote nothing"
    again = subject.impl.load(subject.model(tuning="full"), tmp_path)
    assert isinstance(again, torch.nn.Module), f"{case.id}: load() returned {type(again)}"
