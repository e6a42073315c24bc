"""Dispatch and combine in two halves, so that something else runs between them, and the round in waves made of these.

Start and finish are nodes of their own in the autograd graph, joined by a ticket, a tensor without meaning. Backward
turns them around: the backward of finish starts the exchange of the gradients, that of start waits for it. Autograd
runs nodes that are ready by descending creation, so backward overlaps as forward did, in one order on all ranks. While
it waits it computes what may be late (see late_gradients.py), so that gradients of weights keep no wave from leaving.

    dispatch:  start(x, topk_weights) -> ticket;  finish(ticket) -> rows, weights
    combine:   start(y, weights) -> ticket;       finish(tickets) -> out
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_efa import group_registry, nvtx, op_kernels, ops, plan_tensor
from moe_efa.config import ExpertParallelConfig
from moe_efa.late_gradients import LateGradients, Queue
from moe_efa.native_group import NativeGroup, StartedCall

MOST_WAVES = 8
LEAST_WAVE_BYTES = 4 << 20
WAVES_AHEAD = 2  # dispatches under way beside that of the wave to be computed: combines share the wire with them


def default_waves(config: ExpertParallelConfig, *, num_nodes: int, dtype: torch.dtype) -> int:
    """Waves of a round, from what is equal on all ranks.

    1 where there is one node. Otherwise as many, up to 8, as leave a full wave of a rank 4 MiB to send: ``row bytes *
    max_tokens_per_rank * min(top_k, num_nodes - 1)`` are those of a round in which every token goes as far as it can.

    Example:
        4096 tokens of 7168 bf16 elements between two nodes are 56 MiB: 8 waves of 7 MiB. 1024 of them are 14 MiB: 3.
    """
    if num_nodes == 1:
        return 1
    element_bytes = {"auto": dtype.itemsize, "bf16": 2, "fp32": 4, "fp8": 1}[config.wire_dtype]
    row_bytes = config.hidden_size * element_bytes
    round_bytes = row_bytes * config.max_tokens_per_rank * min(config.top_k, num_nodes - 1)
    return max(1, min(MOST_WAVES, round_bytes // LEAST_WAVE_BYTES))


def wave_sizes(num_tokens: int, waves: int) -> list[int]:
    """Tokens of each wave, nearly equal: ``wave_sizes(5, 3) == [1, 2, 2]``."""
    ends = [num_tokens * wave // waves for wave in range(waves + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


class DispatchHalves:
    """What the nodes of one dispatch share: its call under way, and that of its gradient."""

    def __init__(
        self,
        group: str,
        *,
        plan: Tensor | None = None,
        expert_alignment: int = 1,
        output: str = "same",
        capacity: int | None = None,
    ) -> None:
        self.group, self.expert_alignment, self.output, self.capacity = group, expert_alignment, output, capacity
        self.plan = plan
        self.late: Queue | None = None
        self.needs_weights = False  # a gradient of topk_weights
        self.num_tokens = 0
        self.forward: StartedCall | None = None
        self.gradient: StartedCall | None = None
        self.gradients: tuple[Tensor, Tensor | None] | None = None  # where that writes


def start_dispatch(
    halves: DispatchHalves, x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None
) -> Tensor:
    """Start a dispatch, or the replay of ``halves.plan``; gives its ticket."""
    return _StartDispatch.apply(x, topk_weights, topk_idx, halves)  # type: ignore[no-untyped-call]


def finish_dispatch(halves: DispatchHalves, ticket: Tensor) -> op_kernels.Dispatched:
    """Wait for the dispatch. Of a replay only rows and scales mean anything."""
    return op_kernels.Dispatched(*_FinishDispatch.apply(ticket, halves))  # type: ignore[no-untyped-call]


class CombineHalves:
    """What the nodes of one combine share. ``out`` [T, H] is where it writes."""

    def __init__(self, group: str, plan: Tensor, out: Tensor) -> None:
        self.group, self.plan, self.out = group, plan, out
        self.late: Queue | None = None
        self.forward: StartedCall | None = None
        self.gradient: StartedCall | None = None


def start_combine(halves: CombineHalves, y: Tensor, weights: Tensor | None) -> Tensor:
    """Start a combine; gives its ticket."""
    return _StartCombine.apply(y, weights, halves.plan, halves)  # type: ignore[no-untyped-call]


def finish_combines(all_halves: Sequence[CombineHalves], out: Tensor, tickets: Sequence[Tensor]) -> Tensor:
    """Wait for combines that write consecutive rows of ``out``, and give that a graph."""
    return _FinishCombines.apply(tuple(all_halves), [out], *tickets)  # type: ignore[no-untyped-call]


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor | None, topk_idx: Tensor | None, halves: DispatchHalves
    ) -> Tensor:
        halves.needs_weights = ctx.needs_input_grad[1]
        halves.num_tokens = x.shape[0]
        halves.forward = op_kernels.start_dispatch(
            x.detach(),
            topk_idx,
            None if topk_weights is None else topk_weights.detach(),
            halves.plan,
            group=halves.group,
            expert_alignment=halves.expert_alignment,
            output=halves.output,
            capacity=halves.capacity,
        )
        ctx.halves = halves
        return _ticket()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        halves: DispatchHalves = ctx.halves
        call, gradients = halves.gradient, halves.gradients
        assert call is not None
        assert gradients is not None
        halves.gradient = halves.gradients = None
        native = group_registry.find(halves.group)
        _use_the_time(halves.late, native, call)
        native.finish(call)
        return gradients[0] if ctx.needs_input_grad[0] else None, gradients[1], None, None


class _FinishDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, halves: DispatchHalves) -> tuple[Tensor, ...]:
        call = halves.forward
        assert call is not None
        results = op_kernels.finish_dispatch(call, group=halves.group)
        halves.forward = None
        ctx.halves, ctx.rows_shape, ctx.dtype = halves, results.rows.shape, results.rows.dtype
        ctx.device = results.rows.device
        ctx.save_for_backward(results.plan)
        fp8 = (results.rows,) if results.rows.dtype == op_kernels.FP8_DTYPE else ()
        ctx.mark_non_differentiable(*fp8, results.scales, *results[3:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (plan,) = ctx.saved_tensors
        halves: DispatchHalves = ctx.halves
        grad_rows, _, grad_weights = grads[:3]
        if grad_rows is None:
            grad_rows = torch.zeros(ctx.rows_shape, dtype=ctx.dtype, device=ctx.device)
        native, native_plan = group_registry.find(halves.group), plan_tensor.unwrap(plan, halves.group)
        grad_x = native.empty(halves.num_tokens, native.config.hidden_size, dtype=grad_rows.dtype)
        grad_topk_weights = None
        if not halves.needs_weights:
            grad_weights = None
        else:
            grad_topk_weights = torch.empty(
                halves.num_tokens, native.config.top_k, dtype=torch.float32, device=ctx.device
            )
            if grad_weights is None:
                grad_weights = torch.zeros(ctx.rows_shape[0], dtype=torch.float32, device=ctx.device)
        halves.gradients = grad_x, grad_topk_weights
        halves.gradient = native.start_combine(
            grad_rows.contiguous(),
            native_plan,
            out=grad_x,
            weight_grads=None if grad_weights is None else grad_weights.contiguous(),
            topk_weight_grads=grad_topk_weights,
            gradient=True,
        )
        return _ticket(), None


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor | None, plan: Tensor, halves: CombineHalves) -> Tensor:
        needs_weight_grads = weights is not None and ctx.needs_input_grad[1]
        ctx.halves = halves
        ctx.save_for_backward(weights, y if needs_weight_grads else None, plan)
        halves.forward = op_kernels.start_combine(
            y.detach(), None if weights is None else weights.detach(), plan, group=halves.group, out=halves.out
        )
        return _ticket()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        weights, y, plan = ctx.saved_tensors
        halves: CombineHalves = ctx.halves
        call = halves.gradient
        assert call is not None
        halves.gradient = None
        native = group_registry.find(halves.group)
        _use_the_time(halves.late, native, call)
        grad_rows = native.finish_dispatch(call)[1]
        grad_y, grad_weights = ops.combine_gradients(
            grad_rows, weights, y, plan, group=halves.group, needs_y=ctx.needs_input_grad[0]
        )
        return grad_y, grad_weights, None, None


class _FinishCombines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, all_halves: tuple[CombineHalves, ...], out: list[Tensor], *tickets: Tensor) -> Tensor:
        for halves in all_halves:
            call = halves.forward
            assert call is not None
            group_registry.find(halves.group).finish(call)
            halves.forward = None
        ctx.all_halves, ctx.sizes = all_halves, [len(halves.out) for halves in all_halves]
        ctx.save_for_backward(*(halves.plan for halves in all_halves))
        for halves in all_halves:  # the nodes live as long as the graph, and are to keep no more than they save
            halves.out = halves.plan = torch.empty(0, device="cpu")
        return out[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        parts = torch.split(grad_out.contiguous(), ctx.sizes)
        waves = list(zip(ctx.all_halves, parts, ctx.saved_tensors, strict=True))
        for halves, part, plan in reversed(waves):  # the order in which they are waited for
            native, native_plan = group_registry.find(halves.group), plan_tensor.unwrap(plan, halves.group)
            halves.gradient = native.start_replay(part, native_plan, gradient=True)
        return None, None, *(_ticket() for _ in waves)


def _ticket() -> Tensor:
    return torch.zeros(1, device="cpu")


def _use_the_time(late: Queue | None, native: NativeGroup, call: StartedCall) -> None:
    if late is None:
        return
    if native.device.type == "cuda":  # queued in no time, a part holds up what comes: one for each wait
        turns = iter((True,))
        late.run_while(lambda: next(turns, False))
    else:
        late.run_while(lambda: not native.has_ended(call))


def moe(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    compute: Callable[[op_kernels.Dispatched, int], Tensor],
    *,
    native: NativeGroup,
    expert_alignment: int,
    waves: int,
    weighted: bool = True,
    late: LateGradients | None = None,
) -> Tensor:
    """Dispatch, experts and combine in waves: a few dispatches are ahead of the experts, all combines behind them.

    Args:
        compute: what the experts make of what came, and of how many tokens of this rank's that wave has.
        weighted: the combines multiply by the weights.
        late: gradients to be computed while backward waits for those on their way.
    """
    group = native.name
    sizes = wave_sizes(len(x), waves)
    parts = list(zip(*(torch.split(tensor, sizes) for tensor in (x, topk_idx, topk_weights)), strict=True))
    dispatches = [DispatchHalves(group, expert_alignment=expert_alignment) for _ in parts]
    tickets: list[Tensor | None] = [None] * waves
    combines: list[CombineHalves] = []
    combine_tickets = []
    outputs: Sequence[Tensor] = ()
    out = x
    try:
        for wave in range(-WAVES_AHEAD, waves):
            if 0 <= wave + WAVES_AHEAD < waves:
                coming = wave + WAVES_AHEAD
                tickets[coming] = start_dispatch(dispatches[coming], *parts[coming])
            if wave < 0:
                continue
            ticket = tickets[wave]
            assert ticket is not None
            received = finish_dispatch(dispatches[wave], ticket)
            with nvtx.annotate("experts"):
                y = compute(received, sizes[wave])
            if wave == 0:
                out = native.empty(len(x), native.config.hidden_size, dtype=y.dtype)
                outputs = torch.split(out, sizes)
            combines.append(CombineHalves(group, received.plan, outputs[wave]))
            if late is not None:
                combines[wave].late = dispatches[wave].late = late.queue
            combine_tickets.append(start_combine(combines[wave], y, received.weights if weighted else None))
        return finish_combines(combines, out, combine_tickets)
    except BaseException:
        # The traceback holds this frame. What has been started runs out without us, for the sake of the other ranks.
        for dispatch in dispatches:
            dispatch.forward = None
        for combine in combines:
            combine.forward = None
        raise
