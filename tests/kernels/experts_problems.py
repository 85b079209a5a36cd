"""Problems for the experts layer, and a slot-by-slot float64 oracle that shares no code with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("hidden", "weights", "gate_up", "down", "up_a", "up_b", "down_a", "down_b")


@dataclass
class Case:
    """Sizes, ranks and a routing; the tensors follow from the seed."""

    tokens: int = 9
    top_k: int = 2
    experts: int = 4
    width: int = 32
    inner: int = 16
    rank_up: int = 4
    rank_down: int = 3
    routing: str = "any"  # any, sentinels, one, duplicates
    act: str = "silu"
    seed: int = 0
    scales: tuple[float, float] = (1.5, 0.75)
    tensors: dict[str, Tensor | None] = field(init=False)
    index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * std

        t, e, h, i = self.tokens, self.experts, self.width, self.inner
        self.tensors = {
            "hidden": normal(t, h),
            "weights": torch.rand(t, self.top_k, generator=generator, dtype=torch.float64) * 1.5,
            "gate_up": normal(e, 2 * i, h, std=h**-0.5),
            "down": normal(e, h, i, std=i**-0.5),
            "up_a": normal(self.rank_up * e, h, std=h**-0.5) if self.rank_up else None,
            "up_b": normal(2 * i, self.rank_up * e, std=0.3) if self.rank_up else None,
            "down_a": normal(self.rank_down * e, i, std=i**-0.5) if self.rank_down else None,
            "down_b": normal(h, self.rank_down * e, std=0.3) if self.rank_down else None,
        }
        high = e + 1 if self.routing == "sentinels" else e
        self.index = torch.randint(0, high, (t, self.top_k), generator=generator)
        if self.routing == "one":
            self.index[:] = e - 1
        if self.routing == "duplicates":
            self.index[:] = self.index[:, :1]

    def rounded(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Fresh leaves whose values ``dtype`` can hold."""
        return {
            name: None if t is None else t.to(dtype).clone().requires_grad_()
            for name, t in self.tensors.items()
        }

    def upstream(self, dtype: torch.dtype) -> Tensor:
        """The incoming gradient."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.tokens, self.width, generator=generator, dtype=torch.float64).to(
            dtype
        )


def oracle(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients in float64, from values rounded to ``dtype``, with W + s B A formed."""
    t = {
        name: None if x is None else x.detach().double().requires_grad_()
        for name, x in case.rounded(dtype).items()
    }
    experts, rows = case.experts, []
    up, down = t["gate_up"], t["down"]
    assert up is not None and down is not None and t["hidden"] is not None
    if t["up_a"] is not None and t["up_b"] is not None:
        a, b = t["up_a"].view(experts, -1, case.width), t["up_b"].view(2 * case.inner, -1, experts)
        up = up + case.scales[0] * torch.einsum("ore,eri->eoi", b, a)
    if t["down_a"] is not None and t["down_b"] is not None:
        a, b = t["down_a"].view(experts, -1, case.inner), t["down_b"].view(case.width, -1, experts)
        down = down + case.scales[1] * torch.einsum("ore,eri->eoi", b, a)
    for token in range(case.tokens):
        row = t["hidden"][token] * 0
        for slot in range(case.top_k):
            e = int(case.index[token, slot])
            if e == experts:
                continue
            gate, value = (up[e] @ t["hidden"][token]).chunk(2)
            act = F.silu(gate) if case.act == "silu" else F.gelu(gate, approximate="tanh")
            assert t["weights"] is not None
            row = row + t["weights"][token, slot] * (down[e] @ (act * value))
        rows.append(row)
    out = torch.stack(rows)
    leaves = {name: x for name, x in t.items() if x is not None}
    upstream = case.upstream(dtype).double()
    grads = torch.autograd.grad(out, list(leaves.values()), upstream, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
