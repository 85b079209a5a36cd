"""Qwen 3.5, dense: gated delta rule and gated full attention, images with mRoPE."""

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
    TEXT_ENDS,
    VOCAB,
)

_TEXT: dict[str, Any] = {
    **ATTENTION,
    **LINEAR_ATTENTION,
    **MROPE,
    **TEXT_ENDS,
    "intermediate_size": 72,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
}
_TRAITS = frozenset({"linear_attention"})
_MODELLING = "transformers.models.qwen3_5.modeling_qwen3_5"

MODELS = (
    Model(
        name="qwen3_5",
        family="qwen3_5",
        config_class="Qwen3_5Config",
        model_class="Qwen3_5ForConditionalGeneration",
        modelling=_MODELLING,
        tiny={**QWEN_IDS, "text_config": _TEXT, "vision_config": QWEN_VISION},
        published="qwen3.5-dense",
        traits=_TRAITS | {"vision"},
        wrap_class="Qwen3_5DecoderLayer",
        layers="model.language_model.layers",
        images=QWEN_IMAGES,
        text_model="qwen3_5-text",
        freeze=("visual",),
    ),
    Model(
        name="qwen3_5-text",
        family="qwen3_5",
        config_class="Qwen3_5TextConfig",
        model_class="Qwen3_5ForCausalLM",
        modelling=_MODELLING,
        tiny=_TEXT,
        published="qwen3.5-dense",
        traits=_TRAITS,
        wrap_class="Qwen3_5DecoderLayer",
        layers="model.layers",
    ),
)
