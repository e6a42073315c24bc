"""The shapes that are timed and checked, and routings for them. Real ones, and tiny ones for a dry run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_efa import routing


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer on one rank. `ranks` and `node_size` are of the group whose packing is timed."""

    model: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    topk: int
    groups: int = 1
    topk_groups: int = 1
    ranks: int = 64
    node_size: int = 8

    @property
    def name(self) -> str:
        """Short, for tables."""
        return f"{self.model}-t{self.tokens}"


DEEPSEEK_V3 = {"hidden": 7168, "intermediate": 2048, "experts": 256, "topk": 8, "groups": 8, "topk_groups": 4}
KIMI_K2 = {"hidden": 7168, "intermediate": 2048, "experts": 384, "topk": 8}
TOKENS = (128, 4096, 8192)
LARGE_TOKENS = 4096  # from here on the bars on fractions count
TINY = {"hidden": 256, "intermediate": 128, "experts": 8, "topk": 4, "ranks": 4, "node_size": 2}


def timed_shapes(*, dry_run: bool) -> list[Shape]:
    """Of the speed sections, the most important first: who runs out of time has those."""
    if dry_run:
        return [Shape(model="tiny", tokens=10, groups=2, topk_groups=1, **TINY)]
    deepseek = [Shape(model="deepseek-v3", tokens=tokens, **DEEPSEEK_V3) for tokens in TOKENS]
    kimi = [Shape(model="kimi-k2", tokens=tokens, **KIMI_K2) for tokens in TOKENS]
    return [deepseek[1], kimi[1], deepseek[0], kimi[0], deepseek[2], kimi[2]]


def logits_of(shape: Shape, *, seed: int = 0) -> Tensor:
    """[T, E] fp32 on the CPU, all different enough that no two experts tie."""
    return torch.randn(shape.tokens, shape.experts, generator=torch.Generator().manual_seed(seed))


def route(shape: Shape, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """topk_idx [T, K] int64 and topk_weights [T, K] fp32 on the CPU, as the model's router selects."""
    found = routing.sigmoid_group_topk(
        logits_of(shape, seed=seed),
        shape.topk,
        e_score_correction_bias=torch.zeros(shape.experts),
        n_group=shape.groups,
        topk_group=shape.topk_groups,
    )
    return found.topk_idx.contiguous(), found.topk_weights.contiguous()


def random_rows(rows: int, columns: int, *, seed: int = 0, device: str = "cpu") -> Tensor:
    """bf16, normal, with magnitudes that differ from row to row."""
    generator = torch.Generator(device=device).manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, device=device)
    exponents = torch.randint(-4, 5, (rows, 1), generator=generator, device=device)
    return (values * torch.exp2(exponents.float())).to(torch.bfloat16)
