"""Known failures of the stock stack with 4-bit weights, in one process and on ranks."""

from __future__ import annotations

from conformance.expectation import Expectation

_TRANSFORMERS = "https://github.com/huggingface/transformers/issues"
_SOURCE = "https://github.com/bitsandbytes-foundation/bitsandbytes"  # where no thread is known


def _each(
    patterns: tuple[str, ...],
    reason: str,
    issue: str,
    raises: tuple[type[BaseException], ...] = (AssertionError,),
) -> tuple[Expectation, ...]:
    """One defect, seen by several checks."""
    return tuple(Expectation(pattern, reason, issue, raises) for pattern in patterns)


QUANTIZATION: tuple[Expectation, ...] = (
    *_each(
        (
            *(f"Q01/{model}/qlora/single" for model in ("gemma4-moe", "mixtral", "qwen3_5_moe*")),
            *(f"Q06/{model}/qlora/ddp" for model in ("gemma4-moe", "qwen3_5_moe*")),
        ),
        "4-bit loading replaces linear layers only: fused expert weights stay as they are",
        f"{_SOURCE}/issues/1849",
    ),
    *_each(
        ("Q02/*/qlora/single",),
        "bitsandbytes on a CPU unpacks a row that is no multiple of its block of 64 wrongly",
        _SOURCE,
    ),
    *_each(
        (
            "P12/*/qlora/single",
            *(f"Q0[34]/{model}/qlora/single" for model in ("gemma4-*", "mixtral")),
            "Q07/gemma4-moe/qlora/ddp",
        ),
        "bitsandbytes' packing for evaluation on a CPU takes no row narrower than its block of 64",
        _SOURCE,
        raises=(RuntimeError,),
    ),
    *_each(
        ("Q0[5679]/*/qlora/fsdp2",),
        "L18: when no class is named, accelerate wraps all of `_no_split_modules`, which lists"
        " classes that this model does not have, and raises",
        f"{_TRANSFORMERS}/37672",
        raises=(ValueError,),
    ),
    *_each(
        ("Q08/*/qlora/tp", "Q08/*/qlora/tp_ep"),
        "loading with a tensor plan makes DTensors before quantisation, which reads attributes of"
        " bitsandbytes' own parameter class",
        f"{_TRANSFORMERS}/39648",
        raises=(AttributeError,),
    ),
    *_each(
        ("Q08/*/qlora/fsdp2_ep",),
        "L9: the expert plan also names the dense layers, which FSDP shards over the same ranks",
        f"{_TRANSFORMERS}/45621",
        raises=(RuntimeError,),
    ),
)
