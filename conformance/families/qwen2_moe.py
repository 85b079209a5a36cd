"""Qwen2 MoE: unnormalised routing weights, a gated shared expert, biases in attention."""

from __future__ import annotations

from conformance.case import Model
from conformance.families._shared import ATTENTION, SHARED_EXPERT, TEXT_ENDS, VOCAB

MODELS = (
    Model(
        name="qwen2_moe",
        family="qwen2_moe",
        config_class="Qwen2MoeConfig",
        model_class="Qwen2MoeForCausalLM",
        modelling="transformers.models.qwen2_moe.modeling_qwen2_moe",
        tiny={
            **ATTENTION,
            **TEXT_ENDS,
            "num_hidden_layers": 2,
            **SHARED_EXPERT,
            "norm_topk_prob": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "vocab_size": VOCAB,
            "tie_word_embeddings": False,
            "max_position_embeddings": 128,
        },
        published="qwen1.5-moe-a2.7b",
        traits=frozenset({"moe", "shared_expert", "auxiliary_loss"}),
        wrap_class="Qwen2MoeDecoderLayer",
        layers="model.layers",
    ),
)
