"""Qwen 3.5 MoE: as the dense one, with routed experts and a gated shared expert."""

from __future__ import annotations

from typing import Any

from conformance.case import Model
from conformance.families._shared import (
    ATTENTION,
    LINEAR_ATTENTION,
    MROPE,
    QWEN_IDS,
    QWEN_IMAGES,
    QWEN_VISION,
    SHARED_EXPERT,
    TEXT_ENDS,
    VOCAB,
)

_TEXT: dict[str, Any] = {
    **ATTENTION,
    **LINEAR_ATTENTION,
    **MROPE,
    **TEXT_ENDS,
    **SHARED_EXPERT,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
}
_TRAITS = frozenset({"moe", "shared_expert", "auxiliary_loss", "linear_attention"})
_MODELLING = "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"

MODELS = (
    Model(
        name="qwen3_5_moe",
        family="qwen3_5_moe",
        config_class="Qwen3_5MoeConfig",
        model_class="Qwen3_5MoeForConditionalGeneration",
        modelling=_MODELLING,
        tiny={**QWEN_IDS, "text_config": _TEXT, "vision_config": QWEN_VISION},
        published="qwen3.5-35b-a3b",
        traits=_TRAITS | {"vision"},
        wrap_class="Qwen3_5MoeDecoderLayer",
        layers="model.language_model.layers",
        images=QWEN_IMAGES,
        text_model="qwen3_5_moe-text",
        freeze=("visual",),
    ),
    Model(
        name="qwen3_5_moe-text",
        family="qwen3_5_moe",
        config_class="Qwen3_5MoeTextConfig",
        model_class="Qwen3_5MoeForCausalLM",
        modelling=_MODELLING,
        tiny=_TEXT,
        published="qwen3.5-35b-a3b",
        traits=_TRAITS,
        wrap_class="Qwen3_5MoeDecoderLayer",
        layers="model.layers",
    ),
)
