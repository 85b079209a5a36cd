"""Where a plan differs from the specification, or gives another reason for the same value.

The specification is the public axolotl guide to these model families (2026-04). Each row: what it
says, what the reference emits, and the measurement that made us differ. A `Decision` names its row.
"""

from __future__ import annotations

from dataclasses import dataclass

STACK = "transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, torch 2.13.0"
AXOLOTL = "axolotl main 067b021c (2026-07) and 0.21.0"


@dataclass(frozen=True)
class Deviation:
    """One row. key: as in `Decision.deviation`, "" where no key of a plan bears on it. same_value:
    the value is the specification's and only the reason differs. source: defect, thread or
    table.
    """

    key: str
    topic: str
    says: str
    emits: str
    measured: str
    source: str
    versions: str = STACK
    same_value: bool = False


ROWS: tuple[Deviation, ...] = (
    Deviation(
        "normalize_weight_scales",
        "normalize_weight_scales",
        "the key detects and rescales outlying weights",
        "the same rules, for the reference's own function; look with dry_run first",
        "no release and not on main: the schema has no such field, so the key does nothing",
        "families.md §1 row 1, §1.1; branch weight-scale-norm f608d263a",
        AXOLOTL,
        same_value=True,
    ),
    Deviation(
        "",
        "experts of Gemma 4 26B-A4B",
        "256 experts",
        "the number in the config",
        "128 experts, top-8, width 704; 256 is Qwen3.5-35B-A3B",
        "families.md §1 row 2",
    ),
    Deviation(
        "router-detection",
        "experts_implementation",
        "the plugin detects model type and routing function",
        "scattermoe by the layout and activation of the experts; the router stays the model's own",
        "since axolotl#3651 one experts function is registered and the router is left in the block",
        "families.md §1 row 3",
        AXOLOTL,
        same_value=True,
    ),
    Deviation(
        "",
        "processing strategy of Gemma 4",
        "none is needed",
        "labels on the assistant's turns, stop token included",
        "the base class trains on every turn, the user's included, until axolotl#3625",
        "families.md §1 row 4, §7",
        AXOLOTL,
    ),
    Deviation(
        "reentrant",
        "gradient_checkpointing_kwargs",
        "use_reentrant: false, since shared per-layer norms are 'marked ready twice'",
        "false where keys and values are shared (also over an explicit true), where the auxiliary"
        " loss is on, where DDP looks for unused parameters, and for every multimodal class; an"
        " explicit true is kept elsewhere",
        "norms are not the cause: reentrant, 0 of 101 parameters off with no shared layer, 56 of 95"
        " with 2 (relative error 0.28–1.1, the loss equal); 'ready twice' needs"
        " find_unused_parameters; router logits come without history (check R04)",
        "families.md §1 row 5; live-defects.md L1; parallel.md §3, §4",
    ),
    Deviation(
        "",
        "starting loss ≈ 12 of E2B and E4B",
        "cause under investigation; or lora_target_linear",
        "nothing to set",
        "K/V sharing lived in the cache (6.84 → 16.17 on transformers 5.5.0); fixed by"
        " transformers#45312; use_cache on and off now differ by 0.0",
        "families.md §1 row 6; transformers#45242",
    ),
    Deviation(
        "type-ids",
        "mm_token_type_ids",
        "required",
        "among the forward inputs whenever images are fed, not for text",
        "not required since 5.6.0; left out beside an image the mask is silently causal: logits"
        " differ by 0.4–0.8 relative",
        "families.md §1 row 7; L3",
    ),
    Deviation(
        "fsdp1-adapters",
        "FSDP1",
        "no: out of memory while sharding with QLoRA",
        "refused with every adapter; full fine-tuning is right",
        "gradient storage 46 404 of 47 972 local elements for 624 trainable ones (74 ×);"
        " use_orig_params=False raises",
        "families.md §1 row 8; parallel.md §6; L19",
    ),
    Deviation(
        "",
        "auto-detection",
        "Gemma 4 settings are detected",
        "by facts (shared K/V, unused parameters, towers), so for text classes and unseen models"
        " too",
        "upstream keys on the model types gemma4 and gemma4_unified; gemma4_text is excluded",
        "families.md §1 row 9; parallel.md §2",
        AXOLOTL,
    ),
    Deviation(
        "find-unused",
        "ddp_find_unused_parameters",
        "true for Gemma 4 and Gemma 3 under DDP",
        "true for every multimodal class, false for text classes",
        "towers frozen: false works as well as true; not frozen: false stops with 'Expected to have"
        " finished reduction'; true with reentrant checkpointing marks a variable ready twice",
        "parallel.md §3; L25",
        same_value=True,
    ),
    Deviation(
        "find-unused-offload",
        "ddp_find_unused_parameters with activation_offloading",
        "skipped for activation_offloading: true",
        "false in every offload mode, and refused where a parameter would stay unused",
        "upstream skips for the value true alone; without offload wrappers (LoRA since"
        " axolotl#3733)"
        " the stated reason does not hold, and unfrozen towers then fail",
        "families.md §1 row 10; parallel.md §2, §7",
        AXOLOTL,
    ),
    Deviation(
        "packing-mask",
        "attention mask under packing",
        "must be dropped for Gemma",
        "dropped for every family",
        "an all-ones mask beside packed position ids: max Δlogit 1.0–1.5 in every family; without"
        " it ≤ 6e-6",
        "families.md §1 row 11, §8; L14",
    ),
    Deviation(
        "packing-recurrent",
        "sample_packing with recurrent layers",
        "nothing",
        "packed with the document-aware patch of the gated delta rule; refused for other"
        " recurrences",
        "max Δlogit 0.5–1.6 across documents, silent; boundaries come only from cu_seq_lens_q"
        " and seq_idx",
        "L4; families.md §9",
    ),
    Deviation(
        "vlm-text-packing",
        "sample_packing of a VLM",
        "false for every VLM",
        "false, unless packed text is asked for: then true with a tokenizer, sdpa or eager"
        " attention,"
        " and no images",
        "text packed by position ids in a multimodal class: ≤ 6e-6 with eager and sdpa; the"
        " flash path does not isolate 3-D position ids",
        "families.md §8",
    ),
    Deviation(
        "regex-names",
        "lora_target_modules",
        "adapts q, k, v, o, gate, up and down of every layer",
        "the specification's regex; it matches what each layer has",
        "consumers of shared K/V have no k_proj and v_proj (transformers ≥ 5.8); full-attention"
        " layers with attention_k_eq_v have no v_proj",
        "families.md §1 row 12, §6",
        same_value=True,
    ),
    Deviation(
        "regex-by-class",
        "lora_target_modules",
        "model.language_model.layers…",
        "the path of the layers in the class that is loaded, such as model.layers…",
        "on Gemma4ForCausalLM the specification's regex matches nothing: NoMatchingPeftModuleError",
        "families.md §6",
    ),
    Deviation(
        "regex-recurrent",
        "lora_target_modules",
        "(mlp|self_attn) projections",
        "also the recurrent layers' and shared experts' projections, where the model has them",
        "three of four layers of Qwen3.5 have no self_attn, and its MoE no mlp projection outside"
        " the shared expert: the specification's form leaves them unadapted, without a word",
        "families.md §6; L5",
    ),
    Deviation(
        "lora-names",
        "names in a LoRA specification",
        "one list for every family",
        "a regex over the language model of the class; expert leaves that name no routed expert are"
        " warned of; 'routed experts' is one spelling for all",
        "[q,gate,up,down]_proj adapts routed experts on qwen3_moe, the shared expert on qwen2_moe,"
        " a"
        " dense MLP on gemma4, q_proj alone on mixtral; PEFT says nothing",
        "L5; families.md §6",
    ),
    Deviation(
        "peft-rewrite",
        "lora_target_modules on a MoE with shared experts",
        "nothing",
        "the shared experts' linear layers; routed experts only if asked for",
        "on model types of PEFT's list (qwen3_next, deepseek_v3, glm4_moe, …) even a regex that"
        " names shared experts is rewritten to the routed experts: on a qwen3_next of 6 layers 18"
        " shared projections are dropped and 6 experts modules adapted, without a word",
        "peft.utils.transformers_weight_conversion; measured 2026-11-24",
    ),
    Deviation(
        "context-parallel",
        "context_parallel_size",
        "nothing",
        "keys and values gathered, masks from global positions; the YAML names FlashAttention, as"
        " axolotl's schema demands",
        "a ring that drops the mask makes sliding layers fully causal, silently (accelerate#4177)",
        "parallel.md §9",
    ),
    Deviation(
        "target-linear",
        "lora_target_linear",
        "not for Gemma 4",
        "false everywhere; asked for, it becomes a regex over the language model",
        "'all-linear' puts 9 adapters into a one-layer tower, none with a gradient on text; DDP"
        " then"
        " fails",
        "L5, L6; parallel.md §3",
    ),
    Deviation(
        "",
        "Gemma4ClippableLinear",
        "axolotl patches PEFT automatically",
        "targets are restricted to the language model; asked for, the layer inside is adapted",
        "suffix targets still raise ValueError on peft 0.21.2",
        "families.md §1 row 13; L6",
    ),
    Deviation(
        "freeze-by-class",
        "freeze_mm_modules",
        "true when training text only",
        "true for every multimodal class unless false is asked for; the modules are those of the"
        " class beside its language model",
        "nine fixed prefixes cover gemma, qwen3.5, llama4; by the class also connectors of other"
        " names",
        "families.md §7",
        same_value=True,
    ),
    Deviation(
        "offload-key",
        "gradient_checkpointing with activation_offloading",
        "nothing",
        "true in the YAML, which axolotl demands; the reference recomputes only if asked to",
        "axolotl: 'activation_offloading requires gradient_checkpointing', then turns it off",
        "parallel.md §7",
        AXOLOTL,
    ),
    Deviation(
        "fsdp-unit",
        "fsdp_transformer_layer_cls_to_wrap",
        "Gemma4TextDecoderLayer",
        "the class of the decoder layers in the class that is loaded",
        "the default policy takes _no_split_modules: ValueError, no Gemma4AudioLayer in the model",
        "L18; parallel.md §5",
        same_value=True,
    ),
    Deviation(
        "expert-plan",
        "expert parallel of a MoE with dense MLPs",
        "nothing",
        "the dense entries are dropped from the expert plan before sharding",
        "FSDP with EP: 'Cannot concatenate overlapping meshes'; without the three entries logits"
        " differ by 0.0, gradients by 3.9e-7",
        "L9",
    ),
    Deviation(
        "auxiliary-loss",
        "output_router_logits",
        "nothing",
        "false where the class has no load-balancing loss; asking for it is refused",
        "gemma4 MoE: router_logits are probabilities, no aux_loss, the loss is unchanged",
        "L10",
    ),
    Deviation(
        "fused-loss-heads",
        "CutCrossEntropyPlugin",
        "for every model",
        "only for heads whose epilogue is known, without adapter and without auxiliary loss",
        "the generic patch drops softcap, logit scale and auxiliary loss; an adapter on lm_head is"
        " ignored and untrained",
        "L21, L22",
        AXOLOTL,
    ),
    Deviation(
        "fused-loss-dtype",
        "CutCrossEntropyPlugin",
        "for every dtype",
        "the plugin only with bf16; the reference's own fused loss in every dtype",
        "'Cut Cross Entropy requires fp16/bf16 training for backward pass'",
        "kernels.md §4",
        AXOLOTL,
    ),
)

BY_KEY = {row.key: row for row in ROWS if row.key}
