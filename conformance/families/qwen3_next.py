"""Qwen3-Next: gated delta rule, top-k of many experts, a gated shared expert; text only."""

from __future__ import annotations

from conformance.case import Model
from conformance.families._shared import (
    ATTENTION,
    LINEAR_ATTENTION,
    SHARED_EXPERT,
    TEXT_ENDS,
    VOCAB,
)

MODELS = (
    Model(
        name="qwen3_next",
        family="qwen3_next",
        config_class="Qwen3NextConfig",
        model_class="Qwen3NextForCausalLM",
        modelling="transformers.models.qwen3_next.modeling_qwen3_next",
        tiny={
            **ATTENTION,
            **TEXT_ENDS,
            **LINEAR_ATTENTION,
            **SHARED_EXPERT,
            "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000_000,
                "partial_rotary_factor": 0.25,
            },
            "vocab_size": VOCAB,
            "tie_word_embeddings": False,
            "max_position_embeddings": 128,
        },
        published="qwen3-next-80b-a3b",
        traits=frozenset({"moe", "shared_expert", "auxiliary_loss", "linear_attention"}),
        wrap_class="Qwen3NextDecoderLayer",
        layers="model.layers",
    ),
)
