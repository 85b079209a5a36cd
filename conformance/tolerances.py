"""The one table of tolerances, each with the worst noise seen in that very measure beside it.

A limit is 2 to 10 times the noise (`checks.md` §2), or 0 where equality is bitwise. A row is chosen
by what is compared and by the family class: models with linear attention have rows of their own
where the summation order of `A_log` and `dt_bias` gradients makes more noise, and some measures
have a row for GPUs, whose kernels add in other orders. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Same-dtype rule: error ≤ ratio × the error of eager code in that dtype + EPS_SHARE × eps.
FROBENIUS_RATIO = 1.5
MAX_RATIO = 2.0
EPS_SHARE = 0.25
# A gradient's error is measured against max(own norm, this share of the global gradient norm).
GLOBAL_SHARE = 1e-4


@dataclass(frozen=True)
class Tolerance:
    """limit: largest accepted error. observed: worst noise seen in the same measure, on what and
    where in `why`. ValueError unless the limit is 2–10 times the noise, or both are 0."""

    name: str
    limit: float
    observed: float
    why: str

    def __post_init__(self) -> None:
        exact = self.limit == self.observed == 0
        if not exact and not 2 <= self.limit / max(self.observed, 1e-300) <= 10:
            raise ValueError(
                f"tolerance {self.name}: {self.limit:g} is not 2 to 10 times {self.observed:g}"
            )


_ROWS = (
    Tolerance("exact", 0.0, 0.0, "the same operations in the same order, or a masked-out input"),
    Tolerance(
        "gradients/data-parallel",
        1e-5,
        3.8e-6,
        "float32, batch split over 2 ranks: DDP, FSDP1, FSDP2, experts; gemma4-moe lora (full"
        " fine-tuning 1.2e-6, gemma3n)",
    ),
    Tolerance(
        "gradients/data-parallel/linear-attention",
        2e-4,
        3.5e-5,
        "as above, qwen3_5_moe lora (full 6.2e-6): A_log and dt_bias gradients are 1e-6 of the"
        " largest",
    ),
    Tolerance(
        "gradients/tensor-parallel", 1e-4, 3.0e-5, "float32, 2 ranks; gemma4-text tp (tp_ep 1.6e-5)"
    ),
    Tolerance(
        "gradients/tensor-parallel/linear-attention",
        2e-4,
        7.2e-5,
        "as above; qwen3_5 tp (lora 4.0e-5, tp_ep 2.2e-5)",
    ),
    Tolerance(
        "gradients/context-parallel",
        1e-5,
        2.6e-6,
        "float32, 2 ranks; gemma4-moe lora-experts (packed 2.3e-6, images 1.1e-6)",
    ),
    Tolerance(
        "gradients/context-parallel/linear-attention",
        2e-4,
        3.5e-5,
        "as above; qwen3_5_moe lora (packed 1.6e-5, full 4.3e-6)",
    ),
    Tolerance(
        "gradients/hybrid",
        2e-5,
        8.2e-6,
        "float32, batch split over 4 ranks; gemma4-moe lora-experts (full 6.3e-6)",
    ),
    Tolerance("gradients/hybrid/linear-attention", 5e-5, 1.1e-5, "as above; qwen3_5_moe"),
    Tolerance(
        "parameters/data-parallel",
        1e-6,
        3.9e-7,
        "one AdamW step in float64, lr 1e-3; gemma3n hsdp (ddp 3.6e-7)",
    ),
    Tolerance(
        "parameters/tensor-parallel", 1e-6, 1.5e-7, "one AdamW step in float64, lr 1e-3; gemma4"
    ),
    Tolerance(
        "parameters/context-parallel", 1e-6, 4.2e-7, "one AdamW step in float64; gemma4-text"
    ),
    Tolerance(
        "parameters/context-parallel/linear-attention",
        3e-6,
        9.9e-7,
        "as above, qwen3_5_moe: torch's chunked delta rule computes in float32 whatever it is given"
        " and its whole rows come from another rank here",
    ),
    Tolerance("loss/spread", 1e-6, 2e-7, "float32, shares of ranks added; worst is qwen3_5 tp"),
    Tolerance(
        "loss/several steps",
        1e-6,
        2.2e-7,
        "float32, three steps of AdamW, lr 1e-4; worst of 45 losses, gemma4-moe tp_ep",
    ),
    Tolerance(
        "parameters/launched", 2e-6, 4.2e-7, "four steps of AdamW in float64, lr 1e-3; gemma4-moe"
    ),
    Tolerance("loss/launched", 1e-6, 1.1e-7, "as above; Trainer logs float32"),
    Tolerance(
        "gradients/images on a rank", 5e-5, 9.6e-6, "float32, towers trained; gemma4-e4b ddp"
    ),
    Tolerance("gradients/images on a rank/linear-attention", 1e-4, 1.4e-5, "as above; qwen3_5 ddp"),
    Tolerance(
        "bfloat16/mixed precision",
        8e-3,
        1.0e-3,
        "loss, float32 weights cast by layer against one process in bfloat16; gemma4-e4b",
    ),
    Tolerance("loss/trained", 1e-6, 2.1e-7, "float32, after two steps of SGD; gemma4-e4b cp"),
    Tolerance(
        "loss/trained/linear-attention",
        1e-5,
        1.8e-6,
        "as above; qwen3_5_moe hsdp, whose gradients are as noisy as their own row",
    ),
    Tolerance("norm/spread", 6e-5, 1.9e-5, "float32 global norm; gemma4-text tp"),
    Tolerance("norm/clipped", 1e-6, 3.1e-7, "float32, clipped to 0.1; gemma4-text tp"),
    Tolerance(
        "gradients/reduced twice", 1e-6, 2.3e-7, "float32, two reductions for one; qwen3_5_moe ddp"
    ),
    Tolerance(
        "router/logits on ranks", 3e-7, 5.5e-8, "float32, root mean square of a layer; mixtral"
    ),
    Tolerance(
        "logits/reloaded", 1e-6, 2e-7, "float32, the same weights loaded again, merged once or not"
    ),
    Tolerance(
        "logits/golden", 4e-6, 1.8e-6, "float32, eager then, sdpa now; gemma4-moe of peft 0.18.1"
    ),
    Tolerance("logits/golden/gpu", 1e-5, 4.1e-6, "as above, that adapter on an H100"),
    Tolerance(
        "parameters/golden",
        1e-6,
        1.2e-7,
        "float32 LoRA factors, two AdamW steps after a kept state: 0 on one machine with 5.5, 5.17"
        " and 5.23; one unit in the last place is left to other processors",
    ),
    Tolerance("logits/merged", 1e-4, 2.6e-5, "float32, W + s·B·A folded; worst is gemma4-moe"),
    Tolerance("logits/reordered", 2e-5, 6e-6, "float32, rows of a batch in another order"),
    Tolerance("weights/merged", 1e-6, 2e-7, "float32, W + s·B·A by einsum against PEFT's"),
    Tolerance("gradients/settings", 1e-4, 2e-5, "float32, offload, checkpoints, kernels on or off"),
    Tolerance("rotary/frequencies", 1e-6, 1.2e-7, "float32 arithmetic of theta ** (-2i/d)"),
    Tolerance(
        "experts/any shape",
        5e-5,
        1.2e-5,
        "float32 against float64; a gradient that is one cancelling dot product (one token, one"
        " expert), where eager code may be right by luck",
    ),
    Tolerance("head/row sum", 2e-6, 4e-7, "float32, largest entry of the hidden gradient"),
    Tolerance("kernels/float32", 3e-6, 5e-7, "float32 against float64, tiny experts and heads"),
    Tolerance("kernels/float64", 1e-14, 1.1e-15, "float64 twice, sums in another order"),
    Tolerance("loss/same-model", 1e-6, 2e-7, "float32, the same model's loss by another path"),
    Tolerance("loss/ln V", 0.2, 0.07, "fixture weights by name; worst is gemma3 packed"),
    Tolerance("logits/same-model", 1e-6, 1.3e-7, "float32, the same states by another path"),
    Tolerance("logits/padded", 2e-5, 4.0e-6, "float32, other row lengths; worst is gemma4-e2b"),
    Tolerance("logits/regrouped", 3e-6, 6.5e-7, "float32, experts meet other tokens; gemma4-moe"),
    Tolerance("logits/regrouped/gpu", 1e-5, 3.6e-6, "as above on an H100; qwen3_5_moe images"),
    Tolerance("logits/decoded", 2e-5, 3.8e-6, "float32, token by token; worst is gemma4-e4b"),
    Tolerance("logits/decoded/linear-attention", 5e-5, 1.4e-5, "float32, qwen3_next"),
    Tolerance("router/weights", 1e-6, 2.3e-7, "float32 router against float64; gemma4-moe"),
    Tolerance("rule/float32", 3e-6, 6.1e-7, "float32 delta rule against float64; qwen3_5_moe-text"),
    Tolerance(
        "memory/copies on a CPU",
        0.25,
        0.084,
        "share by which offloaded copies exceed what they replace, views of one storage; mixtral",
    ),
    Tolerance("experts/float32", 2e-6, 5.1e-7, "float32 experts against the float64 loop"),
    Tolerance("gradients/head", 1e-6, 2.2e-7, "float32 loss against float64 cross-entropy"),
    Tolerance("gradients/rescaled", 1e-5, 3.9e-6, "float32, another divisor; qwen3_5_moe"),
    Tolerance("logits/attention", 3e-5, 7.6e-6, "float32, sdpa against eager; qwen3_5_moe images"),
    Tolerance(
        "gradients/attention", 2e-4, 4.3e-5, "float32, sdpa against eager; gemma4-moe images"
    ),
    Tolerance(
        "gradients/attention/linear-attention",
        3e-3,
        9.8e-4,
        "as above, qwen3_5 images: the tower's biases; 1.6e-3 from float64 for eager itself",
    ),
    Tolerance(
        "gradients/accumulated/linear-attention",
        2e-4,
        6.8e-5,
        "float32, documents run one by one against separate rows; qwen3_5",
    ),
    Tolerance(
        "gradients/accumulated/linear-attention/gpu",
        1e-3,
        2.5e-4,
        "as above on an H100, other first document; qwen3_5-text lora",
    ),
    Tolerance(
        "gradients/float64", 5e-6, 9.4e-7, "float64 with float32 islands; qwen3_5_moe-text smoothed"
    ),
    Tolerance(
        "gradients/float64/linear-attention/gpu",
        5e-5,
        1.6e-5,
        "as above on an H100: the delta rule's float32 sums, eager; qwen3_5-text",
    ),
    Tolerance(
        "parameters/one step in float64",
        1e-6,
        1.1e-7,
        "AdamW, lr 1e-4, whole against split batch; gemma4-dense images, float32 islands",
    ),
    Tolerance(
        "parameters/one step in float64/linear-attention/gpu",
        2e-4,
        4.3e-5,
        "as above on an H100: Adam divides the rule's noise by small gradients; qwen3_5_moe lora",
    ),
    Tolerance("curve/max Δ", 2e-3, 4.9e-4, "20 AdamW steps, float32 against float64; gemma4-moe"),
    Tolerance("curve/mean Δ", 2e-4, 5.0e-5, "as above; gemma4-moe"),
    Tolerance("curve/max Δ/gpu", 2e-2, 4.4e-3, "as above on an H100; gemma4-e4b"),
    Tolerance("curve/mean Δ/gpu", 2e-3, 5.2e-4, "as above on an H100; gemma4-e4b"),
    Tolerance(
        "curve/max Δ/linear-attention",
        0.25,
        0.095,
        "as above, qwen3_next; 0.15 in float64: its rounding doubles in every step or two",
    ),
    Tolerance("curve/mean Δ/linear-attention", 0.05, 0.018, "as above; qwen3_next"),
    Tolerance(
        "gradients/accumulated", 1e-4, 3.2e-5, "float32, packed against separate; gemma4-e2b lora"
    ),
)

TOLERANCES: dict[str, Tolerance] = {row.name: row for row in _ROWS}
EXACT = TOLERANCES["exact"]


def tolerance(what: str, classes: Iterable[str] = ()) -> Tolerance:
    """The row for what is compared (`gradients/data-parallel`): the most special one for the
    model's traits and, where `Subject.numerics` gives them, the device's class ("gpu").

    Raises KeyError, naming the rows there are, for an unknown comparison.
    """
    known = set(classes)
    kinds = ("/linear-attention", "") if "linear_attention" in known else ("",)
    places = ("/gpu", "") if "gpu" in known else ("",)
    for kind in kinds:
        for place in places:
            if what + kind + place in TOLERANCES:
                return TOLERANCES[what + kind + place]
    raise KeyError(f"no tolerance {what!r}; there are {', '.join(TOLERANCES)}")
