"""Known failures of the stock stack: each with its reason, its thread and its version range.

The numbers L1, L2, … are those of the project's list of live defects. What only older releases do
is in `transformers_history.py`; what is here holds for the newest stack that was tried.
"""

from __future__ import annotations

from conformance.expectation import Expectation
from conformance.implementations.transformers_history import HISTORY
from conformance.implementations.transformers_quantization import QUANTIZATION
from conformance.ranks import RankFailed, RanksTimeout

_TRANSFORMERS = "https://github.com/huggingface/transformers/issues"
_PEFT = "https://github.com/huggingface/peft/issues"
_AXOLOTL = "https://github.com/axolotl-ai-cloud/axolotl/pull"


def _each(
    patterns: tuple[str, ...],
    reason: str,
    issue: str,
    raises: tuple[type[BaseException], ...] = (AssertionError,),
    when: tuple[str, ...] = (),
) -> tuple[Expectation, ...]:
    """One defect, seen by several checks."""
    return tuple(Expectation(pattern, reason, issue, raises, when) for pattern in patterns)


FORWARD = (
    *_each(
        (
            "M05/gemma4-e[24]b/*ckpt-reentrant*/single",
            "M05/gemma3n/*ckpt-reentrant*/single",
            "N01/gemma4-e[24]b/*ckpt-reentrant*/single",
            "N01/gemma3n/*ckpt-reentrant*/single",
        ),
        "L1: the first pass of reentrant checkpointing runs without gradient, so the keys and"
        " values that later layers share are detached and their producers get a wrong gradient",
        "https://github.com/unslothai/unsloth-zoo/issues/813",
        when=("transformers>=5.6",),
    ),
    Expectation(
        "M03/gemma3n/-/single",
        "L12: from `inputs_embeds` the per-layer inputs are left out without a word",
        f"{_TRANSFORMERS}/45874",
    ),
    *_each(
        ("[MNX]0[17]/gemma3n/*qlora*/single",),
        "in training AltUp clamps `prediction_coefs.weight` in place, which 4-bit loading packed"
        " into uint8",
        "https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3n/"
        "modeling_gemma3n.py",
        (RuntimeError,),
    ),
)
MASKS = (
    *_each(
        ("V04/gemma3-vlm/images/single", "V04/gemma4-[dmu]*/images/single"),
        "L3: an image without type ids is attended to causally, silently, since the demand for them"
        " was dropped",
        f"{_TRANSFORMERS}/45454",
        when=("transformers>=5.6",),
    ),
    *_each(
        ("A06/gemma4-unified/images/single", "V27/gemma4-unified/images/single"),
        "the forward overlays image blocks as Gemma 3 does, on full-attention layers and across the"
        " window's edge; generation uses the family's own masks",
        f"{_TRANSFORMERS}/46850",
    ),
    Expectation(
        "S04/*/packed/single",
        "L14: any attention mask, all ones too, turns the document mask by position ids off",
        f"{_AXOLOTL}/2449",
    ),
    *_each(
        ("S03/*/*packed/single", "K02/qwen3_[5n]*/packed/single", "K03/*/*packed/single"),
        "L4: convolution and state of the recurrent layers take boundaries from kernel arguments"
        " only; restarting position ids leak across documents",
        f"{_TRANSFORMERS}/44717",
    ),
    *_each(
        ("N01/qwen3_5/*ckpt*+packed*/single", "N01/qwen3_5_moe/*ckpt*+packed*/single"),
        "Trainer switches the cache off in the top config, this decoder reads its own; with a cache"
        " the documents of a packed row see one another, which checkpointing (no cache) stops",
        f"{_TRANSFORMERS}/44717",
    ),
)
LOSS = (
    *_each(
        ("L02/gemma4-[!t]*/*/single", "L02/qwen3_5/*/single", "L02/qwen3_5_moe/*/single"),
        "L2: the class says `accepts_loss_kwargs = False`, so Trainer averages micro-batches"
        " without regard to their numbers of labels",
        f"{_AXOLOTL}/3706",
    ),
    *_each(
        ("L08/qwen3_5/fp64/single", "L08/qwen3_5_moe/fp64/single"),
        "Trainer's label smoother shifts labels only for class names of the causal-LM mapping,"
        " which lacks these multimodal classes",
        "https://github.com/huggingface/transformers/pull/17987",
    ),
    Expectation(
        "L06/*/single",
        "the mean over no labelled token is 0 / 0: NaN, and NaN gradients",
        f"{_AXOLOTL}/3033",
    ),
    Expectation(
        "R05/*/-/single",
        "the auxiliary loss is added whole to every micro-batch, whatever `num_items_in_batch`"
        " says, so its share grows with accumulation",
        f"{_TRANSFORMERS}/34191",
    ),
)
EXPERTS = (
    Expectation(
        "R04/[!g]*/ckpt-reentrant/single",
        "router logits are recorded in the first reentrant pass, without history: the auxiliary"
        " loss is in the loss and in no gradient",
        "https://pytorch.org/docs/stable/checkpoint.html",
    ),
    Expectation(
        "R10/gemma4-moe/-/single",
        "L10: `output_router_logits` is accepted, yet the class adds no loss and its router returns"
        " probabilities",
        f"{_TRANSFORMERS}/44242",
    ),
    Expectation(
        "R11/gemma4-moe/-/single",
        "L15: the sonicmoe integration looks the activation up as `hidden_act`, which this config"
        " lacks, and falls back to silu",
        f"{_AXOLOTL}/3651",
    ),
)
ATTENTION = (
    Expectation(
        "K04/gemma4-*/bf16/single",
        "the class says that it supports FlashAttention, whose heads end at 256; those of its full"
        " layers have 512, and the first forward fails",
        "https://github.com/huggingface/transformers/pull/45202",
    ),
)
_ABSENT = "gemma4-[dmt]*", "gemma3-vlm", "qwen3_5*-text"
_WRAP = (
    "L18: when no class is named, accelerate wraps all of `_no_split_modules`, which lists classes"
    " that this model does not have, and raises"
)
_WRAPPED = (
    *(f"[FL]*/{model}/*/fsdp[12]" for model in _ABSENT),
    *(f"[FL]*/{model}/*/hsdp" for model in _ABSENT),
    *(f"P17/{model}/*/fsdp[12]" for model in ("gemma4-moe", "gemma3-vlm")),
    "C14/gemma4-moe/*/hsdp",
    *(f"V10/{model}/*/fsdp2" for model in ("gemma4-[dm]*", "gemma3-vlm")),
    *(f"C0[89]/{model}/*/fsdp2" for model in ("gemma4-moe", "gemma3-vlm")),
)
SHARDING = (
    *_each(
        (*(f"X06/{model}/-/fsdp2" for model in _ABSENT), "I0[49]/*/fsdp2"),
        _WRAP,
        f"{_TRANSFORMERS}/37672",
    ),
    *_each(
        _WRAPPED,
        _WRAP,
        f"{_TRANSFORMERS}/37672",
        (ValueError,),
    ),
    *_each(
        ("F02/gemma4-[eu]*/-/fsdp1", "F02/qwen3_5/-/fsdp1", "F02/qwen3_5_moe/-/fsdp1"),
        "FSDP1 gives every weight of a flat parameter a gradient, zeros where nothing was fed: the"
        " optimizer's weight decay then shrinks towers that text never reached",
        "https://pytorch.org/docs/stable/fsdp.html",
    ),
    Expectation(
        "I11/*",
        "L19: FSDP1 stores gradients of packed weights; nothing declines it for QLoRA",
        f"{_AXOLOTL}/3597",
    ),
    Expectation(
        "I08/*",
        "L19: FSDP1 stores gradients of frozen weights; nothing declines it for adapters",
        f"{_AXOLOTL}/3597",
    ),
    *_each(
        ("[FP]1[47]/mixtral/*/fsdp1", "[FP]1[47]/qwen3_5_moe/lora-experts/fsdp1"),
        "PEFT adapts expert weights, and on fused experts by its own map, through a"
        " parametrization; FSDP1's views of its flat parameter may not be changed in place there",
        "https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py",
        (RuntimeError,),
    ),
)
DATA_PARALLEL = (
    Expectation(
        "I02/*",
        "L25: Trainer does not look for unused parameters if a plain model is checkpointed, which"
        " ends DDP on the second step where towers are not fed",
        f"{_AXOLOTL}/3584",
        (RuntimeError,),
    ),
    *_each(
        (
            "P17/gemma*/*/ddp",
            "P17/gemma4-e2b/lora/fsdp[12]",
            "P17/qwen3_5_moe/lora/fsdp*",
            *(f"P17/qwen3_5_moe/lora-experts/{name}" for name in ("ddp", "fsdp2")),
            "P17/qwen3_5_moe/lora/ddp",
        ),
        "L6: `all-linear` adapts towers that text does not feed; those adapters get no gradient",
        f"{_AXOLOTL}/3584",
    ),
    *_each(
        ("V10/gemma4-[eu]*/-/fsdp2", "V10/qwen3_5/-/fsdp2", "V10/qwen3_5_moe/-/fsdp2"),
        "accelerate wraps the layers of towers too; a rank without images never gathers them, so"
        " the ranks' collectives no longer match",
        "https://github.com/NVIDIA-NeMo/Automodel/issues/2566",
        (RankFailed, RanksTimeout),
    ),
    Expectation(
        "F2[34]/*moe/*/ddp",
        "L2: the class denies loss arguments, so Trainer averages the ranks' means, whatever their"
        " numbers of labels",
        f"{_TRANSFORMERS}/34191",
    ),
    Expectation(
        "R13/*",
        "the auxiliary loss of each rank is added whole, whatever its share of the labels",
        f"{_TRANSFORMERS}/34191",
    ),
)
EXPERT_PARALLEL = (
    *_each(
        tuple(f"{check}/gemma4-moe/*/fsdp2_ep" for check in ("F*", "L04", "C08", "P17")),
        "L9: the expert plan also names the dense layers, which FSDP shards over the same ranks",
        f"{_TRANSFORMERS}/45621",
        (RuntimeError,),
    ),
    *_each(
        ("F08/mixtral/-/fsdp2_ep", "F08/qwen*/-/fsdp2_ep"),
        "in float64 and float16 torch applies FSDP2's divide factor twice where the experts' shard"
        " group has one rank: expert gradients are half of what they should be",
        "https://github.com/pytorch/pytorch/blob/main/torch/distributed/fsdp/_fully_shard/"
        "_fsdp_collectives.py",
    ),
    *_each(
        ("[FP]1[47]/mixtral/*/fsdp2_ep", "[FP]1[47]/*/lora-experts/fsdp2_ep"),
        "PEFT adds a plain adapter to expert weights that are sharded: mixed tensors",
        f"{_TRANSFORMERS}/45621",
        (RuntimeError,),
    ),
    Expectation(
        "F14/qwen3_5_moe/lora/fsdp2_ep",
        "adapters come after the sharding while loading, so nothing reduces their gradients over"
        " the ranks",
        f"{_TRANSFORMERS}/45621",
    ),
)
_TENSOR = "https://github.com/huggingface/transformers/blob/main/src/transformers/distributed/"
TENSOR_PARALLEL = (
    *_each(
        ("[FL]*/gemma4-e[24]b/*/tp", "P17/gemma4-e2b/*/tp"),
        "for per-layer inputs the padding's embedding is read from the sharded table by hand, and"
        " meets plain tensors in `where`",
        f"{_TRANSFORMERS}/39648",
        (RuntimeError,),
    ),
    *_each(
        ("F07/gemma3n/-/tp", "F1[1235]/gemma3n/-/tp", "L05/gemma3n/-/tp"),
        "activation sparsity takes mean and deviation over a rank's own part of the features",
        f"{_TRANSFORMERS}/39648",
    ),
    *_each(
        (
            "F12/gemma[34]-[dmtuv]*/-/tp",
            "F12/qwen3*/-/tp",
            "F12/gemma4-moe/-/tp_ep",
            "F12/qwen3*/-/tp_ep",
        ),
        "the hook that sums the partial gradients of q_norm and k_norm runs after accumulation:"
        " with a second micro-batch it sums the first one's again",
        f"{_TENSOR}tensor_parallel.py",
    ),
    *_each(
        (
            *(f"[FPC][01][478]/*/lora-experts/{name}" for name in ("tp", "tp_ep")),
            *(f"[FPC][01][478]/mixtral/lora/{name}" for name in ("tp", "tp_ep")),
        ),
        "PEFT's wrapper of experts lacks the `weight` that the sharded forward reads",
        f"{_AXOLOTL}/3779",
        (AttributeError,),
    ),
    *_each(
        ("[FP]1[47]/*/lora/tp", "[FP]1[47]/*/lora/tp_ep"),
        "PEFT adds adapters of the whole weight's shape, or of the rank's part where the output is"
        " gathered, to weights that were sharded while loading",
        f"{_AXOLOTL}/3779",
        (RuntimeError,),
    ),
    *_each(
        ("C08/qwen3_5_moe/lora/tp", "C08/qwen3_5_moe/lora/tp_ep"),
        "the adapter on a sharded weight is saved as the rank's part of it",
        f"{_AXOLOTL}/3779",
    ),
)
CHECKPOINTS = _each(
    (
        "C07/gemma3-vlm/-/single",
        "C07/mixtral/-/single",
        "C07/qwen*_moe*/-/single",
        "C07/qwen3_next/-/single",
    ),
    "Trainer writes its checkpoint through the hub's key names but reads it without them: whatever"
    " was renamed or fused stays as it was before training, with a warning",
    f"{_TRANSFORMERS}/48805",
)
_UNREACHED = (
    "L5: the names of expert leaves match nothing, or a dense or shared layer of that name only,"
    " and no warning says so"
)
ADAPTERS = (
    *_each(
        tuple(
            f"{check}/{model}/lora/single"
            for check, model in (
                ("P0[12]", "gemma4-[dm]*e"),
                ("P0[12]", "gemma4-e[24]b"),
                ("P03", "gemma4-moe"),
                ("I05", "gemma4-dense"),
            )
        ),
        "L6: PEFT finds the projection's name on the towers' Gemma4ClippableLinear, which it cannot"
        " adapt",
        f"{_PEFT}/3129",
        (ValueError,),
    ),
    Expectation(
        "P02/gemma3-vlm/lora/single",
        "L6: a list of names also adapts the vision tower, silently",
        f"{_PEFT}/3129",
    ),
    Expectation(
        "P02/qwen3_next/lora/single",
        "L5: PEFT's expert map rewrites the names to the routed experts; the shared expert of those"
        " names is left out",
        f"{_PEFT}/3711",
    ),
    *_each(
        ("P03/mixtral/*", "P03/qwen3_5_moe*/*"),
        _UNREACHED,
        f"{_PEFT}/3711",
    ),
    Expectation("P03/qwen2_moe/*", _UNREACHED, f"{_PEFT}/3711", when=("transformers>=5.9",)),
    *_each(
        (
            "P05/gemma[34]-[vu]*/lora*/single",
            "P05/gemma4-[dm]*/lora[-/]*",
            "P05/gemma4-e[24]b/lora*/single",
            "P05/qwen3_5/lora/single",
            "P05/qwen3_5_moe/lora[-/]*",
            "I03/gemma4-e2b/lora/single",
        ),
        "L6: `all-linear` adapts towers that the batch does not feed; those adapters get no"
        " gradient, which ends DDP",
        f"{_AXOLOTL}/3584",
    ),
    *_each(
        ("P05/gemma3n/lora/single", "P13/gemma3n/lora*/single"),
        "L7: AltUp reads `correction_coefs.weight` itself in training, past the adapter",
        f"{_PEFT}/899",
    ),
    *_each(
        ("C04/*/lora-experts/single", "C11/*/lora-experts/single"),
        "expert adapters that PEFT 0.18 or older wrote no longer load: input and output changed"
        " places, and nothing converts them",
        f"{_PEFT}/3083",
        (RuntimeError,),
        when=("peft>=0.19",),
    ),
    Expectation(
        "P14/*",
        "L13: PEFT removes its parametrization only when it is alone on the parameter, so on a"
        " parametrised (quantised) expert weight one more piles up with every forward",
        "https://github.com/huggingface/peft/pull/2638",
        when=("peft>=0.21",),
    ),
)
TRAINING = (
    *_each(
        ("V13/*/lora+images/single", "V15/qwen3_5/lora+images/single"),
        "`all-linear` adapts the towers too, although a text-only recipe means them frozen (L6)",
        f"{_PEFT}/3129",
    ),
)
CONVERSATIONS = (
    Expectation(
        "T06/*/-/single",
        "a template that marks no assistant's turn gives a mask of zeros and one logged line: the"
        " batch has no label at all",
        "https://github.com/huggingface/trl/issues/6577",
    ),
    Expectation(
        "T07/*/-/single",
        "the assistant mask is what the template marks; a stop token written behind the mark is"
        " not in it, and the model is never told to stop",
        f"{_AXOLOTL}/3756",
    ),
    Expectation(
        "T08/*/images/single",
        "a picture inside an assistant's turn is expanded inside its mask, so placeholders and"
        " what begins and ends them are labelled",
        f"{_AXOLOTL}/3625",
    ),
    *_each(
        ("V2[45]/*/images/single", "V32/*/images/single", "V23/gemma4-unified/images/single"),
        "the error of a batch says what is wrong and not in which conversation (of a file that is"
        " no picture only where torchvision decodes it)",
        f"{_TRANSFORMERS}/35779",
    ),
)

EXPECTATIONS: tuple[Expectation, ...] = (
    *TRAINING,
    *QUANTIZATION,
    *HISTORY,
    *CONVERSATIONS,
    *FORWARD,
    *MASKS,
    *LOSS,
    *EXPERTS,
    *ATTENTION,
    *SHARDING,
    *DATA_PARALLEL,
    *EXPERT_PARALLEL,
    *TENSOR_PARALLEL,
    *CHECKPOINTS,
    *ADAPTERS,
)
