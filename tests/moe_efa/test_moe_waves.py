"""ExpertParallel.moe_waves on one rank: bad arguments and results are named. Between ranks: tests/integration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_efa import ExpertParallel


def test_bad_waves_and_results_are_refused() -> None:
    x, topk_idx, topk_weights = torch.ones(6, 16), torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2)
    with ExpertParallel(None, num_experts=4, hidden_size=16, top_k=2, max_tokens_per_rank=64) as ep:
        waves: Any
        for waves in (0, -1, True, 2.0, None):
            with pytest.raises(ValueError, match="waves must be a positive integer, not"):
                ep.moe_waves(x, topk_idx, topk_weights, lambda d: d.x, waves=waves)
        with pytest.raises(ValueError, match="waves=65 is more than 64"):
            ep.moe(x, topk_idx, topk_weights, lambda rows, offsets: rows, waves=65)
        assert ep.stats()["dispatch"]["calls"] == 0
        nothing: Any = None
        with pytest.raises(ValueError, match="not NoneType"):
            ep.moe_waves(x, topk_idx, topk_weights, lambda d: nothing, waves=2)
        torch.testing.assert_close(ep.moe_waves(x, topk_idx, topk_weights, lambda d: d.x, waves=2), x * 2)
