"""Gemma 4: sliding and full attention of different head sizes, k = v, shared K/V, PLE, images.

The MoE member has a dense MLP and experts side by side in every decoder layer. The unified member
has no vision tower: patches and waveform frames go through projections.
"""

from __future__ import annotations

from typing import Any

from conformance.case import ImageInputs, Model
from conformance.families._shared import ATTENTION, TEXT_ENDS, VOCAB, WINDOW, layer_types

_TEXT: dict[str, Any] = {
    **ATTENTION,
    **TEXT_ENDS,
    "vocab_size": VOCAB,
    "intermediate_size": 72,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "num_hidden_layers": 6,
    "layer_types": layer_types("sliding_attention", "full_attention", run=2),
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}
_LARGE: dict[str, Any] = {
    **_TEXT,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 2,
    "use_bidirectional_attention": "vision",
}
_NO_PLE = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB}
_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 40,
}
_EDGE: dict[str, Any] = {
    **_TEXT,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
}
_E2B = {**_EDGE, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}
_E4B = {
    **_EDGE,
    "num_hidden_layers": 8,
    "layer_types": layer_types("sliding_attention", "full_attention", run=3),
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": False,
}
_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 2,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
_AUDIO: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [16, 8],
    "attention_chunk_size": 4,
    "attention_context_left": 5,
    "output_proj_dims": 40,
}
_IDS = {
    "boi_token_id": 90,
    "image_token_id": 91,
    "eoi_token_id": 92,
    "boa_token_id": 93,
    "audio_token_id": 94,
    "eoa_token_index": 95,
    "video_token_id": 96,
    "tie_word_embeddings": True,
}


def _images(pixel_values: tuple[int, ...]) -> ImageInputs:
    return ImageInputs(
        token_id=91,
        tokens_per_image=6,
        pixel_values=pixel_values,
        extra=("image_position_ids",),
        type_ids="mm_token_type_ids",
        begin_id=90,
        end_id=92,
    )


def _multimodal(name: str, published: str, traits: set[str], tiny: dict[str, Any]) -> Model:
    audio = "audio_config" in tiny
    towers = ("vision_tower", "embed_vision") + (("audio_tower", "embed_audio") if audio else ())
    return Model(
        name=name,
        family="gemma4",
        config_class="Gemma4Config",
        model_class="Gemma4ForConditionalGeneration",
        modelling="transformers.models.gemma4.modeling_gemma4",
        tiny={**_IDS, **tiny},
        published=published,
        traits=frozenset(traits | {"vision", "sliding_window", "tied_embeddings", "softcap"}),
        wrap_class="Gemma4TextDecoderLayer",
        layers="model.language_model.layers",
        # 28 patches: 4 of padding, 24 pooled 2 x 2 into 3 x 2 tokens; one more than the window
        images=_images((28, 12)),
        text_model="gemma4-text" if name == "gemma4-dense" else None,
        freeze=towers,
    )


MODELS = (
    _multimodal(
        "gemma4-moe",
        "gemma4-26b-a4b",
        {"moe", "experts_in_layer", "attention_k_eq_v", "bidirectional_images"},
        {
            "text_config": {**_LARGE, **_NO_PLE, **_EXPERTS},
            "vision_config": {**_VISION, "standardize": True},
        },
    ),
    _multimodal(
        "gemma4-dense",
        "gemma4-31b",
        {"attention_k_eq_v", "bidirectional_images"},
        {
            "text_config": {**_LARGE, **_NO_PLE},
            "vision_config": {**_VISION, "standardize": True},
        },
    ),
    _multimodal(
        "gemma4-e2b",
        "gemma4-e2b",
        {"kv_sharing", "per_layer_inputs", "audio"},
        {
            "text_config": _E2B,
            "vision_config": {**_VISION, "use_clipped_linears": True},
            "audio_config": _AUDIO,
        },
    ),
    _multimodal(
        "gemma4-e4b",
        "gemma4-e4b",
        {"kv_sharing", "per_layer_inputs", "audio"},
        {
            "text_config": _E4B,
            "vision_config": {**_VISION, "use_clipped_linears": True},
            "audio_config": _AUDIO,
        },
    ),
    Model(
        name="gemma4-text",
        family="gemma4",
        config_class="Gemma4TextConfig",
        model_class="Gemma4ForCausalLM",
        modelling="transformers.models.gemma4.modeling_gemma4",
        tiny={**_LARGE, **_NO_PLE},
        published="gemma4-31b",
        traits=frozenset({"attention_k_eq_v", "sliding_window", "tied_embeddings", "softcap"}),
        wrap_class="Gemma4TextDecoderLayer",
        layers="model.layers",
    ),
    Model(
        name="gemma4-unified",
        family="gemma4",
        config_class="Gemma4UnifiedConfig",
        model_class="Gemma4UnifiedForConditionalGeneration",
        modelling="transformers.models.gemma4_unified.modeling_gemma4_unified",
        tiny={
            **_IDS,
            "text_config": _LARGE,
            "vision_config": {
                "patch_size": 2,
                "pooling_kernel_size": 3,
                "mm_embed_dim": 56,
                "mm_posemb_size": 16,
                "output_proj_dims": 56,
            },
            "audio_config": {"audio_embed_dim": 20},
        },
        published="gemma4-unified-12b",
        traits=frozenset(
            {
                "vision",
                "audio",
                "attention_k_eq_v",
                "bidirectional_images",
                "sliding_window",
                "tied_embeddings",
                "softcap",
            }
        ),
        wrap_class="Gemma4UnifiedTextDecoderLayer",
        layers="model.language_model.layers",
        images=_images((8, 108)),  # 2 patches of padding, 6 tokens
        freeze=("embed_vision", "embed_audio"),
    ),
)
