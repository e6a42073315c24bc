"""The baseline "torch per-expert": the exchange as users write it first, with torch.distributed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_efa.bench.inputs import Inputs


class _Handle(NamedTuple):
    topk_weights: Tensor
    order: Tensor
    arrival: Tensor
    send_splits: list[int]
    recv_splits: list[int]


class TorchPerExpert:
    """One row per (token, expert) on the wire.

    Rows are sorted by expert, counts and then rows go through ``all_to_all_single``, and the receiver brings them into
    expert-major order; the way back is the reverse, with an fp32 weighted sum over [T, K, H] at the end.
    """

    def __init__(self, num_ranks: int, num_experts: int) -> None:
        self._num_ranks = num_ranks
        self._num_experts = num_experts

    def dispatch(self, inputs: Inputs) -> tuple[Tensor, _Handle]:
        x, topk_idx, topk_weights = inputs
        experts_per_rank = self._num_experts // self._num_ranks
        flat = topk_idx.flatten()
        order = flat.argsort(stable=True)
        send_counts = flat.bincount(minlength=self._num_experts)
        recv_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(recv_counts, send_counts)
        send_splits = send_counts.view(self._num_ranks, experts_per_rank).sum(1).tolist()
        recv_splits = recv_counts.view(self._num_ranks, experts_per_rank).sum(1).tolist()
        received = x.new_empty(sum(recv_splits), x.shape[1])
        dist.all_to_all_single(received, x[order // topk_idx.shape[1]], recv_splits, send_splits)
        expert_of_row = torch.arange(experts_per_rank).repeat(self._num_ranks).repeat_interleave(recv_counts)
        arrival = expert_of_row.argsort(stable=True)
        return received[arrival], _Handle(topk_weights, order, arrival, send_splits, recv_splits)

    def combine(self, y: Tensor, handle: _Handle) -> Tensor:
        in_arrival_order = torch.empty_like(y)
        in_arrival_order[handle.arrival] = y
        sorted_rows = y.new_empty(handle.topk_weights.numel(), y.shape[1])
        dist.all_to_all_single(sorted_rows, in_arrival_order, handle.send_splits, handle.recv_splits)
        rows = torch.empty_like(sorted_rows)
        rows[handle.order] = sorted_rows
        terms = rows.view(*handle.topk_weights.shape, y.shape[1]).float() * handle.topk_weights[:, :, None]
        return terms.sum(1).to(y.dtype)
