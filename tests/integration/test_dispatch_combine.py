"""Dispatch, combine and their gradients between real processes, bit by bit against the oracle.

One set of processes per number of ranks runs all cases of that number; a test looks up its own outcome. If the set does
not survive, every test runs its case in processes of its own, so that the culprit shows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moe_efa
from moe_efa import ClosedError, ExpertParallel, TransportError, reference
from moe_efa.quantization import dequantize_1x128
from moe_efa.testing import assert_bitwise, spawn
from moe_efa.testing.routing import PATTERNS, uneven_token_counts

DTYPES = reference.DTYPES
TIMEOUT_S = 30.0
NAN = float("nan")
_seeds = itertools.count(1)  # of reordering: another one for every group, the same in every run


@dataclass(frozen=True)
class Setting:
    """Where the ranks stand and what joins the nodes; ``reorder`` makes that deliver as badly as SRD may."""

    num_ranks: int
    node_size: int
    transport: str = "auto"
    reorder: bool = False

    @property
    def id(self) -> str:
        joined = "" if self.node_size == self.num_ranks else f"-{self.transport}"
        joined += "-reordered" if self.reorder else ""
        return f"ep{self.num_ranks}-node{self.node_size}{joined}"

    def open(self, group: dist.ProcessGroup | None, **changes: Any) -> ExpertParallel:
        options: dict[str, Any] = {
            "num_experts": 2 * self.num_ranks,
            "hidden_size": 40,
            "top_k": 2,
            "max_tokens_per_rank": 32,
            "node_size": self.node_size,
            "transport": self.transport,
            "provider": "tcp" if self.transport == "libfabric" else None,
            "timeout_s": TIMEOUT_S,
            "heartbeat_timeout_s": TIMEOUT_S,
            "memory_budget_bytes": 64 << 20,
        }
        if not self.reorder:
            return ExpertParallel(group, **{**options, **changes})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOE_EFA_REORDER", str(next(_seeds)))
            ep = ExpertParallel(group, **{**options, **changes})
        assert ep.info()["transport"].startswith("reordered (seed "), "it must not be tested for nothing"
        return ep


@dataclass(frozen=True)
class Case:
    """One line of the grid. ``tokens`` is the most that a rank has."""

    setting: Setting
    tokens: int = 24
    hidden_size: int = 40
    dtype: str = "bf16"
    top_k: int = 4
    experts_per_rank: int = 4
    pattern: str = "uniform"
    uneven: bool = False
    drop_fraction: float = 0.0
    alignment: int = 1
    weighted: bool = True
    wire_dtype: str = "auto"
    combine_dtype: str = "auto"
    grad_wire_dtype: str = "auto"
    fp8_scale: str = "fp32"
    chunk_rows: int = 0
    slots: int = 0
    room: str = ""  # static mode: one of ROOM

    @property
    def id(self) -> str:
        parts = [self.setting.id, f"tok{self.tokens}", f"h{self.hidden_size}", self.dtype, f"top{self.top_k}"]
        parts += [self.pattern] if self.pattern != "uniform" else []
        parts += ["uneven"] if self.uneven else []
        parts += [f"drop{self.drop_fraction:g}"] if self.drop_fraction else []
        parts += [f"align{self.alignment}"] if self.alignment > 1 else []
        parts += [] if self.weighted else ["unweighted"]
        parts += [f"wire-{self.wire_dtype}"] if self.wire_dtype != "auto" else []
        parts += [f"combine-{self.combine_dtype}"] if self.combine_dtype != "auto" else []
        parts += [f"grad-{self.grad_wire_dtype}"] if self.grad_wire_dtype != "auto" else []
        parts += [self.fp8_scale] if self.fp8_scale != "fp32" else []
        parts += [f"chunk{self.chunk_rows}"] if self.chunk_rows else []
        parts += [f"slots{self.slots}"] if self.slots else []
        parts += [f"room-{self.room}"] if self.room else []
        return "-".join(parts)

    @property
    def num_experts(self) -> int:
        return self.experts_per_rank * self.setting.num_ranks

    def open(self, group: dist.ProcessGroup | None) -> ExpertParallel:
        return self.setting.open(
            group,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            max_tokens_per_rank=max(1, self.tokens),
            wire_dtype=self.wire_dtype,
            combine_dtype=self.combine_dtype,
            grad_wire_dtype=self.grad_wire_dtype,
            fp8_scale=self.fp8_scale,
            chunk_rows=self.chunk_rows,
            slots=self.slots,
        )

    @property
    def config(self) -> moe_efa.ExpertParallelConfig:
        return moe_efa.ExpertParallelConfig(
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            max_tokens_per_rank=max(1, self.tokens),
            wire_dtype=self.wire_dtype,
            combine_dtype=self.combine_dtype,
            grad_wire_dtype=self.grad_wire_dtype,
            fp8_scale=self.fp8_scale,
        )


# Capacities of static mode, from a rank and the rows that it needs.
ROOM: dict[str, Callable[[int, int], int]] = {
    "for-all": lambda rank, rows: rows + rank,
    "for-all-but-one": lambda rank, rows: max(0, rows - 1),
    "for-none": lambda rank, rows: 0,
    "for-some": lambda rank, rows: rows // 2 if rank % 2 else rows,
}


class World:
    """The inputs of all ranks of a case and what the oracle makes of them. Equal on every rank."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        num_ranks, dtype = case.setting.num_ranks, DTYPES[case.dtype]
        counts = uneven_token_counts(num_ranks, case.tokens, seed=seed) if case.uneven else [case.tokens] * num_ranks
        generator = torch.Generator().manual_seed(1000 + seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        routings = [
            PATTERNS[case.pattern](
                count, case.num_experts, case.top_k, seed=100 * seed + rank, drop_fraction=case.drop_fraction
            )
            for rank, count in enumerate(counts)
        ]
        self.topk_idx = [routing.topk_idx for routing in routings]
        self.topk_weights = [routing.topk_weights for routing in routings]
        self.x = [randn(count, case.hidden_size) for count in counts]
        make_plan = functools.partial(
            reference.make_plan, self.topk_idx, num_experts=case.num_experts, expert_alignment=case.alignment
        )
        self.plan = make_plan()
        if case.room:
            needed = enumerate(self.plan.required_capacity)
            self.plan = make_plan(capacity=[ROOM[case.room](rank, rows) for rank, rows in needed])
        self.y = [randn(len(rows), case.hidden_size) for rows in self.plan.rows]
        for y, rows in zip(self.y, self.plan.rows, strict=True):
            y[[row is None for row in rows]] = NAN
        self.grad_out = [randn(count, case.hidden_size) for count in counts]
        self.grad_rows = [randn(len(rows), case.hidden_size) for rows in self.plan.rows]
        self.grad_weights = [torch.randn(len(rows), generator=generator) for rows in self.plan.rows]

    def expected(self, rank: int) -> dict[str, torch.Tensor]:
        case, config = self.case, self.case.config
        scale = case.fp8_scale
        received = reference.dispatch(self.x, self.topk_weights, self.plan, wire_dtype=case.wire_dtype, fp8_scale=scale)
        weights = [d.weights for d in received] if case.weighted else None
        out = reference.combine(
            self.y,
            self.plan,
            weights=weights,
            node_size=case.setting.node_size,
            combine_dtype=case.combine_dtype,
            fp8_scale=scale,
        )
        grad_y, grad_w = reference.combine_backward(
            self.grad_out,
            self.y,
            self.plan,
            weights=weights,
            wire_dtype=config.grad_dispatch_dtype,
            fp8_scale=scale,
        )
        grad_weights = self.grad_weights
        if grad_w is not None:  # d.weights got a gradient of its own and one from combine
            grad_weights = [a + b for a, b in zip(grad_weights, grad_w, strict=True)]
        grad_x, grad_topk_weights = reference.dispatch_backward(
            self.grad_rows,
            grad_weights,
            self.plan,
            node_size=case.setting.node_size,
            combine_dtype=config.grad_combine_dtype,
            fp8_scale=scale,
        )
        assert grad_topk_weights is not None
        overflow = {}
        if case.room:
            overflow = {
                "overflow after dispatch": torch.tensor(self.plan.overflow_of_experts(rank)),
                "overflow after combine": torch.tensor(self.plan.overflow(rank)),
            }
        return {
            **overflow,
            "d.x": received[rank].x,
            "d.tokens_per_expert": received[rank].tokens_per_expert,
            "d.offsets": received[rank].offsets,
            "d.weights": received[rank].weights,
            "out": out[rank],
            "y.grad": grad_y[rank],
            "d.weights.grad": grad_weights[rank],
            "x.grad": grad_x[rank],
            "topk_weights.grad": grad_topk_weights[rank],
        }

    def run(self, ep: ExpertParallel) -> dict[str, torch.Tensor]:
        """Forward and backward on this rank. y does not come from d.x, so that every gradient is seen alone."""
        rank = ep.rank
        x = self.x[rank].clone().requires_grad_()
        topk_weights = self.topk_weights[rank].clone().requires_grad_()
        capacity = None if self.plan.capacity is None else self.plan.capacity[rank]
        d = ep.dispatch(x, self.topk_idx[rank], topk_weights, expert_alignment=self.case.alignment, capacity=capacity)
        assert (d.tokens_per_expert is None) == (d.counts is not None) == (capacity is not None)
        overflow = {}
        if d.overflow is not None:
            overflow["overflow after dispatch"] = d.overflow.clone()
        d.weights.retain_grad()
        y = self.y[rank].clone().requires_grad_()
        assert y.shape == d.x.shape, f"dispatch gave {tuple(d.x.shape)}, the oracle {tuple(y.shape)}"
        out = ep.combine(y, d.handle, weighted=self.case.weighted)
        if d.overflow is not None:
            overflow["overflow after combine"] = d.overflow.clone()
        torch.autograd.backward(
            [out, d.x, d.weights], [self.grad_out[rank], self.grad_rows[rank], self.grad_weights[rank]]
        )
        assert x.grad is not None
        assert y.grad is not None
        assert topk_weights.grad is not None
        assert d.weights.grad is not None
        return {
            **overflow,
            "d.x": d.x.detach(),
            "d.tokens_per_expert": d.tokens_per_expert if d.counts is None else d.counts,
            "d.offsets": d.offsets,
            "d.weights": d.weights.detach(),
            "out": out.detach(),
            "y.grad": y.grad,
            "d.weights.grad": d.weights.grad,
            "x.grad": x.grad,
            "topk_weights.grad": topk_weights.grad,
        }


def compare(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bitwise(actual[name], tensor, name)


# The grid


def run_case(rank: int, group: dist.ProcessGroup, case: Case) -> None:
    world = World(case)
    with case.open(group) as ep:
        actual = world.run(ep)
    compare(actual, world.expected(rank))


def settings_of(num_ranks: int) -> list[Setting]:
    settings = [Setting(num_ranks, num_ranks)]
    for node_size in range(num_ranks - 1, 0, -1):
        if num_ranks % node_size == 0:
            settings += [
                Setting(num_ranks, node_size, transport, reorder)
                for transport in ("shm", "libfabric")
                for reorder in (False, True)
            ]
    return settings


def grid() -> list[Case]:
    cases = []
    for setting in itertools.chain.from_iterable(settings_of(num_ranks) for num_ranks in (1, 2, 4)):
        cases += [
            Case(setting, dtype="bf16"),
            Case(setting, dtype="fp32", uneven=True, drop_fraction=0.3, alignment=8),
            Case(setting, dtype="fp32", weighted=False, combine_dtype="bf16", wire_dtype="bf16"),
            Case(setting, dtype="bf16", pattern="duplicates", combine_dtype="fp32", chunk_rows=4, slots=2),
        ]
    fp8 = {"wire_dtype": "fp8", "combine_dtype": "fp8"}
    for setting in itertools.chain.from_iterable(settings_of(num_ranks) for num_ranks in (1, 2, 4)):
        cases += [
            Case(setting, dtype="bf16", hidden_size=200, uneven=True, drop_fraction=0.2, alignment=8, **fp8),
            Case(setting, dtype="fp32", hidden_size=40, grad_wire_dtype="fp8", fp8_scale="ue8m0", **fp8),
        ]
    for setting in itertools.chain.from_iterable(settings_of(num_ranks) for num_ranks in (1, 2, 4)):
        cases += [
            Case(setting, room="for-some", uneven=True, alignment=4, chunk_rows=4, slots=2, combine_dtype="fp32"),
        ]
    for setting in settings_of(4):
        cases += [
            Case(setting, room="for-all-but-one", pattern="one_expert", alignment=4, weighted=False, **fp8),
            Case(setting, room="for-none", pattern="duplicates", hidden_size=200, uneven=True, **fp8),
            Case(setting, room="for-all", dtype="fp32", uneven=True, drop_fraction=0.3, alignment=8),
            Case(setting, hidden_size=256, wire_dtype="fp8", combine_dtype="bf16"),
            Case(setting, hidden_size=130, dtype="fp32", wire_dtype="fp8", combine_dtype="fp32", fp8_scale="ue8m0"),
            Case(setting, hidden_size=128, combine_dtype="fp8", grad_wire_dtype="bf16", dtype="fp32", weighted=False),
            Case(setting, hidden_size=700, top_k=8, pattern="duplicates", grad_wire_dtype="fp8", slots=2, **fp8),
            Case(setting, hidden_size=7, wire_dtype="bf16", grad_wire_dtype="fp8", chunk_rows=4, slots=2),
            Case(setting, tokens=0, **fp8),
            Case(setting, pattern="nothing", **fp8),
            Case(setting, pattern="one_expert", alignment=16, hidden_size=1, **fp8),
            Case(setting, tokens=37, hidden_size=513, uneven=True, chunk_rows=8, slots=2, grad_wire_dtype="fp8", **fp8),
            Case(setting, tokens=64, hidden_size=512, dtype="bf16", top_k=8, pattern="skewed", alignment=16),
            Case(setting, tokens=0),
            Case(setting, pattern="nothing", dtype="fp32"),
            Case(setting, pattern="one_expert", alignment=16),
            Case(setting, tokens=1, dtype="fp32"),
            Case(setting, tokens=37, dtype="fp32", uneven=True, chunk_rows=8, slots=2),
            Case(setting, tokens=150, hidden_size=7, top_k=1, experts_per_rank=1, drop_fraction=0.5, chunk_rows=16),
            Case(setting, tokens=12, hidden_size=24, top_k=16, pattern="duplicates", uneven=True, weighted=False),
        ]
    return cases


# Scenarios: more than one call


def tensors_for(
    rank: int, ep: ExpertParallel, seed: int, tokens: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small inputs of one rank that differ between ranks and seeds."""
    routing = PATTERNS["uniform"](tokens, ep.config.num_experts, ep.config.top_k, seed=10 * seed + rank)
    generator = torch.Generator().manual_seed(77 * seed + rank)
    return torch.randn(tokens, ep.config.hidden_size, generator=generator), routing.topk_idx, routing.topk_weights


def oracle_of_identity(ep: ExpertParallel, seed: int, tokens: int = 6) -> torch.Tensor:
    """What combine(d.x) gives on this rank for :func:`tensors_for`."""
    x, topk_idx, topk_weights = zip(*(tensors_for(r, ep, seed, tokens) for r in range(ep.num_ranks)), strict=True)
    plan = reference.make_plan(topk_idx, num_experts=ep.config.num_experts)
    received = reference.dispatch(x, topk_weights, plan)
    out = reference.combine(
        [d.x for d in received], plan, weights=[d.weights for d in received], node_size=ep.node_size
    )
    return out[ep.rank]


def many_rounds_wrap_the_epoch(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """The immediate has 4 bits for the epoch; 45 rounds also wrap every ring."""
    with setting.open(group, chunk_rows=4, slots=2) as ep:
        results = []
        for seed in range(45):
            d = ep.dispatch(*tensors_for(rank, ep, seed))
            results.append(ep.combine(d.x, d.handle))
        rounds = ep.stats()["rounds"]
    for seed, out in enumerate(results):
        assert_bitwise(out, oracle_of_identity(ep, seed), f"round {seed}")
    assert rounds == 45


def rounds_reordered_by_many_seeds(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """The smallest rings, so that slots are reused while their writes are held back, cut and repeated."""
    for _ in range(10):
        with setting.open(group, chunk_rows=2, slots=2) as ep:
            results = []
            for seed in range(6):
                d = ep.dispatch(*tensors_for(rank, ep, seed, tokens=12))
                results.append(ep.combine(d.x, d.handle))
        for seed, out in enumerate(results):
            assert_bitwise(out, oracle_of_identity(ep, seed, tokens=12), f"round {seed}")


def handles_in_any_order(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    with setting.open(group) as ep:
        received = [ep.dispatch(*tensors_for(rank, ep, seed, tokens=4 + seed)) for seed in range(4)]
        order = (2, 0, 3, 1, 2)
        results = [ep.combine(received[seed].x, received[seed].handle) for seed in order]
    for seed, out in zip(order, results, strict=True):
        assert_bitwise(out, oracle_of_identity(ep, seed, tokens=4 + seed), f"handle {seed}")


def replay_with_a_handle(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    case = Case(setting, dtype="fp32", drop_fraction=0.2, uneven=True, alignment=8)
    world = World(case)
    with case.open(group) as ep:
        first = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank], expert_alignment=8)
        other = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
        values = world.grad_out[rank].clone().requires_grad_()
        again = ep.dispatch(values, handle=first.handle)
        again.x.backward(world.grad_rows[rank])
        out = ep.combine(again.x.detach(), again.handle)
    expected_rows = reference.dispatch_rows(world.grad_out, world.plan)
    assert_bitwise(again.x, expected_rows[rank], "replayed rows")
    assert_bitwise(again.offsets, first.offsets)
    assert_bitwise(again.tokens_per_expert, first.tokens_per_expert)
    assert_bitwise(again.weights, first.weights)
    assert int(again.offsets[-1]) == len(again.x)
    assert len(other.x) == int(other.tokens_per_expert.sum())
    grad_x, _ = reference.dispatch_backward(world.grad_rows, None, world.plan, node_size=setting.node_size)
    assert values.grad is not None
    assert_bitwise(values.grad, grad_x[rank], "gradient of a replay")
    weights = [d.weights for d in reference.dispatch(world.x, world.topk_weights, world.plan)]
    expected_out = reference.combine(expected_rows, world.plan, weights=weights, node_size=setting.node_size)
    assert_bitwise(out, expected_out[rank], "combine of a replay")


def fp8_rows_handed_through(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """output="fp8": rows and scales as on the wire, fresh and replayed; the weights keep their gradient."""
    for dtype, hidden_size, scale in (("bf16", 200, "fp32"), ("fp32", 40, "ue8m0")):
        fp8 = {"wire_dtype": "fp8", "fp8_scale": scale}
        case = Case(setting, dtype=dtype, hidden_size=hidden_size, drop_fraction=0.2, uneven=True, alignment=8, **fp8)
        world = World(case)
        for tokens in world.x:
            tokens.view(-1)[:1] = NAN  # where there is a token: one block of NaN
        expected = world.expected(rank)
        codes, scales = reference.dispatch_fp8_rows(world.x, world.plan, fp8_scale=scale)[rank]
        x, topk_idx = world.x[rank], world.topk_idx[rank]
        topk_weights = world.topk_weights[rank].clone().requires_grad_()
        with case.open(group) as ep, case.setting.open(group, hidden_size=hidden_size) as bf16:
            if rank == 0:
                leaf = x.clone().requires_grad_()
                for wrong, tensor, output, text in (
                    (ep, leaf, "fp8", "output='fp8' is for an x without gradient"),
                    (ep, x, "e4m3", "output must be 'same' or 'fp8', not 'e4m3'"),
                    (bf16, x, "fp8", "output='fp8' needs wire_dtype='fp8', not 'auto'"),
                ):
                    with pytest.raises(ValueError, match=text):
                        wrong.dispatch(tensor, topk_idx, topk_weights, output=output)
            d = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=8, output="fp8")
            zeros = ep.dispatch(torch.zeros_like(x), handle=d.handle, output="fp8")
            with torch.no_grad():
                again = ep.dispatch(x.clone().requires_grad_(), handle=d.handle, output="fp8")
            same = ep.dispatch(x, handle=d.handle)
            out = ep.combine(world.y[rank], d.handle)
            torch.autograd.backward([out, d.weights], [world.grad_out[rank], world.grad_weights[rank]])
        for got in (d, again):
            assert got.x.dtype == torch.float8_e4m3fn
            assert got.scales is not None
            assert not got.x.requires_grad
            assert_bitwise(got.x.view(torch.uint8), codes.view(torch.uint8), "codes")
            assert_bitwise(got.scales, scales, "scales")
            assert_bitwise(dequantize_1x128(got.x, got.scales, dtype=x.dtype), expected["d.x"], "values")
        assert not zeros.x.view(torch.uint8).any()
        assert zeros.scales is not None
        assert bool((zeros.scales == 1).all())
        assert same.scales is None
        assert_bitwise(same.x, expected["d.x"])
        assert_bitwise(d.weights.detach(), expected["d.weights"])
        assert_bitwise(d.offsets, expected["d.offsets"])
        assert_bitwise(out.detach(), expected["out"])
        assert topk_weights.grad is not None
        assert_bitwise(topk_weights.grad, expected["topk_weights.grad"])


def a_step_is_repeated_until_it_fits(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """Tokens crowd on one rank, so that only some of the others hear of it, and all have to repeat the step."""

    def routed(source: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, topk_idx, topk_weights = tensors_for(source, ep, 0, tokens=8)
        crowded = source % 2 == 0
        own = source * ep.num_local_experts
        return x, torch.full_like(topk_idx, 0 if crowded else own), topk_weights

    with setting.open(group) as ep:
        worlds = [routed(source) for source in range(setting.num_ranks)]
        x, topk_idx, topk_weights = (list(parts) for parts in zip(*worlds, strict=True))
        capacity, attempts, told = 16, 0, []
        while True:
            leaf = x[rank].clone().requires_grad_()
            d = ep.dispatch(leaf, topk_idx[rank], topk_weights[rank], capacity=capacity)
            out = ep.combine(d.x, d.handle)
            out.sum().backward()
            attempts += 1
            assert d.overflow is not None
            told.append(int(d.overflow))
            needed = d.overflow.clone()
            dist.all_reduce(needed, dist.ReduceOp.MAX, group=group)
            if not needed:
                break
            capacity = int(needed)
        exact = ep.dispatch(x[rank], topk_idx[rank], topk_weights[rank])
        assert_bitwise(out.detach(), ep.combine(exact.x, exact.handle))
        # A rank that gives a capacity where others give none is told so, and nobody gets anything wrong.
        dist.barrier(group)
        if setting.num_ranks > 1:
            with pytest.raises(TransportError, match=r"ranks issued different calls: .* with a capacity"):
                ep.dispatch(x[rank], topk_idx[rank], topk_weights[rank], capacity=64 if rank else None)
    crowd = 8 * 2 * -(-setting.num_ranks // 2)
    if setting.num_ranks <= 2:
        assert (attempts, told) == (1, [0])
    else:
        assert attempts == 2
        assert told == [crowd if rank % 2 == 0 else 0, 0]


def objects_share_natives_of_equal_configuration(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    with setting.open(group) as a, setting.open(group) as b, setting.open(group, hidden_size=24) as c:
        results = []
        for seed, ep in enumerate((a, b, c, a, c, b)):
            d = ep.dispatch(*tensors_for(rank, ep, seed))
            results.append((ep, seed, ep.combine(d.x, d.handle)))
        across = a.dispatch(*tensors_for(rank, a, 9))
        b.combine(across.x, across.handle)  # one native group, so the handle is good for both
        with pytest.raises(ValueError, match="belongs to another ExpertParallel"):
            c.combine(across.x, across.handle)
        rounds = (a.stats()["rounds"], b.stats()["rounds"], c.stats()["rounds"])
        b.close()
        d = a.dispatch(*tensors_for(rank, a, 5))
        results.append((a, 5, a.combine(d.x, d.handle)))
    for ep, seed, out in results:
        assert_bitwise(out, oracle_of_identity(ep, seed), f"seed {seed}")
    assert rounds == (5, 5, 2)
    reopened = setting.open(group)
    try:
        assert reopened.stats()["rounds"] == 0
    finally:
        reopened.close()


def calls_from_another_thread(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    results: list[Any] = []

    def work(ep: ExpertParallel, seed: int) -> None:
        d = ep.dispatch(*tensors_for(rank, ep, seed))
        results.append(ep.combine(d.x, d.handle))

    with setting.open(group) as ep:
        for seed in range(3):
            thread = threading.Thread(target=work, args=(ep, seed))
            thread.start()
            thread.join()
            work(ep, seed)
    assert len(results) == 6
    for i, out in enumerate(results):
        assert_bitwise(out, oracle_of_identity(ep, i // 2), f"call {i}")


def three_runs_are_bitwise_equal(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    case = Case(setting, tokens=32, dtype="bf16", pattern="skewed", uneven=True)
    world = World(case)
    with case.open(group) as ep:
        runs = [world.run(ep) for _ in range(2)]
    with case.open(group) as ep:
        runs.append(world.run(ep))
    for run in runs[1:]:
        compare(run, runs[0])


def results_do_not_depend_on_transport_or_chunks(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """I3, for two transports at one node_size and for rings of any shape."""
    runs = []
    for transport, chunk_rows, slots in (("shm", 0, 0), ("libfabric", 0, 0), ("shm", 3, 2), ("libfabric", 8, 3)):
        place = Setting(setting.num_ranks, setting.node_size, transport, setting.reorder)
        case = Case(place, tokens=29, dtype="bf16", drop_fraction=0.1, chunk_rows=chunk_rows, slots=slots)
        with case.open(group) as ep:
            runs.append(World(case, seed=4).run(ep))
    for run in runs[1:]:
        compare(run, runs[0])


def argument_errors_poison_nothing(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """I17: rank 0 errs in every way, corrects itself, and meets the others in the same round."""
    with setting.open(group) as ep, setting.open(group, hidden_size=24) as other:
        foreign = other.dispatch(*tensors_for(rank, other, 1)).handle
        x, topk_idx, topk_weights = tensors_for(rank, ep, 0)
        if rank == 0:
            for text, arguments in {
                "x must be torch.bfloat16 or torch.float32, not torch.float16": (x.half(), topk_idx, topk_weights),
                "x must be a tensor, not a list": (x.tolist(), topk_idx, topk_weights),
                "x is on meta": (x.to("meta"), topk_idx, topk_weights),
                "x must be contiguous": (x.t().contiguous().t(), topk_idx, topk_weights),
                "x must be [T, 40], not [6, 39]": (x[:, :39].contiguous(), topk_idx, topk_weights),
                "x must be [T, 40], not [240]": (x.flatten(), topk_idx, topk_weights),
                "x has 60 tokens, more than max_tokens_per_rank=32": (
                    x.repeat(10, 1),
                    topk_idx.repeat(10, 1),
                    topk_weights.repeat(10, 1),
                ),
                "topk_idx must be torch.int64, not torch.int32": (x, topk_idx.int(), topk_weights),
                "topk_weights must be torch.float32, not torch.bfloat16": (x, topk_idx, topk_weights.bfloat16()),
                "topk_idx must be [T, top_k] = [6, 2], not [6, 1]": (x, topk_idx[:, :1].contiguous(), topk_weights),
                "topk_weights must be [T, top_k] = [6, 2], not [5, 2]": (x, topk_idx, topk_weights[:5]),
                "topk_idx holds -2; expert ids are in [-1, ": (x, torch.full_like(topk_idx, -2), topk_weights),
                f"topk_idx holds {ep.config.num_experts}; ": (
                    x,
                    topk_idx.clamp(max=0) + ep.config.num_experts,
                    topk_weights,
                ),
                "dispatch needs topk_idx and topk_weights": (x, topk_idx),
            }.items():
                with pytest.raises(ValueError, match=re.escape(text)):
                    ep.dispatch(*arguments)
            with pytest.raises(ValueError, match="expert_alignment must be a positive integer, not 0"):
                ep.dispatch(x, topk_idx, topk_weights, expert_alignment=0)
        d = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=2)
        if rank == 0:
            rows = len(d.x)
            for text, call in {
                "belongs to another ExpertParallel": lambda: ep.combine(d.x, foreign),
                "handle must be the handle of a DispatchResult, not a DispatchResult": lambda: ep.combine(d.x, d),
                f"y has {rows + 1} rows, but the handle's dispatch gave {rows}": lambda: ep.combine(
                    torch.zeros(rows + 1, 40), d.handle
                ),
                f"y must be [{rows}, 40]": lambda: ep.combine(d.x[:, :20].contiguous(), d.handle),
                "y must be torch.bfloat16 or torch.float32, not torch.float64": lambda: ep.combine(
                    d.x.double(), d.handle
                ),
                "not allowed with a handle": lambda: ep.dispatch(x, topk_idx, topk_weights, handle=d.handle),
                "x has 3 tokens, but the handle's dispatch had 6": lambda: ep.dispatch(x[:3], handle=d.handle),
                "expert_alignment=4 differs from the handle's 2": lambda: ep.dispatch(
                    x, handle=d.handle, expert_alignment=4
                ),
            }.items():
                with pytest.raises(ValueError, match=re.escape(text)):
                    call()
        out = ep.combine(d.x, d.handle)
    assert_bitwise(out, oracle_of_identity(ep, 0))
    for call in (lambda: ep.dispatch(x, topk_idx, topk_weights), lambda: ep.combine(d.x, d.handle), ep.stats):
        with pytest.raises(ClosedError, match="was closed"):
            call()
    ep.close()  # again: nothing happens


class Scale(torch.nn.Module):
    """Experts that multiply by powers of two: exact in bf16."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.factors = torch.nn.Parameter(2.0 ** (torch.arange(num_experts, dtype=torch.float32) % 3))

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        counts = offsets.diff()
        return rows * self.factors.repeat_interleave(counts.long())[:, None].to(rows.dtype)


def moe_agrees_with_the_dense_layer(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """Small integers, so that every sum is exact; one rank has no tokens and some experts get no rows."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 0 if rank == setting.num_ranks - 1 and rank > 0 else 9
    with setting.open(group) as ep:
        num_experts, local = ep.config.num_experts, ep.num_local_experts
        x = torch.randint(-3, 4, (tokens, 40), generator=generator).float().requires_grad_()
        topk_idx = torch.randint(-1, max(1, num_experts // 2), (tokens, 2), generator=generator)
        topk_weights = torch.randint(1, 4, (tokens, 2), generator=generator).float().requires_grad_()
        experts = Scale(local)
        out = ep.moe(x, topk_idx, topk_weights, experts)
        out.sum().backward()
    factors = [float(2 ** (e % local % 3)) for e in range(num_experts)]
    leaf, leaf_weights = (t.detach().clone().requires_grad_() for t in (x, topk_weights))
    dense = reference.moe_reference(leaf, topk_idx, leaf_weights, [lambda r, f=f: r * f for f in factors])
    dense.sum().backward()
    assert torch.equal(out, dense)
    assert torch.equal(x.grad, leaf.grad)
    assert torch.equal(topk_weights.grad, leaf_weights.grad)
    assert experts.factors.grad is not None, "also where an expert saw no rows"
    assert bool(experts.factors.grad.isfinite().all())
    expert_grads = torch.zeros(num_experts)
    for e in range(num_experts):
        chosen = leaf_weights.detach().masked_fill(topk_idx != e, 0.0)
        expert_grads[e] = (leaf.detach().sum(1, keepdim=True) * chosen).sum()
    dist.all_reduce(expert_grads, group=group)
    assert torch.equal(experts.factors.grad, expert_grads[rank * local : (rank + 1) * local])


def backward_of_part_of_the_inputs(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """Gradients of x alone, of the weights alone, and none at all; twice through a kept graph."""
    case = Case(setting, dtype="fp32")
    world = World(case)
    expected = world.expected(rank)
    with case.open(group) as ep:
        for needs_x, needs_weights in ((True, False), (False, True), (False, False)):
            x = world.x[rank].clone().requires_grad_(needs_x)
            topk_weights = world.topk_weights[rank].clone().requires_grad_(needs_weights)
            d = ep.dispatch(x, world.topk_idx[rank], topk_weights)
            out = ep.combine(world.y[rank], d.handle)
            assert out.requires_grad == (needs_x or needs_weights)
            assert_bitwise(out.detach(), expected["out"])
            if needs_x:
                for times in (1.0, 2.0):
                    d.x.backward(world.grad_rows[rank], retain_graph=True)
                    assert_bitwise(x.grad, times * expected["x.grad"], "x.grad")
            if needs_weights:
                torch.autograd.backward([out, d.weights], [world.grad_out[rank], world.grad_weights[rank]])
                assert x.grad is None
                assert_bitwise(topk_weights.grad, expected["topk_weights.grad"], "topk_weights.grad")


def leaving_with_an_exception_fails_the_others(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    start = time.monotonic()
    expected = KeyError if rank == 1 else TransportError
    with pytest.raises(expected) as error, setting.open(group) as ep:
        d = ep.dispatch(*tensors_for(rank, ep, 0))
        if rank == 1:
            raise KeyError("lost my way")
        ep.combine(d.x, d.handle)
    assert time.monotonic() - start < TIMEOUT_S / 2
    if rank != 1:
        assert "lost my way" in str(error.value)  # and not merely that rank 1 is gone
    with setting.open(group) as ep:  # a new object works
        d = ep.dispatch(*tensors_for(rank, ep, 0))
        out = ep.combine(d.x, d.handle)
    assert_bitwise(out, oracle_of_identity(ep, 0))


def no_rows(*shape: Any, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """torch.empty where there is no memory for rows, only for bytes such as those of a plan."""
    if dtype != torch.uint8:
        raise IndexError
    return torch.zeros(*shape, dtype=dtype, **options)


def allocation_failure_fails_the_group(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    """Rank 0 has no memory for its rows; the others, who count on it, hear why, and every later call repeats it."""
    with setting.open(group) as ep:
        inputs = tensors_for(rank, ep, 0)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(torch, "empty", no_rows)
            with pytest.raises(IndexError if rank == 0 else TransportError) as first:
                d = ep.dispatch(*inputs)
                ep.combine(d.x, d.handle)
        if rank > 0:
            assert "rank 0 could not finish a dispatch" in str(first.value)
        for _ in range(2):
            with pytest.raises(TransportError, match="rank 0 could not finish a dispatch"):
                ep.dispatch(*inputs)
    with setting.open(group) as ep:  # a new object does not share the broken one
        d = ep.dispatch(*inputs)
        out = ep.combine(d.x, d.handle)
    assert_bitwise(out, oracle_of_identity(ep, 0))


def construction_errors_are_the_same_everywhere(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    last = setting.num_ranks - 1
    attempts: list[tuple[str, dict[str, Any]]] = [
        (
            f"differ in hidden_size: 40 on rank 0, 24 on rank {last}" if last else "",
            {"hidden_size": 24 if rank == last and last else 40},
        ),
        (
            f"differ in fp8_scale: 'fp32' on rank 0, 'ue8m0' on rank {last}" if last else "",
            {"wire_dtype": "fp8", "fp8_scale": "ue8m0" if rank == last and last else "fp32"},
        ),
        ("num_experts=9 is not a multiple" if last else "", {"num_experts": 9}),
        ("memory_budget_bytes=1 is too small", {"memory_budget_bytes": 1}),
    ]
    if last:
        attempts.append(
            ("top_k must be at least 1, not 0", {"top_k": 0 if rank == last else 2}),
        )
    for text, changes in attempts:
        if not text:
            continue
        with pytest.raises(moe_efa.ConfigError) as error:
            setting.open(group, **changes)
        assert text in str(error.value)
    with setting.open(group) as ep:
        ep.dispatch(*tensors_for(rank, ep, 0))


def fp8_bytes_are_close_to_the_floor(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    tokens, hidden_size, num_experts, top_k = 1024, 4096, 32, 8
    selections = [
        PATTERNS["uniform"](tokens, num_experts, top_k, seed=source).topk_idx for source in range(setting.num_ranks)
    ]
    with setting.open(
        group,
        num_experts=num_experts,
        hidden_size=hidden_size,
        top_k=top_k,
        max_tokens_per_rank=tokens,
        memory_budget_bytes=256 << 20,
        wire_dtype="fp8",
        combine_dtype="fp8",
    ) as ep:
        x = torch.ones(tokens, hidden_size, dtype=torch.bfloat16)
        d = ep.dispatch(x, selections[rank], torch.ones(tokens, top_k), output="fp8")
        ep.combine(torch.ones(d.x.shape, dtype=torch.bfloat16), d.handle)
        stats = ep.stats()
    num_nodes, own_node = setting.num_ranks // setting.node_size, rank // setting.node_size

    def rows(source: int, node: int) -> int:  # tokens of a rank that select an expert of a node
        return int((selections[source] // (num_experts // num_nodes) == node).any(1).sum())

    others = [node for node in range(num_nodes) if node != own_node]
    row_bytes = hidden_size + 4 * (hidden_size // 128)
    sent = sum(rows(rank, node) for node in others) * row_bytes
    returned = sum(rows(node * setting.node_size + rank % setting.node_size, own_node) for node in others) * row_bytes
    for phase, floor in (("dispatch", sent), ("combine", returned)):
        assert stats[phase]["wire_floor_bytes"] == floor
        assert 1 <= stats[phase]["wire_bytes"] / floor <= 1.03, (phase, stats[phase])


SCENARIOS: list[Callable[[int, dist.ProcessGroup, Setting], None]] = [
    many_rounds_wrap_the_epoch,
    rounds_reordered_by_many_seeds,
    handles_in_any_order,
    replay_with_a_handle,
    fp8_rows_handed_through,
    a_step_is_repeated_until_it_fits,
    objects_share_natives_of_equal_configuration,
    calls_from_another_thread,
    three_runs_are_bitwise_equal,
    argument_errors_poison_nothing,
    moe_agrees_with_the_dense_layer,
    backward_of_part_of_the_inputs,
    leaving_with_an_exception_fails_the_others,
    allocation_failure_fails_the_group,
    construction_errors_are_the_same_everywhere,
]


# Running


Job = tuple[str, Callable[..., None], tuple[Any, ...]]


def jobs() -> dict[str, Job]:
    out: dict[str, Job] = {case.id: (case.id, run_case, (case,)) for case in grid()}
    for num_ranks in (1, 2, 4):
        for setting in settings_of(num_ranks):
            for scenario in SCENARIOS:
                if scenario is leaving_with_an_exception_fails_the_others and num_ranks == 1:
                    continue
                if scenario is rounds_reordered_by_many_seeds and not setting.reorder:
                    continue
                name = f"{setting.id}-{scenario.__name__}"
                out[name] = (name, scenario, (setting,))
            if setting.node_size < num_ranks and setting.transport == "shm":
                place = setting.id.replace("-shm", "")
                name = f"{place}-{results_do_not_depend_on_transport_or_chunks.__name__}"
                out[name] = (name, results_do_not_depend_on_transport_or_chunks, (setting,))
    place = Setting(4, 2, "shm")
    name = f"{place.id}-{fp8_bytes_are_close_to_the_floor.__name__}"
    out[name] = (name, fp8_bytes_are_close_to_the_floor, (place,))
    return out


JOBS = jobs()


def num_ranks_of(job_id: str) -> int:
    return int(job_id.removeprefix("ep").split("-")[0])


def run_jobs(rank: int, group: dist.ProcessGroup, names: list[str]) -> dict[str, str]:
    """Run jobs one after the other; return the tracebacks of those that failed here."""
    failures = {}
    for name in names:
        _, function, arguments = JOBS[name]
        try:
            function(rank, group, *arguments)
        except Exception as error:
            failures[name] = "".join(traceback.format_exception(error))
            traceback.clear_frames(error.__traceback__)
        dist.barrier(group)
    return failures


@functools.cache
def outcomes(num_ranks: int) -> list[dict[str, str]] | Exception:
    names = [name for name in JOBS if num_ranks_of(name) == num_ranks]
    try:
        return spawn(run_jobs, num_ranks, names, timeout=400.0)
    except Exception as error:
        return error


@pytest.mark.parametrize("name", JOBS)
def test_dispatch_and_combine(name: str) -> None:
    num_ranks = num_ranks_of(name)
    by_rank = outcomes(num_ranks)
    if isinstance(by_rank, Exception):
        with contextlib.suppress(TimeoutError):
            by_rank = spawn(run_jobs, num_ranks, [name], timeout=60.0)
            assert not any(by_rank), by_rank
        raise AssertionError("passes alone, but its set of processes did not survive") from outcomes(num_ranks)
    texts = [f"rank {rank}:\n{failures[name]}" for rank, failures in enumerate(by_rank) if name in failures]
    assert not texts, "\n".join(texts)
