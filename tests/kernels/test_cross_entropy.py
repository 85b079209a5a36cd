"""The linear cross-entropy in plain torch: values, gradients, budgets, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from impl.kernels import cross_entropy as module
from impl.kernels import graph
from impl.kernels.cross_entropy import causal_lm_loss, linear_cross_entropy
from impl.kernels.cross_entropy_chunks import Needs, Operands, whole_row_tiles
from impl.kernels.cross_entropy_kept import Kept, kept_chunks
from impl.kernels.cross_entropy_lean import sliced_tiles
from impl.kernels.cross_entropy_rows import Form
from impl.kernels.cross_entropy_torch import TorchRows
from impl.kernels.cross_entropy_weight import Room, WeightGradient
from tests.kernels.cross_entropy_cases import CASES, judge

SMALL = (1 << 20) + 40_000  # several chunks and several slices of every case


@pytest.mark.parametrize("budget", [None, SMALL])
@pytest.mark.parametrize("name", CASES)
def test_float64(name: str, budget: int | None) -> None:
    """In float64 the loss and every gradient are those of full logits."""
    for key, (ours, _) in judge(name, "torch", torch.float64, budget).items():
        assert ours < 1e-12, f"{name} {key}: {ours:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Elsewhere no further from float64 than 1.5 times full logits in the same dtype.

    In float32 both are noise of the summation order: seen 7e-7.
    """
    if dtype == torch.float16 and name == "extreme":
        dtype = torch.bfloat16  # eager itself overflows
    floor = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    for key, (ours, eager) in judge(name, "torch", dtype, SMALL).items():
        limit = 1.5 * eager + floor
        assert ours <= limit, f"{name} {key}: {ours:.1e}, eager {eager:.1e}"


def problem(tokens: int = 40, vocabulary: int = 500, dim: int = 32) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels."""
    torch.manual_seed(3)
    hidden = torch.randn(tokens, dim, requires_grad=True)
    weight = torch.randn(vocabulary, dim) * 0.2
    return hidden, weight, torch.randint(0, vocabulary, (tokens,))


def test_no_valid_token() -> None:
    """Zero loss and zero gradients, finite whatever the divisor and the hidden states."""
    hidden, weight, labels = problem()
    weight.requires_grad_()
    hidden.data[0] = torch.inf
    for options in ({}, {"num_items_in_batch": 0}, {"reduction": "none"}):
        loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), **options)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert not loss.any() and not any(g.any() for g in grads), options


def test_rows_of_the_logit_gradient_sum_to_zero() -> None:
    """With a classifier of ones the hidden states get no gradient, frozen or trained."""
    hidden, weight, labels = problem()
    for trainable in (False, True):
        ones = torch.ones_like(weight).requires_grad_(trainable)
        linear_cross_entropy(hidden, ones, labels).backward()
        assert hidden.grad is not None and hidden.grad.abs().max() < 1e-6
        hidden.grad = None


def test_frozen_classifier_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen weight's gradient is neither computed nor allocated."""
    monkeypatch.setattr(WeightGradient, "__init__", lambda *a: pytest.fail("allocated"))
    hidden, weight, labels = problem()
    linear_cross_entropy(hidden, weight, labels).backward()
    linear_cross_entropy(hidden, weight, labels, z_loss=1e-3, mode="torch").backward()
    assert weight.grad is None


def test_without_gradients_nothing_is_kept() -> None:
    """Under no_grad the loss is the same and only one product is made."""
    hidden, weight, labels = problem()
    wanted = linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, labels)
    assert not got.requires_grad
    torch.testing.assert_close(got, wanted.detach())


def test_float16_gradient_survives_a_large_divisor() -> None:
    """A float16 gradient below float16's range reaches the upstream loss scale unharmed."""
    hidden, weight, labels = problem()
    half = hidden.detach().half().requires_grad_()
    loss = linear_cross_entropy(half, weight.half(), labels, num_items_in_batch=2.0**24)
    (got,) = torch.autograd.grad(loss * 2.0**24, half)
    wanted_loss = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    (wanted,) = torch.autograd.grad(wanted_loss, hidden)
    assert (got.float() - wanted).norm() / wanted.norm() < 2e-3


def test_shifts_once() -> None:
    """causal_lm_loss predicts the next label; shift_labels are taken as they are."""
    hidden, weight, labels = problem()
    rows, targets = hidden.view(4, 10, 32), labels.view(4, 10)
    wanted = torch.nn.functional.cross_entropy(
        (rows[:, :-1] @ weight.t()).flatten(0, 1), targets[:, 1:].flatten()
    )
    torch.testing.assert_close(causal_lm_loss(rows, weight, targets), wanted)
    shifted = torch.nn.functional.pad(targets, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(causal_lm_loss(rows, weight, None, shift_labels=shifted), wanted)


def test_autocast_and_items_tensor() -> None:
    """Autocast casts both operands; the divisor may be an integer tensor."""
    hidden, weight, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, num_items_in_batch=torch.tensor(80))
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) / 2, hidden)
    assert grad.dtype == torch.float32
    assert (grad - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (3, 3), (64, 5), (130, 7)])
def test_weight_gradient_narrows_in_place(shape: tuple[int, int]) -> None:
    """The 16-bit gradient that shares storage with its fp32 sums is their rounding."""
    vocabulary, dim = shape
    gradient = WeightGradient(torch.empty(vocabulary, dim, dtype=torch.bfloat16))
    total = torch.zeros(vocabulary, dim)
    for i in range(3):
        logits, hidden = torch.randn(7, vocabulary).bfloat16(), torch.randn(7, dim).bfloat16()
        cut = vocabulary // 3
        gradient.add(0, logits[:, :cut], hidden, i == 0)
        gradient.add(cut, logits[:, cut:], hidden, i == 0)
        total += logits.float().t() @ hidden.float()
    got = gradient.result(torch.tensor(0.3), TorchRows())
    torch.testing.assert_close(got, (total * 0.3).bfloat16(), rtol=2**-7, atol=1e-6)
    assert got.untyped_storage().nbytes() == vocabulary * dim * 2


@pytest.mark.parametrize(
    ("vocabulary", "slices", "first", "later"),
    [
        (64, 8, 16, 8),  # halves of four slices as large as their sums, several later chunks
        (64, 8, 24, 6),  # larger ones: some lie in the arena
        (64, 8, 40, 0),
        (64, 2, 9, 4),  # smaller ones
        (68, 2, 12, 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gathered", [False, True])
def test_kept_tiles(
    vocabulary: int,
    slices: int,
    first: int,
    later: int,
    dtype: torch.dtype,
    gathered: bool,
    monkeypatch: Any,
) -> None:
    """Tiles in the storage of sums not yet written give the loss and gradients of full logits."""
    torch.manual_seed(5)
    tokens = first + 2 * later + later // 2
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[5:15] = vocabulary - 1  # a run longer than a block of rows
    if gathered:
        labels[::9] = -100
        first -= len(labels[::9]) if not later else 0
    room = Room.plan(weight, first, slices, dtype)
    assert room is not None
    monkeypatch.setattr(module, "kept_chunks", lambda *a: Kept(room, later))
    bias = torch.randn(vocabulary, dtype=dtype)
    bias[40:] += 50  # the reference moves after the first slices
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    for cap in (30.0, None):
        z = wide[0] @ wide[1].t() + bias.double()
        z = z if cap is None else cap * torch.tanh(z / cap)
        wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(z, labels), wide)
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=cap)
        got = torch.autograd.grad(loss, (hidden, weight))
        limit = 1e-12 if dtype == torch.float64 else 1e-2
        for g, w in zip(got, wanted, strict=True):
            assert (g.double() - w).norm() / w.norm() < limit, f"softcap {cap}"


@pytest.mark.parametrize("valid", [100, 4000, 8000])
@pytest.mark.parametrize(("dim", "vocabulary"), [(2816, 262144), (2048, 248320), (2304, 151669)])
def test_kept_chunks_fit(dim: int, vocabulary: int, valid: int) -> None:
    """Every tile fits the sums of the next slice, and the buffers fit the budget."""
    budget = 1100 << 20
    with torch.device("meta"):
        op = Operands(
            torch.empty(8192, dim, dtype=torch.bfloat16), torch.empty(valid, dtype=torch.int64),
            torch.empty(vocabulary, dim, dtype=torch.bfloat16), Form(vocabulary), TorchRows(),
            rows=torch.empty(valid, dtype=torch.int64), buffer_dtype=torch.bfloat16,
        )  # fmt: skip
        chunks = kept_chunks(op, budget)
        assert (chunks is None) == (vocabulary == 151669)  # its halves have no equal slices
        if chunks is None:
            return
    used = max(chunks.room.spare, chunks.later * vocabulary * 2) + chunks.room.tokens * dim * 6
    assert used <= budget, f"{chunks}: {used / 2**20:.0f} MiB"
    assert chunks.room.tokens + chunks.later >= valid


def test_tiles_keep_clear_of_sums() -> None:
    """Sums are written only over tiles that are spent, and tiles never overlap."""
    weight = torch.empty(960, 8, dtype=torch.bfloat16)
    for slices in (2, 4, 10, 12):
        for tokens in range(1, 60):
            room = Room.plan(weight, tokens, slices, torch.bfloat16)
            assert room is not None
            gradient = WeightGradient(weight, room.spare)
            tiles = gradient.first_tiles(room)
            for index, (_, x) in enumerate(tiles):
                x.fill_(index + 1)
            for index, (low, x) in enumerate(tiles):
                assert (x == index + 1).all(), f"{room}: tile {index} was overwritten"
                for start, piece in gradient.pieces:
                    if start <= low < start + piece.shape[0]:
                        piece[low - start : low - start + room.width] = -1.0
                assert (x == index + 1).all(), f"{room}: tile {index} lies under its own sums"


@pytest.mark.parametrize("mib", [32, 320, 640, 1100])
@pytest.mark.parametrize(("dim", "vocabulary"), [(2816, 262144), (2048, 248320), (4096, 32000)])
def test_tiles_fit_the_budget(mib: int, dim: int, vocabulary: int) -> None:
    """Tile, accumulator and gathered rows of real shapes stay within the budget."""
    with torch.device("meta"):
        op = Operands(
            torch.empty(8192, dim, dtype=torch.bfloat16), torch.empty(8000, dtype=torch.int64),
            torch.empty(vocabulary, dim, dtype=torch.bfloat16), Form(vocabulary), TorchRows(),
            rows=torch.empty(8000, dtype=torch.int64), buffer_dtype=torch.bfloat16,
        )  # fmt: skip
    for tiles in (sliced_tiles(op, mib << 20), whole_row_tiles(op, mib << 20)):
        used = tiles.tokens * (tiles.width * 2 + dim * 4 + dim * 2)
        assert used <= mib << 20, f"{tiles}: {used / 2**20:.1f} MiB"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"softcap": 0.0}, "softcap must be positive"),
    ({"logit_scale": -1.0}, "logit_scale must be positive"),
    ({"mode": "fast"}, "mode must be"),
    ({"reduction": "avg"}, "reduction must be"),
    ({"label_smoothing": 1.0}, "label_smoothing must be"),
    ({"reduction": "none", "num_items_in_batch": 3}, "contradicts"),
    ({"bias": torch.zeros(3)}, "bias must be"),
    ({"lora": (torch.zeros(2, 5), torch.zeros(500, 2), 1.0)}, "lora needs A"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    """One clear line."""
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match=message) as caught:
        linear_cross_entropy(hidden, weight, labels, **options)
    assert "\n" not in str(caught.value)


def test_bad_inputs() -> None:
    """Wrong shapes, dtypes, and Triton where there is none."""
    hidden, weight, labels = problem()
    for args, message in (
        ((hidden, weight[:, 1:], labels), "weight must be"),
        ((hidden, weight, labels[1:]), "40 hidden rows but 39 labels"),
        ((hidden, weight.double(), labels), "must share a floating dtype"),
        ((hidden, weight, labels.int()), "labels must be int64"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*args)


def test_second_backward_where_the_graph_is_kept_unknowably(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where torch cannot tell whether the graph is kept, the saved gradient is not overwritten."""
    hidden, weight, labels = problem()
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph", raising=False)
    assert graph.is_kept()
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, hidden, torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, hidden, torch.tensor(2.0))
    assert torch.equal(first[0], second[0])


def test_needs() -> None:
    """Which gradients sum over tokens."""
    assert not Needs(hidden=True, features=True).parameters
    assert Needs(low_rank=True).parameters and Needs(low_rank=True).any
