"""ep.moe with experts as people write them."""

from __future__ import annotations

import pytest
import torch

import moe_efa
from moe_efa.testing.spawn import spawn


def skip_empty_experts(rank, group, experts_of_rank_0_only):
    """Experts that give a tensor without a graph where there are no rows."""
    with moe_efa.ExpertParallel(group, num_experts=4, hidden_size=6, top_k=1, max_tokens_per_rank=5) as ep:
        torch.manual_seed(rank)
        x = torch.randn(5, 6, requires_grad=True)
        weight = torch.full((6,), 3.0, requires_grad=True)

        def experts(rows, offsets):
            if len(rows) == 0:
                return torch.zeros_like(rows)
            return rows * weight

        idx = torch.zeros(5, 1, dtype=torch.int64) if experts_of_rank_0_only else torch.full((5, 1), rank)
        out = ep.moe(x, idx, torch.ones(5, 1), experts)
        out.sum().backward()
        return torch.equal(x.grad, torch.full((5, 6), 3.0)), weight.grad


@pytest.mark.parametrize("experts_of_rank_0_only", [True, False])
def test_backward_runs_on_ranks_whose_experts_saw_nothing(experts_of_rank_0_only):
    results = spawn(skip_empty_experts, 4, experts_of_rank_0_only)
    assert [right for right, _ in results] == [True] * 4
    assert [grad is not None for _, grad in results] == [True] + [not experts_of_rank_0_only] * 3
