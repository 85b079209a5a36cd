"""Other linear cross-entropies as implementations: the same kernel checks, another function.

    pytest -m kernels --device cuda --impl conformance.implementations.losses:LIGER

`FULL_LOGITS` and `COMPILED` (`torch.compile`) need nothing but torch; `LIGER` wants liger-kernel,
`CUT` and `CUT_EXACT` (without the gradient filter) want cut-cross-entropy, each with a GPU.
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
        """The contract's function; the divisor is applied outside. Raises Declined for a scale or a
        bias that the function has no argument for."""
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


def _no_scale(logit_scale: float) -> None:
    if logit_scale != 1.0:
        raise Declined(f"logit_scale {logit_scale}: the function has no argument for it")


def _liger(
    hidden: Any, weight: Any, labels: Any, *, bias: Any, softcap: Any, logit_scale: float,
    reduction: str,
) -> Any:  # fmt: skip
    """Liger's fused linear cross-entropy."""
    _no_scale(logit_scale)
    module = import_module(f"{LIGER_PACKAGE}.transformers.fused_linear_cross_entropy")
    layer = module.LigerFusedLinearCrossEntropyLoss(softcap=softcap, reduction=reduction)
    return layer(weight, hidden, labels, bias)


def _cut(
    hidden: Any, weight: Any, labels: Any, *, bias: Any, softcap: Any, logit_scale: float,
    reduction: str, **how: Any,
) -> Any:  # fmt: skip
    """Apple's cut cross-entropy, by default with its gradient filter."""
    _no_scale(logit_scale)
    if bias is not None:
        raise Declined("bias: the function has no argument for it")
    module = import_module(CUT_PACKAGE)
    return module.linear_cross_entropy(
        hidden, weight, labels, softcap=softcap, reduction=reduction, **how
    )


def _cut_exact(*args: Any, **options: Any) -> Any:
    """The same without the filter."""
    return _cut(*args, filter_eps=None, **options)


ONE_BACKWARD = Expectation(
    "K16/*",
    "a compiled backward gives its buffers away and cannot run twice over one graph",
    "https://github.com/pytorch/pytorch/pull/130580",
    raises=(RuntimeError,),
)
FULL_LOGITS = OtherLoss("full-logits", _full)
COMPILED = OtherLoss("torch.compile", _compiled, expectations=(ONE_BACKWARD,))
LIGER = OtherLoss("liger", _liger, _needs(LIGER_PACKAGE))
CUT = OtherLoss("cut-cross-entropy", _cut, _needs(CUT_PACKAGE))
CUT_EXACT = OtherLoss("cut-cross-entropy-exact", _cut_exact, _needs(CUT_PACKAGE))
