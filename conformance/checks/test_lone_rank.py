"""Every strategy with one rank, as one GPU holds it: the same wrapping, hooks and collectives,
where there is nothing to share."""

from __future__ import annotations

from conformance import evidence
from conformance.case import Case
from conformance.check import check
from conformance.evidence import assert_step
from conformance.subject import Subject

Measured = dict[str, float]


@check(
    "F25",
    needs=("plan", "build", "prepare", "parallelize", "loss"),
    models=("gemma4-moe",),
    settings=("-", "lora+offload"),
    strategies=("ddp", "fsdp1", "fsdp2", "hsdp", "tp", "cp"),
    marks=("ranks",),
    lone_rank=True,
    reads=("exact",),
)
def test_one_rank_is_one_process(case: Case, subject: Subject, measured: Measured) -> None:
    """A strategy of one rank gives the loss, gradients, step and saved adapter of one process.

    found here: with an adapter, fsdp2 of one rank could not be saved
    """
    seen = evidence.evidence(subject)
    assert_step(subject, seen, measured)
    first, want = seen.first.saved, seen.single.saved
    if case.setting.tuning == "full":
        assert not want and not first, f"{case.id}: an adapter was saved where there is none"
    else:
        evidence.assert_saved(subject, first, want, measured)
