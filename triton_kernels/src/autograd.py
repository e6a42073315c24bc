"""Differentiable kernels: the router, and permute and unpermute, which are dispatch and combine of one rank.

The latter two serve where no network is: a single GPU, or experts that a node shares by other means. No native
extension is used; the order of rows and of additions, hence every bit, is that of ``ExpertParallel`` on one rank::

    topk_idx, topk_weights, _ = router_topk(logits, top_k)
    plan = plan_rows(topk_idx, num_experts=num_experts, expert_alignment=128)
    rows, weights = permute(x, topk_weights, plan)     # as d.x, d.weights of dispatch
    y = experts(rows, plan.offsets)
    out = unpermute(y, plan, weights)                  # as combine; unpermute(y, plan) is the plain sum
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_efa.routing import Routing

from . import permute as _permute
from . import router_topk as _router_topk
from . import unpermute as _unpermute
from .reference import RowPlan
from .router_topk_backward import router_topk_backward
from .unpermute_backward import unpermute_backward


def permute(x: Tensor, topk_weights: Tensor, plan: RowPlan, *, num_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`moe_efa.triton_kernels.permute.permute` with gradients of ``x`` and ``topk_weights``.

    The gradient of a token is the plain sum of its rows' gradients, that of a weight is moved; 0 for -1 selections.

    Returns:
        ``rows`` ``[num_rows, hidden_size]`` in x's dtype and ``weights`` ``[num_rows]`` fp32.
    """
    return _Permute.apply(x, topk_weights, plan, num_rows)  # type: ignore[no-untyped-call]


def unpermute(y: Tensor, plan: RowPlan, weights: Tensor | None = None) -> Tensor:
    """:func:`moe_efa.triton_kernels.unpermute.unpermute` with gradients of ``y`` and ``weights``.

    Returns:
        ``[num_tokens, hidden_size]`` in y's dtype.
    """
    if weights is None:
        return _PlainUnpermute.apply(y, plan)  # type: ignore[no-untyped-call]
    return _WeightedUnpermute.apply(y, weights, plan)  # type: ignore[no-untyped-call]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topk_weights: Tensor, plan: RowPlan, num_rows: int | None) -> tuple[Tensor, ...]:
        ctx.plan = plan
        rows, weights = _permute.permute(x, plan, topk_weights=topk_weights, num_rows=num_rows)
        assert weights is not None
        return rows, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_topk_weights = _unpermute.unpermute(
            grad_rows.contiguous(), ctx.plan, row_values=grad_weights.contiguous()
        )
        return grad_x, grad_topk_weights, None, None


class _PlainUnpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan, ctx.num_rows = plan, len(y)
        return _unpermute.unpermute(y, plan)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _permute.permute(grad_out.contiguous(), ctx.plan, num_rows=ctx.num_rows)[0], None


class _WeightedUnpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y, weights)
        return _unpermute.unpermute(y, plan, weights=weights)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        y, weights = ctx.saved_tensors
        grad_y, grad_weights = unpermute_backward(grad_out.contiguous(), y, ctx.plan, weights=weights)
        return grad_y, grad_weights, None


def router_topk(
    logits: Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    e_score_correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    topk_idx: Tensor | None = None,
) -> Routing:
    """:func:`moe_efa.triton_kernels.router_topk.router_topk`; weights and scores are differentiable in the logits."""
    options = {
        "score_function": score_function,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": routed_scaling_factor,
    }
    selection = {
        "e_score_correction_bias": e_score_correction_bias,
        "n_group": n_group,
        "topk_group": topk_group,
        "topk_idx": topk_idx,
    }
    return Routing(*_RouterTopk.apply(logits, top_k, options, selection))  # type: ignore[no-untyped-call]


class _RouterTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k: int, options: dict[str, Any], selection: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        routing = _router_topk.router_topk(logits, top_k, **options, **selection)
        ctx.options, ctx.dtype = options, logits.dtype
        ctx.mark_non_differentiable(routing.topk_idx)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*routing)
        return tuple(routing)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Tensor | None, grad_weights: Tensor | None, grad_scores: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        routing = Routing(*ctx.saved_tensors)
        if grad_weights is None and grad_scores is None:
            return None, None, None, None
        if grad_weights is None:
            grad_weights = torch.zeros_like(routing.topk_weights)
        if grad_scores is not None:
            grad_scores = grad_scores.contiguous()
        grad_logits = router_topk_backward(
            grad_weights.contiguous(), routing, grad_scores=grad_scores, dtype=ctx.dtype, **ctx.options
        )
        return grad_logits, None, None, None
