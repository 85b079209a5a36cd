"""Failures of older releases of the stock stack, each with the range in which it was seen.

Tried on transformers 5.5.0, 5.9.0, 5.12.0, 5.17.0 and 5.23.0: a range ends at the first of these
that was right.
"""

from __future__ import annotations

from conformance.expectation import Expectation

_AXOLOTL = "https://github.com/axolotl-ai-cloud/axolotl/pull"
_TRANSFORMERS = "https://github.com/huggingface/transformers/issues"
_TYPED = "gemma[34]-[vdm]*"  # the models whose images are attended to in both directions


def _until(
    release: str,
    patterns: tuple[str, ...],
    reason: str,
    issue: str,
    raises: tuple[type[BaseException], ...] = (AssertionError,),
) -> tuple[Expectation, ...]:
    """One defect of the releases before `release`, seen by several checks."""
    when = (f"transformers<{release}",)
    return tuple(Expectation(pattern, reason, issue, raises, when) for pattern in patterns)


_TEXT_NEEDS_TYPE_IDS = _until(
    "5.6",
    (
        *(f"{check}/{_TYPED}/*[!s]/single" for check in ("A0[45]", "L0[123678]", "M05", "N01")),
        *(f"{check}/{_TYPED}/*" for check in ("A09", "C07", "M01", "P09", "P13", "R07", "V01")),
        *(f"{check}/{_TYPED}/*" for check in ("R10", "S0[124]", "D02", "M0[269]", "X07")),
        *(
            f"{case}/single"
            for case in (f"M04/{_TYPED}/-", f"K02/{_TYPED}/-", f"K02/{_TYPED}/packed")
        ),
        f"R04/{_TYPED}/*",
        f"L02/{_TYPED}/fp64+images/single",
        f"P05/{_TYPED}/lora[-/]*",
    ),
    "token type ids were demanded of every training batch, of text too",
    f"{_TRANSFORMERS}/45222",
    (ValueError,),
)
_LOSS = (
    *_until(
        "5.9",
        ("L01/gemma4-e[24]b/*/single", f"L01/{_TYPED}/images/single", "L07/gemma4-e[24]b/-/single"),
        "the multimodal classes had a loss of their own, which ignored `num_items_in_batch`",
        f"{_TRANSFORMERS}/45354",
    ),
    *_until(
        "5.17",
        (
            *(f"L0[17]/{model}/*/single" for model in ("gemma3-vlm", "qwen3_5", "qwen3_5_moe")),
            "L02/gemma3-vlm/*",
        ),
        "the multimodal classes had a loss of their own, which ignored `num_items_in_batch`",
        f"{_TRANSFORMERS}/45354",
    ),
    *_until(
        "5.12",
        ("L02/*",),
        "Trainer counted the first label of each row, which no token predicts; before 5.9 it also"
        " told accelerate of the accumulation, which divides the loss once more",
        f"{_TRANSFORMERS}/34191",
    ),
    *_until(
        "5.9",
        ("L03/*",),
        "Trainer told accelerate of the accumulation too, which divides the loss once more",
        f"{_TRANSFORMERS}/34191",
    ),
    *_until(
        "5.9",
        ("R02/*", "R03/*"),
        "the routers recorded probabilities, of which the auxiliary loss took the softmax again",
        f"{_TRANSFORMERS}/44242",
    ),
    *_until(
        "5.23",
        ("R03/qwen3_5_moe/-/single", "R10/qwen3_5_moe/-/single"),
        "the multimodal class looked for `output_router_logits` in its call only, not its config",
        f"{_TRANSFORMERS}/44242",
    ),
)
_MASKS = (
    *_until(
        "5.17",
        ("A06/gemma4-[dm]*e/images/single", "V27/gemma4-dense/images/single"),
        "image blocks were joined to the mask after the window, so they crossed its edge",
        f"{_TRANSFORMERS}/46850",
    ),
    *_until(
        "5.9",
        tuple(
            f"{check}/{model}/*/single"
            for check in ("A07", "M0[47]")
            for model in ("gemma4-e[24]b", "gemma3n")
        ),
        "shared keys and values lived in the cache: without one, consumers computed their own",
        f"{_TRANSFORMERS}/45242",
    ),
    *_until(
        "5.12",
        ("A07/gemma4-[dmt]*/-/single",),
        "a static cache without any shared layer had no layers at all",
        f"{_TRANSFORMERS}/45242",
        (IndexError,),
    ),
    *_until(
        "5.17",
        ("S01/gemma3-vlm/*packed/single",),
        "the decoder kept its cache on in training, and a cache turns the document mask off",
        f"{_TRANSFORMERS}/45242",
    ),
    *_until(
        "5.9",
        ("S01/gemma4-e[24]b/*packed/single",),
        "the decoder kept its cache on in training, and a cache turns the document mask off",
        f"{_TRANSFORMERS}/45242",
    ),
)
_OTHERS = (
    *_until(
        "5.9",
        ("D06/gemma4-moe/bf16/single",),
        "the router took its softmax in the dtype of the weights",
        f"{_TRANSFORMERS}/45354",
    ),
    *_until(
        "5.9",
        ("P02/qwen2_moe/lora/single",),
        "L5: PEFT's expert map rewrote the names to the routed experts; the shared expert of those"
        " names was left out",
        "https://github.com/huggingface/peft/issues/3711",
    ),
    *_until(
        "5.9",
        ("C07/gemma3n/-/single", "C07/qwen3_5/-/single", "C07/qwen3_5-text/-/single"),
        "Trainer writes its checkpoint through the hub's key names but reads it without them",
        f"{_TRANSFORMERS}/48805",
    ),
    *_until(
        "5.17",
        ("X06/gemma3-text/-/fsdp2",),
        "L18: `_no_split_modules` listed classes that this model does not have",
        f"{_TRANSFORMERS}/37672",
    ),
)
_PROCESSED = tuple(
    f"T02/{model}/-/single" for model in ("gemma3-vlm", "gemma3n", "gemma4-[deu]*", "qwen3_5")
)
_CONVERSATIONS = (
    *_until(
        "5.9",
        _PROCESSED,
        "a processor's template took parts only; a turn whose content is text was a TypeError",
        f"{_AXOLOTL}/3595",
        (TypeError,),
    ),
    *_until(
        "5.23",
        (*_PROCESSED, "V11/*/images/single"),
        "a processor looked marked turns up by bisection in the offsets of tokens, which padding"
        " and what pictures are replaced with put out of order",
        f"{_AXOLOTL}/3592",
    ),
    *_until(
        "5.12",
        ("V25/gemma4-*/images/single",),
        "a placeholder without a picture was a bare StopIteration",
        f"{_TRANSFORMERS}/35779",
        (StopIteration,),
    ),
    *_until(
        "5.23",
        ("V25/qwen3_5*/images/single",),
        "a placeholder without a picture was an index out of bounds, then a bare StopIteration",
        f"{_TRANSFORMERS}/35779",
        (IndexError, StopIteration),
    ),
)
HISTORY: tuple[Expectation, ...] = (
    *_CONVERSATIONS,
    *_TEXT_NEEDS_TYPE_IDS,
    *_LOSS,
    *_MASKS,
    *_OTHERS,
)
