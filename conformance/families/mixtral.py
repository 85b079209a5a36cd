"""Mixtral: softmax routing, top-2 of 8, silu experts, text only, untied."""

from __future__ import annotations

from conformance.case import Model

MODELS = (
    Model(
        name="mixtral",
        family="mixtral",
        config_class="MixtralConfig",
        model_class="MixtralForCausalLM",
        modelling="transformers.models.mixtral.modeling_mixtral",
        tiny={
            "vocab_size": 97,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        published="mixtral-8x7b",
        traits=frozenset({"moe", "auxiliary_loss"}),
        wrap_class="MixtralDecoderLayer",
        layers="model.layers",
    ),
)
