"""Sizes and ids that every tiny model shares, and the layer patterns (no torch is imported here).

The sizes obey `conformance.fidelity.fixture_faults`: H=48, 2I, I, E and heads x head_dim are all
different, so that a transposed or mixed-up weight is a shape error rather than a silent one.
"""

from __future__ import annotations

from typing import Any

from conformance.case import ImageInputs

VOCAB = 97  # a prime: no tile of a kernel divides it
HIDDEN = 48
WINDOW = 5

TEXT_ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

ATTENTION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def layer_types(many: str, one: str, run: int, periods: int = 2) -> list[str]:
    """`run` layers of type `many`, then one of type `one`, `periods` times; the last is `one`."""
    return ([many] * run + [one]) * periods


# The gated delta rule of Qwen 3.5 and Qwen3-Next, and the layers around it.
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 6,
    "layer_types": layer_types("linear_attention", "full_attention", run=2),
}
SHARED_EXPERT: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 24,
}
# Four rotary pairs, all three rows of position ids among them.
MROPE: dict[str, Any] = {
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}
QWEN_IDS = {
    "vision_start_token_id": 90,
    "image_token_id": 91,
    "vision_end_token_id": 92,
    "video_token_id": 93,
    "tie_word_embeddings": False,
}
QWEN_IMAGES = ImageInputs(
    token_id=91,
    tokens_per_image=6,
    pixel_values=(24, 24),  # 4 x 6 patches of 3 channels x 2 frames x 2 x 2 pixels
    extra=("image_grid_thw",),
    type_ids="mm_token_type_ids",
    begin_id=90,
    end_id=92,
)
