"""Which experts the tokens of a rank select, seeded: equal arguments give equal selections in every process.

Popularity of experts is the same on all ranks; what single tokens select differs. All selections of a token differ and
none is -1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_efa.errors import ConfigError


@dataclass(frozen=True)
class RoutingConfig:
    """A routing with its parameters; those of others are ignored.

    Attributes:
        name: a key of :data:`ROUTINGS`.
        zipf_exponent: "zipf": the n-th most popular expert is drawn in proportion to ``n ** -zipf_exponent``.
        lognormal_sigma: "lognormal": an expert's share is ``exp(sigma * normal draw)``.
        topk_nodes: "node-limited": the most nodes that a token's experts may be on; None is half of the nodes.
    """

    name: str = "uniform"
    zipf_exponent: float = 1.0
    lognormal_sigma: float = 1.0
    topk_nodes: int | None = None

    def __post_init__(self) -> None:
        if self.name not in ROUTINGS:
            raise ConfigError(f"--routing {self.name!r} is unknown; use one of {', '.join(ROUTINGS)}")
        for option, value in (("zipf-exponent", self.zipf_exponent), ("lognormal-sigma", self.lognormal_sigma)):
            if not 0 <= value <= 20:
                raise ConfigError(f"--{option} must be between 0 and 20, not {value}")
        if self.topk_nodes is not None and self.topk_nodes < 1:
            raise ConfigError(f"--topk-nodes must be at least 1, not {self.topk_nodes}")

    def limit(self, num_nodes: int) -> int:
        """Nodes per token of a node-limited routing."""
        return min(num_nodes, self.topk_nodes or max(1, num_nodes // 2))

    def check(self, *, topk: int, experts: int, num_nodes: int) -> None:
        """Raise ConfigError if the nodes that a token may use have fewer than ``topk`` experts."""
        if self.name != "node-limited":
            return
        nodes = self.limit(num_nodes)
        if topk > nodes * (experts // num_nodes):
            raise ConfigError(
                f"--routing node-limited: {nodes} of {num_nodes} nodes have {nodes * (experts // num_nodes)} of the "
                f"{experts} experts, fewer than --topk {topk}: use more --topk-nodes or --experts"
            )

    def text(self, num_nodes: int) -> str:
        """For people."""
        return {
            "uniform": "uniform",
            "zipf": f"zipf, exponent {self.zipf_exponent:g}",
            "lognormal": f"lognormal, sigma {self.lognormal_sigma:g}",
            "node-limited": f"node-limited, {self.limit(num_nodes)} of {num_nodes} nodes per token",
        }[self.name]


def select(
    config: RoutingConfig, rank: int, *, tokens: int, topk: int, experts: int, num_nodes: int, seed: int
) -> Tensor:
    """The selections of a rank's tokens: [T, K] int64, the likeliest of a token first."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rank)
    scores = torch.rand(tokens, experts, generator=generator)
    everyone = torch.Generator().manual_seed(seed)
    return ROUTINGS[config.name](config, scores, topk, num_nodes, everyone)


def _uniform(config: RoutingConfig, scores: Tensor, topk: int, num_nodes: int, everyone: torch.Generator) -> Tensor:
    """All experts equally likely."""
    return scores.topk(topk, dim=1).indices


def _zipf(config: RoutingConfig, scores: Tensor, topk: int, num_nodes: int, everyone: torch.Generator) -> Tensor:
    """Shares n ** -exponent, dealt to the experts at random: the popular ones are not all on the first rank."""
    experts = scores.shape[1]
    place = torch.randperm(experts, generator=everyone).double() + 1
    return _draw(scores, -config.zipf_exponent * place.log(), topk)


def _lognormal(config: RoutingConfig, scores: Tensor, topk: int, num_nodes: int, everyone: torch.Generator) -> Tensor:
    """Shares exp(sigma * normal)."""
    normal = torch.randn(scores.shape[1], generator=everyone, dtype=torch.float64)
    return _draw(scores, config.lognormal_sigma * normal, topk)


def _node_limited(
    config: RoutingConfig, scores: Tensor, topk: int, num_nodes: int, everyone: torch.Generator
) -> Tensor:
    """All experts equally likely, but a token keeps those nodes alone whose best two experts score highest."""
    by_node = scores.view(len(scores), num_nodes, -1)
    node_scores = by_node.topk(min(2, by_node.shape[2]), dim=2).values.sum(2)
    kept = node_scores.topk(config.limit(num_nodes), dim=1).indices
    allowed = torch.zeros(len(scores), num_nodes, dtype=torch.bool).scatter_(1, kept, True)
    return by_node.masked_fill(~allowed[:, :, None], -1.0).flatten(1).topk(topk, dim=1).indices


def _draw(scores: Tensor, log_shares: Tensor, topk: int) -> Tensor:
    """Sampling in proportion to the shares, without replacement: the first of exponential races, in logarithms."""
    races = log_shares - (-scores.double().clamp(min=2.0**-25, max=1 - 2.0**-25).log()).log()
    return races.topk(topk, dim=1).indices


ROUTINGS: dict[str, Callable[[RoutingConfig, Tensor, int, int, torch.Generator], Tensor]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "lognormal": _lognormal,
    "node-limited": _node_limited,
}


@dataclass(frozen=True)
class Imbalance:
    """How uneven the rows of a round are: the most of one rank, and of one expert, over the mean."""

    ranks: float
    experts: float

    @staticmethod
    def of(selections: Sequence[Tensor], *, experts: int) -> Imbalance:
        """From the selections of all ranks.

        >>> Imbalance.of([torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0, 3], [0, 1]])], experts=4)
        Imbalance(ranks=1.5, experts=2.0)
        """
        per_expert = torch.cat([selection.flatten() for selection in selections]).bincount(minlength=experts).double()
        per_rank = per_expert.view(len(selections), -1).sum(1)
        return Imbalance(*(float(rows.max() / rows.mean()) for rows in (per_rank, per_expert)))
