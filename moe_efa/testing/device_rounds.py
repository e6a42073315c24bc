"""Rounds between ranks whose tensors are on a device, for comparison with the same rounds on the CPU, bit by bit.

Everything that a user can do with a group is in :func:`run`: calls in one and in halves, FP8, replays, waves, static
mode, backward. :func:`lose_a_rank` is what happens when one dies.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_efa.errors import PeerLostError
from moe_efa.expert_parallel import ExpertParallel
from moe_efa.nn import MoELayer
from moe_efa.testing import graphs, routing
from moe_efa.testing.compare import assert_bitwise

NUM_EXPERTS, TOP_K = 8, 3
_REPLAYED_CAPACITY = 64  # some rounds of some cases do not fit
_ROUTINGS = {
    "uniform": routing.uniform,
    "skewed": routing.skewed,
    "one-expert": routing.one_expert,
    "duplicates": routing.duplicates,
    "nothing": routing.nothing,
}


@dataclass(frozen=True)
class Case:
    """One group and the rows that it exchanges."""

    num_ranks: int
    node_size: int
    transport: str = "auto"
    dtype: torch.dtype = torch.bfloat16
    wire_dtype: str = "auto"
    combine_dtype: str = "auto"
    hidden_size: int = 160
    num_tokens: int = 40  # of rank 0; each further rank has 7 fewer, down to none
    routing: str = "uniform"
    alignment: int = 8
    chunk_rows: int = 0
    slots: int = 0
    buffers: str = "host"
    buffers_on_gpu: str = "auto"  # between nodes tcp and shm reach no others than "host"

    @property
    def id(self) -> str:
        """As a sentence for test ids and tables."""
        words = [f"ep{self.num_ranks}-node{self.node_size}", self.transport, str(self.dtype).removeprefix("torch.")]
        words += [f"wire-{self.wire_dtype}", f"combine-{self.combine_dtype}", f"h{self.hidden_size}"]
        words += [f"tok{self.num_tokens}", self.routing, f"align{self.alignment}"]
        if self.chunk_rows:
            words.append(f"chunk{self.chunk_rows}-slots{self.slots}")
        return "-".join([*words, f"{self.buffers}-buffers"])

    def open(self, group: dist.ProcessGroup | None, device: str, **options: Any) -> ExpertParallel:
        """The group's object on a device."""
        return ExpertParallel(
            group,
            **{
                "num_experts": NUM_EXPERTS,
                "hidden_size": self.hidden_size,
                "top_k": TOP_K,
                "max_tokens_per_rank": max(1, self.num_tokens),
                "wire_dtype": self.wire_dtype,
                "combine_dtype": self.combine_dtype,
                "node_size": self.node_size,
                "transport": self.transport if self.node_size < self.num_ranks else "auto",
                "provider": "tcp" if self.transport == "libfabric" else None,
                "chunk_rows": self.chunk_rows,
                "slots": self.slots,
                "memory_budget_bytes": 64 << 20,
                "timeout_s": 15.0 if device == "cuda" else 60.0,  # kernels say why before they are killed
                "device": device,
                "buffers": self.buffers_on_gpu if device == "cuda" else self.buffers,
                **options,
            },
        )

    def inputs(self, rank: int, ep: ExpertParallel, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, topk_idx, topk_weights of a rank, the same values on every device."""
        tokens = max(0, self.num_tokens - 7 * rank)
        generator = torch.Generator().manual_seed(1000 + rank + 100 * seed)
        x = torch.randn(tokens, self.hidden_size, generator=generator).to(self.dtype)
        idx, weights = _ROUTINGS[self.routing](tokens, NUM_EXPERTS, TOP_K, seed=rank + 100 * seed, drop_fraction=0.2)
        return x.to(ep.device), idx.to(ep.device), weights.to(ep.device)


CASES = (
    Case(1, 1),
    Case(2, 2, dtype=torch.float32, routing="skewed", buffers="device"),
    Case(2, 1, "libfabric", wire_dtype="fp8", routing="nothing", num_tokens=9),
    Case(
        num_ranks=4,
        node_size=2,
        transport="libfabric",
        wire_dtype="fp8",
        combine_dtype="fp8",
        hidden_size=264,
        routing="duplicates",
        alignment=1,
        buffers="device",
    ),
    Case(
        num_ranks=4,
        node_size=2,
        transport="shm",
        dtype=torch.float32,
        combine_dtype="bf16",
        routing="one-expert",
        num_tokens=30,
        chunk_rows=3,
        slots=2,
    ),
)
MANY_RANKS = (
    Case(8, 4, "libfabric", wire_dtype="fp8", hidden_size=2048, num_tokens=128),
    Case(8, 8, hidden_size=4096, num_tokens=100, routing="skewed"),
)


def run(rank: int, group: dist.ProcessGroup | None, case: Case, device: str) -> dict[str, Tensor]:
    """What every kind of call gives on this rank, by name, on the CPU."""
    found: dict[str, Tensor] = {}
    with case.open(group, device) as ep:
        inputs = case.inputs(rank, ep)
        _calls_in_one(found, ep, case, *inputs)
        _calls_in_halves(found, ep, case, *inputs)
        _waves(found, ep, case, *inputs)
        _capacities(found, ep, case, *inputs)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def assert_same(
    found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], *, torch_sums_alike: bool = True
) -> None:
    """Raise AssertionError unless :func:`run` found the same bits on all ranks.

    Args:
        torch_sums_alike: False where torch adds up the gradients of weights in another order, as on a GPU: they may
            then differ by roundings.
    """
    for rank, (here, there) in enumerate(zip(found, expected, strict=True)):
        assert list(here) == list(there)
        for name in there:
            if name.endswith("weights.grad") and not torch_sums_alike:
                torch.testing.assert_close(here[name], there[name], rtol=1e-4, atol=1e-3)
                continue
            assert_bitwise(here[name], there[name], f"{name} of rank {rank}")


def replay(rank: int, group: dist.ProcessGroup | None, case: Case, device: str, num_rounds: int) -> dict[str, Tensor]:
    """What rounds in static mode give, each with inputs of its own, by name, on the CPU.

    On a device they are replays of graphs that were captured once, with a call that is none in every third; on the CPU
    they are calls.
    """
    found: dict[str, Tensor] = {}
    with case.open(group, device) as ep:
        rounds = [case.inputs(rank, ep, seed=seed) for seed in range(num_rounds)]
        tensors = tuple(tensor.clone() for tensor in rounds[0])
        results: dict[str, Tensor] = {}

        def both_ways() -> None:
            x, idx, weights = tensors[0].detach().requires_grad_(), tensors[1], tensors[2].detach().requires_grad_()
            d = ep.dispatch(x, idx, weights, expert_alignment=case.alignment, capacity=_REPLAYED_CAPACITY)
            plain = ep.combine(d.x, d.handle, weighted=False)
            (x_grad,) = torch.autograd.grad(plain, (x,), grad_outputs=tensors[0])
            assert d.counts is not None
            assert d.overflow is not None
            results.update(rows=d.x, weights=d.weights, counts=d.counts, offsets=d.offsets, plain=plain, grad=x_grad)
            results.update(weighted=ep.combine(d.x.detach(), d.handle), overflow=d.overflow)
            results["again"] = ep.dispatch(tensors[0], handle=d.handle).x
            if case.wire_dtype == "fp8":
                fp8 = ep.dispatch(*tensors, capacity=_REPLAYED_CAPACITY, output="fp8")
                assert fp8.scales is not None
                results.update(fp8_rows=fp8.x.view(torch.uint8), fp8_scales=fp8.scales)

        graph = None
        if ep.info()["device"]:
            graph = graphs.Graph()
            with graph.capture():
                both_ways()
        for number, inputs in enumerate(rounds):
            for tensor, values in zip(tensors, inputs, strict=True):
                tensor.copy_(values)
            if graph is None:
                both_ways()
            else:
                graph.replay()
            if number % 3 == 2:
                found[f"{number} call"] = ep.dispatch(*inputs).x
            ep.synchronize()
            found |= {f"{number} {name}": tensor.detach().clone() for name, tensor in results.items()}
        found["rounds"] = torch.tensor(ep.stats()["rounds"])
    return {name: tensor.cpu() for name, tensor in found.items()}


def replay_layer(rank: int, group: dist.ProcessGroup | None, case: Case, device: str, num_rounds: int) -> None:
    """A layer as a whole in a graph of torch, forward and backward, against calls of the same layer."""
    torch.manual_seed(rank)
    with case.open(group, device) as ep:
        bf16: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}  # whose products need no sizes on the host
        layer = MoELayer(expert_parallel=ep, intermediate_size=64, capacity=256, seed=3, **bf16)
        x = torch.zeros(max(1, case.num_tokens - 7 * rank), case.hidden_size, requires_grad=True, **bf16)
        torch.autograd.backward(layer(x).sum())  # first uses of kernels and memory are none of a graph's business
        graph = graphs.Graph()
        with graph.capture():
            out = layer(x)
            (grad,) = torch.autograd.grad(out.square().sum(), (x,))
        for _ in range(num_rounds):
            tokens = torch.randn_like(x)
            with torch.no_grad():
                x.copy_(tokens)
            graph.replay()
            tokens.requires_grad_()
            expected = layer(tokens)
            (expected_grad,) = torch.autograd.grad(expected.square().sum(), (tokens,))
            ep.synchronize()
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-3)
            torch.testing.assert_close(grad, expected_grad, rtol=2e-2, atol=1e-3)


def _calls_in_one(
    found: dict[str, Tensor], ep: ExpertParallel, case: Case, x: Tensor, idx: Tensor, weights: Tensor
) -> None:
    for weighted in (True, False):
        name = "weighted" if weighted else "plain"
        own, own_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        d = ep.dispatch(own, idx, own_weights, expert_alignment=case.alignment)
        assert d.tokens_per_expert is not None
        y = (d.x.float() * 1.5).to(case.dtype) if weighted else (d.x * d.weights[:, None]).to(case.dtype)
        out = ep.combine(y, d.handle, weighted=weighted)
        torch.autograd.backward(out.float().square().sum())
        assert own.grad is not None
        assert own_weights.grad is not None
        found[f"{name} rows"], found[f"{name} weights"], found[f"{name} out"] = d.x, d.weights, out
        found[f"{name} x.grad"], found[f"{name} weights.grad"] = own.grad, own_weights.grad
        found[f"{name} counts"], found[f"{name} offsets"] = d.tokens_per_expert, d.offsets
        found[f"{name} again"] = ep.dispatch(out.detach(), handle=d.handle).x
    if case.wire_dtype == "fp8":
        fp8 = ep.dispatch(x, idx, weights, expert_alignment=case.alignment, output="fp8")
        assert fp8.scales is not None
        found["fp8 rows"], found["fp8 scales"] = fp8.x.view(torch.uint8), fp8.scales


def _calls_in_halves(
    found: dict[str, Tensor], ep: ExpertParallel, case: Case, x: Tensor, idx: Tensor, weights: Tensor
) -> None:
    first = ep.dispatch_start(x, idx, weights, expert_alignment=case.alignment)
    second = ep.dispatch_start(x * 2, idx, weights)
    late, early = second.finish(), first.finish()  # in any order
    third = ep.combine_start(early.x, early.handle)
    fourth = ep.combine_start(late.x, late.handle, weighted=False)
    dropped = ep.dispatch_start(x, idx, weights)  # runs out by itself
    found["second half first"], found["first half"] = late.x, early.x
    found["fourth"], found["third"] = fourth.finish(), third.finish()
    del dropped
    found["after the dropped one"] = ep.dispatch(x, idx, weights).x


def _waves(found: dict[str, Tensor], ep: ExpertParallel, case: Case, x: Tensor, idx: Tensor, weights: Tensor) -> None:
    own, own_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = ep.moe(own, idx, own_weights, lambda rows, _: (rows.float() * 0.5).to(rows.dtype), waves=3)
    torch.autograd.backward(out.float().sum())
    assert own.grad is not None
    assert own_weights.grad is not None
    found["waves"], found["waves x.grad"], found["waves weights.grad"] = out, own.grad, own_weights.grad


def _capacities(
    found: dict[str, Tensor], ep: ExpertParallel, case: Case, x: Tensor, idx: Tensor, weights: Tensor
) -> None:
    for capacity in (0, 24, 4096):
        own = x.clone().requires_grad_()
        d = ep.dispatch(own, idx, weights, expert_alignment=case.alignment, capacity=capacity)
        assert d.counts is not None
        assert d.overflow is not None
        out = ep.combine(d.x, d.handle)
        torch.autograd.backward(out.float().sum())
        assert own.grad is not None
        name = f"capacity {capacity}"
        found[f"{name} rows"], found[f"{name} counts"], found[f"{name} out"] = d.x, d.counts, out
        found[f"{name} x.grad"], found[f"{name} overflow"] = own.grad, d.overflow.clone()


def lose_a_rank(
    rank: int, group: dist.ProcessGroup, case: Case, device: str, heartbeat_s: float, in_call: bool
) -> tuple[int | None, float]:
    """Rank 1 is killed, in a combine or before it; the others return whom the error names, and after how many seconds.

    For :func:`moe_efa.testing.spawn.spawn` with ``may_die=[1]``.
    """
    ep = case.open(group, device, heartbeat_timeout_s=heartbeat_s)
    x, idx, weights = case.inputs(rank, ep)
    d = ep.dispatch(x, idx, weights)
    dist.barrier(group)
    if rank == 1 and not in_call:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        pending = ep.combine_start(d.x, d.handle)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        pending.finish()
        for _ in range(3):  # where calls return before their kernels end
            ep.dispatch(x, idx, weights)
            time.sleep(heartbeat_s)
    except PeerLostError as error:
        return error.rank, time.monotonic() - begin
    return None, time.monotonic() - begin
