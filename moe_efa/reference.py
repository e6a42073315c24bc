"""The oracle: dispatch, combine and their gradients for a whole group in one process, in plain torch.

Slow and obvious: it loops in the order in which every other implementation must add (csrc/kernels, triton_kernels), so
results agree bitwise. Lists run over the ranks of the group. It knows the plan and nothing else: no chunks, rings or
epochs, which is invariant I3.

Numerics: scores are fp32; every product ``w * y`` and every addition is rounded to fp32 on its own, never fused. FP8 is
that of :mod:`moe_efa.quantization`. A dtype is a word as in ``ExpertParallelConfig``; for the backward functions it is
that of gradients, ``config.grad_dispatch_dtype`` and ``config.grad_combine_dtype``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_efa.quantization import dequantize_1x128, quantize_1x128

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class RowSource(NamedTuple):
    """Where a dispatched row comes from, and which of the group's experts it is for."""

    source_rank: int
    token_idx: int
    topk_pos: int
    expert_idx: int


@dataclass(frozen=True)
class ReferencePlan:
    """The routing of one dispatch.

    ``rows[r][i]`` describes row ``i`` of the rank ``r`` that owns the expert, None for a padding row; ``offsets[r]``
    has ``num_experts / num_ranks + 1`` padded starts; ``tokens_per_expert[r]`` the true counts; ``num_tokens[r]`` the
    tokens that rank ``r`` sent, each with ``top_k`` selections.

    In static mode rank ``r`` has ``capacity[r]`` rows, those without a source None; counts and offsets are those of the
    rows that are there. ``lost[r]`` are those that are not, ``required_capacity[r]`` is what rank ``r`` needed.
    """

    num_experts: int
    top_k: int
    num_tokens: tuple[int, ...]
    rows: tuple[tuple[RowSource | None, ...], ...]
    offsets: tuple[tuple[int, ...], ...]
    tokens_per_expert: tuple[tuple[int, ...], ...]
    capacity: tuple[int, ...] | None
    required_capacity: tuple[int, ...]
    lost: tuple[tuple[RowSource, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    def overflow_of_experts(self, rank: int) -> int:
        """What ``d.overflow`` says on a rank after dispatch: 0, or the capacity that its own experts needed."""
        return self.required_capacity[rank] if self.lost[rank] else 0

    def overflow(self, rank: int) -> int:
        """What ``d.overflow`` says on a rank after combine: the most that a rank needed which lost rows of its tokens,
        or the rank itself; 0 if there is none."""
        concerned = [owner for owner, lost in enumerate(self.lost) if any(row.source_rank == rank for row in lost)]
        return max([self.required_capacity[owner] for owner in concerned] + [self.overflow_of_experts(rank)])


class ReferenceDispatch(NamedTuple):
    """What one rank receives: x [rows, H] in the senders' dtype, tokens_per_expert [E_local] int64, offsets
    [E_local + 1] int32, weights [rows] fp32; scales [rows, ceil(H / 128)] fp32 where x is e4m3."""

    x: Tensor
    tokens_per_expert: Tensor
    offsets: Tensor
    weights: Tensor
    scales: Tensor | None = None


def make_plan(
    topk_idx: Sequence[Tensor],
    *,
    num_experts: int,
    expert_alignment: int = 1,
    capacity: Sequence[int] | None = None,
) -> ReferencePlan:
    """Order the rows of every rank: by expert, then source rank, then source token, then top-k position.

    Args:
        topk_idx: per rank [T_r, K] int64 global expert ids; -1 selects nothing.
        num_experts: experts of the group; rank r owns ``[r * E / R, (r + 1) * E / R)``.
        expert_alignment: every expert's rows are padded to a multiple of this.
        capacity: per rank, for static mode. Rows whose place is not below it, rounded down to a multiple of
            ``expert_alignment``, are lost.

    Two ranks, four experts, top-2; expert 1 and expert 2 see three rows each:

    >>> idx = [torch.tensor([[1, 2], [1, -1]]), torch.tensor([[2, 1], [2, 3]])]
    >>> plan = make_plan(idx, num_experts=4, expert_alignment=2)
    >>> plan.tokens_per_expert
    ((0, 3), (3, 1))
    >>> plan.offsets
    ((0, 0, 4), (0, 4, 6))
    >>> [tuple(row) if row else None for row in plan.rows[0]]
    [(0, 0, 0, 1), (0, 1, 0, 1), (1, 0, 1, 1), None]

    The same with room for five rows on rank 0, and for two on rank 1, which needed six:

    >>> plan = make_plan(idx, num_experts=4, expert_alignment=2, capacity=(5, 2))
    >>> [len(rows) for rows in plan.rows], plan.offsets, plan.tokens_per_expert
    ([5, 2], ((0, 0, 4), (0, 2, 2)), ((0, 3), (2, 0)))
    >>> [tuple(row) for row in plan.lost[1]]
    [(1, 1, 0, 2), (1, 1, 1, 3)]
    >>> plan.overflow_of_experts(1), plan.overflow(0), plan.overflow(1)
    (6, 0, 6)
    """
    num_ranks = len(topk_idx)
    if num_experts % num_ranks:
        raise ValueError(f"num_experts={num_experts} is not a multiple of the {num_ranks} ranks")
    experts_per_rank = num_experts // num_ranks
    rows_of_expert: list[list[RowSource]] = [[] for _ in range(num_experts)]
    for source_rank, selection in enumerate(topk_idx):
        for token_idx, experts in enumerate(selection.tolist()):
            for topk_pos, expert_idx in enumerate(experts):
                if expert_idx != -1:
                    rows_of_expert[expert_idx].append(RowSource(source_rank, token_idx, topk_pos, expert_idx))

    rows, offsets, tokens_per_expert, required_capacity, lost = [], [], [], [], []
    for rank in range(num_ranks):
        own_rows: list[RowSource | None] = []
        own_offsets = [0]
        own_experts = range(rank * experts_per_rank, (rank + 1) * experts_per_rank)
        for expert_idx in own_experts:
            own_rows += rows_of_expert[expert_idx]
            while len(own_rows) % expert_alignment:
                own_rows.append(None)
            own_offsets.append(len(own_rows))
        required_capacity.append(len(own_rows))
        usable = len(own_rows)
        if capacity is not None:
            usable = min(usable, capacity[rank] // expert_alignment * expert_alignment)
        lost.append(tuple(row for row in own_rows[usable:] if row is not None))
        own_rows = own_rows[:usable]
        counts = [sum(row is not None and row.expert_idx == e for row in own_rows) for e in own_experts]
        if capacity is not None:
            own_rows += [None] * (capacity[rank] - usable)
        rows.append(tuple(own_rows))
        offsets.append(tuple(min(start, usable) for start in own_offsets))
        tokens_per_expert.append(tuple(counts))
    return ReferencePlan(
        num_experts=num_experts,
        top_k=topk_idx[0].shape[1],
        num_tokens=tuple(selection.shape[0] for selection in topk_idx),
        rows=tuple(rows),
        offsets=tuple(offsets),
        tokens_per_expert=tuple(tokens_per_expert),
        capacity=None if capacity is None else tuple(capacity),
        required_capacity=tuple(required_capacity),
        lost=tuple(lost),
    )


def dispatch(
    x: Sequence[Tensor],
    topk_weights: Sequence[Tensor],
    plan: ReferencePlan,
    *,
    wire_dtype: str = "auto",
    fp8_scale: str = "fp32",
    output: str = "same",
) -> list[ReferenceDispatch]:
    """Send every row to the rank that owns its expert.

    Args:
        x: per rank [T_r, H] bf16 or fp32.
        topk_weights: per rank [T_r, K] fp32; those of -1 selections are never read.
        plan: from :func:`make_plan`.
        wire_dtype: "auto" (x's dtype), "bf16", "fp32" or "fp8"; rows are rounded to it, those a rank sends to itself
            too.
        fp8_scale: "fp32" or "ue8m0".
        output: "fp8" gives the rows as quantized, with their scales.

    Returns:
        Per rank a :class:`ReferenceDispatch`. Padding rows are zeros with weight 0; their scales are 1.

    >>> idx = [torch.tensor([[1, 2], [1, -1]]), torch.tensor([[2, 1], [2, 3]])]
    >>> w = [torch.tensor([[0.5, 0.25], [1.0, float("nan")]]), torch.tensor([[0.75, 0.125], [0.5, 2.0]])]
    >>> x = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])]
    >>> plan = make_plan(idx, num_experts=4, expert_alignment=2)
    >>> received = dispatch(x, w, plan)
    >>> received[0].x.tolist()
    [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [0.0, 0.0]]
    >>> received[0].weights.tolist()
    [0.5, 1.0, 0.125, 0.0]
    >>> received[1].x.tolist()
    [[1.0, 2.0], [5.0, 6.0], [7.0, 8.0], [0.0, 0.0], [7.0, 8.0], [0.0, 0.0]]
    >>> received[1].weights.tolist()
    [0.25, 0.75, 0.5, 0.0, 2.0, 0.0]
    """
    received = []
    rows_of_rank = dispatch_rows(x, plan, wire_dtype=wire_dtype, fp8_scale=fp8_scale)
    for rank, rows in enumerate(rows_of_rank):
        scales = None
        if output == "fp8":
            rows, scales = dispatch_fp8_rows(x, plan, fp8_scale=fp8_scale)[rank]
        weights = torch.zeros(len(plan.rows[rank]), dtype=torch.float32)
        for i, row in enumerate(plan.rows[rank]):
            if row is not None:
                weights[i] = topk_weights[row.source_rank][row.token_idx, row.topk_pos]
        received.append(
            ReferenceDispatch(
                x=rows,
                tokens_per_expert=torch.tensor(plan.tokens_per_expert[rank], dtype=torch.int64),
                offsets=torch.tensor(plan.offsets[rank], dtype=torch.int32),
                weights=weights,
                scales=scales,
            )
        )
    return received


def dispatch_rows(
    x: Sequence[Tensor], plan: ReferencePlan, *, wire_dtype: str = "auto", fp8_scale: str = "fp32"
) -> list[Tensor]:
    """The rows alone: a dispatch that replays a plan. Per rank [rows, H] in x's dtype."""
    sent = [_round(tokens, wire_dtype, fp8_scale) for tokens in x]
    received = []
    for rank_rows in plan.rows:
        rows = torch.zeros(len(rank_rows), x[0].shape[1], dtype=x[0].dtype)
        for i, row in enumerate(rank_rows):
            if row is not None:
                rows[i] = sent[row.source_rank][row.token_idx]
        received.append(rows)
    return received


def dispatch_fp8_rows(
    x: Sequence[Tensor], plan: ReferencePlan, *, fp8_scale: str = "fp32"
) -> list[tuple[Tensor, Tensor]]:
    """The rows of :func:`dispatch_rows` on an FP8 wire as they are: per rank [rows, H] e4m3 and [rows, blocks] fp32."""
    sent = [quantize_1x128(tokens, scale_format=fp8_scale) for tokens in x]
    received = []
    for rank_rows in plan.rows:
        codes = torch.zeros(len(rank_rows), x[0].shape[1], dtype=torch.uint8)
        scales = torch.ones(len(rank_rows), sent[0][1].shape[1])
        for i, row in enumerate(rank_rows):
            if row is not None:
                q, q_scales = sent[row.source_rank]
                codes[i], scales[i] = q[row.token_idx].view(torch.uint8), q_scales[row.token_idx]
        received.append((codes.view(torch.float8_e4m3fn), scales))
    return received


def combine(
    y: Sequence[Tensor],
    plan: ReferencePlan,
    *,
    weights: Sequence[Tensor] | None = None,
    node_size: int,
    combine_dtype: str = "auto",
    fp8_scale: str = "fp32",
) -> list[Tensor]:
    """Bring the experts' rows home: ``out[t] = sum over k of w[t, k] * y[row(t, k)]``, in a fixed order.

    Per token: every rank adds its own experts' terms in (expert, top-k position) order and rounds the sum to
    ``combine_dtype``, to bf16 where that is "fp8"; every node adds its ranks' sums in rank order and rounds to
    ``combine_dtype``, the token's own node too; the nodes' sums are added in node order and rounded once to y's dtype.
    A sum starts from its first term, and who has no term does not take part. A token that selected nothing gives zeros.
    In static mode terms that were lost are missing, but a node that lost all it had to do for a token adds zeros.

    Args:
        y: per rank [rows, H] bf16 or fp32. Padding rows are never read.
        plan: from :func:`make_plan`.
        weights: per rank [rows] fp32 dispatched weights, or None for the plain sum.
        node_size: ranks per node.
        combine_dtype: "auto" (y's dtype), "bf16", "fp32" or "fp8".
        fp8_scale: "fp32" or "ue8m0".

    Returns:
        Per rank [T_r, H] in y's dtype.

    With y = 10 * x of the example of :func:`dispatch`, each rank a node of its own:

    >>> idx = [torch.tensor([[1, 2], [1, -1]]), torch.tensor([[2, 1], [2, 3]])]
    >>> w = [torch.tensor([[0.5, 0.25], [1.0, float("nan")]]), torch.tensor([[0.75, 0.125], [0.5, 2.0]])]
    >>> x = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])]
    >>> plan = make_plan(idx, num_experts=4)
    >>> received = dispatch(x, w, plan)
    >>> y = [10 * d.x for d in received]
    >>> [out.tolist() for out in combine(y, plan, weights=[d.weights for d in received], node_size=1)]
    [[[7.5, 15.0], [30.0, 40.0]], [[43.75, 52.5], [175.0, 200.0]]]
    >>> [out.tolist() for out in combine(y, plan, node_size=2)]
    [[[20.0, 40.0], [30.0, 40.0]], [[100.0, 120.0], [140.0, 160.0]]]
    """
    num_ranks, hidden_size, dtype = plan.num_ranks, y[0].shape[1], y[0].dtype
    publish_dtype = "bf16" if combine_dtype == "fp8" else combine_dtype
    if num_ranks % node_size:
        raise ValueError(f"node_size={node_size} does not divide {num_ranks} ranks")

    # published[(source rank, token)][owner rank]: rows of a plan are in (expert, top-k position) order for each token.
    published: dict[tuple[int, int], dict[int, Tensor]] = {}
    for owner_rank, rank_rows in enumerate(plan.rows):
        sums: dict[tuple[int, int], Tensor] = {}
        for i, row in enumerate(rank_rows):
            if row is None:
                continue
            term = y[owner_rank][i].float()
            if weights is not None:
                term = weights[owner_rank][i] * term
            token = (row.source_rank, row.token_idx)
            sums[token] = sums[token] + term if token in sums else term
        for token, total in sums.items():
            published.setdefault(token, {})[owner_rank] = _round(total, publish_dtype, auto=dtype)

    experts_per_node = plan.num_experts // num_ranks * node_size
    lost_on = {(row.source_rank, row.token_idx, row.expert_idx // experts_per_node) for r in plan.lost for row in r}
    results = []
    for source_rank, num_tokens in enumerate(plan.num_tokens):
        out = torch.zeros(num_tokens, hidden_size, dtype=dtype)
        for token_idx in range(num_tokens):
            by_rank = published.get((source_rank, token_idx), {})
            node_sums = []
            for first_rank in range(0, num_ranks, node_size):
                node_ranks = range(first_rank, first_rank + node_size)
                terms = [by_rank[rank] for rank in node_ranks if rank in by_rank]
                if not terms and (source_rank, token_idx, first_rank // node_size) in lost_on:
                    terms = [torch.zeros(hidden_size)]
                if terms:
                    node_sums.append(_round(_sum_in_order(terms), combine_dtype, fp8_scale, auto=dtype))
            if node_sums:
                out[token_idx] = _sum_in_order(node_sums).to(dtype)
        results.append(out)
    return results


def dispatch_backward(
    grad_rows: Sequence[Tensor],
    grad_weights: Sequence[Tensor] | None,
    plan: ReferencePlan,
    *,
    node_size: int,
    combine_dtype: str = "auto",
    fp8_scale: str = "fp32",
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Gradients of :func:`dispatch`: the unweighted combine of the rows' gradients; the weights' are moved as fp32.

    Args:
        grad_rows: per rank [rows, H], gradient of the dispatched rows.
        grad_weights: per rank [rows] fp32, gradient of the dispatched weights, or None.
        combine_dtype, fp8_scale: as in :func:`combine`; of gradients, ``config.grad_combine_dtype``.

    Returns:
        ``(grad_x, grad_topk_weights)``, per rank [T_r, H] and [T_r, K] fp32 (0 where nothing was selected).
    """
    grad_x = combine(grad_rows, plan, node_size=node_size, combine_dtype=combine_dtype, fp8_scale=fp8_scale)
    if grad_weights is None:
        return grad_x, None
    grad_topk_weights = [torch.zeros(num_tokens, plan.top_k) for num_tokens in plan.num_tokens]
    for owner_rank, rank_rows in enumerate(plan.rows):
        for i, row in enumerate(rank_rows):
            if row is not None:
                grad_topk_weights[row.source_rank][row.token_idx, row.topk_pos] = grad_weights[owner_rank][i]
    return grad_x, grad_topk_weights


def combine_backward(
    grad_out: Sequence[Tensor],
    y: Sequence[Tensor],
    plan: ReferencePlan,
    *,
    weights: Sequence[Tensor] | None = None,
    wire_dtype: str = "auto",
    fp8_scale: str = "fp32",
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Gradients of :func:`combine`: dispatch of ``grad_out`` on the plan, times w where y was.

    The weight gradient of a row is ``sum over H of grad_row * y`` in fp32; ``grad_y`` is the fp32 product ``w *
    grad_row`` rounded once to y's dtype. Both are 0 on padding rows, whatever y holds there. ``wire_dtype`` and
    ``fp8_scale`` are as in :func:`dispatch`; of gradients, ``config.grad_dispatch_dtype``.

    Returns:
        ``(grad_y, grad_weights)``, per rank [rows, H] in y's dtype and [rows] fp32 (None if unweighted).
    """
    grad_rows = dispatch_rows(grad_out, plan, wire_dtype=wire_dtype, fp8_scale=fp8_scale)
    if weights is None:
        return grad_rows, None
    grad_y, grad_weights = [], []
    for rank, rows in enumerate(grad_rows):
        grad_y.append((weights[rank][:, None] * rows.float()).to(y[rank].dtype))
        row_grad = (rows.float() * y[rank].float()).sum(-1)
        is_padding = torch.tensor([row is None for row in plan.rows[rank]], dtype=torch.bool)
        grad_weights.append(row_grad.masked_fill(is_padding, 0.0))
    return grad_y, grad_weights


def moe_reference(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """A Mixture-of-Experts layer as its definition says: a dense loop over the experts, differentiable by autograd.

    Args:
        x: [T, H] bf16 or fp32.
        topk_idx: [T, K] int64 in [-1, len(experts)).
        topk_weights: [T, K] fp32.
        experts: one function [n, H] -> [n, H] per expert of the group.

    Returns:
        [T, H] in x's dtype: ``sum over k of topk_weights[t, k] * experts[topk_idx[t, k]](x[t])``, summed in fp32.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> moe_reference(x, torch.tensor([[0, 1], [1, -1]]), torch.ones(2, 2), [lambda r: 10 * r, lambda r: -r]).tolist()
    [[9.0, 18.0], [-3.0, -4.0]]
    """
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert_idx, expert in enumerate(experts):
        token_idx, topk_pos = (topk_idx == expert_idx).nonzero(as_tuple=True)
        rows = expert(x[token_idx]).float() * topk_weights[token_idx, topk_pos][:, None]
        out = out.index_add(0, token_idx, rows)
    return out.to(x.dtype)


def _sum_in_order(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _round(values: Tensor, dtype_name: str, fp8_scale: str = "fp32", *, auto: torch.dtype | None = None) -> Tensor:
    """Round rows, or one row, to a named dtype ("auto": to ``auto``, or not at all); return them in their own dtype."""
    if dtype_name == "fp8":
        q, scales = quantize_1x128(values.reshape(-1, values.shape[-1]), scale_format=fp8_scale)
        return dequantize_1x128(q, scales, dtype=values.dtype).reshape(values.shape)
    dtype = (auto or values.dtype) if dtype_name == "auto" else DTYPES[dtype_name]
    return values.to(dtype).to(values.dtype)
