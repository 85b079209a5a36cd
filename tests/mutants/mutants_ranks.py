"""Bugs that live in ranks: the adapters of `rank_adapters.py`, and some of the ranks themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.ranks import RankFailed
from tests.mutants import mutant
from tests.mutants.mutants_forward import around

ADAPTERS = "tests.mutants.rank_adapters"


@mutant(
    "b148",
    case="F01/mixtral/-/ddp",
    issue="bugs.md §7 (gradients summed)",
    implementation=f"{ADAPTERS}:SUMMED",
)
def gradients_are_summed(patch: pytest.MonkeyPatch) -> None:
    """Gradients are twice those of one process."""


@mutant(
    "generic-not-sharded",
    case="F02/mixtral/-/fsdp2",
    issue="bugs.md §7 (b137: twice the memory)",
    implementation=f"{ADAPTERS}:REPLICATED",
)
def sharding_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """Each rank holds every gradient."""


@mutant(
    "b131",
    case="F03/gemma4-dense/-/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3584",
    implementation=f"{ADAPTERS}:NO_SEARCH",
    crash=(AssertionError, RankFailed),
)
def unused_towers_stop_ddp(patch: pytest.MonkeyPatch) -> None:
    """Expected to have finished reduction."""


@mutant(
    "generic-accumulation",
    case="F04/gemma4-dense/-/fsdp2",
    issue="https://github.com/NVIDIA-NeMo/Automodel/issues/2566",
    implementation=f"{ADAPTERS}:SUMS_TWICE",
)
def reduced_gradients_grow(patch: pytest.MonkeyPatch) -> None:
    """What is accumulated is scaled with each batch."""


@mutant(
    "transformers-45912",
    case="F05/gemma4-e2b/-/fsdp2",
    issue="https://github.com/huggingface/transformers/pull/45912",
    implementation=f"{ADAPTERS}:COPIES_SHARED",
    crash=(AssertionError, RankFailed),
)
def shared_keys_are_copied(patch: pytest.MonkeyPatch) -> None:
    """Layers that share keys read an empty copy."""


@mutant(
    "b136",
    case="F06/mixtral/-/fsdp2",
    issue="https://github.com/huggingface/accelerate/issues/3870",
    implementation=f"{ADAPTERS}:RANK_1_DIFFERS",
)
def rank_1_initialises_anew(patch: pytest.MonkeyPatch) -> None:
    """A rank has another weight than the checkpoint."""


@mutant(
    "transformers-45994",
    case="F07/mixtral/-/tp",
    issue="https://github.com/huggingface/transformers/issues/45994",
    implementation=f"{ADAPTERS}:SUMMED",
)
def tensor_ranks_multiply_the_loss(patch: pytest.MonkeyPatch) -> None:
    """The loss is twice that of one process."""


@mutant(
    "generic-router",
    case="F08/mixtral/-/tp_ep",
    issue="bugs.md §13 (router gradient)",
    implementation=f"{ADAPTERS}:HALVED_ROUTER",
)
def router_gradients_are_not_summed(patch: pytest.MonkeyPatch) -> None:
    """The router learns half."""


@mutant(
    "b144",
    case="F09/gemma3-text/-/cp",
    issue="https://github.com/huggingface/accelerate/issues/4177",
    implementation=f"{ADAPTERS}:NO_WINDOW",
)
def windows_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """Sliding layers see all of the past."""


@mutant(
    "b148",
    case="F10/mixtral/-/hsdp",
    issue="bugs.md §7 (gradients summed)",
    implementation=f"{ADAPTERS}:SUMMED",
)
def hybrid_gradients_are_summed(patch: pytest.MonkeyPatch) -> None:
    """Gradients are four times those of one process."""


@mutant(
    "generic-norm",
    case="F11/mixtral/-/fsdp2",
    issue="bugs.md §7 (local norm)",
    implementation=f"{ADAPTERS}:LOCAL_NORM",
)
def ranks_clip_by_their_own_norm(patch: pytest.MonkeyPatch) -> None:
    """The norm is that of a rank's shards."""


@mutant(
    "generic-accumulation",
    case="F12/mixtral/-/ddp",
    issue="https://github.com/huggingface/transformers/issues/39648",
    implementation=f"{ADAPTERS}:SUMS_TWICE",
)
def reduced_gradients_are_reduced_again(patch: pytest.MonkeyPatch) -> None:
    """The first batch counts twice."""


@mutant(
    "b149",
    case="F13/gemma3-text/-/fsdp2",
    issue="bugs.md §7 (untied)",
    implementation=f"{ADAPTERS}:UNTIED",
)
def the_head_is_copied(patch: pytest.MonkeyPatch) -> None:
    """Head and embedding train apart."""


@mutant(
    "generic-ignored",
    case="F14/mixtral/lora/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3403",
    implementation=f"{ADAPTERS}:IGNORED_BY_DDP",
)
def an_adapter_is_not_reduced(patch: pytest.MonkeyPatch) -> None:
    """One adapter keeps a rank's own gradient."""


@mutant(
    "b148",
    case="F21/gemma4-moe/lora/hsdp",
    issue="bugs.md §7 (gradients summed)",
    implementation=f"{ADAPTERS}:SUMMED",
)
def hybrid_adapters_are_summed(patch: pytest.MonkeyPatch) -> None:
    """Gradients of adapters are four times those of one process."""


@mutant(
    "L6",
    case="P17/mixtral/lora/ddp",
    issue="live defect L6",
    implementation=f"{ADAPTERS}:STARVED",
)
def an_adapter_of_ranks_gets_nothing(patch: pytest.MonkeyPatch) -> None:
    """An adapter has no gradient."""


@mutant(
    "L8",
    case="F22/mixtral/-/fsdp2",
    issue="live defect L8",
    implementation=f"{ADAPTERS}:REPLICATED",
)
def a_request_to_shard_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """Each rank holds every weight."""


@mutant(
    "generic-resume",
    case="C14/gemma4-moe/lora/hsdp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3444",
    implementation=f"{ADAPTERS}:LOADS_ANEW",
)
def four_ranks_start_anew(patch: pytest.MonkeyPatch) -> None:
    """The trained adapter is not there."""


@mutant(
    "b057",
    case="F15/mixtral/-/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3478",
    implementation=f"{ADAPTERS}:HALVED_EVALUATION",
)
def evaluation_is_divided_twice(patch: pytest.MonkeyPatch) -> None:
    """The evaluation loss is half."""


@mutant(
    "generic-ignored",
    case="F16/mixtral/-/ddp",
    issue="bugs.md §7",
    implementation=f"{ADAPTERS}:IGNORED_BY_DDP",
)
def ranks_drift_apart(patch: pytest.MonkeyPatch) -> None:
    """A weight differs from rank to rank."""


@mutant(
    "b073",
    case="F18/mixtral/-/tp_ep",
    issue="https://github.com/huggingface/transformers/issues/48205",
    implementation=f"{ADAPTERS}:UNINITIALISED",
)
def absent_rows_are_not_written(patch: pytest.MonkeyPatch) -> None:
    """Rows of absent experts are NaN."""


@mutant(
    "b144",
    case="F19/mixtral/packed/cp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3572",
    implementation=f"{ADAPTERS}:NO_WINDOW",
)
def documents_join_over_ranks(patch: pytest.MonkeyPatch) -> None:
    """Packed documents see one another."""


@mutant(
    "b144",
    case="F20/gemma3-vlm/images/cp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3498",
    implementation=f"{ADAPTERS}:NO_WINDOW",
)
def images_turn_causal(patch: pytest.MonkeyPatch) -> None:
    """Image blocks are attended to causally."""


@mutant(
    "b056",
    case="L04/mixtral/-/ddp",
    issue="https://github.com/huggingface/transformers/issues/34191",
    implementation=f"{ADAPTERS}:MEAN_OF_MEANS",
)
def ranks_weigh_alike(patch: pytest.MonkeyPatch) -> None:
    """A rank with few labels weighs as much as one with many."""


@mutant(
    "b054",
    case="L05/mixtral/-/cp",
    issue="https://github.com/huggingface/transformers/issues/45994",
    implementation=f"{ADAPTERS}:SUMMED",
)
def context_ranks_multiply_the_loss(patch: pytest.MonkeyPatch) -> None:
    """The loss is twice that of one process."""


@mutant(
    "b061",
    case="L09/mixtral/-/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3033",
    implementation=f"{ADAPTERS}:MEAN_OF_MEANS",
)
def a_rank_without_labels_is_nan(patch: pytest.MonkeyPatch) -> None:
    """0/0 on the rank without labels."""


@mutant(
    "b041",
    case="R12/mixtral/-/ddp",
    issue="https://github.com/unslothai/unsloth/issues/4812",
    implementation=f"{ADAPTERS}:LOST_LAYER",
)
def a_layer_is_not_captured(patch: pytest.MonkeyPatch) -> None:
    """The last layer's router logits are missing."""


@mutant(
    "b065",
    case="R13/mixtral/-/ddp",
    issue="https://github.com/NVIDIA/Megatron-LM/pull/3672",
    implementation=f"{ADAPTERS}:GROWING_SHARE",
)
def each_rank_adds_the_whole_balance(patch: pytest.MonkeyPatch) -> None:
    """The balance loss grows with the ranks."""


@mutant(
    "b131",
    case="V10/gemma4-dense/-/ddp",
    issue="https://github.com/NVIDIA-NeMo/Automodel/issues/2566",
    implementation=f"{ADAPTERS}:NO_SEARCH",
    crash=(AssertionError, RankFailed),
)
def a_rank_without_images_stops(patch: pytest.MonkeyPatch) -> None:
    """The tower of a rank without images has no gradient."""


@mutant(
    "b135",
    case="D03/gemma3n/-/fsdp2",
    issue="https://github.com/NVIDIA-NeMo/Automodel/issues/2419",
    implementation=f"{ADAPTERS}:CAST_BUFFERS",
)
def buffers_are_cast(patch: pytest.MonkeyPatch) -> None:
    """Buffers lose their precision for good."""


@mutant(
    "b142",
    case="C08/mixtral/lora/fsdp2",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3779",
    implementation=f"{ADAPTERS}:SAVES_SHARDS",
)
def rank_0_saves_its_shards(patch: pytest.MonkeyPatch) -> None:
    """The adapter on disk is half of it."""


@mutant(
    "generic-resume",
    case="C09/mixtral/lora/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3444",
    implementation=f"{ADAPTERS}:LOADS_ANEW",
)
def resuming_starts_anew(patch: pytest.MonkeyPatch) -> None:
    """The trained adapter is not there."""


@mutant(
    "generic-blame", case="F17/-/-/-", issue="https://github.com/huggingface/accelerate/issues/4021"
)
def the_wrong_rank_is_blamed(patch: pytest.MonkeyPatch) -> None:
    """The error names the rank that complains, not the one that died."""

    def make(original: Any) -> Any:
        def failure(self: Any) -> Any:
            found = original(self)
            found.rank = 0
            return found

        return failure

    around(patch, "conformance.ranks:_Group.failure", make)


@mutant(
    "b151",
    case="O01/mixtral/offload/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3833",
)
def offloaded_tensors_come_back_stale(patch: pytest.MonkeyPatch) -> None:
    """A saved tensor is another's by the time it is fetched."""

    def make(original: Any) -> Any:
        return lambda self, token, device: torch.roll(original(self, token, device), 1, 0)

    around(patch, "impl.activation_offload:Keeper.get", make)


@mutant(
    "b152",
    case="O02/mixtral/offload/single",
    issue="https://github.com/pytorch/torchtune/pull/1867",
)
def views_are_taken_for_their_base(patch: pytest.MonkeyPatch) -> None:
    """Views of one storage are told apart by their address only."""

    def make(original: Any) -> Any:
        def pack(self: Any, tensor: Any) -> Any:
            found = original(self, tensor)
            base = vars(self).setdefault("seen", {})
            place = (tensor.untyped_storage()._cdata, tuple(tensor.shape))
            return base.setdefault(place, found) if found is not tensor else found

        return pack

    around(patch, "impl.activation_offload:Offloader.pack", make)


@mutant(
    "save-at-world-size-1",
    case="F25/gemma4-moe/lora+offload/fsdp2",
    issue="found here: saving took one rank for one process, and PEFT asked a DTensor's address",
    implementation=f"{ADAPTERS}:SAVES_ALONE",
    crash=(RankFailed, RuntimeError),
)
def one_rank_saves_as_one_process(patch: pytest.MonkeyPatch) -> None:
    """Attempted to access the data pointer on an invalid python storage."""
