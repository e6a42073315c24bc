"""The rows of the copy floor are those that the kernels store: counted again from the reference's plan, row by row."""

import pytest
import torch

from moe_efa import reference
from moe_efa.bench.copy_floor import CopyFloor, RowCounts, count_rows, most_rows, row_widths
from moe_efa.bench.options import BenchConfig


def routing(name, *, num_ranks, num_experts, top_k):
    generator = torch.Generator().manual_seed(len(name) + num_ranks)
    selections = []
    for rank in range(num_ranks):
        tokens = {"none": 0, "uneven": 3 * rank}.get(name, 7)
        idx = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
        if name == "holes":
            idx[torch.rand(idx.shape, generator=generator) < 0.5] = -1
        elif name == "nothing":
            idx[:] = -1
        elif name == "one expert":
            idx[:, 0], idx[:, 1:] = 1, -1
        selections.append(idx)
    return selections


def stored(plan, rank, node_size):
    """What a rank stores, as sets of (source, token), from the rows that the plan gives to all ranks."""
    one_node = plan.num_ranks == node_size
    packed, pulled, published, forwarded = set(), 0, set(), set()
    for owner, rows in enumerate(plan.rows):
        for row in rows:
            token = (row.source_rank, row.token_idx)
            forwarder = owner // node_size * node_size + row.source_rank % node_size  # on the experts' node
            if row.source_rank == rank:
                packed.add((token, owner // node_size))
            if owner == rank:
                pulled += 1
                if forwarder != rank:
                    published.add(token)
            if forwarder == rank and not one_node:
                forwarded.add(token)
    return RowCounts(len(packed), pulled, len(published), len(forwarded), plan.num_tokens[rank])


@pytest.mark.parametrize("name", ["full", "holes", "uneven", "none", "nothing", "one expert"])
@pytest.mark.parametrize(("num_ranks", "node_size"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)])
def test_rows_are_those_of_the_plan(name, num_ranks, node_size):
    num_experts = 2 * num_ranks
    idx = routing(name, num_ranks=num_ranks, num_experts=num_experts, top_k=min(3, num_experts))
    plan = reference.make_plan(idx, num_experts=num_experts)
    for rank in range(num_ranks):
        rows = count_rows(idx, rank=rank, node_size=node_size, num_experts=num_experts)
        assert rows == stored(plan, rank, node_size)


@pytest.mark.parametrize(
    ("wire", "combine", "expected"),
    [
        ("auto", "auto", (400, 400, 400, 400, 400)),
        ("fp8", "fp8", (208, 400, 400, 208, 400)),  # two blocks of at most 128, a scale of four bytes for each
        ("fp8", "auto", (208, 400, 400, 400, 400)),
        ("auto", "fp32", (400, 400, 800, 800, 400)),
    ],
)
def test_rows_have_the_width_in_which_they_are_stored(wire, combine, expected):
    assert row_widths(BenchConfig(hidden=200, wire_dtype=wire, combine_dtype=combine)) == expected


def test_the_floor_copies_the_bytes_that_it_names():
    rows, widths = RowCounts(3, 4, 0, 2, 1), RowCounts(5, 6, 7, 8, 9)
    floor = CopyFloor(rows, widths)
    floor.copy()
    assert sum(int(target.sum()) for target in floor._targets) == rows.bytes_of(widths) == 15 + 24 + 16 + 9


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_memory_is_added_up_for_at_least_as_many_rows(node_size):
    config = BenchConfig(tokens=16, topk=4, experts=8)
    balanced = [torch.arange(4).add(t).remainder(8)[None] for t in range(16)]
    idx = [torch.cat(balanced)] * 4
    bound = most_rows(config, node_size=node_size)
    for rank in range(4):
        rows = count_rows(idx, rank=rank, node_size=node_size, num_experts=8)
        assert all(count <= most for count, most in zip(rows, bound, strict=True))
