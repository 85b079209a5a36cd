"""Bugs of requests that are accepted and ignored: R10 and R11."""

from __future__ import annotations

import pytest

from tests.mutants import mutant
from tests.mutants.mutants_forward import around


@mutant("L10", case="R10/gemma4-moe/-/single", issue="live defect L10")
def an_absent_auxiliary_loss_is_accepted(patch: pytest.MonkeyPatch) -> None:
    """Gemma 4 is asked for the auxiliary loss that it does not have, and trains without."""
    around(patch, "impl.plan:decide_auxiliary_loss", lambda original: lambda draft: False)


@mutant("b083", case="R11/gemma4-moe/-/single", issue="live defect L15")
def the_kernel_reads_another_key(patch: pytest.MonkeyPatch) -> None:
    """sonic-moe is accepted for a config without `hidden_act`, and runs SwiGLU."""
    around(patch, "impl.plan_kernels:_exclusions", lambda original: lambda *args: None)
