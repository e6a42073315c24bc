"""Several rails per rank: the same bits as with one, an even spread, and a failing rail that is named on every rank.

Endpoints of tcp on one interface, and inboxes in shared memory, stand for NICs. One set of processes runs all cases
that should work; a test looks up its own outcome.
"""

from __future__ import annotations

import functools
import itertools
import traceback
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_efa
from moe_efa import ExpertParallel, reference, rendezvous
from moe_efa.plan import plan_memory
from moe_efa.testing import assert_bitwise, spawn
from moe_efa.testing.outcomes import run_ranks
from moe_efa.testing.routing import PATTERNS, uneven_token_counts

NUM_RANKS, NODE_SIZE = 4, 2
NUM_EXPERTS, TOP_K, HIDDEN_SIZE, MAX_TOKENS = 8, 4, 264, 150
DTYPE = torch.bfloat16
# (pattern, most tokens of a rank, do ranks differ in it): the last chunk of 150 tokens is a partial one.
ROUNDS = (
    ("uniform", 150, False),
    ("skewed", 37, True),
    ("one_expert", 64, False),
    ("nothing", 24, False),
    ("uniform", 0, False),
)
LAYOUTS = ("shm", "libfabric")


@dataclass(frozen=True)
class Rails:
    """Rails of every rank, and whether they deliver as badly as SRD may."""

    transport: str
    num_nics: int
    reorder: str = ""

    @property
    def id(self) -> str:
        return f"{self.transport}-{self.num_nics}-nics" + ("-reordered" if self.reorder else "")

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "num_experts": NUM_EXPERTS,
            "hidden_size": HIDDEN_SIZE,
            "top_k": TOP_K,
            "max_tokens_per_rank": MAX_TOKENS,
            "node_size": NODE_SIZE,
            "transport": self.transport,
            "provider": "tcp" if self.transport == "libfabric" else None,
            "num_nics": self.num_nics,
            "timeout_s": 20.0,
            "heartbeat_timeout_s": 20.0,
            "memory_budget_bytes": 16 << 20,
            "chunk_rows": 8,
            **changes,
        }

    def open(self, group: dist.ProcessGroup, **changes: Any) -> ExpertParallel:
        with pytest.MonkeyPatch.context() as patch:
            if self.reorder:
                patch.setenv("MOE_EFA_REORDER", self.reorder)
            return ExpertParallel(group, **self.config(**changes))


CASES = [
    Rails(transport, num_nics, reorder)
    for transport, num_nics, reorder in itertools.product(LAYOUTS, (1, 2, 4), ("", "11"))
]


def inputs(pattern: str, tokens: int, uneven: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """x, topk_idx and topk_weights of all ranks."""
    counts = uneven_token_counts(NUM_RANKS, tokens, seed=3) if uneven else [tokens] * NUM_RANKS
    generator = torch.Generator().manual_seed(tokens)
    x = [torch.randn(count, HIDDEN_SIZE, generator=generator).to(DTYPE) for count in counts]
    routings = [PATTERNS[pattern](count, NUM_EXPERTS, TOP_K, seed=rank) for rank, count in enumerate(counts)]
    return x, [routing.topk_idx for routing in routings], [routing.topk_weights for routing in routings]


@functools.cache
def expected(pattern: str, tokens: int, uneven: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Dispatched rows and results of all ranks, by the oracle."""
    x, topk_idx, topk_weights = inputs(pattern, tokens, uneven)
    plan = reference.make_plan(topk_idx, num_experts=NUM_EXPERTS)
    received = reference.dispatch(x, topk_weights, plan)
    out = reference.combine([d.x for d in received], plan, weights=[d.weights for d in received], node_size=NODE_SIZE)
    return [d.x for d in received], out


def check_rounds(ep: ExpertParallel) -> None:
    for round_ in ROUNDS:
        x, topk_idx, topk_weights = (tensors[ep.rank] for tensors in inputs(*round_))
        rows, out = (tensors[ep.rank] for tensors in expected(*round_))
        received = ep.dispatch(x, topk_idx, topk_weights)
        assert_bitwise(received.x, rows, f"dispatched rows of {round_}")
        assert_bitwise(ep.combine(received.x, received.handle), out, f"results of {round_}")


def run_case(group: dist.ProcessGroup, case: Rails) -> dict[str, Any]:
    with case.open(group) as ep:
        names = ep.info()["nics"]
        greeted = ep.stats()["nics"]
        check_rounds(ep)
        check_rounds(ep)
        return {"names": names, "greeted": greeted, "stats": ep.stats()}


def run_cases(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    outcomes: dict[str, Any] = {}
    for case in CASES:
        try:
            outcomes[case.id] = run_case(group, case)
        except Exception:
            outcomes[case.id] = traceback.format_exc()
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    return spawn(run_cases, NUM_RANKS, timeout=300)


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Rails:
    return request.param


def of_all_ranks(outcomes: list[dict[str, Any]], case: Rails) -> list[dict[str, Any]]:
    found = [outcome[case.id] for outcome in outcomes]
    for facts in found:
        assert isinstance(facts, dict), facts
    return found


def test_every_number_of_rails_gives_the_bits_of_the_oracle(outcomes: list[dict[str, Any]], case: Rails) -> None:
    of_all_ranks(outcomes, case)  # a difference was raised on the rank


def test_descriptions_name_the_nic(outcomes: list[dict[str, Any]], case: Rails) -> None:
    for facts in of_all_ranks(outcomes, case):
        assert len(facts["names"]) == case.num_nics
        for index, name in enumerate(facts["names"]):
            assert name.startswith("reordered (seed 11) ") == bool(case.reorder), name
            suffix = f" (NIC {index + 1} of {case.num_nics})" if case.num_nics > 1 else ""
            assert name.endswith(suffix), name
            assert ("NIC" in name) == (case.num_nics > 1), name


def test_every_nic_has_met_its_peer_before_the_first_call(outcomes: list[dict[str, Any]], case: Rails) -> None:
    for facts in of_all_ranks(outcomes, case):
        assert [nic["writes"] for nic in facts["greeted"]] == [1] * case.num_nics  # one rail peer
        assert sum(nic["bytes"] for nic in facts["greeted"]) == 0


def test_bytes_are_spread_evenly_over_the_nics(outcomes: list[dict[str, Any]], case: Rails) -> None:
    sizes = plan_memory(NUM_RANKS, moe_efa.ExpertParallelConfig(**case.config()))
    slot = max(sizes.dispatch_slot_bytes, sizes.combine_slot_bytes)
    for facts in of_all_ranks(outcomes, case):
        nics, stats = facts["stats"]["nics"], facts["stats"]
        spent = [nic["bytes"] for nic in nics]
        assert len(spent) == case.num_nics
        assert sum(spent) == stats["wire_bytes"]
        assert sum(nic["writes"] for nic in nics) == stats["writes"]
        if case.reorder:  # rails refuse writes for a while, and the others take them
            assert min(spent) > sum(spent) / case.num_nics / 3
        else:
            # A NIC that is slower for a while may fall behind by a chunk more than it has in flight, and catches up.
            assert max(spent) - min(spent) <= 2 * slot


# What goes wrong


def lose_a_nic(rank: int, group: dist.ProcessGroup, transport: str, writes: int) -> str:
    """NIC 2 of 2 does not reach node 1 any more, from either rank of node 0; NIC 1 does."""
    try:
        with Rails(transport, 2, f"5,drop=1@{writes},nic=1").open(group) as ep:
            for _ in range(1000):
                check_rounds(ep)
    except moe_efa.TransportError as error:
        assert error.rank in (2, 3), error
        with pytest.raises((moe_efa.TransportError, moe_efa.ClosedError)):
            check_rounds(ep)
        return str(error)
    return "no error"


@pytest.mark.parametrize("transport", LAYOUTS)
def test_a_failing_rail_is_an_error_that_names_nic_and_peer_on_every_rank(transport: str) -> None:
    for rank, outcome in enumerate(run_ranks(lose_a_nic, NUM_RANKS, transport, 20)):
        assert outcome.error is None, outcome.error
        assert "(NIC 2 of 2)" in outcome.result, (rank, outcome.result)
        assert "(status 13)" in outcome.result, (rank, outcome.result)
        assert "peer rank 2" in outcome.result or "peer rank 3" in outcome.result, (rank, outcome.result)


def disagree(rank: int, group: dist.ProcessGroup) -> list[str]:
    """num_nics differs in the configuration, then in what was found on the hosts."""
    texts = []
    with pytest.raises(moe_efa.ConfigError) as refused:
        Rails("shm", 2 if rank == 3 else 1).open(group)
    texts.append(str(refused.value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendezvous, "_nics", lambda *_: {"num_nics": 2 if rank >= NODE_SIZE else 1})
        with pytest.raises(moe_efa.ConfigError) as refused:
            Rails("shm", 1).open(group)
    texts.append(str(refused.value))
    return texts


def test_unequal_numbers_of_nics_are_refused_and_both_ranks_named() -> None:
    for rank, (configured, found) in enumerate(spawn(disagree, NUM_RANKS)):
        assert "differ in num_nics: 1 on rank 0, 2 on rank 3" in configured
        other, own = (2, 1) if rank < NODE_SIZE else (0, 2)
        assert f"rank {rank} has {own} NICs, rank {other} has {3 - own}: all ranks need the same number" in found
