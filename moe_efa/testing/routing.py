"""Seeded routings: which experts the tokens of one rank select. Equal arguments give equal tensors on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """topk_idx [T, K] int64 in [-1, E) and topk_weights [T, K] fp32."""

    topk_idx: Tensor
    topk_weights: Tensor


def uniform(num_tokens: int, num_experts: int, top_k: int, *, seed: int, drop_fraction: float = 0.0) -> Routing:
    """Every token selects ``top_k`` different experts, all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return _finish(scores.topk(top_k, dim=1).indices, generator, drop_fraction)


def skewed(
    num_tokens: int, num_experts: int, top_k: int, *, seed: int, drop_fraction: float = 0.0, exponent: float = 1.2
) -> Routing:
    """Every token selects ``top_k`` different experts; expert e is drawn in proportion to ``(e + 1) ** -exponent``."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -exponent
    # Sampling without replacement by exponential races.
    races = torch.empty(num_tokens, num_experts, dtype=torch.float64).exponential_(generator=generator)
    return _finish((probabilities / races).topk(top_k, dim=1).indices, generator, drop_fraction)


def one_expert(
    num_tokens: int, num_experts: int, top_k: int, *, seed: int, drop_fraction: float = 0.0, expert_idx: int = 0
) -> Routing:
    """Every token selects one and the same expert, at a random top-k position, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    topk_idx = torch.full((num_tokens, top_k), -1, dtype=torch.int64)
    position = torch.randint(top_k, (num_tokens,), generator=generator)
    topk_idx[torch.arange(num_tokens), position] = expert_idx % num_experts
    return _finish(topk_idx, generator, drop_fraction)


def duplicates(num_tokens: int, num_experts: int, top_k: int, *, seed: int, drop_fraction: float = 0.0) -> Routing:
    """Selections are drawn independently from at most three experts, so most tokens select one more than once."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randperm(num_experts, generator=generator)[:3]
    topk_idx = pool[torch.randint(len(pool), (num_tokens, top_k), generator=generator)]
    return _finish(topk_idx, generator, drop_fraction)


def nothing(num_tokens: int, num_experts: int, top_k: int, *, seed: int, drop_fraction: float = 0.0) -> Routing:
    """No token selects anything; all weights are NaN, since nobody may read them."""
    del num_experts, seed, drop_fraction
    topk_idx = torch.full((num_tokens, top_k), -1, dtype=torch.int64)
    return Routing(topk_idx, torch.full((num_tokens, top_k), float("nan")))


PATTERNS: dict[str, Callable[..., Routing]] = {
    "uniform": uniform,
    "skewed": skewed,
    "one_expert": one_expert,
    "duplicates": duplicates,
    "nothing": nothing,
}


def uneven_token_counts(num_ranks: int, max_tokens: int, *, seed: int) -> list[int]:
    """Tokens per rank in [0, max_tokens]: one rank full, one (if there are two) empty, the others random."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(max_tokens + 1, (num_ranks,), generator=generator).tolist()
    order = torch.randperm(num_ranks, generator=generator).tolist()
    if num_ranks > 1:
        counts[order[1]] = 0
    counts[order[0]] = max_tokens
    return counts


def _finish(topk_idx: Tensor, generator: torch.Generator, drop_fraction: float) -> Routing:
    """Draw weights, replace a fraction of the selections by -1 and put NaN where nothing is selected."""
    topk_weights = torch.rand(topk_idx.shape, generator=generator) + 0.05
    dropped = torch.rand(topk_idx.shape, generator=generator) < drop_fraction
    topk_idx = topk_idx.masked_fill(dropped, -1)
    return Routing(topk_idx, topk_weights.masked_fill(topk_idx == -1, float("nan")))
