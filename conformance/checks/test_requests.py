"""What is asked of the experts takes effect, or is refused: never accepted and ignored."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import Measured, declined, experts_of
from conformance.numerics import relative_error
from conformance.subject import Subject

# The gate of each activation that sonic-moe's enumeration names.
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SWIGLU": torch.nn.functional.silu,
    "GEGLU": torch.nn.functional.gelu,
    "REGLU": torch.nn.functional.relu,
}


@check("R10", needs=("plan", "prepare", "loss"), traits=("moe",))
def test_auxiliary_loss_acts_or_is_refused(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """Asked for the auxiliary loss, the training loss contains one, or the wish is refused.

    live defect L10; https://github.com/huggingface/transformers/issues/44242
    """
    batch = subject.batch()
    without = subject.step(subject.model(), batch)
    found: list[Any] = []

    def attempt() -> None:
        found.append(subject.step(subject.model(options={"auxiliary_loss": True}), batch))

    if declined(subject, attempt, measured):
        return
    assert without.loss and found[0].loss, f"{case.id}: a loss is missing"
    measured["auxiliary share"] = found[0].loss - without.loss
    assert measured["auxiliary share"] > 1e-4, (
        f"{case.id}: asked for, the auxiliary loss adds {measured['auxiliary share']:.3g}, and no"
        " refusal says so"
    )


@check("R11", needs=("plan", "prepare"), traits=("moe",))
def test_experts_kernel_runs_the_models_activation(
    case: Case, subject: Subject, measured: Measured, unsupported: Any
) -> None:
    """The sonic-moe experts, where asked for, are told the model's own activation, or are refused.

    live defect L15 (the kernel is replaced by a recorder, so that a CPU can tell)
    """
    try:
        sonic = importlib.import_module("transformers.integrations.sonicmoe")
    except ImportError:
        unsupported("this transformers has no sonicmoe integration")
    if not hasattr(sonic, "load_sonicmoe_kernel"):
        unsupported("this transformers loads the sonicmoe kernel in another way")
    options = {"experts_implementation": "sonicmoe"}
    if declined(subject, lambda: subject.plan(options=options), measured):
        return
    told: list[str] = []
    module: Any = next(iter(experts_of(subject.model()).values()))
    hidden = torch.randn(3, module.gate_up_proj.shape[2])
    index = torch.tensor([[0, 2], [2, 3], [3, 0]])
    with mock.patch.object(sonic, "load_sonicmoe_kernel", lambda: _recorder(told)):
        sonic.sonicmoe_experts_forward(module, hidden, index, torch.rand(3, 2))
    assert told, f"{case.id}: the kernel was not called"
    x, act = torch.linspace(-4, 4, 101), module.act_fn
    error_of_gate = relative_error(GATES[told[0]](x), act(x)).maximum
    measured["error of the activation"] = error_of_gate
    assert error_of_gate < 1e-6, (
        f"{case.id}: the kernel is told {told[0]}, off from the model's activation by"
        f" {error_of_gate:.3g}, tolerance 1e-06"
    )


def _recorder(told: list[str]) -> Any:
    """Stands in for the loaded kernel: notes the activation that it is told."""

    def run(hidden: torch.Tensor, *_: Any, activation_type: str, **__: Any) -> Any:
        told.append(activation_type)
        return hidden, None

    names = SimpleNamespace(**{name: name for name in GATES})
    return SimpleNamespace(activation_type_enum=names, moe_general_routing_inputs=run)
