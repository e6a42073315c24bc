"""The exchange as someone writes it who knows where the time goes; over torch.distributed and over MPI.

A token goes once to every rank that has an expert for it, with its expert ids and weights beside it, and comes back as
one sum per rank. Buffers are kept between calls, rows are gathered straight into them, nothing is sorted by comparison,
and a sum over rows is one fused ``embedding_bag``. torch wants its weights in the dtype of the rows, so bf16 rows are
weighted with bf16 weights: less exact than moe_efa, and several times faster than fp32 products and index_add_.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_efa.bench.inputs import Inputs

AllToAll = Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], None]
"""(received, sent, rows to receive per rank, rows to send per rank); both tensors are contiguous."""


class _Bags(NamedTuple):
    """Which rows each sum takes: ``members[starts[i] : starts[i + 1]]`` for sum i."""

    members: Tensor
    starts: Tensor


class _Handle(NamedTuple):
    bags_by_row: _Bags  # of this rank's expert rows, for every received row
    weights: Tensor  # of those, in the same order
    bags_by_token: _Bags  # of the rows that come back, for every own token
    send_splits: list[int]
    recv_splits: list[int]


class LeanExchange:
    """One row per (token, rank) on the wire.

    Args:
        all_to_all: how rows travel.
        reuse_results: whether dispatched rows too lie in a buffer that the next call overwrites.
    """

    def __init__(self, num_ranks: int, num_experts: int, all_to_all: AllToAll, *, reuse_results: bool) -> None:
        self._num_ranks = num_ranks
        self._experts_per_rank = num_experts // num_ranks
        self._all_to_all = all_to_all
        self._reuse_results = reuse_results
        self._buffers: dict[str, Tensor] = {}

    def dispatch(self, inputs: Inputs) -> tuple[Tensor, _Handle]:
        x, topk_idx, topk_weights = inputs
        num_tokens, top_k = topk_idx.shape
        owner = topk_idx // self._experts_per_rank
        wanted = torch.zeros(num_tokens, self._num_ranks, dtype=torch.bool).scatter_(1, owner, True)
        by_rank = wanted.T.contiguous()
        dest, token = by_rank.nonzero(as_tuple=True)  # by rank, then token
        send_counts = by_rank.sum(1)
        recv_counts = torch.empty_like(send_counts)
        ones = [1] * self._num_ranks
        self._all_to_all(recv_counts, send_counts, ones, ones)
        send_splits, recv_splits = send_counts.tolist(), recv_counts.tolist()
        num_sent, num_received = len(token), sum(recv_splits)

        # Expert ids as the receiver counts them (elsewhere: outside of 0 .. experts per rank), then the weights' bits.
        facts = torch.cat([topk_idx.int(), topk_weights.view(torch.int32)], 1)
        sent_facts = facts.index_select(0, token)
        sent_facts[:, :top_k] -= (dest * self._experts_per_rank).int()[:, None]
        received_facts = sent_facts.new_empty(num_received, 2 * top_k)
        self._all_to_all(received_facts, sent_facts, recv_splits, send_splits)

        sent = self._buffer("sent", x, num_sent)
        torch.index_select(x, 0, token, out=sent)
        received = self._buffer("received", x, num_received)
        self._all_to_all(received, sent, recv_splits, send_splits)

        expert = received_facts[:, :top_k]
        mine = (expert >= 0) & (expert < self._experts_per_rank)
        row = mine.nonzero()[:, 0]
        order = _order(expert[mine], self._experts_per_rank)
        rows = self._buffer("rows", x, len(row)) if self._reuse_results else x.new_empty(len(row), x.shape[1])
        torch.index_select(received, 0, row.index_select(0, order), out=rows)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order))
        weights = received_facts[:, top_k:].view(torch.float32)[mine].to(x.dtype)
        returned = (by_rank.flatten().cumsum(0) - 1).view(by_rank.shape).T[wanted]
        by_row, by_token = _Bags(position, _starts(mine.sum(1))), _Bags(returned, _starts(wanted.sum(1)))
        return rows, _Handle(by_row, weights, by_token, send_splits, recv_splits)

    def combine(self, y: Tensor, handle: _Handle) -> Tensor:
        sums = _sum_bags(y, handle.bags_by_row, handle.weights)
        returned = self._buffer("returned", y, sum(handle.send_splits))
        self._all_to_all(returned, sums, handle.send_splits, handle.recv_splits)
        return _sum_bags(returned, handle.bags_by_token, None)

    def _buffer(self, name: str, like: Tensor, rows: int) -> Tensor:
        """[rows, H], the same memory as long as it suffices."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < rows or buffer.shape[1] != like.shape[1] or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = like.new_empty(max(1, rows), like.shape[1])
        return buffer[:rows]


def torch_all_to_all(received: Tensor, sent: Tensor, recv_splits: Sequence[int], send_splits: Sequence[int]) -> None:
    """An :data:`AllToAll` over the default group of torch.distributed."""
    dist.all_to_all_single(received, sent, list(recv_splits), list(send_splits))


def _order(expert: Tensor, num_experts: int) -> Tensor:
    """What sorts the rows by expert and keeps their order otherwise: numpy has a radix sort for 16 bits."""
    if num_experts > 2**15:
        return expert.argsort(stable=True)
    return torch.from_numpy(expert.to(torch.int16).numpy().argsort(kind="stable"))


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _sum_bags(rows: Tensor, bags: _Bags, weights: Tensor | None) -> Tensor:
    if not len(bags.members) or not len(bags.starts):
        return rows.new_zeros(len(bags.starts), rows.shape[1])
    return torch.nn.functional.embedding_bag(bags.members, rows, bags.starts, mode="sum", per_sample_weights=weights)
