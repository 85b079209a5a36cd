"""Switches a model to the experts kernel, and back.

The registration is global and shared: it is taken back when the last model that uses it is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import Refused
from . import registration

_users = 0


def enable(model: nn.Module) -> Callable[[], None]:
    """Register the kernel, make `model` (perhaps wrapped by PEFT) use it, and return the undo.

    Raises Refused when another function has the name, or the model cannot be switched.
    """
    global _users
    inner: Any = model
    while not hasattr(inner, "set_experts_implementation") and hasattr(inner, "base_model"):
        inner = inner.base_model.model
    config = inner.config.get_text_config()
    before = getattr(config, "_experts_implementation", None) or "eager"
    try:
        registration.register()
    except RuntimeError as error:
        raise Refused(str(error)) from error
    _users += 1
    inner.set_experts_implementation(registration.NAME)
    if config._experts_implementation != registration.NAME:
        raise Refused(f"experts_implementation={registration.NAME!r} did not take effect")

    def undo() -> None:
        global _users
        inner.set_experts_implementation(before)
        _users -= 1
        if _users == 0:
            registration.unregister()

    return undo
