"""Bugs that the specification's tables of issues describe, and bugs of launched runs."""

from __future__ import annotations

import pytest

from conformance.ranks import RankFailed
from tests.mutants import mutant

ADAPTERS = "tests.mutants.rank_adapters"


@mutant(
    "b130",
    case="I01/gemma4-dense/-/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3584",
    implementation=f"{ADAPTERS}:READS_WRAPPER",
    crash=(AssertionError, RankFailed),
)
def config_is_read_on_the_wrapper(patch: pytest.MonkeyPatch) -> None:
    """DDP has no config."""


@mutant(
    "b132",
    case="I02/gemma4-dense/ckpt-nonreentrant/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3584",
    implementation=f"{ADAPTERS}:REENTRANT",
    crash=(AssertionError, RankFailed),
)
def checkpoints_stay_reentrant(patch: pytest.MonkeyPatch) -> None:
    """A parameter is marked ready twice."""


@mutant(
    "L6",
    case="I03/gemma4-e2b/lora/single",
    issue="live defect L6",
    implementation=f"{ADAPTERS}:STARVED",
)
def an_adapter_gets_nothing(patch: pytest.MonkeyPatch) -> None:
    """An adapter has no gradient."""


@mutant(
    "b133",
    case="I04/gemma4-dense/-/fsdp2",
    issue="live defect L18",
    implementation=f"{ADAPTERS}:WRAPS_AUDIO",
)
def the_audio_layer_is_wrapped(patch: pytest.MonkeyPatch) -> None:
    """The plan names a class that the model lacks."""


@mutant(
    "L6",
    case="I05/gemma4-dense/lora/single",
    issue="live defect L6",
    implementation=f"{ADAPTERS}:STARVED",
)
def a_tower_adapter_gets_nothing(patch: pytest.MonkeyPatch) -> None:
    """An adapter has no gradient."""


@mutant(
    "b131",
    case="I06/gemma4-moe/-/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3584",
    implementation=f"{ADAPTERS}:NEVER_SEARCHES",
)
def the_plan_does_not_search(patch: pytest.MonkeyPatch) -> None:
    """DDP stops on unused parameters."""


@mutant(
    "b132",
    case="I07/gemma4-moe/offload/ddp",
    issue="specification, multi-GPU table",
    implementation=f"{ADAPTERS}:ALWAYS_SEARCHES",
)
def the_plan_searches_under_offload(patch: pytest.MonkeyPatch) -> None:
    """Offload wrappers are marked twice."""


@mutant(
    "L19",
    case="I08/gemma4-dense/lora/fsdp1",
    issue="live defect L19",
    implementation=f"{ADAPTERS}:PLANS_FSDP1",
)
def fsdp1_is_planned_with_adapters(patch: pytest.MonkeyPatch) -> None:
    """Memory for gradients of frozen weights."""


@mutant(
    "b133",
    case="I09/gemma4-moe/-/fsdp2",
    issue="live defect L18",
    implementation=f"{ADAPTERS}:WRAPS_AUDIO",
)
def another_class_is_wrapped(patch: pytest.MonkeyPatch) -> None:
    """The plan names a class that the model lacks."""


@mutant(
    "generic-resume",
    case="F23/gemma4-moe/fp64/ddp",
    issue="https://github.com/huggingface/transformers/issues/48805",
    implementation=f"{ADAPTERS}:RESUMES_ANEW",
)
def a_launched_run_starts_anew(patch: pytest.MonkeyPatch) -> None:
    """The checkpoint is found and not read."""


@mutant(
    "b057",
    case="F24/gemma3-vlm/fp64+lora/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3478",
    implementation=f"{ADAPTERS}:EVALUATES_A_SHARE",
)
def launched_evaluation_is_divided(patch: pytest.MonkeyPatch) -> None:
    """The evaluation loss of two ranks is half."""


@mutant(
    "L8",
    case="I10/mixtral/-/tp_ep",
    issue="live defect L8",
    implementation=f"{ADAPTERS}:TENSORS_ONLY",
)
def experts_stay_whole(patch: pytest.MonkeyPatch) -> None:
    """Expert parallel is asked for, and experts are cut by their features."""


@mutant(
    "L19",
    case="I11/gemma4-dense/qlora/fsdp1",
    issue="live defect L19",
    implementation=f"{ADAPTERS}:PLANS_FSDP1",
)
def fsdp1_is_planned_with_packed_weights(patch: pytest.MonkeyPatch) -> None:
    """Memory for gradients of packed weights."""


@mutant(
    "b151",
    case="O04/gemma4-moe/offload/fsdp2",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3833",
    implementation=f"{ADAPTERS}:STALE_OFFLOAD",
)
def offloaded_tensors_of_ranks_are_stale(patch: pytest.MonkeyPatch) -> None:
    """A saved tensor is another's by the time it is fetched."""
