"""The copy floor: what the rows of a round cost if each is written once and nothing else is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowCounts(NamedTuple):
    """Rows that one rank writes in one round, by what writes them."""

    packed: int
    pulled: int
    published: int
    forwarded: int
    reduced: int

    @property
    def total(self) -> int:
        return sum(self)


def count_rows(topk_idx: Sequence[Tensor], *, rank: int, node_size: int, num_experts: int) -> RowCounts:
    """Rows that ``rank`` must write in one round, from the selections of all ranks.

    Packed: one per (own token, node). Pulled: one per (token, own expert). Published: one per token that has an own
    expert. Forwarded: one per token, of the sources on this rank's rail, that has an expert on this node. Reduced: one
    per own token.

    Two ranks, each a node of its own, each with two experts and two tokens:

    >>> idx = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2, 3], [0, 3]])]
    >>> count_rows(idx, rank=0, node_size=1, num_experts=4)
    RowCounts(packed=3, pulled=4, published=3, forwarded=3, reduced=2)
    """
    experts_per_rank = num_experts // len(topk_idx)
    owners = [selection // experts_per_rank for selection in topk_idx]
    node, rail = rank // node_size, rank % node_size
    packed = _count_distinct(owners[rank] // node_size)
    pulled = sum(int((owner == rank).sum()) for owner in owners)
    published = sum(int((owner == rank).any(1).sum()) for owner in owners)
    forwarded = sum(int((owner // node_size == node).any(1).sum()) for owner in owners[rail::node_size])
    return RowCounts(packed, pulled, published, forwarded, len(topk_idx[rank]))


def _count_distinct(values: Tensor) -> int:
    """Distinct values of every row, added over the rows."""
    ordered = values.sort(1).values
    return len(values) + int((ordered[:, 1:] != ordered[:, :-1]).sum())


class CopyFloor:
    """Copies as many rows as a round writes on this rank, each once, between buffers that were touched before."""

    def __init__(self, rows: RowCounts, hidden: int, dtype: torch.dtype) -> None:
        self._sources = [torch.ones(count, hidden, dtype=dtype) for count in rows]
        self._targets = [torch.zeros(count, hidden, dtype=dtype) for count in rows]

    def copy(self) -> None:
        for target, source in zip(self._targets, self._sources, strict=True):
            target.copy_(source)
