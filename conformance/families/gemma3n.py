"""Gemma 3n: AltUp, Laurel, per-layer inputs and shared K/V; the text-only class."""

from __future__ import annotations

from conformance.case import Model
from conformance.families._shared import ATTENTION, TEXT_ENDS, VOCAB, WINDOW, layer_types

MODELS = (
    Model(
        name="gemma3n",
        family="gemma3n",
        config_class="Gemma3nTextConfig",
        model_class="Gemma3nForCausalLM",
        modelling="transformers.models.gemma3n.modeling_gemma3n",
        tiny={
            **ATTENTION,
            **TEXT_ENDS,
            "vocab_size": VOCAB,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "intermediate_size": [72] * 6,
            "sliding_window": WINDOW,
            "num_hidden_layers": 6,
            "layer_types": layer_types("sliding_attention", "full_attention", run=2),
            "num_kv_shared_layers": 3,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
            "altup_num_inputs": 3,
            "laurel_rank": 4,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 128,
        },
        published="gemma3n-e2b",
        traits=frozenset(
            {"kv_sharing", "per_layer_inputs", "sliding_window", "tied_embeddings", "softcap"}
        ),
        wrap_class="Gemma3nTextDecoderLayer",
        layers="model.layers",
    ),
)
