"""Calls in a CUDA graph: captured once, replayed with other tokens and other routings. Where there is no GPU, a library
plays it and the graph (moe_efa/testing/graphs.py); replays are compared bit by bit with calls on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_efa
from moe_efa import device as device_of
from moe_efa.errors import TransportError
from moe_efa.handle import DispatchResult
from moe_efa.testing import device_rounds
from moe_efa.testing.device_ranks import DeviceRanks
from moe_efa.testing.device_rounds import CASES, Case
from moe_efa.testing.graphs import Graph
from moe_efa.testing.spawn import spawn

HEARTBEAT_S = 2.0
DEVICE = "cuda" if torch.cuda.is_available() and device_of.CUDA_LIBRARY.exists() else "cpu"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_replays_give_the_bits_of_calls_on_the_cpu(case: Case, ranks: DeviceRanks) -> None:
    found = ranks.spawn(device_rounds.replay, case.num_ranks, case, DEVICE, 4)
    expected = spawn(device_rounds.replay, case.num_ranks, dataclasses.replace(case, buffers="host"), "cpu", 4)
    device_rounds.assert_same(found, expected)


def test_replays_differ_as_their_inputs_do(ranks: DeviceRanks) -> None:
    """The comparison above has something to compare."""
    for found in ranks.spawn(device_rounds.replay, 2, CASES[1], DEVICE, 2):
        for name in ("rows", "weights", "counts", "offsets", "plain", "weighted", "grad", "again"):
            assert not torch.equal(found[f"0 {name}"], found[f"1 {name}"]), name


def capture_halves_of_a_round(
    ep: moe_efa.ExpertParallel, inputs: tuple[Tensor, ...], y: Tensor
) -> tuple[Graph, DispatchResult, Graph, Tensor]:
    """A graph of the dispatch, and one of the combine of y [capacity, H]: what is between can be anything."""
    first, second = Graph(), Graph()
    with first.capture():
        d = ep.dispatch(*inputs, capacity=len(y))
    with second.capture():
        out = ep.combine(y, d.handle)
    return first, d, second, out


def compute_between_graphs(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> bool:
    with case.open(group, device) as ep:
        inputs = case.inputs(rank, ep)
        y = torch.zeros(128, case.hidden_size, dtype=case.dtype, device=ep.device)
        first, d, second, out = capture_halves_of_a_round(ep, inputs, y)
        same = []
        for seed in range(4):
            fresh = case.inputs(rank, ep, seed=seed)
            for tensor, values in zip(inputs, fresh, strict=True):
                tensor.copy_(values)
            first.replay()
            ep.synchronize()
            y.copy_(d.x * 3)
            second.replay()
            ep.synchronize()
            called = ep.dispatch(*fresh)
            same.append(torch.equal(out, ep.combine(called.x * 3, called.handle)))
            same.append(torch.equal(out, ep.combine(y, d.handle)))  # the handle is that of the last replay
        return all(same)


def test_a_dispatch_and_its_combine_may_be_in_two_graphs(ranks: DeviceRanks) -> None:
    assert ranks.spawn(compute_between_graphs, 2, CASES[2], DEVICE) == [True, True]


def capture_what_cannot_be(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> None:
    with case.open(group, device) as ep:
        inputs = case.inputs(rank, ep)
        graph = Graph()
        with graph.capture():
            with pytest.raises(ValueError, match="needs a capacity, or a handle"):
                ep.dispatch(*inputs)
            with pytest.raises(RuntimeError, match="cannot be captured"):
                ep.dispatch_start(*inputs)
            with pytest.raises(RuntimeError, match="cannot be captured"):
                ep.moe(*inputs, lambda rows, _: rows, waves=2)
            with pytest.raises(RuntimeError, match="is being captured"):
                ep.synchronize()
            with pytest.raises(ValueError, match="x must be"):
                ep.dispatch(inputs[0][:, 1:].contiguous(), *inputs[1:], capacity=8)
        d = ep.dispatch(*inputs)
        with graph.capture():
            d = ep.dispatch(*inputs, capacity=64)
        with pytest.raises(ValueError, match="has not been replayed yet"):
            ep.combine(d.x, d.handle)
        with pytest.raises(ValueError, match="has not been replayed yet"):
            ep.dispatch(inputs[0], handle=d.handle)
        graph.replay()
        ep.combine(d.x, d.handle)
        weights = inputs[2].clone().requires_grad_()
        called = ep.dispatch(inputs[0], inputs[1], weights)  # its sizes are on the host, where no replay looks
        with graph.capture(), pytest.raises(ValueError, match="gradients of topk_weights only if"):
            torch.autograd.backward(ep.combine(called.x, called.handle).float().sum())


def test_what_cannot_be_captured_is_refused_and_poisons_nothing(ranks: DeviceRanks) -> None:
    ranks.spawn(capture_what_cannot_be, 2, CASES[1], DEVICE)


def replay_one_call(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> bool:
    with case.open(group, device) as ep:
        inputs = case.inputs(rank, ep)
        graph = Graph()
        with graph.capture():
            d = ep.dispatch(*inputs, capacity=128)
        for _ in range(60):
            graph.replay()
        ep.synchronize()
        return torch.equal(d.x, ep.dispatch(*inputs, capacity=128).x)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_graph_of_one_call_may_be_replayed_again_and_again(num_ranks: int, ranks: DeviceRanks) -> None:
    assert all(ranks.spawn(replay_one_call, num_ranks, dataclasses.replace(CASES[0], num_ranks=num_ranks), DEVICE))


def replay_for_longer_than_the_timeout(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> int:
    with case.open(group, device, timeout_s=2.0) as ep:
        inputs = case.inputs(rank, ep)
        y = torch.zeros(128, case.hidden_size, dtype=case.dtype, device=ep.device)
        first, _, second, _ = capture_halves_of_a_round(ep, inputs, y)
        begin, rounds = time.monotonic(), 0
        while time.monotonic() - begin < 1:  # to learn how fast this machine is
            first.replay()
            second.replay()
            ep.synchronize()
            rounds += 1
        limit = torch.tensor(rounds * 8)
        dist.all_reduce(limit, dist.ReduceOp.MAX, group)
        for _ in range(int(limit)):
            first.replay()
            second.replay()
        ep.synchronize()
        return int(ep.stats()["rounds"]) - rounds - int(limit)


@pytest.mark.waits
def test_replays_that_move_may_take_longer_than_the_timeout(ranks: DeviceRanks) -> None:
    assert ranks.spawn(replay_for_longer_than_the_timeout, 1, CASES[0], DEVICE) == [0]


def synchronize_for_long(ep: moe_efa.ExpertParallel) -> None:
    """An error of another rank may still be on its way."""
    for _ in range(100):
        ep.synchronize()
        time.sleep(0.1)


def replay_before_the_dispatch(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> str:
    with contextlib.suppress(TransportError), case.open(group, device) as ep:
        inputs = case.inputs(rank, ep)
        y = torch.zeros(128, case.hidden_size, dtype=case.dtype, device=ep.device)
        first, _, second, _ = capture_halves_of_a_round(ep, inputs, y)
        dist.barrier(group)  # capturing, too, would be refused once rank 0 has failed
        try:
            (second if rank == 0 else first).replay()
            synchronize_for_long(ep)
        except TransportError as error:
            return str(error)
    return "nothing"


def test_a_combine_replayed_before_its_dispatch_is_an_error_on_all_ranks(ranks: DeviceRanks) -> None:
    texts = ranks.spawn(replay_before_the_dispatch, 2, CASES[1], DEVICE)
    assert all("rank 0 replayed a combine before the graph with the dispatch of its handle" in text for text in texts)


def replay_a_wrong_id(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> str:
    with contextlib.suppress(TransportError), case.open(group, device) as ep:
        inputs = case.inputs(rank, ep)
        y = torch.zeros(128, case.hidden_size, dtype=case.dtype, device=ep.device)
        first, _, second, _ = capture_halves_of_a_round(ep, inputs, y)
        first.replay()
        second.replay()
        ep.synchronize()
        if rank == 0:
            inputs[1][3, 1] = 99
        try:
            first.replay()
            second.replay()
            synchronize_for_long(ep)
        except TransportError as error:
            first.replay()  # of no use, and no harm
            with pytest.raises(TransportError):
                ep.synchronize()
            return str(error)
    return "nothing"


def test_a_wrong_id_in_a_replay_is_an_error_on_all_ranks(ranks: DeviceRanks) -> None:
    first, *others = ranks.spawn(replay_a_wrong_id, 4, CASES[4], DEVICE)
    assert "topk_idx[10] (of all slots) is 99, outside [-1, 8)" in first
    assert all("rank 0" in text for text in others)


def replay_different_calls(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> str:
    with contextlib.suppress(TransportError), case.open(group, device) as ep:
        inputs = case.inputs(rank, ep)
        y = torch.zeros(128, case.hidden_size, dtype=case.dtype, device=ep.device)
        first, _, second, _ = capture_halves_of_a_round(ep, inputs, y)
        try:
            first.replay()
            (second if rank == 0 else first).replay()
            synchronize_for_long(ep)
        except TransportError as error:
            return str(error)
    return "nothing"


def test_replays_of_different_graphs_are_an_error_on_all_ranks(ranks: DeviceRanks) -> None:
    texts = ranks.spawn(replay_different_calls, 2, CASES[1], DEVICE)
    assert all("different calls" in text for text in texts)


def lose_a_rank(rank: int, group: dist.ProcessGroup, case: Case, device: str, idle: bool) -> tuple[int | None, float]:
    """With ``idle`` the loss is known before a replay, which nobody looks after but the group itself."""
    ep = case.open(group, device, heartbeat_timeout_s=HEARTBEAT_S)
    y = torch.zeros(128, case.hidden_size, dtype=case.dtype, device=ep.device)
    first, _, second, _ = capture_halves_of_a_round(ep, case.inputs(rank, ep), y)
    first.replay()
    ep.synchronize()
    dist.barrier(group)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    if idle:
        time.sleep(2 * HEARTBEAT_S)
        begin = time.monotonic()
        first.replay()
        second.replay()
        first.wait()  # as torch.cuda.synchronize(): no call of this library's
    try:
        while time.monotonic() - begin < 10 * HEARTBEAT_S:
            second.replay()
            first.replay()
            ep.synchronize()
    except moe_efa.PeerLostError as error:
        return error.rank, time.monotonic() - begin
    return None, time.monotonic() - begin


@pytest.mark.waits
@pytest.mark.parametrize("idle", [False, True], ids=["at-once", "after-a-while"])
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=lambda case: case.id)
def test_a_rank_killed_between_replays_is_named_by_all_others(case: Case, idle: bool, ranks: DeviceRanks) -> None:
    outcomes = ranks.spawn(lose_a_rank, case.num_ranks, case, DEVICE, idle, may_die=[1])
    for named, after_s in outcomes[:1] + outcomes[2:]:
        assert named == 1
        assert after_s < 5 * HEARTBEAT_S


def replay_after_close(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> None:
    ep = case.open(group, device)
    inputs = case.inputs(rank, ep)
    y = torch.zeros(128, case.hidden_size, dtype=case.dtype, device=ep.device)
    first, d, second, out = capture_halves_of_a_round(ep, inputs, y)
    first.replay()
    second.replay()
    ep.close()  # waits for both
    assert int(d.offsets[-1]) > 0
    assert not bool(out.any())
    first.replay()
    second.replay()
    with pytest.raises(moe_efa.ClosedError):
        ep.synchronize()


def test_a_replay_after_close_is_harmless(ranks: DeviceRanks) -> None:
    ranks.spawn(replay_after_close, 2, CASES[1], DEVICE)
