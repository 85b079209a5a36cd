"""Qwen3 MoE: softmax routing with normalised weights, no shared expert, text only."""

from __future__ import annotations

from conformance.case import Model
from conformance.families._shared import ATTENTION, TEXT_ENDS, VOCAB

MODELS = (
    Model(
        name="qwen3_moe",
        family="qwen3_moe",
        config_class="Qwen3MoeConfig",
        model_class="Qwen3MoeForCausalLM",
        modelling="transformers.models.qwen3_moe.modeling_qwen3_moe",
        tiny={
            **ATTENTION,
            **TEXT_ENDS,
            "num_hidden_layers": 2,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "vocab_size": VOCAB,
            "tie_word_embeddings": False,
            "max_position_embeddings": 128,
        },
        published="qwen3-30b-a3b",
        traits=frozenset({"moe", "auxiliary_loss"}),
        wrap_class="Qwen3MoeDecoderLayer",
        layers="model.layers",
    ),
)
