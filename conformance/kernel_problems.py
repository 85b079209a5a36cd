"""Problems for the kernels: inputs, a float64 oracle, and eager code in the working dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conformance.oracles import cross_entropy as head_oracle
from conformance.oracles.experts import Lora, experts, gelu_tanh

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float64")}
ROUTINGS = ("even", "empty expert", "one token", "all on one", "duplicates", "sentinels")
SCALE, DOWN_SCALE = 0.7, 1.3


@dataclass(frozen=True)
class ExpertsProblem:
    """hidden (T, H), index (T, K), weights (T, K), gate_up (E, 2I, H), down (E, H, I); LoRA A
    expert-major and B rank-major (`kernels.md` §3); upstream (T, H) flows into the output."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    factors: tuple[Tensor, Tensor, Tensor, Tensor] | None
    scales: tuple[float, float]
    upstream: Tensor
    trained: bool = False

    def without_lora(self) -> ExpertsProblem:
        """The same layer without an adapter."""
        return replace(self, factors=None)

    def scaled(self, scale: float) -> ExpertsProblem:
        """The same layer with another scaling of both adapters."""
        return replace(self, scales=(scale, scale))

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh leaves that require gradients, cast to `dtype` if given."""
        named = {"hidden": self.hidden, "weights": self.weights}
        if self.trained:
            named |= {"gate_up": self.gate_up, "down": self.down}
        if self.factors is not None:
            named |= dict(zip(("a1", "b1", "a2", "b2"), self.factors, strict=True))
        return {
            name: (t if dtype is None else t.to(dtype)).detach().clone().requires_grad_()
            for name, t in named.items()
        }

    def run(self, function: Callable[..., Tensor], backwards: int = 1) -> dict[str, Tensor]:
        """Output and gradients of an implementation's `experts` (see the contract)."""
        leaves = self.leaves()
        lora = None
        if self.factors is not None:
            lora = {
                "gate_up": (leaves["a1"], leaves["b1"], self.scales[0]),
                "down": (leaves["a2"], leaves["b2"], self.scales[1]),
            }
        output = function(
            leaves["hidden"],
            self.index,
            leaves["weights"],
            leaves.get("gate_up", self.gate_up),
            leaves.get("down", self.down),
            act="gelu_tanh",
            lora=lora,
        )
        return _backward(output, leaves, self.upstream, backwards)

    def oracle(self) -> dict[str, Tensor]:
        """Output and gradients in float64, token by token."""
        return self._by_loop(torch.float64)

    def eager(self) -> dict[str, Tensor]:
        """The yardstick: an ordinary loop over experts in the working dtype, LoRA unfolded."""
        leaves = self.leaves()
        out = torch.zeros_like(leaves["hidden"])
        count = self.gate_up.shape[0]
        gate_up, down = leaves.get("gate_up", self.gate_up), leaves.get("down", self.down)
        for expert in range(count):
            tokens, slots = torch.where(self.index == expert)
            x = leaves["hidden"][tokens]
            both = self._project(x, gate_up[expert], leaves, "1", expert, self.scales[0])
            gate, up = both.chunk(2, -1)
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
            outer = self._project(inner, down[expert], leaves, "2", expert, self.scales[1])
            shares = leaves["weights"][tokens, slots, None].to(outer.dtype)
            out = out.index_add(0, tokens, outer * shares)
        return _backward(out, leaves, self.upstream, 1)

    def _project(
        self, x: Tensor, weight: Tensor, leaves: dict[str, Tensor], n: str, e: int, scale: float
    ) -> Tensor:
        result = x @ weight.T
        if self.factors is None:
            return result
        a, b, count = leaves[f"a{n}"], leaves[f"b{n}"], self.gate_up.shape[0]
        rank = a.shape[0] // count
        a_e, b_e = a.view(count, rank, -1)[e], b.view(-1, rank, count)[:, :, e]
        return result + scale * ((x @ a_e.T) @ b_e.T)

    def _by_loop(self, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = self.leaves(dtype)
        loras: list[Lora | None] = [None, None]
        if self.factors is not None:
            loras = [
                Lora(leaves["a1"], leaves["b1"], self.scales[0]),
                Lora(leaves["a2"], leaves["b2"], self.scales[1]),
            ]
        output = experts(
            leaves["hidden"],
            self.index,
            leaves["weights"],
            leaves.get("gate_up", self.gate_up.to(dtype)),
            leaves.get("down", self.down.to(dtype)),
            gelu_tanh,
            *loras,
        )
        return _backward(output, leaves, self.upstream.to(dtype), 1)


def _backward(
    output: Tensor, leaves: dict[str, Tensor], upstream: Tensor, backwards: int
) -> dict[str, Tensor]:
    """The output and each leaf's gradient from the last of `backwards` passes."""
    for index in range(backwards):
        for leaf in leaves.values():
            leaf.grad = None
        output.backward(upstream.to(output.dtype), retain_graph=index + 1 < backwards)  # type: ignore[no-untyped-call]
    found = {"output": output.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} got no gradient"
        found[name] = leaf.grad.detach().clone()
    return found


def experts_problem(
    routing: str,
    dtype: str,
    device: str = "cpu",
    tokens: int = 13,
    experts_count: int = 6,
    top_k: int = 2,
    rank: int = 3,
    seed: int = 0,
    trained: bool = False,
    widths: tuple[int, int] = (48, 40),
) -> ExpertsProblem:
    """A small layer with a routing by name: one of ROUTINGS, or `random`.

    widths: hidden and inner, distinct.
    """
    rng = torch.Generator().manual_seed(seed)
    hidden, inner = widths
    tokens = 1 if routing == "one token" else tokens
    index = _index(routing, tokens, experts_count, top_k, rng)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).to(
            device, DTYPES[dtype]
        )

    factors = (
        draw(rank * experts_count, hidden, scale=hidden**-0.5),
        draw(2 * inner, rank * experts_count, scale=0.3),
        draw(rank * experts_count, inner, scale=inner**-0.5),
        draw(hidden, rank * experts_count, scale=0.3),
    )
    return ExpertsProblem(
        hidden=draw(tokens, hidden),
        index=index.to(device),
        weights=(torch.rand(tokens, top_k, generator=rng, dtype=torch.float64) + 0.25).to(
            device, DTYPES[dtype]
        ),
        gate_up=draw(experts_count, 2 * inner, hidden, scale=hidden**-0.5),
        down=draw(experts_count, hidden, inner, scale=inner**-0.5),
        factors=factors,
        scales=(SCALE, DOWN_SCALE),
        upstream=draw(tokens, hidden),
        trained=trained,
    )


def _index(routing: str, tokens: int, count: int, top_k: int, rng: torch.Generator) -> Tensor:
    if routing == "all on one":
        return torch.full((tokens, top_k), count - 1)
    if routing == "duplicates":
        return (torch.arange(tokens) % count)[:, None].expand(tokens, top_k).contiguous()
    if routing == "even":
        return (torch.arange(tokens * top_k) % count).view(tokens, top_k)
    index = torch.randint(0, count, (tokens, top_k), generator=rng)
    if routing == "empty expert":
        index[index == 2] = 3
    if routing == "sentinels":
        index[:, 0] = count
    return index


@dataclass(frozen=True)
class HeadProblem:
    """hidden (N, D), weight (V, D), labels (N); upstream (N) only where nothing is reduced."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    num_items: float | None
    reduction: str
    upstream: Tensor

    def _leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight}
        if self.bias is not None:
            named["bias"] = self.bias
        return {n: t.detach().clone().requires_grad_() for n, t in named.items()}

    def run(self, function: Callable[..., Tensor], backwards: int = 1) -> dict[str, Tensor]:
        """Loss and gradients of an implementation's `linear_cross_entropy`."""
        leaves = self._leaves()
        loss = function(
            leaves["hidden"],
            leaves["weight"],
            self.labels,
            bias=leaves.get("bias"),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            num_items_in_batch=self.num_items,
            reduction=self.reduction,
        )
        return self._finish(loss, leaves, backwards)

    def eager(self) -> dict[str, Tensor]:
        """The yardstick: full logits in the working dtype, the loss from them in float32.

        In float64 over a shuffled vocabulary: the oracle has no more digits, and with sums in its
        order the yardstick would share its rounding (1.3e-16 seen where another order has 6e-16).
        """
        leaves, size = self._leaves(), self.weight.shape[0]
        order = torch.arange(size)
        if self.weight.dtype == torch.float64:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        order = order.to(self.weight.device)
        labels = self.labels.clone()
        labels[labels != -100] = torch.argsort(order)[labels[labels != -100]]
        logits = leaves["hidden"] @ leaves["weight"][order].T
        if "bias" in leaves:
            logits = logits + leaves["bias"][order]
        logits = logits * self.logit_scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
        if self.reduction == "none":
            return self._finish(losses, leaves, 1)
        count = self.num_items or int((self.labels != -100).sum())
        return self._finish(losses.sum() / count, leaves, 1)

    def oracle(self) -> dict[str, Tensor]:
        """Loss and gradients by formula in float64."""
        none = self.reduction == "none"
        found = head_oracle.linear_cross_entropy(
            self.hidden.cpu(),
            self.weight.cpu(),
            self.labels.cpu(),
            bias=None if self.bias is None else self.bias.cpu(),
            scale=self.logit_scale,
            softcap=self.softcap,
            num_items=self.num_items,
            upstream=self.upstream.cpu() if none else None,
        )
        value, per_token, hidden, weight, bias = found
        result = {"loss": per_token if none else value, "hidden": hidden, "weight": weight}
        if bias is not None:
            result["bias"] = bias
        return {name: tensor.to(self.hidden.device) for name, tensor in result.items()}

    def _finish(self, loss: Tensor, leaves: dict[str, Tensor], backwards: int) -> dict[str, Tensor]:
        upstream = self.upstream if self.reduction == "none" else torch.ones_like(loss)
        found = _backward(loss, leaves, upstream, backwards)
        found["loss"] = found.pop("output")
        return found


def head_problem(kind: str, dtype: str, device: str = "cpu") -> HeadProblem:
    """A classifier of 302 labels over 96 inputs (no tile multiple, wider than a tile's 64)."""
    rng = torch.Generator().manual_seed(len(kind))
    rows, width, vocabulary = 23, 96, 302
    if kind == "common direction":
        vocabulary = 6008  # a filter's usual threshold, 2^-12, lies below 1 / 302 (L17)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * scale

    hidden, weight = draw(rows, width), draw(vocabulary, width, scale=width**-0.5)
    labels = torch.randint(0, vocabulary, (rows,), generator=rng)
    options: dict[str, Any] = {"softcap": None, "logit_scale": 1.0, "num_items": None}
    bias = None
    if kind == "flat":
        weight *= 0.01
    elif kind == "common direction":
        weight = weight * 0.01 + draw(1, width, scale=0.2)
    elif kind == "peaked":
        hidden = hidden + 6 * weight[labels]
        options |= {"logit_scale": 0.5, "num_items": 31.0}
    elif kind == "saturated":
        hidden *= 20
        options["softcap"] = 5.0
    elif kind == "extreme":
        hidden *= 300
    elif kind == "bias":
        bias = draw(vocabulary, scale=2.0)
    elif kind == "ones":
        weight = torch.ones_like(weight)
        bias = draw(vocabulary)
    labels[::4] = -100
    if kind == "last label":
        labels[labels != -100] = vocabulary - 1
    if kind == "one token":
        labels[:-1] = -100
        labels[-1] = 7
    if kind == "no label":
        labels[:] = -100
    cast = {"device": device, "dtype": DTYPES[dtype]}
    return HeadProblem(
        hidden=hidden.to(**cast),
        weight=weight.to(**cast),
        labels=labels.to(device),
        bias=None if bias is None else bias.to(**cast),
        reduction="none" if kind == "unreduced" else "mean",
        upstream=torch.rand(rows, generator=rng, dtype=torch.float64).to(**cast),
        **options,
    )
