"""Mixtral: softmax routing with normalised weights, silu experts, text only, untied."""

from __future__ import annotations

from conformance.case import Model
from conformance.families._shared import ATTENTION, TEXT_ENDS, VOCAB

MODELS = (
    Model(
        name="mixtral",
        family="mixtral",
        config_class="MixtralConfig",
        model_class="MixtralForCausalLM",
        modelling="transformers.models.mixtral.modeling_mixtral",
        tiny={
            **ATTENTION,
            **TEXT_ENDS,
            "num_hidden_layers": 2,
            "intermediate_size": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "vocab_size": VOCAB,
            "tie_word_embeddings": False,
            "max_position_embeddings": 128,
        },
        published="mixtral-8x7b",
        traits=frozenset({"moe", "auxiliary_loss"}),
        wrap_class="MixtralDecoderLayer",
        layers="model.layers",
    ),
)
