"""The tokens of a rank: the same for moe_efa and for every baseline, in whatever process it runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_efa.bench.options import DTYPES, BenchConfig
from moe_efa.bench.routing import select


class Inputs(NamedTuple):
    """One rank's tokens: x [T, H], topk_idx [T, K] without -1 and without equal ids in a row, topk_weights [T, K]."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor

    def to(self, device: torch.device) -> Inputs:
        """The same there."""
        return Inputs(*(tensor.to(device) for tensor in self))


def make_inputs(config: BenchConfig, rank: int, *, node_size: int) -> Inputs:
    """Seeded tokens of a rank; ``node_size`` is that of the group, which the configuration may leave open."""
    topk_idx = select(
        config.routing,
        rank,
        tokens=config.tokens,
        topk=config.topk,
        experts=config.experts,
        num_nodes=config.ranks // node_size,
        seed=config.seed,
    )
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + rank + 500_009)
    x = torch.empty(config.tokens, config.hidden, dtype=DTYPES[config.dtype]).normal_(generator=generator)
    return Inputs(x, topk_idx, torch.rand(config.tokens, config.topk, generator=generator) + 0.05)
