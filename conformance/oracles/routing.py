"""Which experts a token goes to, and with which weights: softmax, sigmoid and grouped routers.

Rules from the routers' model cards and papers, tabled in `families.md` §6. Choosing is done by a
Python sort per token (the lower index wins a tie); weights stay differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One routing rule.

    score: "softmax" or "sigmoid" of the logits, or "softmax_of_chosen" (softmax after the choice).
    top_k: experts per token. normalise: divide the chosen weights by (their sum + sum_floor); where
    clamp_sum, by max(sum, sum_floor) instead. groups, groups_kept: experts compete inside the best
    `groups_kept` of `groups` groups, ranked by their `group_top` best scores ("max": group_top 1).
    scale: factor on the weights. bias: a correction is added for the choice only.
    """

    top_k: int
    score: str = "softmax"
    normalise: bool = True
    sum_floor: float = 0.0
    clamp_sum: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_top: int = 2
    scale: float = 1.0
    bias: bool = False


class Routing(NamedTuple):
    """scores (T, E), weights (T, k) and indices (T, k) int64, best expert first."""

    scores: Tensor
    weights: Tensor
    indices: Tensor


# Families whose published router always normalises (no switch in their config).
_ALWAYS = frozenset({"mixtral", "gemma4", "gemma4_text", "qwen3_5_moe", "qwen3_5_moe_text"})
_GROUPED_SIGMOID = frozenset(
    {"deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa"}
)


def rule_of(config: Any) -> Rule:
    """The routing rule of a model config, from the facts it states.

    config: any object with the text model's fields. Raises ValueError for an unknown router.
    """
    kind = str(config.model_type)
    top_k = _first(config, "top_k_experts", "num_experts_per_tok")
    if kind in _GROUPED_SIGMOID:
        return Rule(
            top_k,
            "sigmoid",
            normalise=bool(config.norm_topk_prob),
            sum_floor=1e-20,
            groups=int(config.n_group),
            groups_kept=int(config.topk_group),
            scale=float(config.routed_scaling_factor),
            bias=True,
        )
    if kind == "mistral4":
        return Rule(
            top_k,
            sum_floor=1e-20,
            groups=int(config.n_group),
            groups_kept=int(config.topk_group),
            scale=float(config.routed_scaling_factor),
        )
    if kind == "minimax_m2":
        return Rule(top_k, "sigmoid", bias=True)
    if kind == "ernie4_5_moe":
        return Rule(top_k, sum_floor=float(config.moe_norm_min), clamp_sum=True, bias=True)
    if kind == "deepseek_v2":
        grouped = config.topk_method != "greedy"
        return Rule(
            top_k,
            normalise=False,
            groups=int(config.n_group) if grouped else 1,
            groups_kept=int(config.topk_group) if grouped else 1,
            group_top=1,
            scale=float(config.routed_scaling_factor),
        )
    if kind == "hunyuan_v1_moe":
        return Rule(top_k, sum_floor=1e-20)
    if kind == "gpt_oss":
        return Rule(top_k, "softmax_of_chosen", normalise=False)
    if kind in _ALWAYS:
        return Rule(top_k)
    if hasattr(config, "norm_topk_prob"):
        return Rule(top_k, normalise=bool(config.norm_topk_prob))
    raise ValueError(f"routing: no rule is known for model type {kind!r}")


def route(logits: Tensor, rule: Rule, bias: Tensor | None = None) -> Routing:
    """Route tokens by their raw logits (T, E); `bias` (E) corrects the choice where the rule asks.

    In the dtype of `logits`. Raises ValueError when the rule needs a bias it was not given.
    """
    if rule.bias and bias is None:
        raise ValueError("routing: the rule corrects the choice with a bias, none was given")
    scores = _scores(logits, rule)
    rows, picks = [], []
    for token in range(logits.shape[0]):
        ranked = scores[token] + bias if rule.bias and bias is not None else scores[token]
        chosen = _choose(ranked.tolist(), rule)
        weight = torch.stack([scores[token, expert] for expert in chosen])
        if rule.score == "softmax_of_chosen":
            weight = _softmax(weight)
        if rule.normalise:
            total = weight.sum()
            floor = rule.sum_floor
            weight = weight / (total.clamp_min(floor) if rule.clamp_sum else total + floor)
        rows.append(weight * rule.scale)
        picks.append(chosen)
    indices = torch.tensor(picks, dtype=torch.int64, device=logits.device)
    return Routing(scores, torch.stack(rows), indices.reshape(len(picks), rule.top_k))


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Raw router logits (T, E) of hidden (T, H) and weight (E, H)."""
    return torch.einsum("th,eh->te", hidden, weight)


def gemma4_logits(hidden: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Logits of the Gemma 4 router: RMS norm without scale, times scale (H), times H^-0.5, project.

    hidden (T, H), weight (E, H). Source: the published Gemma 4 architecture, `families.md` §6.
    """
    size = hidden.shape[-1]
    rms = torch.sqrt((hidden * hidden).sum(-1, keepdim=True) / size + eps)
    return linear_logits(hidden / rms * scale / size**0.5, weight)


def scale_per_expert(routing: Routing, per_expert_scale: Tensor) -> Routing:
    """The routing with each weight multiplied by the scale (E) of its expert (Gemma 4)."""
    rows = [
        torch.stack([w * per_expert_scale[i] for w, i in zip(weights, indices, strict=True)])
        for weights, indices in zip(routing.weights, routing.indices.tolist(), strict=True)
    ]
    return routing._replace(weights=torch.stack(rows))


def _scores(logits: Tensor, rule: Rule) -> Tensor:
    if rule.score == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    return _softmax(logits) if rule.score == "softmax" else logits


def _softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.max(-1, keepdim=True).values)
    return powers / powers.sum(-1, keepdim=True)


def _choose(ranked: list[float], rule: Rule) -> list[int]:
    allowed = list(range(len(ranked)))
    if rule.groups > 1:
        size = len(ranked) // rule.groups
        strength = []
        for group in range(rule.groups):
            best = sorted(ranked[group * size : (group + 1) * size], reverse=True)
            strength.append(sum(best[: rule.group_top]))
        kept = sorted(range(rule.groups), key=lambda g: (-strength[g], g))[: rule.groups_kept]
        allowed = [expert for expert in allowed if expert // size in kept]
    return sorted(allowed, key=lambda expert: (-ranked[expert], expert))[: rule.top_k]


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError(f"routing: the config has none of {', '.join(names)}")
