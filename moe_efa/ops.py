"""Dispatch and combine as differentiable functions. Backward uses the forward's plan (I8) and is collective too.

    dispatch:  rows = x[source], weights = topk_weights[source]
       backward: grad_x = combine(grad_rows), unweighted; the gradients of the weights ride along as fp32
    combine:   out[t] = sum over k of w * y
       backward: grad_rows = dispatch(grad_out) on the plan; grad_y = w * grad_rows; grad_w = sum over H grad_rows * y

A collective backward runs on a rank only if the rank's graph contains it. So whether an input requires a gradient must
be the same on all ranks, and the results must reach the loss also on ranks without tokens or rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from moe_efa import _C
    from moe_efa.native_group import NativeGroup

_BLOCK_ELEMENTS = 1 << 22  # bounds the fp32 temporaries of a weight gradient


def dispatch(
    native_group: NativeGroup, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, expert_alignment: int
) -> tuple[Tensor, Tensor, _C.Plan]:
    """x [T, H], topk_idx [T, K] int64, topk_weights [T, K] fp32 -> rows [rows, H], weights [rows] fp32, plan."""
    return _Dispatch.apply(x, topk_weights, topk_idx, native_group, expert_alignment)  # type: ignore[no-untyped-call]


def dispatch_fp8(
    native_group: NativeGroup, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, expert_alignment: int
) -> tuple[Tensor, Tensor, Tensor, _C.Plan]:
    """As dispatch, for an x without gradient: rows [rows, H] e4m3, scales [rows, blocks] fp32, weights, plan."""
    return _DispatchFp8.apply(x, topk_weights, topk_idx, native_group, expert_alignment)  # type: ignore[no-untyped-call]


def replay(native_group: NativeGroup, x: Tensor, plan: _C.Plan) -> Tensor:
    """x [T, H] -> rows [rows, H] of an earlier dispatch's plan."""
    return _Replay.apply(x, native_group, plan)  # type: ignore[no-untyped-call]


def combine(native_group: NativeGroup, y: Tensor, weights: Tensor | None, plan: _C.Plan) -> Tensor:
    """y [rows, H], weights [rows] fp32 or None -> out [T, H] in y's dtype."""
    return _Combine.apply(y, weights, native_group, plan)  # type: ignore[no-untyped-call]


def tie(y: Tensor, rows: Tensor) -> Tensor:
    """y; where it has no graph, as when experts skip empty inputs, one that gives the dispatched rows zero gradients.

    Backward is collective, so it has to run also on a rank whose experts saw no row.
    """
    if y.requires_grad or not rows.requires_grad or not torch.is_grad_enabled():
        return y
    return _Tie.apply(y, rows)  # type: ignore[no-untyped-call]


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor) -> Tensor:
        ctx.rows_shape, ctx.rows_dtype = rows.shape, rows.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, torch.zeros(ctx.rows_shape, dtype=ctx.rows_dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor, topk_idx: Tensor, native_group: NativeGroup, expert_alignment: int
    ) -> tuple[Tensor, Tensor, _C.Plan]:
        plan, rows, weights = native_group.dispatch(x, topk_idx, topk_weights, expert_alignment)
        ctx.native_group, ctx.plan = native_group, plan
        return rows, weights, plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: None) -> tuple[Tensor | None, ...]:
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        grad_x, grad_topk_weights = ctx.native_group.combine(
            grad_rows.contiguous(),
            ctx.plan,
            weight_grads=grad_weights.contiguous() if needs_weights else None,
            gradient=True,
        )
        return grad_x if needs_x else None, grad_topk_weights, None, None, None


class _DispatchFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor, topk_idx: Tensor, native_group: NativeGroup, expert_alignment: int
    ) -> tuple[Tensor, Tensor, Tensor, _C.Plan]:
        plan, rows, scales, weights = native_group.dispatch_fp8(x, topk_idx, topk_weights, expert_alignment)
        ctx.native_group, ctx.plan, ctx.x_shape, ctx.x_dtype = native_group, plan, x.shape, x.dtype
        ctx.mark_non_differentiable(rows, scales)
        return rows, scales, weights, plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, __: Tensor, grad_weights: Tensor, ___: None) -> tuple[Tensor | None, ...]:
        # The weights' gradients ride on rows, which have none of their own here.
        no_grad_rows = torch.zeros(ctx.plan.rows, ctx.x_shape[1], dtype=ctx.x_dtype)
        _, grad_topk_weights = ctx.native_group.combine(
            no_grad_rows, ctx.plan, weight_grads=grad_weights.contiguous(), gradient=True
        )
        return None, grad_topk_weights, None, None, None


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, native_group: NativeGroup, plan: _C.Plan) -> Tensor:
        ctx.native_group, ctx.plan = native_group, plan
        return native_group.replay(x, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.native_group.combine(grad_rows.contiguous(), ctx.plan, gradient=True)[0], None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor | None, native_group: NativeGroup, plan: _C.Plan) -> Tensor:
        ctx.native_group, ctx.plan = native_group, plan
        needs_weight_grads = weights is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(weights, y if needs_weight_grads else None)
        return native_group.combine(y, plan, weights=weights)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weights, y = ctx.saved_tensors
        grad_rows = ctx.native_group.replay(grad_out.contiguous(), ctx.plan, gradient=True)
        grad_weights = None if y is None else _weight_grads(grad_rows, y, ctx.plan)
        if not ctx.needs_input_grad[0]:
            return None, grad_weights, None, None
        grad_y = grad_rows if weights is None else (weights[:, None] * grad_rows).to(grad_rows.dtype)
        return grad_y, grad_weights, None, None


def _weight_grads(grad_rows: Tensor, y: Tensor, plan: _C.Plan) -> Tensor:
    """[rows] fp32: ``(grad_rows.float() * y.float()).sum(-1)``, and 0 on padding rows, where y may be anything."""
    rows, hidden_size = y.shape
    grads = torch.empty(rows, dtype=torch.float32)
    block = max(1, _BLOCK_ELEMENTS // hidden_size)
    for start in range(0, rows, block):
        stop = start + block
        grads[start:stop] = (grad_rows[start:stop].float() * y[start:stop].float()).sum(-1)
    offsets = plan.offsets
    for start, stop, count in zip(offsets[:-1], offsets[1:], plan.tokens_per_expert, strict=True):
        grads[start + count : stop] = 0.0
    return grads
