"""End to end through a launcher: HF Trainer on two gloo ranks trains, saves, resumes, evaluates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from conformance.case import Case
from conformance.check import check
from conformance.launched import Launched, launch, train
from conformance.numerics import relative_error, worst
from conformance.strategies import SINGLE
from conformance.subject import Subject, bound
from conformance.tolerances import tolerance

Measured = dict[str, float]
NEEDS = ("plan", "build", "prepare", "fit", "resume")
EXTENDED = ("gemma4-moe", "gemma3-vlm", "qwen3_5_moe")


def alone(subject: Subject, folder: Path) -> Launched:
    """The same training in one process, with the ranks' rows in one batch."""
    case = replace(subject.case, strategy=SINGLE)
    with bound(subject.loaded, case, subject.device) as one:
        return train(one, folder)


def assert_same(case: Case, got: Any, want: Any, what: str, measured: Measured) -> None:
    """Every trained parameter is that of one process."""
    assert want and set(got) == set(want), f"{case.id}: {what}: {sorted(set(got) ^ set(want))[:3]}"
    name, value = worst({n: relative_error(got[n], p).frobenius for n, p in want.items()})
    row = tolerance("parameters/launched", case.model.traits if case.model else ())
    measured[what] = value
    assert value <= row.limit, (
        f"{case.id}: {what}: {name} is off by {value:.3g}, tolerance {row.limit:g}"
    )


def run(launcher: str, case: Case, subject: Subject, folder: Path, measured: Measured) -> None:
    """Launch, and hold what comes of it against one process."""
    folder.mkdir(exist_ok=True)
    ranks = launch(launcher, subject, folder)
    want = alone(subject, folder / "alone")
    first = ranks[0]
    assert len(ranks) == case.strategy.ranks and len(want.losses) == 4, f"{case.id}: {want.losses}"
    assert want.losses[0] != want.losses[-1], f"{case.id}: nothing was trained"
    row = tolerance("loss/launched")
    got, right = [*first.losses, *first.evaluated], [*want.losses, *want.evaluated]
    measured["loss"] = max(abs(a / b - 1) for a, b in zip(got, right, strict=True))
    assert measured["loss"] <= row.limit, (
        f"{case.id}: losses of training and evaluation {got}, in one process {right}: off by"
        f" {measured['loss']:.3g}, tolerance {row.limit:g}"
    )
    assert all(r.evaluated == first.evaluated for r in ranks), f"{case.id}: ranks evaluate apart"
    assert_same(case, first.trained, want.trained, "trained", measured)
    assert_same(case, first.resumed, want.trained, "resumed", measured)


@check("F23", needs=NEEDS, models=("gemma4-moe",), settings=("fp64",), strategies=("ddp",),
       marks=("launch",))  # fmt: skip
def test_torchrun(case: Case, subject: Subject, tmp_path: Any, measured: Measured) -> None:
    """Trained, saved, resumed and evaluated under `torchrun`: losses and weights of one process.

    https://github.com/huggingface/transformers/issues/34191
    """
    run("torchrun", case, subject, Path(tmp_path), measured)


@check("F24", needs=NEEDS, models=EXTENDED, settings=("fp64+lora",), strategies=("ddp",),
       marks=("launch",), nightly=True)  # fmt: skip
def test_both_launchers(case: Case, subject: Subject, tmp_path: Any, measured: Measured) -> None:
    """Adapters trained, saved and resumed under `accelerate launch` and `torchrun` as in one
    process.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3584
    """
    run("accelerate", case, subject, Path(tmp_path) / "accelerate", measured)
    run("torchrun", case, subject, Path(tmp_path) / "torchrun", measured)
