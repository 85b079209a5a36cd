"""How a training is spread over processes: one entry a strategy."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Strategy:
    """A parallel strategy: its id, the number of ranks, and the traits a model must have.

    `mesh` names the device-mesh dimensions and their sizes, outermost first.
    """

    name: str
    ranks: int
    mesh: tuple[tuple[str, int], ...] = ()
    traits: frozenset[str] = frozenset()
    claim: str = ""

    def applies_to(self, traits: frozenset[str]) -> bool:
        """Whether a model with these traits can be spread so."""
        return traits >= self.traits

    def on_one_rank(self) -> Strategy:
        """The same strategy with a mesh of ones."""
        return replace(self, ranks=1, mesh=tuple((name, 1) for name, _ in self.mesh))


_MOE = frozenset({"moe"})

STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy("single", 1, claim="one process; the oracle of every other strategy"),
        Strategy("ddp", 2, (("dp", 2),), claim="replicated, gradients averaged by token count"),
        Strategy("fsdp1", 2, (("dp", 2),), claim="flat parameters sharded per decoder layer"),
        Strategy("fsdp2", 2, (("dp", 2),), claim="each parameter sharded per decoder layer"),
        Strategy("hsdp", 4, (("replicate", 2), ("shard", 2)), claim="sharded, then replicated"),
        Strategy("tp", 2, (("tp", 2),), claim="the model's own tensor-parallel plan"),
        Strategy("tp_ep", 2, (("tp", 2),), _MOE, "tensor parallel, experts spread over it"),
        Strategy("fsdp2_ep", 2, (("dp", 2),), _MOE, "sharded, tokens sent to their experts"),
        Strategy("cp", 2, (("cp", 2),), claim="the sequence split, keys and values gathered"),
    )
}
SINGLE = STRATEGIES["single"]
