"""Rounds in waves, and calls in two halves: the bits of the unoverlapped path, its errors, and that something overlaps."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moe_efa
from moe_efa import ExpertParallel, TransportError, overlap
from moe_efa.testing import assert_bitwise, spawn
from moe_efa.testing.routing import uneven_token_counts

HIDDEN_SIZE, EXPERTS_PER_RANK, TOP_K = 40, 3, 2
WAVES = (2, 3, 7, 40)
_seeds = itertools.count(1)


@dataclass(frozen=True)
class Setting:
    num_ranks: int
    node_size: int
    transport: str = "auto"
    reorder: bool = False

    @property
    def id(self) -> str:
        joined = "" if self.node_size == self.num_ranks else f"-{self.transport}"
        return f"ep{self.num_ranks}-node{self.node_size}{joined}{'-reordered' if self.reorder else ''}"

    def open(self, group: dist.ProcessGroup | None, **changes: Any) -> ExpertParallel:
        options: dict[str, Any] = {
            "num_experts": EXPERTS_PER_RANK * self.num_ranks,
            "hidden_size": HIDDEN_SIZE,
            "top_k": TOP_K,
            "max_tokens_per_rank": 32,
            "node_size": self.node_size,
            "transport": self.transport,
            "provider": "tcp" if self.transport == "libfabric" else None,
            "timeout_s": 30.0,
            "memory_budget_bytes": 64 << 20,
        }
        with pytest.MonkeyPatch.context() as patch:
            if self.reorder:
                patch.setenv("MOE_EFA_REORDER", str(next(_seeds)))
            return ExpertParallel(group, **{**options, **changes})


SETTINGS = (
    Setting(2, 2),
    Setting(4, 2, "shm"),
    Setting(4, 2, "shm", reorder=True),
    Setting(2, 1, "libfabric"),
    Setting(2, 1, "libfabric", reorder=True),
)


def routing(pattern: str, num_tokens: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    idx = torch.randint(0, num_experts, (num_tokens, TOP_K), generator=generator)
    if pattern == "one expert takes all":
        idx.fill_(num_experts - 1)
    elif pattern == "nothing selected":
        idx.fill_(-1)
    elif pattern == "some selected":
        idx[torch.rand(num_tokens, TOP_K, generator=generator) < 0.4] = -1
    return idx


# (pattern, tokens per rank or "uneven" or "none on the last rank", dtype, expert_alignment, weighted weights need grad)
CASES = (
    ("uniform", "even", torch.float32, 1),
    ("uniform", "uneven", torch.bfloat16, 8),
    ("some selected", "none on the last rank", torch.float32, 1),
    ("one expert takes all", "uneven", torch.float32, 4),
    ("nothing selected", "even", torch.float32, 1),
    ("uniform", "none", torch.bfloat16, 1),
)


def num_tokens_of(tokens: str, rank: int, num_ranks: int) -> int:
    if tokens == "uneven":
        return uneven_token_counts(num_ranks, 29, seed=3)[rank]
    if tokens == "none" or (tokens == "none on the last rank" and rank == num_ranks - 1):
        return 0
    return 23


def gradients_of(ep: ExpertParallel, case: tuple[Any, ...], waves: int | None) -> dict[str, torch.Tensor]:
    """One step with experts that scale and shift every element of a row, so that every row is computed by itself."""
    pattern, tokens, dtype, alignment = case
    generator = torch.Generator().manual_seed(7 + ep.rank)
    num_tokens = num_tokens_of(tokens, ep.rank, ep.num_ranks)
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype).requires_grad_()
    idx = routing(pattern, num_tokens, ep.config.num_experts, generator)
    topk_weights = torch.rand(num_tokens, TOP_K, generator=generator).requires_grad_()
    scale = torch.randn(EXPERTS_PER_RANK, HIDDEN_SIZE, generator=generator).requires_grad_()
    called: list[int] = []
    magnitudes = torch.zeros_like(scale, requires_grad=False)  # of what is added up for the gradient of scale

    def add_magnitudes(terms: torch.Tensor, expert_of_row: torch.Tensor) -> None:
        magnitudes.index_add_(0, expert_of_row, terms.abs())

    def experts(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        called.append(len(rows))
        if len(rows) == 0 and len(called) % 2:
            return torch.zeros_like(rows)  # without a graph
        expert_of_row = torch.repeat_interleave(torch.arange(EXPERTS_PER_RANK), offsets.diff().long())
        scales = scale[expert_of_row]
        scales.register_hook(lambda terms: add_magnitudes(terms, expert_of_row))
        return (rows.float() * scales).tanh().to(rows.dtype)

    out = ep.moe(x, idx, topk_weights, experts, expert_alignment=alignment, waves=waves)
    grad_out = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    out.backward(grad_out.to(dtype))
    assert len(called) == (waves or 1)
    assert x.grad is not None
    assert topk_weights.grad is not None
    gradient = torch.zeros_like(scale) if scale.grad is None else scale.grad
    return {
        "out": out.detach(),
        "x": x.grad,
        "topk_weights": topk_weights.grad,
        "scale": gradient,
        "magnitudes": magnitudes,
        "rows": torch.tensor(sum(called)),
    }


def compare_waves(rank: int, group: dist.ProcessGroup, setting: Setting) -> dict[str, str]:
    """What is wrong, by case and waves; empty if nothing is."""
    wrong = {}
    with setting.open(group) as ep:
        for case in CASES:
            expected = gradients_of(ep, case, 1)
            for waves in WAVES:
                found = gradients_of(ep, case, waves)
                for name in ("out", "x", "topk_weights"):
                    try:
                        assert_bitwise(found[name], expected[name])
                    except AssertionError as error:
                        wrong[f"{case[:2]} waves {waves} {name}"] = str(error)
                # The same terms in another order: an fp32 sum of n terms is within n 2^-24 of the sum of their
                # magnitudes, to first order, and so is the other one. Padding and zeros add nothing.
                bound = 2 * 1.01 * int(found["rows"]) * 2.0**-24 * expected["magnitudes"]
                if not bool(((found["scale"] - expected["scale"]).abs() <= bound).all()):
                    wrong[f"{case[:2]} waves {waves} scale"] = "beyond the bound"
        stats = ep.stats()
        rounds = 2 * len(CASES) * (1 + sum(WAVES))  # a wave is a round; the dispatch's backward is a combine
        if stats["rounds"] != rounds or stats["dispatch"]["calls"] != rounds:
            wrong["stats"] = f"{stats} where {rounds} rounds were made"
    return wrong


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.id)
def test_waves_give_the_bits_of_one_wave(setting):
    assert spawn(compare_waves, setting.num_ranks, setting) == [{}] * setting.num_ranks
