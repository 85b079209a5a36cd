"""Tiny models for the suite's own tests of `impl`: the shapes of `families.md` §11, jittered by
name.

Independent of `conformance.families`, so that these tests stand alone.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

SHARED = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA4 = {
    **SHARED,
    "intermediate_size": 72,
    "sliding_window": 5,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 97,
    "final_logit_softcapping": 30.0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 2,
}
MOE = {"num_experts": 6, "moe_intermediate_size": 40}
DELTA = {
    **SHARED,
    "num_hidden_layers": 8,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "intermediate_size": 72,
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 1, 0],
    "partial_rotary_factor": 0.25,
}

# name: (config class, model class, wrap class, config arguments)
TINY: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "gemma4-moe": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        "Gemma4TextDecoderLayer",
        {
            **GEMMA4,
            **MOE,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "top_k_experts": 2,
        },
    ),
    "gemma4-e2b": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        "Gemma4TextDecoderLayer",
        {
            **GEMMA4,
            "num_hidden_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        "Qwen3NextDecoderLayer",
        {
            **DELTA,
            **MOE,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 24,
            "rope_parameters": {**ROPE, "mrope_section": None},
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeDecoderLayer",
        {
            **DELTA,
            **MOE,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 24,
            "rope_parameters": ROPE,
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        "Gemma3nTextDecoderLayer",
        {
            **SHARED,
            "num_hidden_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "intermediate_size": [72] * 8,
            "sliding_window": 5,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "num_kv_shared_layers": 4,
            "laurel_rank": 4,
            "altup_num_inputs": 3,
            "activation_sparsity_pattern": [0.5, 0.0] * 4,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        "MixtralDecoderLayer",
        {
            **SHARED,
            "num_hidden_layers": 2,
            "intermediate_size": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
}
VISION_GEMMA4 = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "patch_size": 2,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}


def jitter(model: Any, scale: float = 0.05) -> Any:
    """Add noise to every floating tensor, seeded by its name: no zero or one hides a bug."""
    with torch.no_grad():
        for name, tensor in sorted({**dict(model.named_parameters())}.items()):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(tensor.shape, generator=generator) * scale
            tensor.add_(noise.to(tensor.dtype))
    return model


def wrap_class(name: str) -> str:
    """The decoder layer's class name."""
    return "Gemma4TextDecoderLayer" if name == "gemma4-vision" else TINY[name][2]


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model in training mode, the same numbers on every rank."""
    import transformers

    torch.manual_seed(0)
    if name == "gemma4-vision":
        text = {**TINY["gemma4-moe"][3], "use_bidirectional_attention": "vision", **changes}
        config = transformers.Gemma4Config(
            text_config=text,
            vision_config=VISION_GEMMA4,
            audio_config=None,
            image_token_id=90,
            boi_token_id=91,
            eoi_token_id=92,
            video_token_id=93,
            audio_token_id=94,
        )
        model = transformers.Gemma4ForConditionalGeneration(config)
    else:
        config_class, model_class, _, arguments = TINY[name]
        config = getattr(transformers, config_class)(**{**arguments, **changes})
        model = getattr(transformers, model_class)(config)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return jitter(model.to(dtype)).train()


def rows(count: int = 4, length: int = 13) -> dict[str, torch.Tensor]:
    """Text rows with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 90, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, : 1 + 2 * row] = -100
    return {"input_ids": ids, "labels": labels}


def lora(model: Any, targets: list[str], parameters: list[str] | None = None) -> Any:
    """A PEFT LoRA model with non-zero B."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=targets, target_parameters=parameters, lora_alpha=4)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for key, tensor in adapted.named_parameters():
            if ".lora_" in key:
                generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                noise = torch.randn(tensor.shape, generator=generator) * 0.1
                if isinstance(tensor, DTensor):
                    noise = distribute_tensor(noise, tensor.device_mesh, tensor.placements)
                tensor.copy_(noise)
    return adapted


def packed_row() -> dict[str, torch.Tensor]:
    """Two documents of 9 and 12 tokens in one row; no mask, positions restart."""
    batch = rows(1, 21)
    batch["position_ids"] = torch.cat([torch.arange(9), torch.arange(12)])[None]
    batch["labels"][0, 9] = -100
    return batch


def image_rows(count: int = 2) -> dict[str, torch.Tensor]:
    """Rows of 14 tokens with an image of four at 5–8: across the middle of the row, wider than
    nothing."""
    batch = rows(count, 14)
    generator = torch.Generator().manual_seed(11)
    image = slice(5, 9)
    batch["input_ids"][:, image] = 90
    batch["labels"][:, image] = -100
    batch["mm_token_type_ids"] = (batch["input_ids"] == 90).long()
    batch["pixel_values"] = torch.rand(count, 16, 12, generator=generator)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    batch["image_position_ids"] = grid[None].repeat(count, 1, 1)
    return batch
