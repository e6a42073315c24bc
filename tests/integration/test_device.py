"""Ranks whose tensors are on a device: the real one where there is a GPU, otherwise one that host threads play (the
same runtime, kernels' bodies and plans, streams as threads). Results are compared bit by bit with those of the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_efa
from moe_efa import device as device_of
from moe_efa.errors import TransportError
from moe_efa.testing import device_rounds
from moe_efa.testing.device_ranks import DeviceRanks
from moe_efa.testing.device_rounds import CASES, Case
from moe_efa.testing.spawn import spawn

GPU = torch.cuda.is_available() and device_of.CUDA_LIBRARY.exists()
DEVICE = "cuda" if GPU else "cpu"
HEARTBEAT_S = 2.0


@functools.lru_cache
def on_cpu(case: Case) -> list[dict[str, Tensor]]:
    return spawn(device_rounds.run, case.num_ranks, dataclasses.replace(case, buffers="host"), "cpu")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_call_gives_the_bits_of_the_cpu(case: Case, ranks: DeviceRanks) -> None:
    found = ranks.spawn(device_rounds.run, case.num_ranks, case, DEVICE)
    device_rounds.assert_same(found, on_cpu(case), torch_sums_alike=not GPU)


def test_a_wrong_bit_is_seen() -> None:
    """The comparison can fail."""
    found = [{name: tensor.clone() for name, tensor in rank.items()} for rank in on_cpu(CASES[0])]
    device_rounds.assert_same(found, on_cpu(CASES[0]))
    found[0]["waves weights.grad"].view(-1).view(torch.int32)[0] ^= 1
    with pytest.raises(AssertionError, match=r"waves weights\.grad of rank 0"):
        device_rounds.assert_same(found, on_cpu(CASES[0]))


def what_runs_kernels(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> str:
    with case.open(group, device) as ep:
        assert ep.device.type == device
        return str(ep.info()["device"])


def test_the_group_says_what_runs_its_kernels(ranks: DeviceRanks) -> None:
    assert all(ranks.spawn(what_runs_kernels, 2, CASES[1], DEVICE))
    assert not any(spawn(what_runs_kernels, 2, dataclasses.replace(CASES[1], buffers="host"), "cpu"))


def send_a_wrong_id(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> str:
    with contextlib.suppress(TransportError), case.open(group, device) as ep:
        x, idx, weights = case.inputs(rank, ep)
        if rank == 0:
            idx[3, 1] = 99
        try:
            ep.dispatch(x, idx, weights)
        except TransportError as error:
            with pytest.raises(TransportError):
                ep.dispatch(x, idx.clamp(max=0), weights)
            return str(error)
    return "nothing"


def test_a_wrong_expert_id_is_an_error_on_all_ranks(ranks: DeviceRanks) -> None:
    first, *others = ranks.spawn(send_a_wrong_id, 4, CASES[4], DEVICE)
    assert "topk_idx[10] (of all slots) is 99, outside [-1, 8)" in first
    assert all("rank 0" in text for text in others)


@pytest.mark.waits
@pytest.mark.parametrize("in_call", [False, True], ids=["before", "during"])
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=lambda case: case.id)
def test_a_killed_rank_is_named_by_all_others(case: Case, in_call: bool, ranks: DeviceRanks) -> None:
    outcomes = ranks.spawn(device_rounds.lose_a_rank, case.num_ranks, case, DEVICE, HEARTBEAT_S, in_call, may_die=[1])
    for named, after_s in outcomes[:1] + outcomes[2:]:
        assert named == 1
        assert after_s < 5 * HEARTBEAT_S


def issue_different_calls(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> str:
    with contextlib.suppress(TransportError), case.open(group, device) as ep:
        x, idx, weights = case.inputs(rank, ep)
        d = ep.dispatch(x, idx, weights)
        try:
            if rank == 0:
                ep.combine(d.x, d.handle)
            else:
                ep.dispatch(x, idx, weights)
            ep.dispatch(x, idx, weights)
        except TransportError as error:
            return str(error)
    return "nothing"


def test_different_calls_are_an_error_on_all_ranks(ranks: DeviceRanks) -> None:
    texts = ranks.spawn(issue_different_calls, 2, CASES[1], DEVICE)
    assert all("different calls" in text for text in texts)


def train_a_layer(rank: int, group: dist.ProcessGroup, device: str) -> dict[str, Tensor]:
    sizes: dict[str, Any] = {"num_experts": 8, "hidden_size": 64, "top_k": 2, "max_tokens_per_rank": 32}
    layer = moe_efa.MoELayer(
        group, **sizes, intermediate_size=32, node_size=2, transport="shm", seed=1, waves=2, device=device
    )
    x = torch.randn(24 - rank, 64, generator=torch.Generator().manual_seed(rank)).to(device).requires_grad_()
    found = {}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        out = layer(x)
        out.square().sum().backward()
        optimizer.step()
        found[f"out {step}"] = out.detach().cpu()
    assert x.grad is not None
    found["x.grad"] = x.grad.cpu()
    layer.close()
    return found


def test_a_layer_trains_as_on_the_cpu(ranks: DeviceRanks) -> None:
    found = ranks.spawn(train_a_layer, 4, DEVICE)
    expected = spawn(train_a_layer, 4, "cpu")
    for here, there in zip(found, expected, strict=True):
        for name in there:
            # On a GPU other products are in between: the sums of a row of 64 differ by their order.
            torch.testing.assert_close(here[name], there[name], rtol=1e-4 if GPU else 0, atol=1e-4 if GPU else 0)
