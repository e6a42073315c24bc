"""The router, and permute and unpermute, with gradients: operators of torch, which graphs of torch.compile hold whole.

The latter two are dispatch and combine of one rank, without the native extension: the order of rows and of additions,
hence every bit, is that of ``ExpertParallel`` on one rank. :mod:`.intra_node` is the same between the ranks of a node::

    topk_idx, topk_weights, _ = router_topk(logits, top_k)
    plan = plan_rows(topk_idx, num_experts=num_experts, expert_alignment=128)
    rows, weights = permute(x, topk_weights, plan)     # as d.x, d.weights of dispatch
    y = experts(rows, plan.offsets)
    out = unpermute(y, plan, weights)                  # as combine; unpermute(y, plan) is the plain sum

There are no second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from moe_efa.routing import Routing

from . import permute as _permute
from . import plan_rows as _plan_rows
from . import router_topk as _router_topk
from . import router_topk_backward as _router_topk_backward
from . import unpermute as _unpermute
from . import unpermute_backward as _unpermute_backward
from .reference import RowPlan


def plan_rows(topk_idx: Tensor, *, num_experts: int, expert_alignment: int = 1) -> RowPlan:
    """:func:`moe_efa.triton_kernels.plan_rows.plan_rows`, which a compiler may see here."""
    tokens_per_expert, offsets, positions = _plan_rows_op(topk_idx, num_experts, expert_alignment)
    return RowPlan(tokens_per_expert, offsets, positions, expert_alignment)


def permute(x: Tensor, topk_weights: Tensor, plan: RowPlan, *, num_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`moe_efa.triton_kernels.permute.permute` with gradients of ``x`` and ``topk_weights``.

    The gradient of a token is the plain sum of its rows' gradients, that of a weight is moved; 0 for -1 selections.
    In a compiled function without ``num_rows`` the number of rows is a size that the graph finds when it runs.

    Returns:
        ``rows`` ``[num_rows, hidden_size]`` in x's dtype and ``weights`` ``[num_rows]`` fp32.
    """
    if topk_weights is None:
        raise ValueError("topk_weights are needed here; permute without gradients does without them")
    return _permute_op(x, topk_weights, *plan, num_rows)


def unpermute(y: Tensor, plan: RowPlan, weights: Tensor | None = None) -> Tensor:
    """:func:`moe_efa.triton_kernels.unpermute.unpermute` with gradients of ``y`` and ``weights``.

    Returns:
        ``[num_tokens, hidden_size]`` in y's dtype.
    """
    return _unpermute_op(y, weights, *plan)


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
    topk_weights, scores, chosen = _router_topk_op(
        logits,
        top_k,
        score_function,
        norm_topk_prob,
        float(routed_scaling_factor),
        e_score_correction_bias,
        n_group,
        topk_group,
        topk_idx,
    )
    return Routing(chosen, topk_weights, scores)


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """The function becomes an operator of torch, which compilers do not look into."""
    # Schemas are written out, since older torch cannot read them from annotations that are strings.
    return torch.library.custom_op(f"moe_efa_triton::{name}", mutates_args=(), schema=schema)


# Rows

_PLAN = "Tensor tokens_per_expert, Tensor offsets, Tensor positions, int expert_alignment"


@operator("plan_rows", "(Tensor topk_idx, int num_experts, int expert_alignment) -> (Tensor, Tensor, Tensor)")
def _plan_rows_op(topk_idx: Tensor, num_experts: int, expert_alignment: int) -> tuple[Tensor, ...]:
    plan = _plan_rows.plan_rows(topk_idx, num_experts=num_experts, expert_alignment=expert_alignment)
    return plan.tokens_per_expert, plan.offsets, plan.positions


@_plan_rows_op.register_fake
def _(topk_idx: Tensor, num_experts: int, expert_alignment: int) -> tuple[Tensor, ...]:
    return (
        topk_idx.new_empty(num_experts, dtype=torch.int64),
        topk_idx.new_empty(num_experts + 1, dtype=torch.int32),
        topk_idx.new_empty(topk_idx.shape, dtype=torch.int32),
    )


@operator("permute", f"(Tensor x, Tensor topk_weights, {_PLAN}, SymInt? num_rows) -> (Tensor, Tensor)")
def _permute_op(x: Tensor, topk_weights: Tensor, *plan_and_num_rows: Any) -> tuple[Tensor, Tensor]:
    *plan, num_rows = plan_and_num_rows
    rows, weights = _permute.permute(x, RowPlan(*plan), topk_weights=topk_weights, num_rows=num_rows)
    assert weights is not None
    return rows, weights


@_permute_op.register_fake
def _(x: Tensor, topk_weights: Tensor, *plan_and_num_rows: Any) -> tuple[Tensor, Tensor]:
    num_rows = plan_and_num_rows[-1]
    if num_rows is None:
        num_rows = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(num_rows, x.shape[1]), topk_weights.new_empty(num_rows)


@operator("permute_backward", f"(Tensor grad_rows, Tensor? grad_weights, {_PLAN}) -> (Tensor, Tensor)")
def _permute_backward_op(grad_rows: Tensor, grad_weights: Tensor | None, *plan: Any) -> tuple[Tensor, Tensor]:
    grad_x, grad_topk_weights = _unpermute.unpermute(grad_rows, RowPlan(*plan), row_values=grad_weights)
    return grad_x, _or_empty(grad_topk_weights, grad_x)


@_permute_backward_op.register_fake
def _(grad_rows: Tensor, grad_weights: Tensor | None, *plan: Any) -> tuple[Tensor, Tensor]:
    shape = RowPlan(*plan).positions.shape
    grad_topk_weights = None if grad_weights is None else grad_weights.new_empty(shape)
    return grad_rows.new_empty(shape[0], grad_rows.shape[1]), _or_empty(grad_topk_weights, grad_rows)


def _keep_plan(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, *tensors, ctx.expert_alignment, _ = inputs
    ctx.save_for_backward(*tensors)


def _permute_grads(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    needs_weights = ctx.needs_input_grad[1]
    grad_x, grad_topk_weights = _permute_backward_op(
        grad_rows.contiguous(),
        grad_weights.contiguous() if needs_weights else None,
        *ctx.saved_tensors,
        ctx.expert_alignment,
    )
    return grad_x, grad_topk_weights if needs_weights else None, *(None,) * 5


_permute_op.register_autograd(_permute_grads, setup_context=_keep_plan)


@operator("unpermute", f"(Tensor y, Tensor? weights, {_PLAN}) -> Tensor")
def _unpermute_op(y: Tensor, weights: Tensor | None, *plan: Any) -> Tensor:
    return _unpermute.unpermute(y, RowPlan(*plan), weights=weights)[0]


@_unpermute_op.register_fake
def _(y: Tensor, weights: Tensor | None, *plan: Any) -> Tensor:
    return y.new_empty(RowPlan(*plan).positions.shape[0], y.shape[1])


@operator(
    "unpermute_backward",
    f"(Tensor grad_out, Tensor? y, Tensor? weights, {_PLAN}, SymInt num_rows) -> (Tensor, Tensor)",
)
def _unpermute_backward_op(
    grad_out: Tensor, y: Tensor | None, weights: Tensor | None, *plan_and_num_rows: Any
) -> tuple[Tensor, Tensor]:
    *plan, num_rows = plan_and_num_rows
    if y is None or weights is None:  # a plain sum
        rows, _ = _permute.permute(grad_out, RowPlan(*plan), num_rows=num_rows)
        return rows, _or_empty(None, rows)
    return _unpermute_backward.unpermute_backward(grad_out, y, RowPlan(*plan), weights=weights)


@_unpermute_backward_op.register_fake
def _(grad_out: Tensor, y: Tensor | None, weights: Tensor | None, *plan_and_num_rows: Any) -> tuple[Tensor, Tensor]:
    grad_y = grad_out.new_empty(plan_and_num_rows[-1], grad_out.shape[1])
    return grad_y, _or_empty(None if weights is None else torch.empty_like(weights), grad_out)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    y, weights, *plan, ctx.expert_alignment = inputs
    ctx.num_rows = y.shape[0]
    ctx.save_for_backward(None if weights is None else y, weights, *plan)


def _unpermute_grads(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_y, grad_weights = _unpermute_backward_op(
        grad_out.contiguous(), *ctx.saved_tensors, ctx.expert_alignment, ctx.num_rows
    )
    return grad_y, grad_weights if ctx.needs_input_grad[1] else None, *(None,) * 4


_unpermute_op.register_autograd(_unpermute_grads, setup_context=_keep_rows)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Operators have no optional results."""
    return like.new_empty(0, dtype=torch.float32) if x is None else x


# The router


@operator(
    "router_topk",
    "(Tensor logits, int top_k, str score_function, bool norm_topk_prob, float routed_scaling_factor,"
    " Tensor? e_score_correction_bias, int n_group, int topk_group, Tensor? topk_idx) -> (Tensor, Tensor, Tensor)",
)
def _router_topk_op(
    logits: Tensor,
    top_k: int,
    score_function: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    e_score_correction_bias: Tensor | None,
    n_group: int,
    topk_group: int,
    topk_idx: Tensor | None,
) -> tuple[Tensor, ...]:
    routing = _router_topk.router_topk(
        logits,
        top_k,
        score_function=score_function,
        e_score_correction_bias=e_score_correction_bias,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
        topk_idx=topk_idx,
    )
    return routing.topk_weights, routing.scores, routing.topk_idx


@_router_topk_op.register_fake
def _(logits: Tensor, top_k: int, *options: Any) -> tuple[Tensor, ...]:
    num_tokens = logits.shape[0]
    return (
        logits.new_empty(num_tokens, top_k, dtype=torch.float32),
        logits.new_empty(logits.shape, dtype=torch.float32),
        logits.new_empty(num_tokens, top_k, dtype=torch.int64),
    )


@operator(
    "router_topk_backward",
    "(Tensor grad_weights, Tensor? grad_scores, Tensor topk_weights, Tensor scores, Tensor topk_idx,"
    " str score_function, bool norm_topk_prob, float routed_scaling_factor, ScalarType dtype) -> Tensor",
)
def _router_topk_backward_op(
    grad_weights: Tensor,
    grad_scores: Tensor | None,
    topk_weights: Tensor,
    scores: Tensor,
    topk_idx: Tensor,
    score_function: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    return _router_topk_backward.router_topk_backward(
        grad_weights,
        Routing(topk_idx, topk_weights, scores),
        grad_scores=grad_scores,
        score_function=score_function,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
        dtype=dtype,
    )


@_router_topk_backward_op.register_fake
def _(grad_weights: Tensor, grad_scores: Tensor | None, *others: Any) -> Tensor:
    scores, dtype = others[1], others[-1]
    return scores.new_empty(scores.shape, dtype=dtype)


def _keep_routing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.options, ctx.dtype = inputs[2:5], inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _router_topk_grads(
    ctx: Any, grad_weights: Tensor | None, grad_scores: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_weights is None and grad_scores is None:
        return (None,) * 9
    topk_weights, scores, topk_idx = ctx.saved_tensors
    if grad_weights is None:
        grad_weights = torch.zeros_like(topk_weights)
    if grad_scores is not None:
        grad_scores = grad_scores.contiguous()
    grad_logits = _router_topk_backward_op(
        grad_weights.contiguous(), grad_scores, topk_weights, scores, topk_idx, *ctx.options, ctx.dtype
    )
    return grad_logits, *(None,) * 8


_router_topk_op.register_autograd(_router_topk_grads, setup_context=_keep_routing)
