"""Other linear cross-entropies as implementations: the same kernel checks, another function.

    pytest -m kernels --device cuda --impl conformance.implementations.losses:LIGER

`FULL_LOGITS` and `COMPILED` (`torch.compile`) need nothing but torch, `TORCH` its 2.13; `LIGER`
wants liger-kernel, `CUT` and `CUT_EXACT` (without the gradient filter) cut-cross-entropy, each with
a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from conformance.expectation import Expectation
from conformance.implementation import Capability

CUT_PACKAGE, LIGER_PACKAGE = "cut_cross_entropy", "liger_kernel"


class Declined(ValueError):
    """The function has no argument for what is asked."""


def _needs(package: str) -> Callable[[], str | None]:
    """A probe: the package and a GPU are there."""

    def probe() -> str | None:
        import torch

        if find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
        return None if torch.cuda.is_available() else f"{package} runs on GPUs alone"

    return probe


@dataclass(frozen=True)
class OtherLoss:
    """One function from hidden states (N, D), weight (V, D) and labels (N) to the loss.

    sum_of: called with hidden, weight, labels, bias, softcap and reduction ("sum" or "none").
    """

    name: str
    sum_of: Callable[..., Any]
    probe: Callable[[], str | None] | None = None
    expectations: tuple[Expectation, ...] = ()
    refusals: tuple[type[BaseException], ...] = (Declined,)
    capabilities: tuple[Capability, ...] = field(init=False)

    def __post_init__(self) -> None:
        claimed = (Capability("linear_cross_entropy", probe=self.probe),)
        object.__setattr__(self, "capabilities", claimed)

    def linear_cross_entropy(
        self,
        hidden: Any,
        weight: Any,
        labels: Any,
        *,
        bias: Any = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        num_items_in_batch: float | None = None,
        reduction: str = "mean",
    ) -> Any:
        """The contract's function; the divisor is applied outside. Raises Declined for a dtype,
        a bias or a softcap that the function does not take."""
        rest = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
        if reduction == "none":
            return self.sum_of(hidden, weight, labels, reduction="none", **rest)
        count = num_items_in_batch or (labels != -100).sum().clamp_min(1)
        return self.sum_of(hidden, weight, labels, reduction="sum", **rest) / count


def _full(
    hidden: Any, weight: Any, labels: Any, *, bias: Any, softcap: Any, logit_scale: float,
    reduction: str,
) -> Any:  # fmt: skip
    """All logits in the working dtype, the loss from them in float32."""
    import torch

    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(wide, labels, reduction=reduction)


def _compiled(*args: Any, **options: Any) -> Any:
    """The same, compiled."""
    import torch

    return torch.compile(_full)(*args, **options)


def _liger(
    hidden: Any, weight: Any, labels: Any, *, bias: Any, softcap: Any, logit_scale: float,
    reduction: str,
) -> Any:  # fmt: skip
    """Liger's fused linear cross-entropy; it has no scale of the logits: the rows take it."""
    import torch

    if hidden.dtype == torch.float64:
        raise Declined("float64: the kernel computes in float32 whatever it is given")
    module = import_module(f"{LIGER_PACKAGE}.transformers.fused_linear_cross_entropy")
    layer = module.LigerFusedLinearCrossEntropyLoss(softcap=softcap, reduction=reduction)
    return layer(weight, hidden * logit_scale, labels, bias)


def _cut(
    hidden: Any, weight: Any, labels: Any, *, bias: Any, softcap: Any, logit_scale: float,
    reduction: str, **how: Any,
) -> Any:  # fmt: skip
    """Apple's cut cross-entropy, by default with its gradient filter."""
    import torch

    if hidden.dtype not in (torch.bfloat16, torch.float16):
        raise Declined(f"{hidden.dtype}: its backward wants bfloat16 or float16")
    if bias is not None:
        raise Declined("bias: the function has no argument for it")
    module = import_module(CUT_PACKAGE)
    rows = hidden * logit_scale
    return module.linear_cross_entropy(
        rows, weight, labels, softcap=softcap, reduction=reduction, **how
    )


def _cut_exact(*args: Any, **options: Any) -> Any:
    """The same without the filter."""
    return _cut(*args, filter_eps=None, **options)


def _torch(
    hidden: Any, weight: Any, labels: Any, *, bias: Any, softcap: Any, logit_scale: float,
    reduction: str,
) -> Any:  # fmt: skip
    """torch's own, in chunks (since 2.13)."""
    import torch

    if softcap is not None:
        raise Declined("softcap: the function has no argument for it")
    return torch.nn.functional.linear_cross_entropy(
        hidden * logit_scale,
        weight,
        labels,
        linear_bias=bias,
        reduction=reduction,
        options=torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True),
    )


def _has_torchs() -> str | None:
    """A probe: this torch has the function."""
    import torch

    found = hasattr(torch.nn.functional, "linear_cross_entropy")
    return None if found else f"torch {torch.__version__} has no linear_cross_entropy"


ONE_BACKWARD = Expectation(
    "K16/*",
    "a compiled backward gives its buffers away and cannot run twice over one graph",
    "https://github.com/pytorch/pytorch/pull/130580",
    raises=(RuntimeError,),
)
ROUNDED_SUMS = Expectation(
    "K01/-/bf16/-",
    "the weight's gradient is rounded to bfloat16 after every chunk of tokens",
    "https://github.com/linkedin/Liger-Kernel/pull/1391",
)
SCALED_IN_PLACE = Expectation(
    "K16/*",
    "the backward scales the saved gradient where it lies, so that a second one scales it again",
    "https://github.com/linkedin/Liger-Kernel/issues/343",
)
HALF_ONLY = Expectation(
    "K*/-/-/-",
    "its backward takes bfloat16 and float16 alone",
    "https://github.com/apple/ml-cross-entropy/blob/main/cut_cross_entropy/cce_backward.py",
    raises=(Declined,),
)
FILTERED = Expectation(
    "K08/-/bf16/-",
    "the gradient filter drops what a flat softmax adds up to along a common direction",
    "https://github.com/apple/ml-cross-entropy/issues/14",
)
REDUCED_IN_HALF = Expectation(
    "K08/-/bf16/-",
    "without the filter too, gradients are added up in bfloat16",
    "https://github.com/apple/ml-cross-entropy/pull/18",
)
TORCH_CHUNKS = "https://github.com/pytorch/pytorch/pull/181574"
OF_TORCH = (
    Expectation(
        "K01/-/-/-",
        "it has no softcap",
        "https://github.com/pytorch/pytorch/issues/124480",
        raises=(Declined,),
    ),
    Expectation("K08/-/bf16/-", "the loss comes back in bfloat16", TORCH_CHUNKS),
    *(
        Expectation(
            f"K08/-/{setting}/-",
            "chunk by chunk, rounding along a common direction is twice that of full logits",
            TORCH_CHUNKS,
        )
        for setting in ("-", "fp64")
    ),
)
FULL_LOGITS = OtherLoss("full-logits", _full)
COMPILED = OtherLoss("torch.compile", _compiled, expectations=(ONE_BACKWARD,))
LIGER = OtherLoss("liger", _liger, _needs(LIGER_PACKAGE), (ROUNDED_SUMS, SCALED_IN_PLACE))
CUT = OtherLoss("cut-cross-entropy", _cut, _needs(CUT_PACKAGE), (HALF_ONLY, FILTERED))
CUT_EXACT = OtherLoss(
    "cut-cross-entropy-exact", _cut_exact, _needs(CUT_PACKAGE), (HALF_ONLY, REDUCED_IN_HALF)
)
TORCH = OtherLoss("torch.linear_cross_entropy", _torch, _has_torchs, OF_TORCH)
