"""The baselines bring what the reference brings: also to a rank that gets nothing, and from one that sends nothing."""

import pytest
import torch

from moe_efa import reference
from moe_efa.bench.inputs import Inputs
from moe_efa.bench.lean import LeanExchange, torch_all_to_all
from moe_efa.bench.torch_per_expert import TorchPerExpert
from moe_efa.testing import assert_bitwise, assert_within_ulps, spawn

NUM_RANKS, NUM_EXPERTS, HIDDEN, TOP_K = 3, 6, 20, 2
TOKENS = {
    "uniform": (9, 5, 7),
    "one rank takes all": (6, 6, 6),
    "a rank has no tokens": (4, 0, 8),
    "nobody has": (0, 0, 0),
}


def make(case, rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    tokens = TOKENS[case][rank]
    experts = 2 if case == "one rank takes all" else NUM_EXPERTS
    topk_idx = torch.rand(tokens, experts, generator=generator).topk(TOP_K, dim=1).indices
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return Inputs(x, topk_idx, torch.rand(tokens, TOP_K, generator=generator) + 0.05)


def exchanges_agree_with_the_reference(rank, group):
    compared = 0
    for make_exchange in (
        lambda: TorchPerExpert(NUM_RANKS, NUM_EXPERTS),
        lambda: LeanExchange(NUM_RANKS, NUM_EXPERTS, torch_all_to_all, reuse_results=False),
        lambda: LeanExchange(NUM_RANKS, NUM_EXPERTS, torch_all_to_all, reuse_results=True),
    ):
        exchange = make_exchange()  # one for all cases: its buffers are used again
        for dtype, fmt in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            for case in TOKENS:
                everyone = [make(case, r, dtype) for r in range(NUM_RANKS)]
                plan = reference.make_plan([inputs.topk_idx for inputs in everyone], num_experts=NUM_EXPERTS)
                wanted = reference.dispatch([i.x for i in everyone], [i.topk_weights for i in everyone], plan)
                sums = reference.combine(
                    [w.x for w in wanted], plan, weights=[w.weights for w in wanted], node_size=NUM_RANKS
                )
                for _ in range(2):
                    rows, handle = exchange.dispatch(everyone[rank])
                    assert_bitwise(rows, wanted[rank].x, f"{case}, rows")
                    out = exchange.combine(rows, handle)
                    assert_within_ulps(out, sums[rank], ulps=4, fmt=fmt, what=f"{case}, sums")
                    compared += 1
    return compared


@pytest.mark.timeout(120)
def test_exchanges_agree_with_the_reference():
    assert spawn(exchanges_agree_with_the_reference, NUM_RANKS) == [3 * 2 * len(TOKENS) * 2] * NUM_RANKS
