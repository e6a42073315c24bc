"""Dispatch and combine as operators of torch, with gradients. Backward uses the forward's plan (I8), collective too.

    dispatch, replay:  rows = x[source], weights = topk_weights[source]
       backward: grad_x = combine(grad_rows), unweighted; the gradients of the weights ride along as fp32
    combine:   out[t] = sum over k of w * y
       backward: grad_rows = replay(grad_out); grad_y = w * grad_rows; grad_w = sum over H grad_rows * y

A collective backward runs on a rank only if the rank's graph contains it. So whether an input requires a gradient must
be the same on all ranks, and the results must reach the loss also on ranks without tokens or rows.

Groups go by name and plans as tensors (plan_tensor.py), so that a graph can hold calls. What the operators do is in
op_kernels.py, what they give a compiler to see in op_shapes.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from moe_efa import op_kernels, op_shapes, plan_tensor
from moe_efa.op_kernels import Dispatched

_library: Any = torch.library.Library("moe_efa", "DEF")  # type: ignore[no-untyped-call]
# A list, because Inductor (2.13) loses the sizes found at run time in the results of an ordered operator with several.
_library.define(
    "dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, str group, int expert_alignment, str output,"
    " SymInt? capacity=None, Tensor? after=None) -> Tensor[]"
)
_library.define(
    "replay(Tensor x, Tensor plan, str group, SymInt rows, bool gradient=False, Tensor? after=None)"
    " -> (Tensor, Tensor done)"
)
_library.define(
    "replay_fp8(Tensor x, Tensor plan, str group, SymInt rows, Tensor? after=None)"
    " -> (Tensor, Tensor scales, Tensor done)"
)
_library.define(
    "combine(Tensor y, Tensor? weights, Tensor plan, str group, SymInt num_tokens, bool gradient=False,"
    " Tensor? after=None) -> (Tensor, Tensor done)"
)
_library.define(
    "combine_grads(Tensor grad_rows, Tensor grad_weights, Tensor plan, str group, SymInt num_tokens,"
    " Tensor? after=None) -> (Tensor, Tensor, Tensor done)"
)
_library.define("weight_grads(Tensor grad_rows, Tensor y, Tensor plan, str group) -> Tensor")
_library.define("weighted_rows(Tensor rows, Tensor weights) -> Tensor")

_dispatch_op = torch.ops.moe_efa.dispatch.default
_replay_op = torch.ops.moe_efa.replay.default
_replay_fp8_op = torch.ops.moe_efa.replay_fp8.default
_combine_op = torch.ops.moe_efa.combine.default
_combine_grads_op = torch.ops.moe_efa.combine_grads.default
_weight_grads_op = torch.ops.moe_efa.weight_grads.default
_weighted_rows_op = torch.ops.moe_efa.weighted_rows.default

COLLECTIVES = frozenset({_dispatch_op, _replay_op, _replay_fp8_op, _combine_op, _combine_grads_op})
"""The operators that meet the other ranks."""

# Ordered: a token of torch's runs through a graph's collectives, forward and backward, so that none is dropped, merged
# or run again for backward. Dynamo's own graph has no tokens yet, so it is told, too, that results are not everything.
# Inductor (2.13) drops the order between them when it lowers tokens; hence `after`, see _call.
for _op in COLLECTIVES:
    _register_effectful_op(_op, _EffectType.ORDERED)
    torch.fx.node.has_side_effect(_op)


def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    group: str,
    expert_alignment: int,
    output: str = "same",
    capacity: int | None = None,
) -> Dispatched:
    """x [T, H], topk_idx [T, K] int64, topk_weights [T, K] fp32 -> rows [rows, H], weights [rows] fp32, a plan, ..."""
    call = _dispatch_op if is_watched() else _dispatch_autograd
    return Dispatched(*call(x, topk_idx, topk_weights, group, expert_alignment, output, capacity))


def replay(x: Tensor, plan: Tensor, *, group: str, rows: int) -> Tensor:
    """x [T, H] -> rows [rows, H] of an earlier dispatch's plan."""
    call = _replay_op if is_watched() else _replay_autograd
    return call(x, plan, group, rows, False)[0]


def replay_fp8(x: Tensor, plan: Tensor, *, group: str, rows: int) -> tuple[Tensor, Tensor]:
    """x [T, H] without gradient -> rows [rows, H] e4m3 and scales [rows, blocks] fp32 of an earlier dispatch's plan."""
    call = _replay_fp8_op if is_watched() else _replay_fp8_autograd
    q, scales, _ = call(x, plan, group, rows)
    return q, scales


def combine(y: Tensor, weights: Tensor | None, plan: Tensor, *, group: str, num_tokens: int) -> Tensor:
    """y [rows, H], weights [rows] fp32 or None -> out [T, H] in y's dtype."""
    call = _combine_op if is_watched() else _combine_autograd
    return call(y, weights, plan, group, num_tokens, False)[0]


def is_watched() -> bool:
    """Whether a compiler or a mode has to see the operator itself; else its first kernel is called right away."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def results_of(experts: Callable[[Tensor, Tensor], Tensor], rows: Tensor, offsets: Tensor) -> Tensor:
    """What the experts make of the rows, contiguous and tied to them (see tie). ValueError if that is no tensor."""
    y = experts(rows, offsets)
    if not isinstance(y, Tensor):
        raise ValueError(f"experts(rows, offsets) must return a tensor [rows, H], not {type(y).__name__}")
    return tie(y.contiguous(), rows)


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
        ctx.rows_shape, ctx.rows_dtype, ctx.device = rows.shape, rows.dtype, rows.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, torch.zeros(ctx.rows_shape, dtype=ctx.rows_dtype, device=ctx.device)


# Gradients


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topk_weights: Tensor, topk_idx: Tensor, *options: Any) -> tuple[Tensor, ...]:
        results = Dispatched(*_call(_dispatch_op, x, topk_idx, topk_weights, *options))
        ctx.group, ctx.num_tokens, ctx.num_others = options[0], x.shape[0], 1 + len(options)
        ctx.rows_shape, ctx.dtype, ctx.device = results.rows.shape, x.dtype, x.device
        _keep_plan(ctx, results.plan)
        fp8 = () if results.rows.dtype == x.dtype else (results.rows,)
        ctx.mark_non_differentiable(*fp8, results.scales, *results[3:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (plan,) = ctx.saved_tensors
        grad_rows, _, grad_weights = grads[:3]
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        if grad_rows is None:
            grad_rows = torch.zeros(ctx.rows_shape, dtype=ctx.dtype, device=ctx.device)
        grad_topk_weights = None
        if needs_weights:
            if grad_weights is None:
                grad_weights = torch.zeros(ctx.rows_shape[0], dtype=torch.float32, device=ctx.device)
            grad_x, grad_topk_weights, _ = _call(
                _combine_grads_op, grad_rows, grad_weights, plan, ctx.group, ctx.num_tokens
            )
        else:
            grad_x, _ = _call(_combine_op, grad_rows, None, plan, ctx.group, ctx.num_tokens, True)
        _release_plan(ctx)
        return grad_x if needs_x else None, grad_topk_weights, *(None,) * ctx.num_others


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: Tensor, group: str, rows: int, gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.num_tokens = group, x.shape[0]
        _keep_plan(ctx, plan)
        out, done = _call(_replay_op, x, plan, group, rows, gradient)
        ctx.mark_non_differentiable(done)
        return out, done

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (plan,) = ctx.saved_tensors
        grad_x, _ = _call(_combine_op, grad_rows, None, plan, ctx.group, ctx.num_tokens, True)
        _release_plan(ctx)
        return grad_x, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weights: Tensor | None, plan: Tensor, group: str, num_tokens: int, gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.rows = group, y.shape[0]
        needs_weight_grads = weights is not None and ctx.needs_input_grad[1]
        # The plan, saved always, makes a checkpoint that stops early stop after this call on every rank, not on some.
        _keep_plan(ctx, plan, weights, y if needs_weight_grads else None)
        out, done = _call(_combine_op, y, weights, plan, group, num_tokens, gradient)
        ctx.mark_non_differentiable(done)
        return out, done

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        plan, weights, y = ctx.saved_tensors
        grad_rows, _ = _call(_replay_op, grad_out, plan, ctx.group, ctx.rows, True)
        grads = combine_gradients(grad_rows, weights, y, plan, group=ctx.group, needs_y=ctx.needs_input_grad[0])
        _release_plan(ctx)
        return *grads, None, None, None, None


def combine_gradients(
    grad_rows: Tensor, weights: Tensor | None, y: Tensor | None, plan: Tensor, *, group: str, needs_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of y and of the weights of a combine from the dispatched grad_out; y where the weights need one."""
    grad_weights = None if y is None else _weight_grads_op(grad_rows, y, plan, group)
    if not needs_y:
        return None, grad_weights
    return (grad_rows if weights is None else _weighted_rows_op(grad_rows, weights)), grad_weights


def _keep_plan(ctx: Any, plan: Tensor, *others: Tensor | None) -> None:
    """Save these for backward. Hooks may save a copy of the plan, so what keeps the plan itself is kept as well."""
    ctx.plan_owner = plan_tensor.owner_of(plan) if _is_plain(plan) else None
    ctx.save_for_backward(plan, *others)


def _release_plan(ctx: Any) -> None:
    """At the end of backward: give up the plan where torch gives up the saved tensors."""
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.plan_owner = None


def _dispatch_autograd(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *options: Any) -> list[Tensor]:
    if _wants_graph(x, topk_weights):
        return list(_Dispatch.apply(x, topk_weights, topk_idx, *options))  # type: ignore[no-untyped-call]
    return _call(_dispatch_op, x, topk_idx, topk_weights, *options)


def _replay_autograd(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if _wants_graph(x):
        return _Replay.apply(x, *options)  # type: ignore[no-untyped-call]
    return _call(_replay_op, x, *options)


def _replay_fp8_autograd(x: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_tangents(x)
    return _call(_replay_fp8_op, x, *options)


def _combine_autograd(y: Tensor, weights: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    if _wants_graph(y, weights):
        return _Combine.apply(y, weights, *options)  # type: ignore[no-untyped-call]
    return _call(_combine_op, y, weights, *options)


_last_results: weakref.WeakKeyDictionary[torch.fx.Graph, Tensor] = weakref.WeakKeyDictionary()


def _call(op: Callable[..., Any], *args: Any) -> Any:
    """The results of a collective, below autograd. In a graph that is being recorded it comes after the one before."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._len_torch_dispatch_stack():
            return (_kernel_of[op] if _goes_straight(args) else op)(*args)
        proxy_mode = get_proxy_mode()
        if proxy_mode is None:
            return op(*args)
        graph = proxy_mode.tracer.graph
        num_nodes = len(graph.nodes)
        results = op(*args, after=_last_results.get(graph))
        _last_results[graph] = results[-1]
        # Where a checkpoint around us asks for recomputation, say that this is not for us: it would be in the graph
        # twice, and the partitioner (2.13) fails on a token that forward and backward share.
        for node in islice(reversed(graph.nodes), len(graph.nodes) - num_nodes):
            if "recompute" in node.meta:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return results


_kernel_of: dict[Callable[..., Any], Callable[..., Any]] = {}  # on the CPU


def _goes_straight(args: tuple[Any, ...]) -> bool:
    """Whether torch would do nothing but call the kernel: the way there costs as much as a small call."""
    if torch.autograd._profiler_enabled():
        return False
    return all(_is_plain(arg) for arg in args if isinstance(arg, Tensor))


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values are in the memory of the tensor as they are: no wrapper, no fake, no sign still to change."""
    return type(tensor) in _PLAIN_TYPES and torch._C._dispatch_keys(tensor).raw_repr() in _PLAIN_KEYS


def _plain_keys(inference: bool) -> int:
    with torch.inference_mode(inference):
        return torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_PLAIN_KEYS = (_plain_keys(inference=False), _plain_keys(inference=True))


def _wants_graph(*tensors: Tensor | None) -> bool:
    _refuse_tangents(*tensors)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise ValueError("dispatch and combine have no forward-mode derivatives, but an input has a tangent")


def _opaque(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, which Dynamo must not look into when a graph broke off right before the operator."""
    frames = torch._C._dynamo.eval_frame
    if not hasattr(frames, "set_code_exec_strategy"):
        return torch._disable_dynamo(kernel)  # the same, at some cost per call
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(kernel.__code__, frames._FrameExecStrategy(skip, skip))
    return kernel


_library.impl("dispatch", _opaque(_dispatch_autograd), "Autograd")
_library.impl("replay", _opaque(_replay_autograd), "Autograd")
_library.impl("replay_fp8", _opaque(_replay_fp8_autograd), "Autograd")
_library.impl("combine", _opaque(_combine_autograd), "Autograd")


for _op, _fake, _kernel in (
    (_dispatch_op, op_shapes.dispatch, op_kernels.dispatch),
    (_replay_op, op_shapes.replay, op_kernels.replay),
    (_replay_fp8_op, op_shapes.replay_fp8, op_kernels.replay_fp8),
    (_combine_op, op_shapes.combine, op_kernels.combine),
    (_combine_grads_op, op_shapes.combine_grads, op_kernels.combine_grads),
    (_weight_grads_op, op_shapes.weight_grads, op_kernels.weight_grads),
    (_weighted_rows_op, op_shapes.weighted_rows, op_kernels.weighted_rows),
):
    torch.library.register_fake(_op, _fake, lib=_library)
    _library.impl(_op, _opaque(_kernel), "CPU")
    _library.impl(_op, _kernel, "CUDA")
    _kernel_of[_op] = _kernel
