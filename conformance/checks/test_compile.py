"""`torch.compile` around a training step: the same numbers, few graphs, compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import Batch, Measured, experts_of, text_config
from conformance.numerics import assert_close_step
from conformance.observe import Step
from conformance.subject import Subject
from conformance.tolerances import tolerance

Act = Callable[[nn.Module, Batch], Step]


class Compiled(NamedTuple):
    """A step for each batch, and the number of graphs that were compiled after each."""

    steps: list[Step]
    graphs: list[int]


def batches(subject: Subject) -> list[Batch]:
    """Three batches of one shape and other tokens."""
    first = subject.batch()
    ids, spec = first["input_ids"], subject.model_spec
    moved = [3 + (ids - 3 + 7 * n) % (spec.text_vocab - 3) for n in range(3)]
    return [{**first, "input_ids": torch.where(ids < spec.text_vocab, new, ids)} for new in moved]


def compiled(subject: Subject, model: nn.Module, given: list[Batch], act: Act) -> Compiled:
    """Steps of the compiled model: on a CPU by autograd's tracing alone, on a GPU by inductor."""
    name = "inductor" if subject.device == "cuda" else "aot_eager"
    backend: Any = torch._dynamo.lookup_backend(name)  # type: ignore[no-untyped-call]
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return backend(graph, inputs)

    torch._dynamo.reset()
    steps, counts = [], []
    try:
        wrapped: Any = torch.compile(model, backend=count)
        for batch in given:
            steps.append(act(wrapped, batch))
            counts.append(len(graphs))
    finally:
        torch._dynamo.reset()
    return Compiled(steps, counts)


def compare(
    case: Case, subject: Subject, measured: Measured, options: dict[str, Any] | None = None
) -> tuple[Compiled, nn.Module]:
    """Compiled steps equal eager ones, and nothing is compiled after the first."""
    given = batches(subject)
    model = subject.model(options=options)
    want = [subject.step(model, batch) for batch in given]
    assert want[0].loss != want[1].loss, f"{case.id}: the batches are alike"
    got = compiled(subject, model, given, subject.step)
    measured |= {f"graphs after step {n}": count for n, count in enumerate(got.graphs, 1)}
    assert got.graphs[0] > 0, f"{case.id}: nothing was compiled"
    row = tolerance("gradients/settings", subject.numerics)
    for number, (one, other) in enumerate(zip(got.steps, want, strict=True), 1):
        assert_close_step(case.id, one, other, row, measured, f"step {number}")
    assert len(set(got.graphs)) == 1, (
        f"{case.id}: compiled again for a batch of the same shape: {got.graphs} graphs"
    )
    return got, model


@check("K05", needs=("plan", "prepare", "loss"), models=("mixtral",))
def test_compiled_equals_eager(case: Case, subject: Subject, measured: Measured) -> None:
    """Compiled, steps are the eager ones, router logits included, in no more graphs than stock.

    An invariant kept without a thread: nothing is compiled anew for a batch of the same shape
    """
    got, _ = compare(case, subject, measured, {"auxiliary_loss": True})
    stock = subject.stock("float32", "sdpa", "grouped_mm")
    text_config(stock).output_router_logits = True
    plainly(stock, subject.batch())  # what installs itself at the first forward is there
    plain = compiled(subject, stock, batches(subject)[:1], plainly).graphs[0]
    measured["graphs of stock"] = plain
    limit = plain if plain == 1 else 2 * plain  # a hook may split what is in pieces once more
    assert got.graphs[0] <= limit, f"{case.id}: {got.graphs[0]} graphs, limit {limit}"


def plainly(model: nn.Module, batch: Batch) -> Step:
    """A step by the model's own loss."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return Step(loss=float(loss.detach()), gradients={})


# Graphs that a function may cost which the compiler does not enter, in a loop that it leaves.
OPAQUE = 4


@check(
    "K21",
    needs=("plan", "prepare", "loss"),
    models=("mixtral", "gemma4-moe", "gemma4-e2b"),
    settings=("kernels", "lora-experts+kernels"),
    nightly=True,
)
def test_compiled_kernels_equal_eager(case: Case, subject: Subject, measured: Measured) -> None:
    """Compiled with kernels and adapters, steps are the eager ones, in few graphs and once.

    kernels.md §3: `torch.compile` around a kernel breaks the graph and changes no number
    """
    got, model = compare(case, subject, measured)
    opaque = len(experts_of(model)) + 1
    measured["graphs a function"] = got.graphs[0] / opaque
    assert got.graphs[0] <= OPAQUE * opaque, f"{case.id}: {got.graphs[0]} graphs, {opaque} kernels"
