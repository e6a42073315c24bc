"""Any group, any routing, any wire: dispatch, combine, replay and the gradients' ways are bitwise those of the oracle.

Ranks are threads here, so that hypothesis can build hundreds of groups and shrink what it finds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_efa import ExpertParallelConfig, plan_tensor, reference
from moe_efa.native_group import NativeGroup
from moe_efa.testing import assert_bitwise
from moe_efa.testing.in_process import in_process_ranks
from moe_efa.testing.routing import PATTERNS

DTYPES = reference.DTYPES
WORDS = ("auto", "bf16", "fp32", "fp8")


@dataclass(frozen=True)
class World:
    """One group and one round; every tensor follows from it."""

    num_nodes: int
    node_size: int
    experts_per_rank: int
    hidden_size: int
    top_k: int
    num_tokens: tuple[int, ...]
    patterns: tuple[str, ...]
    drop_fraction: float
    expert_alignment: int
    x_dtype: str
    y_dtype: str
    weighted: bool
    wire_dtype: str
    combine_dtype: str
    grad_wire_dtype: str
    fp8_scale: str
    chunk_rows: int
    slots: int
    room: tuple[str, ...]  # per rank, in static mode; empty otherwise
    scale: float
    seed: int

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.node_size

    @property
    def config(self) -> ExpertParallelConfig:
        return ExpertParallelConfig(
            num_experts=self.experts_per_rank * self.num_ranks,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            max_tokens_per_rank=max(1, *self.num_tokens),
            wire_dtype=self.wire_dtype,
            combine_dtype=self.combine_dtype,
            grad_wire_dtype=self.grad_wire_dtype,
            fp8_scale=self.fp8_scale,
            node_size=self.node_size,
            timeout_s=60.0,
            heartbeat_timeout_s=60.0,
            memory_budget_bytes=64 << 20,
            chunk_rows=self.chunk_rows,
            slots=self.slots,
        )

    def rows(self, counts: list[int], dtype: str, purpose: int) -> list[Tensor]:
        """Random rows per rank; some are zero, some tiny, so that formats meet their limits."""
        out = []
        for rank, count in enumerate(counts):
            generator = torch.Generator().manual_seed(self.seed * 1009 + rank * 31 + purpose)
            values = torch.randn(count, self.hidden_size, generator=generator) * self.scale
            values *= torch.tensor([0.0, 1.0, 1.0, 1e-3])[torch.randint(4, (count, 1), generator=generator)]
            out.append(values.to(DTYPES[dtype]))
        return out


# Capacities of static mode, from the rows that a rank needs.
ROOM: dict[str, Callable[[int], int]] = {
    "all": lambda rows: rows,
    "one less": lambda rows: max(0, rows - 1),
    "half": lambda rows: rows // 2,
    "none": lambda rows: 0,
    "more": lambda rows: rows + 5,
}


@st.composite
def worlds(draw: st.DrawFn) -> World:
    num_nodes, node_size = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (3, 1), (4, 1), (2, 3)]))
    num_ranks = num_nodes * node_size
    experts_per_rank = draw(st.integers(1, 3))
    top_k = draw(st.integers(1, min(6, experts_per_rank * num_ranks)))
    token_count = st.integers(0, 40)
    return World(
        num_nodes=num_nodes,
        node_size=node_size,
        experts_per_rank=experts_per_rank,
        hidden_size=draw(st.sampled_from([1, 2, 7, 16, 40, 127, 128, 129, 200, 264])),
        top_k=top_k,
        num_tokens=tuple(draw(st.lists(token_count, min_size=num_ranks, max_size=num_ranks))),
        patterns=tuple(draw(st.lists(st.sampled_from(sorted(PATTERNS)), min_size=num_ranks, max_size=num_ranks))),
        drop_fraction=draw(st.sampled_from([0.0, 0.3, 1.0])),
        expert_alignment=draw(st.sampled_from([1, 1, 4, 16])),
        x_dtype=draw(st.sampled_from(sorted(DTYPES))),
        y_dtype=draw(st.sampled_from(sorted(DTYPES))),
        weighted=draw(st.booleans()),
        wire_dtype=draw(st.sampled_from(WORDS)),
        combine_dtype=draw(st.sampled_from(WORDS)),
        grad_wire_dtype=draw(st.sampled_from(WORDS)),
        fp8_scale=draw(st.sampled_from(["fp32", "ue8m0"])),
        chunk_rows=draw(st.sampled_from([0, 1, 3, 8, 64])),
        slots=draw(st.sampled_from([0, 2, 3])),
        room=tuple(draw(st.lists(st.sampled_from(sorted(ROOM)), min_size=num_ranks, max_size=num_ranks)))
        if draw(st.booleans())
        else (),
        scale=draw(st.sampled_from([1.0, 1e-30, 1e4])),
        seed=draw(st.integers(0, 1 << 20)),
    )


@settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(world=worlds())
def test_every_round_is_the_oracle_s(world: World) -> None:
    check_round(world)


def check_round(world: World) -> None:
    config, ranks = world.config, range(world.num_ranks)
    routings = [
        PATTERNS[pattern](
            count, config.num_experts, world.top_k, seed=world.seed + rank, drop_fraction=world.drop_fraction
        )
        for rank, (pattern, count) in enumerate(zip(world.patterns, world.num_tokens, strict=True))
    ]
    weights = [routing.topk_weights for routing in routings]
    x = world.rows(list(world.num_tokens), world.x_dtype, 1)
    make_plan = functools.partial(
        reference.make_plan,
        [routing.topk_idx for routing in routings],
        num_experts=config.num_experts,
        expert_alignment=world.expert_alignment,
    )
    plan = make_plan()
    if world.room:
        required = zip(world.room, plan.required_capacity, strict=True)
        plan = make_plan(capacity=[ROOM[room](rows) for room, rows in required])
    received = reference.dispatch(x, weights, plan, wire_dtype=config.wire_dtype, fp8_scale=config.fp8_scale)
    note(f"rows per rank {[len(d.x) for d in received]}")
    y = world.rows([len(d.x) for d in received], world.y_dtype, 2)
    for rank in ranks:  # padding rows of y are never read
        padding = torch.tensor([row is None for row in plan.rows[rank]], dtype=torch.bool)
        y[rank] = y[rank].masked_fill(padding[:, None], float("nan"))
    row_weights = [d.weights for d in received] if world.weighted else None
    grad_weights = [torch.randn(len(d.x), generator=torch.Generator().manual_seed(world.seed + 7)) for d in received]
    grad_out = world.rows(list(world.num_tokens), world.y_dtype, 3)
    combine_words: dict[str, Any] = {"node_size": world.node_size, "fp8_scale": config.fp8_scale}
    out = reference.combine(y, plan, weights=row_weights, combine_dtype=config.combine_dtype, **combine_words)
    grad_x, grad_topk = reference.dispatch_backward(
        y, grad_weights, plan, combine_dtype=config.grad_combine_dtype, **combine_words
    )
    grad_rows = reference.dispatch_rows(
        grad_out, plan, wire_dtype=config.grad_dispatch_dtype, fp8_scale=config.fp8_scale
    )
    assert grad_topk is not None

    def round_trip(rank: int, group: NativeGroup) -> None:
        for turn in ("first", "second"):  # the second reuses slots
            what = f"rank {rank}, {turn} round: "
            native_plan, rows, got_weights = group.dispatch(
                x[rank],
                routings[rank].topk_idx,
                weights[rank],
                world.expert_alignment,
                None if plan.capacity is None else plan.capacity[rank],
            )
            overflow = plan_tensor.overflow_of(native_plan, rows.device)
            assert overflow.shape == (() if world.room else (0,))
            if world.room:
                assert int(overflow) == plan.overflow_of_experts(rank), what + "overflow after dispatch"
            assert_bitwise(rows, received[rank].x, what + "rows")
            assert_bitwise(got_weights, received[rank].weights, what + "weights")
            assert tuple(native_plan.offsets) == plan.offsets[rank]
            assert tuple(native_plan.tokens_per_expert) == plan.tokens_per_expert[rank]
            got, _ = group.combine(y[rank], native_plan, weights=None if row_weights is None else row_weights[rank])
            assert_bitwise(got, out[rank], what + "combine")
            if world.room:
                assert int(overflow) == plan.overflow(rank), what + "overflow after combine"
            replayed = group.replay(grad_out[rank], native_plan, gradient=True)
            assert_bitwise(replayed, grad_rows[rank], what + "replayed gradients")
            got_x, got_topk = group.combine(y[rank], native_plan, weight_grads=grad_weights[rank], gradient=True)
            assert got_topk is not None
            assert_bitwise(got_x, grad_x[rank], what + "grad_x")
            assert_bitwise(got_topk, grad_topk[rank], what + "grad_topk_weights")
            if world.room:
                assert int(overflow) == plan.overflow(rank), what + "overflow in the end"

    with in_process_ranks(config, world.num_ranks) as group:
        group.run(round_trip)
