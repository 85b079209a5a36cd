"""Bugs of masks, positions and packing: A01 to A09, S01 to S08."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import MIXTRAL, around, drop_patch

GEMMA3 = "transformers.models.gemma3.modeling_gemma3"
GEMMA4 = "transformers.models.gemma4.modeling_gemma4"


def all_visible(patch: pytest.MonkeyPatch) -> None:
    """Mixtral attends to every position."""

    def make(original: Any) -> Any:
        def mask(**kwargs: Any) -> torch.Tensor:
            embeds = kwargs["inputs_embeds"]
            batch, length = embeds.shape[:2]
            return torch.ones(batch, 1, length, length, dtype=torch.bool)

        return mask

    around(patch, f"{MIXTRAL}:create_causal_mask", make)


@mutant(
    "b022",
    case="A01/mixtral/-/single",
    issue="https://github.com/huggingface/accelerate/issues/4177",
)
def the_causal_mask_is_dropped(patch: pytest.MonkeyPatch) -> None:
    """Tokens see the future."""
    all_visible(patch)


def drop_padding(patch: pytest.MonkeyPatch) -> None:
    """Mixtral's mask is made without the padding mask."""

    def make(original: Any) -> Any:
        return lambda **kwargs: original(**{**kwargs, "attention_mask": None})

    around(patch, f"{MIXTRAL}:create_causal_mask", make)


@mutant(
    "b053",
    case="A02/mixtral/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2473",
)
def left_padding_is_attended(patch: pytest.MonkeyPatch) -> None:
    """Left padding changes the logits."""
    drop_padding(patch)


@mutant(
    "b191",
    case="A03/mixtral/padded/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3735",
)
def a_bidirectional_mask_includes_padding(patch: pytest.MonkeyPatch) -> None:
    """What stands at padded positions matters."""
    all_visible(patch)


@mutant(
    "b023",
    case="A04/mixtral/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3598",
)
def sdpa_takes_another_scale(patch: pytest.MonkeyPatch) -> None:
    """One attention implementation differs from the others."""
    functions = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    original = functions["sdpa"]

    def sdpa(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "scaling": 1.02 * kwargs["scaling"]})

    patch.setitem(functions._global_mapping, "sdpa", sdpa)


@mutant(
    "b021",
    case="A05/gemma3-text/-/single",
    issue="https://github.com/unslothai/unsloth-zoo/pull/635",
)
def sliding_layers_are_full(patch: pytest.MonkeyPatch) -> None:
    """The window is ignored."""
    full = import_module(GEMMA3).create_causal_mask
    around(patch, f"{GEMMA3}:create_sliding_window_causal_mask", lambda original: full)


@mutant(
    "b020",
    case="A06/gemma4-dense/images/single",
    issue="https://github.com/huggingface/transformers/pull/46850",
)
def image_blocks_cross_the_window(patch: pytest.MonkeyPatch) -> None:
    """The image block is laid over the window's mask, and over full layers."""
    generic = import_module(GEMMA4).create_masks_for_generate
    around(patch, f"{GEMMA4}:create_masks_for_vision_model", lambda original: generic)


@mutant(
    "generic-static-cache",
    case="A07/gemma3-text/-/single",
    issue="https://github.com/huggingface/transformers/issues/45242",
)
def a_cache_widens_the_window(patch: pytest.MonkeyPatch) -> None:
    """With a cache, sliding layers see everything."""
    full = import_module(GEMMA3).create_causal_mask

    def make(original: Any) -> Any:
        def mask(**kwargs: Any) -> Any:
            return (full if kwargs.get("past_key_values") is not None else original)(**kwargs)

        return mask

    around(patch, f"{GEMMA3}:create_sliding_window_causal_mask", make)


@mutant(
    "b026",
    case="A08/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/44643",
)
def attention_gets_three_rows(patch: pytest.MonkeyPatch) -> None:
    """Attention layers are given position ids of three dimensions."""

    def make(original: Any) -> Any:
        def forward(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
            kwargs["position_ids"] = kwargs["position_ids"][None].expand(3, -1, -1)
            return original(self, hidden_states, **kwargs)

        return forward

    around(patch, f"{MIXTRAL}:MixtralDecoderLayer.forward", make)


@mutant(
    "b170",
    case="A09/gemma4-text/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2441",
)
def the_softcap_is_dropped(patch: pytest.MonkeyPatch) -> None:
    """Logits grow beyond the cap."""

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            cap = self.config.final_logit_softcapping
            self.config.final_logit_softcapping = None
            try:
                return original(self, *args, **kwargs)
            finally:
                self.config.final_logit_softcapping = cap

        return forward

    around(patch, f"{GEMMA4}:Gemma4ForCausalLM.forward", make)


@mutant(
    "b054",
    case="S01/mixtral/packed/single",
    issue="https://github.com/huggingface/transformers/issues/34191",
)
def each_row_is_its_own_mean(patch: pytest.MonkeyPatch) -> None:
    """Documents weigh alike, whatever their length."""
    around(
        patch,
        "impl.loss:denominator",
        lambda original: lambda n, count, like: original(None, count, like),
    )


@mutant(
    "generic-one-token",
    case="S08/mixtral/packed/single",
    issue="https://github.com/huggingface/transformers/pull/31629",
)
def a_document_of_one_token_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    """A document begins where positions fall: after one of one token they do not."""

    def indices(position_ids: Any) -> Any:
        falls = torch.nn.functional.pad(position_ids.diff(dim=-1), (1, 0), value=1) < 0
        return falls.cumsum(-1)

    around(
        patch,
        "transformers.masking_utils:find_packed_sequence_indices",
        lambda original: indices,
    )


@mutant(
    "b042",
    case="S02/mixtral/packed/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2840",
)
def packing_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    """Documents see the ones before."""
    around(
        patch,
        "transformers.masking_utils:find_packed_sequence_indices",
        lambda original: lambda position_ids: None,
    )


@mutant(
    "b032",
    case="S03/qwen3_5-text/packed/single",
    issue="https://github.com/NVIDIA-NeMo/Automodel/issues/2131",
)
def recurrent_layers_run_on(patch: pytest.MonkeyPatch) -> None:
    """State and convolution run over document boundaries."""
    drop_patch(patch, "delta_net_documents")


@mutant(
    "b030",
    case="S04/mixtral/packed/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2449",
)
def the_all_ones_mask_is_kept(patch: pytest.MonkeyPatch) -> None:
    """An all-ones mask joins the documents."""
    drop_patch(patch, "packed_rows")


def collated(patch: pytest.MonkeyPatch, change: Any) -> None:
    """The reference's batches, changed in place."""

    def make(original: Any) -> Any:
        def collate(samples: Any, plan: Any, **options: Any) -> Any:
            batch = original(samples, plan, **options)
            change(batch, samples)
            return batch

        return collate

    around(patch, "impl.collate:collate", make)


@mutant(
    "b038",
    case="S05/mixtral/packed/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2495",
)
def a_document_predicts_the_next(patch: pytest.MonkeyPatch) -> None:
    """The first token of a document is a label of the one before."""

    def change(batch: Any, samples: Any) -> None:
        batch["labels"] = torch.where(
            batch["position_ids"] == 0, batch["input_ids"], batch["labels"]
        )

    collated(patch, change)


@mutant(
    "b040",
    case="S06/mixtral/packed/single",
    issue="https://github.com/hiyouga/LLaMA-Factory/issues/10736",
)
def only_ids_are_padded(patch: pytest.MonkeyPatch) -> None:
    """`input_ids` are longer than the other per-token tensors."""

    def change(batch: Any, samples: Any) -> None:
        batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 1))

    collated(patch, change)


@mutant(
    "b031",
    case="S07/gemma4-dense/packed/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3796",
)
def image_documents_share_a_row(patch: pytest.MonkeyPatch) -> None:
    """The second document gets the image blocks of the first."""
    drop_patch(patch, "packed_images")

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            types, positions = kwargs.get("mm_token_type_ids"), kwargs.get("position_ids")
            starts = [] if positions is None else (positions[0] == 0).nonzero().flatten().tolist()
            if types is not None and len(starts) > 1:
                width = types.shape[1] - starts[1]
                types = torch.cat([types[:, : starts[1]], types[:, :width]], dim=1)
                kwargs["mm_token_type_ids"] = types
            return original(self, *args, **kwargs)

        return forward

    # transformers 5.17 has not the defect itself
    around(patch, f"{GEMMA4}:Gemma4Model.forward", make)
