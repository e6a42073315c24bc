"""Dispatch and combine between the ranks of a group as operators of torch, with gradients; :mod:`.intra_node` has them.

Around the exchange of torch.distributed, which moves bytes and nothing else, stand the kernels of one rank: a plan of
what to send, whose "experts" are ranks, and a plan of what came, whose experts are this rank's::

    dispatch:  x -> permute by rank -> exchange -> permute by expert -> rows
    combine:   y -> unpermute to what came -> exchange -> unpermute to tokens -> out
       backward: each is the other, on the same plans; the gradients of weights travel beside the rows

Groups go by name and plans as tensors, so that a graph can hold calls. A backward meets the other ranks, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.distributed.distributed_c10d import _resolve_process_group

from .autograd import operator
from .dequantize import dequantize_1x128
from .permute import permute
from .permute_quantize import permute_quantize
from .plan_rows import plan_rows
from .reference import RowPlan
from .unpermute import unpermute
from .unpermute_backward import unpermute_backward

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Plan(NamedTuple):
    """The routing of one dispatch.

    Attributes:
        places: [T, K] int32, in which of the sent rows each selection is; a rank's experts share one. -1 for none.
        sent_per_rank, sent_offsets, sent_positions: the row plan of what is sent, ranks in the place of experts.
        tokens_per_expert, offsets, positions: the row plan of what came, [N, K] selections of this rank's experts.
        splits: [2, R] int64 on the CPU: rows to, and from, every rank.
    """

    places: Tensor
    sent_per_rank: Tensor
    sent_offsets: Tensor
    sent_positions: Tensor
    tokens_per_expert: Tensor
    offsets: Tensor
    positions: Tensor
    splits: Tensor

    @property
    def sent(self) -> RowPlan:
        return RowPlan(self.sent_per_rank, self.sent_offsets, self.sent_positions, 1)

    def received(self, expert_alignment: int) -> RowPlan:
        return RowPlan(self.tokens_per_expert, self.offsets, self.positions, expert_alignment)


class Dispatched(NamedTuple):
    """rows [rows, H], weights [rows] fp32, tokens_per_expert [E_local] int64 on the CPU, and the plan."""

    rows: Tensor
    weights: Tensor
    tokens_per_expert: Tensor
    plan: Plan


class Options(NamedTuple):
    """What every call of a group has in common; :class:`.intra_node.IntraNode` describes them."""

    group: str  # its name; "" for a single rank
    wire_dtype: str
    combine_dtype: str
    fp8_scale: str


def dispatch(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, num_experts: int, expert_alignment: int, options: Options
) -> Dispatched:
    """x [T, H], topk_idx [T, K] int64, topk_weights [T, K] fp32 -> the rows of this rank's experts, and a plan."""
    rows, weights, tokens_per_expert, *plan = _dispatch_op(
        x, topk_idx, topk_weights, num_experts, expert_alignment, *options
    )
    return Dispatched(rows, weights, tokens_per_expert, Plan(*plan))


def replay(x: Tensor, plan: Plan, *, expert_alignment: int, num_rows: int, options: Options) -> Tensor:
    """x [T, H] -> rows [num_rows, H] of an earlier dispatch's plan."""
    return _replay_op(x, list(plan), expert_alignment, num_rows, *options)


def combine(
    y: Tensor, weights: Tensor | None, plan: Plan, *, expert_alignment: int, num_rows: int, options: Options
) -> Tensor:
    """y [num_rows, H], weights [num_rows] fp32 or None -> out [T, H] in y's dtype."""
    return _combine_op(y, weights, list(plan), expert_alignment, num_rows, *options)


def _place_in(group: str) -> tuple[int, int]:
    """(rank, number of ranks); "" is a group of one."""
    if not group:
        return 0, 1
    found = _find(group)
    return found.rank(), found.size()


def _find(group: str) -> dist.ProcessGroup:
    return _resolve_process_group(group)  # type: ignore[arg-type, unused-ignore]  # older torch: str


# What moves


def _exchange(rows: Tensor, splits: list[list[int]], group: str) -> Tensor:
    """[rows to all ranks, ...], in order of ranks -> [rows from all ranks, ...], likewise."""
    if not group:
        return rows
    to_ranks, from_ranks = splits
    received = rows.new_empty(sum(from_ranks), *rows.shape[1:])
    as_bytes = (received.view(torch.uint8), rows.view(torch.uint8))  # not every backend knows bf16, none FP8
    dist.all_to_all_single(*as_bytes, from_ranks, to_ranks, group=_find(group))
    return received


def _spread(x: Tensor, plan: Plan, group: str, wire_dtype: str, fp8_scale: str) -> Tensor:
    """x [T, H] -> what comes from all ranks [N, H], in x's dtype: a row for each (token, rank)."""
    splits = plan.splits.tolist()
    num_rows = sum(splits[0])
    if wire_dtype == "fp8":
        q, scales, _ = permute_quantize(x, plan.sent, scale_format=fp8_scale, num_rows=num_rows)
        return dequantize_1x128(_exchange(q, splits, group), _exchange(scales, splits, group), dtype=x.dtype)
    rows, _ = permute(x.to(DTYPES.get(wire_dtype, x.dtype)), plan.sent, num_rows=num_rows)
    return _exchange(rows, splits, group).to(x.dtype)


def _gather(
    y: Tensor, weights: Tensor | None, plan: Plan, group: str, combine_dtype: str, row_values: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y [rows, H] -> sums [T, H] in y's dtype; row_values [rows] fp32 -> [T, K], or None.

    A rank adds the rows of its experts, the token's rank adds what ranks publish, both in ascending order.
    """
    splits = plan.splits.flip(0).tolist()
    published, values = unpermute(
        y,
        plan.received(1),  # whatever the alignment is: padding is not read
        weights=weights,
        row_values=row_values,
        dtype=DTYPES.get(combine_dtype, y.dtype),
    )
    sums, _ = unpermute(_exchange(published, splits, group), plan.sent)
    if values is None:
        return sums.to(y.dtype), None
    values = _exchange(values, splits, group)
    top_k = plan.places.shape[1]
    topk_pos = torch.arange(top_k, device=values.device)
    index = torch.where(plan.places < 0, values.numel(), plan.places * top_k + topk_pos)
    return sums.to(y.dtype), torch.cat([values.flatten(), values.new_zeros(1)])[index]


# Dispatch

_OPTIONS = "str group, str wire_dtype, str combine_dtype, str fp8_scale"


@operator(
    "dispatch",
    f"(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, int expert_alignment, {_OPTIONS}) -> Tensor[]",
)
def _dispatch_op(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    expert_alignment: int,
    group: str,
    wire_dtype: str,
    combine_dtype: str,
    fp8_scale: str,
) -> list[Tensor]:
    rank, num_ranks = _place_in(group)
    num_local_experts = num_experts // num_ranks
    # Of this rank's tokens. It also refuses bad ids, before anything is sent.
    of_all_experts = plan_rows(topk_idx, num_experts=num_experts, expert_alignment=expert_alignment)

    ranks = topk_idx.div(num_local_experts, rounding_mode="floor")  # -1 stays
    is_same = ranks[:, :, None] == ranks[:, None, :]
    to_send = plan_rows(ranks.masked_fill(is_same.tril(-1).any(-1), -1), num_experts=num_ranks)
    places = torch.where(is_same, to_send.positions[:, None, :], -1).amax(-1)

    # [R, 2 + E_local]: rows, bytes of an element, rows of each expert. The one wait for the device.
    element_sizes = torch.full_like(to_send.tokens_per_expert, x.element_size())
    told = [to_send.tokens_per_expert, element_sizes, *of_all_experts.tokens_per_expert.view(num_ranks, -1).unbind(1)]
    counts = torch.stack(told, 1)
    one_each = [[1] * num_ranks] * 2
    counts, received_counts = torch.stack([counts, _exchange(counts, one_each, group)]).cpu()
    if (received_counts[:, 1] != x.element_size()).any():
        raise ValueError(f"ranks disagree on x's dtype; bytes of an element per rank: {received_counts[:, 1].tolist()}")
    tokens_per_expert = received_counts[:, 2:].sum(0)
    num_rows = int((tokens_per_expert.add(expert_alignment - 1) // expert_alignment * expert_alignment).sum())
    splits = torch.stack([counts[:, 0], received_counts[:, 0]])

    # A row's expert ids and weights, of which a rank takes those that are its own.
    facts = torch.cat([topk_idx.int(), topk_weights.view(torch.int32)], 1)
    facts, _ = permute(facts.view(torch.float32), to_send, num_rows=int(splits[0].sum()))
    idx, weights = _exchange(facts, splits.tolist(), group).chunk(2, 1)
    local_idx = idx.contiguous().view(torch.int32) - rank * num_local_experts
    is_local = (local_idx >= 0) & (local_idx < num_local_experts)
    received = plan_rows(
        local_idx.masked_fill(~is_local, -1), num_experts=num_local_experts, expert_alignment=expert_alignment
    )
    plan = Plan(places, *to_send[:3], *received[:3], splits)
    rows, row_weights = permute(
        _spread(x, plan, group, wire_dtype, fp8_scale), received, topk_weights=weights.contiguous(), num_rows=num_rows
    )
    assert row_weights is not None
    return [rows, row_weights, tokens_per_expert, *plan]


@_dispatch_op.register_fake
def _(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, expert_alignment: int, group: str, *_: str
) -> list[Tensor]:
    num_ranks = _place_in(group)[1]
    num_local_experts = num_experts // num_ranks
    context = torch.library.get_ctx()
    num_rows, num_received = context.new_dynamic_size(), context.new_dynamic_size()
    integers = topk_idx.new_empty(0, dtype=torch.int32)
    plan = Plan(
        places=integers.new_empty(topk_idx.shape),
        sent_per_rank=topk_idx.new_empty(num_ranks),
        sent_offsets=integers.new_empty(num_ranks + 1),
        sent_positions=integers.new_empty(topk_idx.shape),
        tokens_per_expert=topk_idx.new_empty(num_local_experts),
        offsets=integers.new_empty(num_local_experts + 1),
        positions=integers.new_empty(num_received, topk_idx.shape[1]),
        splits=torch.empty(2, num_ranks, dtype=torch.int64, device="cpu"),
    )
    tokens_per_expert = torch.empty(num_local_experts, dtype=torch.int64, device="cpu")
    return [x.new_empty(num_rows, x.shape[1]), topk_weights.new_empty(num_rows), tokens_per_expert, *plan]


@operator(
    "dispatch_backward",
    "(Tensor grad_rows, Tensor? grad_weights, Tensor[] plan, str group, str combine_dtype) -> (Tensor, Tensor)",
)
def _dispatch_backward_op(
    grad_rows: Tensor, grad_weights: Tensor | None, plan: list[Tensor], group: str, combine_dtype: str
) -> tuple[Tensor, Tensor]:
    grad_x, grad_topk_weights = _gather(grad_rows, None, Plan(*plan), group, combine_dtype, grad_weights)
    return grad_x, grad_x.new_empty(0, dtype=torch.float32) if grad_topk_weights is None else grad_topk_weights


@_dispatch_backward_op.register_fake
def _(
    grad_rows: Tensor, grad_weights: Tensor | None, plan: list[Tensor], group: str, combine_dtype: str
) -> tuple[Tensor, Tensor]:
    shape = Plan(*plan).places.shape
    grad_x = grad_rows.new_empty(shape[0], grad_rows.shape[1])
    return grad_x, grad_rows.new_empty((0,) if grad_weights is None else shape, dtype=torch.float32)


def _keep_dispatch(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.group, _, ctx.combine_dtype, _ = inputs[5:]
    ctx.save_for_backward(*output[3:])


def _dispatch_grads(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    needs_weights = ctx.needs_input_grad[2]
    grad_x, grad_topk_weights = _dispatch_backward_op(
        grads[0].contiguous(),
        grads[1].contiguous() if needs_weights else None,
        list(ctx.saved_tensors),
        ctx.group,
        ctx.combine_dtype,
    )
    return grad_x, None, grad_topk_weights if needs_weights else None, *(None,) * 6


_dispatch_op.register_autograd(_dispatch_grads, setup_context=_keep_dispatch)


@operator("replay", f"(Tensor x, Tensor[] plan, int expert_alignment, SymInt num_rows, {_OPTIONS}) -> Tensor")
def _replay_op(
    x: Tensor,
    plan: list[Tensor],
    expert_alignment: int,
    num_rows: int,
    group: str,
    wire_dtype: str,
    combine_dtype: str,
    fp8_scale: str,
) -> Tensor:
    came = _spread(x, Plan(*plan), group, wire_dtype, fp8_scale)
    return permute(came, Plan(*plan).received(expert_alignment), num_rows=num_rows)[0]


@_replay_op.register_fake
def _(x: Tensor, plan: list[Tensor], expert_alignment: int, num_rows: int, *_: str) -> Tensor:
    return x.new_empty(num_rows, x.shape[1])


def _keep_replay(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    plan, ctx.group, ctx.combine_dtype = inputs[1], inputs[4], inputs[6]
    ctx.save_for_backward(*plan)


def _replay_grads(ctx: Any, grad_rows: Tensor) -> tuple[Any, ...]:
    plan = list(ctx.saved_tensors)
    grad_x, _ = _dispatch_backward_op(grad_rows.contiguous(), None, plan, ctx.group, ctx.combine_dtype)
    return grad_x, [None] * len(plan), *(None,) * 6


_replay_op.register_autograd(_replay_grads, setup_context=_keep_replay)


# Combine


@operator(
    "combine",
    f"(Tensor y, Tensor? weights, Tensor[] plan, int expert_alignment, SymInt num_rows, {_OPTIONS}) -> Tensor",
)
def _combine_op(
    y: Tensor,
    weights: Tensor | None,
    plan: list[Tensor],
    expert_alignment: int,
    num_rows: int,
    group: str,
    wire_dtype: str,
    combine_dtype: str,
    fp8_scale: str,
) -> Tensor:
    if len(y) != num_rows:  # a compiler may not know it
        raise ValueError(f"y has {len(y)} rows, but the handle's dispatch gave {num_rows}")
    return _gather(y, weights, Plan(*plan), group, combine_dtype)[0]


@_combine_op.register_fake
def _(y: Tensor, weights: Tensor | None, plan: list[Tensor], *_: Any) -> Tensor:
    return y.new_empty(Plan(*plan).places.shape[0], y.shape[1])


@operator(
    "combine_backward",
    "(Tensor grad_out, Tensor? y, Tensor? weights, Tensor[] plan, int expert_alignment, SymInt num_rows, str group,"
    " str wire_dtype) -> (Tensor, Tensor)",
)
def _combine_backward_op(
    grad_out: Tensor,
    y: Tensor | None,
    weights: Tensor | None,
    plan: list[Tensor],
    expert_alignment: int,
    num_rows: int,
    group: str,
    wire_dtype: str,
) -> tuple[Tensor, Tensor]:
    came = _spread(grad_out, Plan(*plan), group, wire_dtype, "fp32")
    received = Plan(*plan).received(expert_alignment)
    if y is None or weights is None:
        return permute(came, received, num_rows=num_rows)[0], came.new_empty(0, dtype=torch.float32)
    return unpermute_backward(came, y, received, weights=weights)


@_combine_backward_op.register_fake
def _(
    grad_out: Tensor,
    y: Tensor | None,
    weights: Tensor | None,
    plan: list[Tensor],
    expert_alignment: int,
    num_rows: int,
    *_: str,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if weights is None else (num_rows,)
    return grad_out.new_empty(num_rows, grad_out.shape[1]), grad_out.new_empty(shape, dtype=torch.float32)


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weights, plan, ctx.expert_alignment, ctx.num_rows, ctx.group, wire_dtype, _, _ = inputs
    ctx.wire_dtype = "auto" if wire_dtype == "fp8" else wire_dtype  # gradients are not rounded to FP8
    ctx.save_for_backward(None if weights is None else y, weights, *plan)


def _combine_grads(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    y, weights, *plan = ctx.saved_tensors
    grad_y, grad_weights = _combine_backward_op(
        grad_out.contiguous(), y, weights, plan, ctx.expert_alignment, ctx.num_rows, ctx.group, ctx.wire_dtype
    )
    grads = grad_y, grad_weights if ctx.needs_input_grad[1] else None
    return *grads, [None] * len(plan), *(None,) * 6


_combine_op.register_autograd(_combine_grads, setup_context=_keep_combine)


# Ordered: a graph keeps all of them, in order, also on a rank without tokens, for whose results nobody has a use there.
for _op in (_dispatch_op, _dispatch_backward_op, _replay_op, _combine_op, _combine_backward_op):
    _register_effectful_op(_op._opoverload, _EffectType.ORDERED)
    torch.fx.node.has_side_effect(_op._opoverload)
