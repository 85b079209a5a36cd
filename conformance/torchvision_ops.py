"""Makes PyPI's torchvision importable beside a CPU build of torch, where it is installed so.

Its compiled part then does not load, and its Python part ends in "operator torchvision::nms does
not exist" (and with it every import of transformers). Pictures and videos need only the Python
part: it is enough that the two operators are defined. Importing this module, before transformers,
does that; where torchvision is not installed it imports nothing.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # a library's definitions go when it does


def ensure() -> str | None:
    """Import torchvision, defining its two operators if only they are missing.

    Returns None where it can be used, else why not.
    """
    if find_spec("torchvision") is None:
        return "torchvision is not installed"
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            return f"torchvision does not import: {error}"
    import torch

    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        return f"torchvision does not import: {error}"
    return None


UNUSABLE = ensure()
"""None where torchvision can be used, else why not."""
