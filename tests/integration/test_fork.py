"""Ranks that fork, as data loaders make them do: a child neither hides its parent's death nor touches its group."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

import moe_efa
from moe_efa.errors import ClosedError, PeerLostError
from moe_efa.testing.spawn import spawn

CHILD_LIVES_S = 12.0
SMALL = {"num_experts": 4, "hidden_size": 16, "top_k": 2, "max_tokens_per_rank": 8, "heartbeat_timeout_s": 60.0}


def round_of(ep):
    x = torch.randn(8, 16)
    idx = torch.arange(8)[:, None] % 4 + torch.tensor([[0, 1]])
    d = ep.dispatch(x, idx % 4, torch.ones(8, 2))
    return ep.combine(d.x, d.handle)


def die_with_a_child(rank, group, transport):
    ep = moe_efa.ExpertParallel(group, node_size=2, transport=transport, **SMALL)
    round_of(ep)
    if rank == 1:
        if os.fork() == 0:
            time.sleep(CHILD_LIVES_S)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(PeerLostError) as error:
        for _ in range(3):
            round_of(ep)
    return time.monotonic() - start, error.value.rank


@pytest.mark.parametrize("transport", ["shm", "libfabric"])
def test_death_of_a_rank_with_a_child_is_noticed_before_the_child_ends(transport):
    results = spawn(die_with_a_child, 4, transport, may_die=[1])
    for rank in (0, 2, 3):
        waited, blamed = results[rank]
        assert blamed == 1
        assert waited < CHILD_LIVES_S / 2


def use_in_a_child(rank, group):
    ep = moe_efa.ExpertParallel(group, **SMALL)
    round_of(ep)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.raises(ClosedError, match="process"):
                round_of(ep)
            with pytest.raises(ClosedError, match="process"):
                ep.close()
            del ep
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    round_of(ep)  # the parent's group is as it was
    ep.close()
    return done == child and os.waitstatus_to_exitcode(status) == 0


def test_child_is_refused_and_the_parent_goes_on():
    assert spawn(use_in_a_child, 2) == [True, True]
