"""Activation offloading: the same gradients, bit for bit, whatever is moved away and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from conformance import evidence
from conformance.case import Case
from conformance.check import check
from conformance.numerics import assert_close_gradients, assert_equal
from conformance.observe import Step
from conformance.storage_watch import StorageWatch
from conformance.subject import Subject
from conformance.tolerances import tolerance

Measured = dict[str, float]
MODES = (
    "offload-legacy",
    "offload-disk",
    "ckpt-nonreentrant+offload-hidden_states",
    "lora+offload",
    "lora+ckpt-nonreentrant+offload-hidden_states",
)


@check("O01", needs=("plan", "prepare", "loss"), settings=("offload",), dealt=MODES)
def test_offloading_changes_no_gradient(case: Case, subject: Subject, measured: Measured) -> None:
    """Every mode of offloading gives the loss and gradients of training without it.

    https://github.com/axolotl-ai-cloud/axolotl/pull/2927
    """
    batch = subject.batch()
    want = subject.plain_step(offload="off", checkpointing="off")
    got, kept = watched(subject, subject.model(), batch)
    _, plain = watched(subject, subject.model(offload="off"), batch)
    measured["share of saved bytes that stay"] = kept / plain
    assert kept < plain, f"{case.id}: {kept} of {plain} saved bytes stay: nothing is offloaded"
    row = tolerance("gradients/settings")
    assert_close_gradients(case.id, got.gradients, want.gradients, row, measured)
    loss = torch.tensor([got.loss]), torch.tensor([want.loss])
    assert torch.allclose(*loss, rtol=1e-6), f"{case.id}: loss {got.loss} against {want.loss}"


def watched(subject: Subject, model: nn.Module, batch: dict[str, Any]) -> tuple[Step, int]:
    """A step, and the bytes of saved tensors that reach hooks further out: those not offloaded."""
    kept: dict[tuple[Any, ...], torch.Tensor] = {}  # alive, so that no address is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr(), tensor.shape] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        found = subject.step(model, batch)
    return found, sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


class Views(nn.Module):
    """Autograd saves overlapping, transposed and strided views of one storage here."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64 * 64).reshape(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A scalar of products of views of one tensor."""
        y = x @ self.weight
        left, right = y[:, :32], y[:, 32:]
        mixed = (left * right).sum() + (y.t() @ y).tanh().sum() + (y[::2] * y[1::2]).sum()
        return mixed + (y.unfold(1, 32, 16) ** 2).mean()


@check("O02", needs=("plan", "prepare"), models=("mixtral",), settings=("offload", "offload-disk"))
def test_views_of_one_storage(case: Case, subject: Subject, measured: Measured) -> None:
    """Saved tensors that are views of one storage come back as they were.

    https://github.com/pytorch/torchtune/pull/1867
    """
    torch.manual_seed(0)
    x, views = torch.randn(48, 64), Views()
    views(x).backward()
    want = views.weight.grad
    assert want is not None and want.any(), f"{case.id}: no gradient"
    views.weight.grad = None
    model = subject.model()
    layer = subject.model_spec.layers.split(".")[-1]
    found = next(m for n, m in model.named_modules() if n.endswith(f"{layer}.0"))
    losses: list[torch.Tensor] = []
    handle = found.register_forward_hook(lambda m, a, out: losses.append(views(x)))
    subject.loss(model, subject.batch())
    handle.remove()
    losses[0].backward()
    assert views.weight.grad is not None
    assert_equal(case.id, "gradient through views", views.weight.grad, want, measured)


@check(
    "O03",
    needs=("plan", "prepare", "loss"),
    models=("gemma4-moe", "qwen3_next"),
    settings=("offload", "ckpt-nonreentrant+offload-hidden_states"),
    hardware="gpu",
)
def test_streams_do_not_race(case: Case, subject: Subject, measured: Measured) -> None:
    """Ten offloaded steps beside a stream that reuses freed memory keep their gradients.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3833
    """
    batch = subject.batch()
    want = subject.step(subject.model(offload="off", checkpointing="off"), batch)
    model, churn = subject.model(), torch.cuda.Stream()
    assert want.gradients, f"{case.id}: nothing trains"
    row = tolerance("gradients/settings")
    for number in range(10):
        with torch.cuda.stream(churn):  # whatever was freed too early is overwritten here
            for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
                torch.full((size,), float("nan"), device=subject.device)
        got = subject.step(model, batch)
        assert_close_gradients(
            case.id, got.gradients, want.gradients, row, measured, f"step {number}"
        )


def forgotten(subject: Subject, model: nn.Module, batch: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes that a second step holds after its forward, at its peak (on a GPU), and at its end
    beside the gradients: of the allocator on a GPU, of storages on a CPU."""
    subject.step(model, batch)  # what is made once is there now
    model.zero_grad(set_to_none=True)
    if subject.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        loss = subject.loss(model, batch)
        held = torch.cuda.memory_allocated() - start
        loss.backward()
        del loss
        model.zero_grad(set_to_none=True)
        peak, end = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return held, peak - start, end - start
    with StorageWatch() as watch:
        loss = subject.loss(model, batch)
        held = watch.alive()
        loss.backward()
        del loss
    model.zero_grad(set_to_none=True)
    return held, held, watch.alive()


@check(
    "O05",
    needs=("plan", "prepare", "loss"),
    models=("mixtral", "qwen3_next"),
    settings=("offload",),
    dealt=("offload-disk", "offload-legacy", "ckpt-nonreentrant+offload-hidden_states"),
)
def test_offloading_frees_memory(case: Case, subject: Subject, measured: Measured) -> None:
    """What is offloaded leaves the device, and nothing of a step is held when it is over.

    On a CPU the copies count too: no more than training without it holds, and on disk far less.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3649
    """
    batch = subject.batch()
    if subject.device == "cuda":  # so many rows that activations, not weights, are what is held
        batch = {k: v.repeat(32, *[1] * (v.dim() - 1)) for k, v in batch.items()}
    plain = forgotten(subject, subject.model(offload="off"), batch)
    held, peak, end = forgotten(subject, subject.model(), batch)
    measured |= {"held": held / plain[0], "peak": peak / plain[1], "left": end}
    assert plain[0] > 0 and plain[2] == 0, f"{case.id}: {plain} without offloading"
    assert end == 0, f"{case.id}: {end} bytes of the step are held after it, tolerance 0"
    layers = case.setting.offload == "hidden_states"
    if subject.device == "cuda":
        # The last layers' inputs stay until they are copied (trl: five), all that a tiny model may
        # have; and a layer's own recomputation may be the peak, with them or without.
        less = (held < plain[0], peak < plain[1])
        same = layers and held <= plain[0] and peak <= plain[1]
        assert all(less) or same, f"{case.id}: holds {held, peak} of {plain[:2]} bytes, no less"
    elif case.setting.offload == "disk":
        assert held < plain[0] / 2, f"{case.id}: {held} of {plain[0]} bytes stay in memory"
    else:  # a copy of a view may be larger than the view, where the storage is kept for another
        limit = plain[0] * (1.0 if layers else 1.0 + tolerance("memory/copies on a CPU").limit)
        assert held <= limit, f"{case.id}: {held} bytes held, {plain[0]} without offloading"


@check(
    "O04",
    needs=("plan", "build", "prepare", "parallelize", "loss"),
    reads=(),
    models=("gemma4-moe",),
    settings=("offload", "ckpt-nonreentrant+offload-hidden_states"),
    strategies=("ddp", "fsdp2"),
)
def test_offloading_on_ranks(case: Case, subject: Subject, measured: Measured) -> None:
    """Offloading, with and without checkpoints, under DDP and FSDP2 gives one process's gradients.

    https://github.com/pytorch/torchtune/issues/2683
    """
    seen = evidence.evidence(subject)
    assert seen.single.gradients, f"{case.id}: one process trains nothing"
    evidence.assert_step(subject, seen, measured)
