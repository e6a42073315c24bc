"""The copy floor: what the rows of a round cost if each is stored once and nothing else is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_efa.bench.options import DTYPES, BenchConfig

_FP8_BLOCK, _FP8_SCALE_BYTES = 128, 4


class RowCounts(NamedTuple):
    """Rows that one rank stores in one round, or the bytes of such a row, by what stores them."""

    packed: int
    pulled: int
    published: int
    forwarded: int
    reduced: int

    def bytes_of(self, widths: RowCounts) -> int:
        """Bytes of all rows, if a row has ``widths``."""
        return sum(count * width for count, width in zip(self, widths, strict=True))


def count_rows(topk_idx: Sequence[Tensor], *, rank: int, node_size: int, num_experts: int) -> RowCounts:
    """Rows that ``rank`` must store in one round, from the selections of all ranks (-1 selects nothing).

    Packed: one per (own token, node). Pulled: one per (token, own expert). Published: one per token that has an own
    expert, of the sources on the rails of the other ranks of this node. Forwarded: one per token, of the sources on
    this rank's rail, that has an expert on this node; none where there is one node, whose forwarders write the output.
    Reduced: one per own token, the output.

    Two nodes of two ranks, each rank with one expert and one token:

    >>> idx = [torch.tensor([experts]) for experts in ([0, 1], [0, 2], [1, 3], [0, 3])]
    >>> count_rows(idx, rank=0, node_size=2, num_experts=4)
    RowCounts(packed=1, pulled=3, published=2, forwarded=2, reduced=1)

    The same four ranks as one node:

    >>> count_rows(idx, rank=0, node_size=4, num_experts=4)
    RowCounts(packed=1, pulled=3, published=2, forwarded=0, reduced=1)
    """
    num_ranks, experts_per_rank = len(topk_idx), num_experts // len(topk_idx)
    num_nodes, node, rail = num_ranks // node_size, rank // node_size, rank % node_size
    owners = [selection // experts_per_rank for selection in topk_idx]  # -1 stays negative
    nodes = [owner // node_size for owner in owners]
    others = [owner for source, owner in enumerate(owners) if source % node_size != rail]
    return RowCounts(
        packed=sum(_tokens_with(nodes[rank], to) for to in range(num_nodes)),
        pulled=sum(int((owner == rank).sum()) for owner in owners),
        published=sum(_tokens_with(owner, rank) for owner in others),
        forwarded=sum(_tokens_with(to, node) for to in nodes[rail::node_size]) if num_nodes > 1 else 0,
        reduced=len(topk_idx[rank]),
    )


def row_widths(config: BenchConfig) -> RowCounts:
    """Bytes of a row as it is stored, without padding: packed and forwarded rows as they travel, FP8 with its scales.

    What ranks of a node publish to each other is not FP8 yet: blocks are made once, of the sum.

    >>> row_widths(BenchConfig(hidden=256, wire_dtype="fp8", combine_dtype="fp32"))
    RowCounts(packed=264, pulled=512, published=1024, forwarded=1024, reduced=512)
    """
    wire, back = (config.dtype if name == "auto" else name for name in (config.wire_dtype, config.combine_dtype))
    return RowCounts(
        packed=_width(wire, config.hidden),
        pulled=config.row_bytes,
        published=_width("bf16" if back == "fp8" else back, config.hidden),
        forwarded=_width(back, config.hidden),
        reduced=config.row_bytes,
    )


def most_rows(config: BenchConfig, *, node_size: int) -> RowCounts:
    """No rank stores more than this if all ranks receive alike: an upper bound, before the routing is known."""
    nodes, ranks = config.ranks // node_size, min(config.topk, config.ranks)
    return RowCounts(
        packed=min(config.topk, nodes) * config.tokens,
        pulled=config.topk * config.tokens,
        published=ranks * config.tokens * (node_size - 1) // node_size,
        forwarded=min(config.topk, nodes) * config.tokens if nodes > 1 else 0,
        reduced=config.tokens,
    )


def _tokens_with(places: Tensor, place: int) -> int:
    """Rows of ``places`` [T, K] that have ``place``."""
    return int((places == place).any(1).sum())


def _width(dtype: str, hidden: int) -> int:
    if dtype == "fp8":
        return hidden + -(-hidden // _FP8_BLOCK) * _FP8_SCALE_BYTES
    return hidden * DTYPES[dtype].itemsize


class CopyFloor:
    """Copies as many rows as a round stores on this rank, each once, between buffers that were touched before."""

    def __init__(self, rows: RowCounts, widths: RowCounts) -> None:
        shapes = list(zip(rows, widths, strict=True))
        self._sources = [torch.ones(shape, dtype=torch.uint8) for shape in shapes]
        self._targets = [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]

    def copy(self) -> None:
        """The whole round."""
        self._copy(RowCounts._fields)

    def dispatch(self) -> None:
        """Its dispatch alone."""
        self._copy(("packed", "pulled"))

    def combine(self) -> None:
        """Its combine alone, and what that must read: a sum of bytes stands for the weighted sum of expert rows."""
        self._sources[RowCounts._fields.index("pulled")].flatten().view(torch.int64).sum()
        self._copy(("published", "forwarded", "reduced"))

    def _copy(self, kinds: Sequence[str]) -> None:
        for kind in kinds:
            at = RowCounts._fields.index(kind)
            self._targets[at].copy_(self._sources[at])
