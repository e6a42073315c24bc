"""Ranks whose tensors are on a device: the real one where there is a GPU, otherwise one that host threads play (the
same runtime, kernels' bodies and plans, streams as threads). Results are compared bit by bit with those of the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_efa
from moe_efa import device as device_of
from moe_efa.dispatch_placement import DispatchPlacement
from moe_efa.errors import TransportError
from moe_efa.handle import PendingDispatch
from moe_efa.testing import device_rounds
from moe_efa.testing.compare import assert_bitwise
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


def flags_and_bits(
    rank: int, group: dist.ProcessGroup, case: Case, device: str, gdrcopy: list[str], fails: dict[int, str]
) -> tuple[str, int, dict[str, Tensor]]:
    """Where a rank's flags are, how many were stored through GDRCopy, and what its calls give."""
    os.environ["MOE_EFA_GDRCOPY"] = gdrcopy[rank]
    os.environ["GDR_STAND_IN_FAILS"] = fails.get(rank, "")
    with case.open(group, device) as ep:
        found = device_rounds.run(rank, group, case, device)  # in the same native group
        stores = ctypes.CDLL(gdrcopy[rank]).gdr_stand_in_stores() if os.path.exists(gdrcopy[rank]) else 0
        return str(ep.info()["flags"]), stores, found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("absent", "fails", "flags"),
    [
        ((), {}, ["device"] * 4),
        ((0,), {}, ["host", "host", "device", "device"]),
        ((), {2: "gdr_open", 1: "gdr_pin_buffer"}, ["host"] * 4),
    ],
    ids=["everywhere", "absent-on-a-rank", "of-no-use-on-a-rank-of-each-node"],
)
def test_flags_through_gdrcopy_give_the_bits_of_the_cpu(
    absent: tuple[int, ...], fails: dict[int, str], flags: list[str], ranks: DeviceRanks, gdrcopy_library: Path
) -> None:
    case = CASES[3]
    libraries = ["/nonexistent/libgdrapi.so" if rank in absent else str(gdrcopy_library) for rank in range(4)]
    found = ranks.spawn(flags_and_bits, case.num_ranks, case, DEVICE, libraries, fails)
    assert [where for where, _, _ in found] == flags
    for where, stores, _ in found:
        assert (stores > 50) == (where == "device")  # a round has some chunks, and slots that come back
    device_rounds.assert_same([tensors for _, _, tensors in found], on_cpu(case))


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


# What others need of a rank takes more than the slots that its first launch fills.
MANY_CHUNKS = Case(4, 2, "shm", num_tokens=40, chunk_rows=3, slots=2)
ROWS = {"fresh": "weighted rows", "capacity": "capacity 4096 rows", "replay": "weighted rows"}  # of device_rounds.run


def start(ep: moe_efa.ExpertParallel, case: Case, rank: int, kind: str) -> PendingDispatch:
    inputs = case.inputs(rank, ep)
    if kind == "replay":
        handle = ep.dispatch(*inputs, expert_alignment=case.alignment).handle
        return ep.dispatch_start(inputs[0], handle=handle)
    capacity = 4096 if kind == "capacity" else None
    return ep.dispatch_start(*inputs, expert_alignment=case.alignment, capacity=capacity)


def finish_when_the_others_have(rank: int, group: dist.ProcessGroup, case: Case, device: str, kind: str) -> Tensor:
    with case.open(group, device, timeout_s=20.0) as ep:
        pending = start(ep, case, rank, kind)
        if rank == 0:
            dist.barrier(group)  # in no call of ours
        rows = pending.finish().x.cpu()
        if rank > 0:
            dist.barrier(group)
    return rows


@pytest.mark.waits
@pytest.mark.parametrize("kind", ROWS)
def test_a_started_dispatch_needs_no_later_call(kind: str, ranks: DeviceRanks) -> None:
    found = ranks.spawn(finish_when_the_others_have, 4, MANY_CHUNKS, DEVICE, kind)
    for rank, rows in enumerate(found):
        assert_bitwise(rows, on_cpu(MANY_CHUNKS)[rank][ROWS[kind]], f"rows of rank {rank}")


def leave_unfinished(rank: int, group: dist.ProcessGroup, case: Case, device: str, how: str) -> Tensor | None:
    ep = case.open(group, device, timeout_s=20.0)
    pending = start(ep, case, rank, "fresh")
    dist.barrier(group)  # all have entered it
    if rank > 0:
        rows = pending.finish().x.cpu()
        with contextlib.suppress(TransportError):  # rank 0 may have left by an error
            ep.close()
        return rows
    if how == "by an error":
        with pytest.raises(ZeroDivisionError), ep:
            raise ZeroDivisionError
    else:
        del pending
        ep.close()
    return None


@pytest.mark.waits
@pytest.mark.parametrize("how", ["by an error", "by close"])
def test_who_leaves_a_started_dispatch_owes_nothing(how: str, ranks: DeviceRanks) -> None:
    found = ranks.spawn(leave_unfinished, 4, MANY_CHUNKS, DEVICE, how)
    for rank in range(1, 4):
        assert_bitwise(found[rank], on_cpu(MANY_CHUNKS)[rank][ROWS["fresh"]], f"rows of rank {rank}")


def have_no_memory(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> tuple[str, Any, Any, Any]:
    """Rank 0 finds none for its rows, and calls nothing until the others have heard of it."""

    def no_results(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("as the test wants")

    ep = case.open(group, device, timeout_s=20.0)
    inputs = case.inputs(rank, ep)
    ep.dispatch(*inputs)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(DispatchPlacement, "results", no_results)
        pending = ep.dispatch_start(*inputs)
        if rank == 0:
            dist.barrier(group)
            with pytest.raises(torch.OutOfMemoryError):
                pending.finish()
    with pytest.raises(TransportError) as error:
        if rank > 0:
            pending.finish()
        ep.dispatch(*inputs)
    if rank > 0:
        dist.barrier(group)
    with contextlib.suppress(TransportError):
        ep.close()
    return str(error.value), error.value.rank, error.value.phase, error.value.epoch


@pytest.mark.waits
def test_no_memory_for_a_started_dispatch_is_an_error_on_all_ranks(ranks: DeviceRanks) -> None:
    for text, rank, phase, epoch in ranks.spawn(have_no_memory, 4, MANY_CHUNKS, DEVICE):
        assert "rank 0 could not finish a dispatch" in text
        assert "OutOfMemoryError: as the test wants" in text
        assert (rank, phase, epoch) == (0, "dispatch", 1)


def finish_for_another(rank: int, group: dist.ProcessGroup, case: Case, device: str) -> None:
    """Whoever waits gives memory to what was started before, in whatever mode of torch that happens to be."""
    with case.open(group, device) as ep:
        x, idx, weights = case.inputs(rank, ep)
        x.requires_grad_()
        for _ in range(10):
            pending = ep.dispatch_start(x, idx, weights)
            with torch.inference_mode():
                ep.dispatch(x, idx, weights)
            rows = pending.finish().x
            torch.autograd.backward((rows * rows).sum())


def test_a_started_dispatch_keeps_its_graph_where_an_inference_waits_for_it(ranks: DeviceRanks) -> None:
    ranks.spawn(finish_for_another, 1, CASES[0], DEVICE)


# A real interpreter per rank, which ends as a user's does.
ENDS = """
import sys, threading, time
import torch, torch.distributed as dist
import moe_efa
torch.set_num_threads(1)
rank, store, device = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
ep = moe_efa.ExpertParallel(dist.group.WORLD, num_experts=8, hidden_size=64, top_k=2, max_tokens_per_rank=64,
                            timeout_s=20, node_size=1, transport="shm", chunk_rows=2, slots=2, device=device)
x, idx = torch.randn(32, 64, device=device), torch.randint(0, 8, (32, 2), device=device)
weights = torch.rand(32, 2, device=device)
ep.dispatch(x, idx, weights)
print("key", ep._native.job_key, flush=True)
dist.destroy_process_group()
"""
LEFT = "pending = [ep.dispatch_start(x, idx, weights) for _ in range(3)]\ntime.sleep(0.3 * rank)\n"
GOES_ON = """
def go_on():
    try:
        while True:
            ep.dispatch_start(x, idx, weights).finish()
    except (moe_efa.ClosedError, moe_efa.TransportError):
        pass
threading.Thread(target=go_on, daemon=True).start()
time.sleep(0.2)
"""
# Rank 0 cannot close, as where another thread is in a call, and is taking its modules down when the sizes of its
# dispatch become known: no thread may ask for the interpreter then.
TORN_DOWN = """
from pathlib import Path
ends, told = Path(store + ".ends"), Path(store + ".told")
def wait_for(path, exists=Path.exists, monotonic=time.monotonic, sleep=time.sleep):
    end = monotonic() + 20
    while not exists(path) and monotonic() < end:
        sleep(0.01)
class Last:
    def __del__(self, ends=ends, told=told, wait_for=wait_for, touch=Path.touch):
        touch(ends)
        wait_for(told)
if rank == 0:
    pending = ep.dispatch_start(x, idx, weights)
    ep._native._lock.acquire()
    _last = Last()
else:
    wait_for(ends)
    try:
        ep.dispatch(x, idx, weights)
        ep.dispatch(x, idx, weights)
    except moe_efa.TransportError as error:
        assert "rank 0 could not finish a dispatch: the process is ending" in str(error), error
    else:
        raise AssertionError("no error")
    told.touch()
"""


@pytest.mark.waits
@pytest.mark.parametrize(
    "body",
    [LEFT, GOES_ON, TORN_DOWN],
    ids=["with calls that nobody finishes", "while a thread calls", "while it is torn down"],
)
def test_a_process_ends_silently_and_soon(body: str, tmp_path: Path, device_library: Path | None) -> None:
    script = tmp_path / "script.py"
    script.write_text(ENDS + body)
    env = {**os.environ, "PYTHONPATH": str(Path(moe_efa.__file__).resolve().parents[1])}
    if device_library is not None:
        env["MOE_EFA_DEVICE_LIBRARY"] = str(device_library)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store"), DEVICE],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, ""), err
            assert not [name for name in os.listdir("/dev/shm") if out.split()[1] in name]
    finally:
        for process in processes:
            process.kill()
            process.wait()


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
