"""The skeleton that `conformance new-adapter PATH` writes: a stack judged by its loop alone."""

from __future__ import annotations

import re
from pathlib import Path

from conformance.errors import InputError

TEMPLATE = '''\
"""My stack, as finetune-conformance sees it. Is it sane, and then, is it right?

pytest --pyargs conformance --impl {module}:IMPLEMENTATION -m smoke
pytest --pyargs conformance --impl {module}:IMPLEMENTATION -m gemma4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from conformance.batches import stack
from conformance.expectation import Expectation
from conformance.implementation import Capability, Exclusion

OTHERS = frozenset({{"ddp", "fsdp1", "fsdp2", "hsdp", "tp", "tp_ep", "fsdp2_ep", "cp"}})


class MyStack:
    """Claims one capability: its own training loop. Each further method is a capability more."""

    name = "my-stack"
    capabilities = (Capability("fit", (Exclusion("one process only", strategies=OTHERS),)),)
    expectations: tuple[Expectation, ...] = ()  # known failures: pattern, reason, issue
    refusals: tuple[type[BaseException], ...] = ()

    def fit(self, model: Any, samples: Sequence[Any], plan: Any, **options: Any) -> None:
        """The training loop, called as a user would call it; the suite watches from outside."""
        size, parts = options.get("batch_size", 2), options.get("accumulation", 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.get("lr", 1e-3))
        batches = [stack(samples[i : i + size]) for i in range(0, len(samples), size)]
        windows = [batches[i : i + parts] for i in range(0, len(batches), parts)]
        for step in range(options.get("steps", 1)):
            window = windows[step % len(windows)]
            tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
            optimizer.zero_grad()
            for batch in window:
                model(**batch, num_items_in_batch=tokens).loss.backward()
            optimizer.step()


IMPLEMENTATION = MyStack()
'''


def write_adapter(path: Path) -> str:
    """Write the skeleton to a new file and return what to do next.

    Raises InputError when the name is no module's, or the file exists or cannot be written.
    """
    if path.suffix != ".py" or not re.fullmatch(r"[A-Za-z_]\w*", path.stem, re.ASCII):
        raise InputError(f"{path}: give a file that Python can import, such as my_stack.py")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(module=path.stem))
    except FileExistsError:
        raise InputError(f"{path}: exists already; it is left as it is") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return (
        f"{path} written. From its folder:\n"
        f"PYTHONPATH=. pytest --pyargs conformance --impl {path.stem}:IMPLEMENTATION -m smoke"
    )
