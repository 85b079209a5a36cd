"""Gemma 3: sliding and full attention, images attend to themselves both ways on every layer."""

from __future__ import annotations

from typing import Any

from conformance.case import ImageInputs, Model
from conformance.families._shared import ATTENTION, TEXT_ENDS, VOCAB, WINDOW, layer_types

_TEXT: dict[str, Any] = {
    **ATTENTION,
    **TEXT_ENDS,
    "vocab_size": VOCAB,
    "intermediate_size": 72,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "num_hidden_layers": 6,
    "layer_types": layer_types("sliding_attention", "full_attention", run=2),
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    },
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}

MODELS = (
    Model(
        name="gemma3-text",
        family="gemma3",
        config_class="Gemma3TextConfig",
        model_class="Gemma3ForCausalLM",
        modelling="transformers.models.gemma3.modeling_gemma3",
        tiny=_TEXT,
        published="gemma3-4b",
        traits=frozenset({"sliding_window", "tied_embeddings"}),
        wrap_class="Gemma3DecoderLayer",
        layers="model.layers",
    ),
    Model(
        name="gemma3-vlm",
        family="gemma3",
        config_class="Gemma3Config",
        model_class="Gemma3ForConditionalGeneration",
        modelling="transformers.models.gemma3.modeling_gemma3",
        tiny={
            "text_config": _TEXT,
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 56,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 90,
            "image_token_index": 91,
            "eoi_token_index": 92,
            "tie_word_embeddings": True,
        },
        published="gemma3-4b",
        traits=frozenset({"vision", "bidirectional_images", "sliding_window", "tied_embeddings"}),
        wrap_class="Gemma3DecoderLayer",
        layers="model.language_model.layers",
        images=ImageInputs(
            token_id=91,
            tokens_per_image=4,
            pixel_values=(3, 16, 16),
            type_ids="token_type_ids",
            begin_id=90,
            end_id=92,
        ),
        text_model="gemma3-text",
        freeze=("vision_tower", "multi_modal_projector"),
    ),
)
