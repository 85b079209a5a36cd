"""The fast ways through a layer: recurrent rules, grouped products, attention by head width."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conformance.applied import experts_registry, places, put_back, put_in_place
from conformance.case import Case, Model
from conformance.check import check
from conformance.checks.probes import (
    Measured,
    documents_of,
    experts_of,
    unwrapped,
)
from conformance.fidelity import published_config, published_data
from conformance.numerics import assert_close, assert_differs, assert_same_dtype, relative_error
from conformance.oracles.attention import attention
from conformance.oracles.delta_rule import causal_convolution, gated_delta_rule
from conformance.subject import Subject
from conformance.tolerances import tolerance

FLASH_WIDTH = 256  # Dao-AILab/flash-attention#2427
RULE = re.compile(r"(chunk_)?gated_delta_rule$")
CONVOLUTION = re.compile(r"causal_conv1d(_fn)?$")


class Call(NamedTuple):
    """A call that a recurrent layer made."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Call]]:
    """The last call of the rule and of the convolution, as the model's own layers make them."""
    seen: dict[str, Call] = {}

    def recorder(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[kind] = Call(function, args, dict(kwargs))
            return function(*args, **kwargs)

        return call

    found = []
    for place in places(unwrapped(model)).values():
        for kind, pattern in (("rule", RULE), ("convolution", CONVOLUTION)):
            if pattern.search(str(place.name)) and "update" not in str(place.name):
                put_in_place(place, recorder(kind, place.function))
                found.append(place)
    try:
        yield seen
    finally:
        for place in found:
            put_back(place)


def evidence(act: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients, for one upstream gradient that is no multiple of another's."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    out = act(*leaves)
    up = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, up.to(out))]


def judge(
    case: Case, what: str, runs: Sequence[list[Tensor]], subject: Subject, m: Measured
) -> None:
    """got, eager and float64 evidence: the row of float32, or eager code of the same dtype."""
    names = ("value", *(f"gradient {i}" for i in range(len(runs[0]) - 1)))
    for name, got, eager, want in zip(names, *runs, strict=True):
        assert want.any(), f"{case.id}: {what}: the oracle's {name} is zero"
        if eager.dtype == torch.bfloat16:
            assert_same_dtype(case.id, f"{what} {name}", got, eager, want, m)
        else:
            row = tolerance("rule/float32", subject.numerics if case.model else ())
            assert_close(case.id, f"{what} {name}", got, want, row, m)


def by_oracle(act: Callable[..., Tensor], given: Sequence[Tensor]) -> list[list[Tensor]]:
    """The oracle's evidence in the dtype of the first that is given, and in float64."""
    return [evidence(act, [t.to(kind) for t in given]) for kind in (given[0].dtype, torch.float64)]


@check(
    "K03",
    needs=("prepare", "collate", "loss"),
    traits=("linear_attention",),
    settings=("-", "packed"),
    dealt=("bf16+packed",),
    marks=("packing",),
)
def test_recurrent_layers_run_the_rule(
    case: Case, subject: Subject, measured: Measured, unsupported: Any
) -> None:
    """The delta rule and the convolution that a recurrent layer calls are the recurrent formula's.

    https://github.com/huggingface/transformers/issues/44717 (on a GPU, what is installed)
    """
    model, batch = subject.model(), subject.batch()
    with recorded(model) as seen:
        subject.loss(model, batch)
    if set(seen) != {"rule", "convolution"}:
        unsupported(f"its recurrent layers call no function of a known name but {sorted(seen)}")
    documents = documents_of(batch)
    assert (max(map(max, documents)) > 0) == (case.setting.batch == "packed"), case.id
    function, args, kwargs = seen["rule"]
    names = [n for n in ("query", "key", "value", "g", "beta") if n in kwargs]
    given = [*args, *(kwargs.pop(n) for n in names)]
    unit = bool(kwargs.get("use_qk_l2norm_in_kernel"))
    measured["fla"] = float("fla" in str(getattr(function, "__module__", "")))

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return gated_delta_rule(q, k, v, g, beta, documents=documents, normalise=unit)[0]

    def theirs(*leaves: Tensor) -> Tensor:
        there = dict(zip(names, leaves[len(args) :], strict=True))
        found = function(*leaves[: len(args)], **there, **kwargs)
        value: Tensor = found[0] if isinstance(found, tuple) else found
        return value

    judge(case, "rule", [evidence(theirs, given), *by_oracle(rule, given)], subject, measured)
    call = seen["convolution"]
    judge_convolution(case, subject, call, documents, measured)


def judge_convolution(
    case: Case, subject: Subject, call: Call, documents: list[list[int]], measured: Measured
) -> None:
    """The recorded convolution against the oracle's, in x and in its weight."""
    function, args, kwargs = call
    silu = (args[3] if len(args) > 3 else kwargs.get("activation")) in ("silu", "swish")
    given = [t for t in args[:3] if torch.is_tensor(t)]

    def theirs(*leaves: Tensor) -> Tensor:
        found: Tensor = function(*leaves, *args[len(leaves) :], **kwargs)
        return found

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.transpose(1, 2)
        out = causal_convolution(rows, weight, bias, documents=documents, activate=silu)
        return out.transpose(1, 2)

    runs = [evidence(theirs, given), *by_oracle(convolve, given)]
    judge(case, "convolution", runs, subject, measured)


PACKAGES = {"fla": "fla.ops.gated_delta_rule", "causal_conv1d": "causal_conv1d"}


@check("K18", settings=("bf16",), hardware="gpu", per_model=False, marks=("kernels",))
def test_fast_packages_are_right(
    case: Case, subject: Subject, measured: Measured, unavailable: Any
) -> None:
    """fla's rule and causal_conv1d, where they are installed, are the recurrent formula's.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3468: one document, and two packed ones
    """
    there = [name for name in PACKAGES if find_spec(name) is not None]
    if not there:
        unavailable(f"neither {' nor '.join(PACKAGES)} is installed")
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(subject.device, torch.bfloat16)

    for length, start in ((96, 96), (131, 37)):  # one document; two, the second from `start` on
        ids = (torch.arange(length, device=subject.device) >= start).int()[None]
        documents = ids.tolist()
        if "fla" in there:
            given = [random(1, length, 2, 64) for _ in range(3)]
            decay = nn.functional.logsigmoid(random(1, length, 2).float())
            given += [decay, random(1, length, 2).sigmoid()]
            runs = [evidence(fla_rule(ids), given), *by_oracle(unit_rule(documents), given)]
            judge(case, f"fla {length}", runs, subject, measured)
        if "causal_conv1d" in there:
            given = [random(1, length, 32), random(32, 4)]
            runs = [evidence(packaged(ids), given), *by_oracle(silu_convolution(documents), given)]
            judge(case, f"causal_conv1d {length}", runs, subject, measured)


def fla_rule(ids: Tensor) -> Callable[..., Tensor]:
    """fla's packed rule on one row, its boundaries from document ids (1, S)."""
    rule = importlib.import_module(PACKAGES["fla"]).chunk_gated_delta_rule
    starts = [0, *(i for i in range(1, ids.shape[1]) if ids[0, i] != ids[0, i - 1]), ids.shape[1]]
    bounds = torch.tensor(starts, dtype=torch.int32, device=ids.device)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        options = {"cu_seqlens": bounds, "use_qk_l2norm_in_kernel": True}
        found: Tensor = rule(q, k, v, g=g, beta=beta, **options)[0]
        return found

    return run


def unit_rule(documents: list[list[int]]) -> Callable[..., Tensor]:
    """The oracle of the same."""
    return lambda *given: gated_delta_rule(*given, documents=documents)[0]


def packaged(ids: Tensor) -> Callable[..., Tensor]:
    """causal_conv1d on x (1, S, C), which it wants with channels last."""
    convolve = importlib.import_module(PACKAGES["causal_conv1d"]).causal_conv1d_fn
    return lambda x, weight: convolve(
        x.transpose(1, 2), weight, seq_idx=ids, activation="silu"
    ).transpose(1, 2)


def silu_convolution(documents: list[list[int]]) -> Callable[..., Tensor]:
    """The oracle of the same."""
    return lambda x, weight: causal_convolution(x, weight, documents=documents)


@check("K19", needs=("prepare",), traits=("moe",), settings=("-", "bf16"))
def test_second_backward_of_grouped_products(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """A second backward through the grouped experts gives the first one's gradients, all finite.

    https://github.com/pytorch/pytorch/issues/193633
    """
    module: Any = next(iter(experts_of(subject.model()).values()))
    count, width = module.gate_up_proj.shape[0], module.gate_up_proj.shape[2]
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(19, width, generator=draw).to(module.gate_up_proj).requires_grad_()
    at = torch.arange(19, device=hidden.device)
    index = torch.stack([at % (count - 1), (at * 3 + 1) % (count - 1)], 1)  # the last is empty
    weights = torch.rand(19, 2, generator=draw).to(hidden)
    given = (hidden, module.gate_up_proj, module.down_proj)
    for name in ("grouped_mm", "batched_mm"):
        out = experts_registry()[name](module, hidden, index, weights)
        up = torch.linspace(-1, 1, out.numel()).to(out).reshape(out.shape)
        first = torch.autograd.grad(out, given, up, retain_graph=True)
        second = torch.autograd.grad(out, given, up)
        limit = float(torch.finfo(out.dtype).eps)
        for part, one, two in zip(
            ("hidden", "gate_up_proj", "down_proj"), first, second, strict=True
        ):
            assert one.any(), f"{case.id}: {name}: the gradient of {part} is zero"
            finite = bool(torch.isfinite(one).all() and torch.isfinite(two).all())
            assert finite, f"{case.id}: {name}: the gradient of {part} is not finite"
            error = relative_error(two, one).frobenius
            measured[f"{name} {part}"] = error
            assert error <= limit, f"{case.id}: {name} {part}: {error:.3g}, tolerance {limit:.3g}"


def head_widths(model: Model) -> list[int]:
    """The widths of the decoder's heads, as the published config writes them down."""
    data = published_data(model)
    text = data.get("text_config", data)
    plain = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return list(dict.fromkeys([int(plain), int(text.get("global_head_dim") or plain)]))


@check("K04", needs=("plan",), settings=("bf16",), one_a_family=True)
def test_attention_fits_its_heads(
    case: Case, subject: Subject, measured: Measured, unsupported: Any
) -> None:
    """Heads wider than FlashAttention takes (256) are not planned for it; what is planned is right.

    https://github.com/Dao-AILab/flash-attention/issues/2427
    """
    config, setting = published_config(subject.model_spec), case.setting
    widths = head_widths(subject.model_spec)
    widest = measured["widest head"] = max(widths)
    assert widest >= 64, f"{case.id}: no published head is {widest} wide"
    chosen = subject.impl.plan(config, setting, "single").decisions.get("attn_implementation")
    planned = ["sdpa" if chosen is None else str(chosen.value)]
    try:
        wish = {"attn_implementation": "flash_attention_2"}
        plan = subject.impl.plan(config, setting, "single", **wish)
        if "attn_implementation" not in plan.decisions:
            unsupported("its plan says nothing of attention")
        value = plan.decisions["attn_implementation"].value
        said = value == "flash_attention_2" or any("attention" in text for text in plan.warnings)
        assert said, f"{case.id}: {value} was planned for flash_attention_2 without a word"
        planned.append(str(value))
    except subject.refusals:
        measured["declined"] = 1.0
    assert "flash_attention_2" not in planned or widest <= FLASH_WIDTH, (
        f"{case.id}: flash_attention_2 is planned for heads of {widest}, limit {FLASH_WIDTH}"
    )
    for name in dict.fromkeys(planned):
        if runs_here(name, subject.device):
            for width in widths:
                judge_attention(case, subject, name, width, measured)


def runs_here(name: str, device: str) -> bool:
    """Whether an attention implementation can run: flash on a GPU with its package."""
    if name.startswith("flash"):
        return device == "cuda" and find_spec("flash_attn") is not None
    return name in ("sdpa", "eager")


def judge_attention(
    case: Case, subject: Subject, name: str, width: int, measured: Measured
) -> None:
    """An implementation of transformers at a head width, causal, against the oracle in bfloat16."""
    modelling = importlib.import_module(subject.model_spec.modelling)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    draw = torch.Generator().manual_seed(width)
    shapes = [(1, heads, 11, width) for heads in (4, 2, 2)]
    given = [torch.randn(s, generator=draw).to(subject.device, torch.bfloat16) for s in shapes]
    module = nn.Module()
    config = SimpleNamespace(_attn_implementation=name, attention_dropout=0.0)
    vars(module).update(
        num_key_value_groups=2, is_causal=True, config=config, training=True, layer_idx=0
    )
    allowed = torch.ones(11, 11, dtype=torch.bool, device=subject.device).tril()
    floor = torch.finfo(torch.bfloat16).min
    mask = torch.zeros(1, 1, 11, 11, device=subject.device).masked_fill(~allowed, floor).bfloat16()
    forward = ALL_ATTENTION_FUNCTIONS.get(name) or modelling.eager_attention_forward

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given_mask = mask if name == "eager" else None
        out: Tensor = forward(module, q, k, v, given_mask, scaling=width**-0.5, dropout=0.0)[0]
        return out.transpose(1, 2)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, allowed[None], width**-0.5)

    runs = [evidence(theirs, given), *by_oracle(formula, given)]
    assert_differs(case.id, "future", runs[0][0][:, :, :1], runs[0][0][:, :, 1:2], {})
    judge(case, f"{name} at {width}", runs, subject, measured)
