"""What the operators of ops.py do, on the CPU and on a GPU, and the same in halves. Nothing here has gradients.

Compiled graphs and autograd may hand over any strides. What depends on values, or on sizes that a compiler leaves open,
is checked here; by then nothing has been sent (I17).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_efa import _C, group_registry, plan_tensor
from moe_efa.config import ExpertParallelConfig
from moe_efa.native_group import NativeGroup, PlanTables, StartedCall

FP8_DTYPE = torch.float8_e4m3fn

_BLOCK_ELEMENTS = 1 << 22  # bounds the fp32 temporaries of the gradients of a combine


class Dispatched(NamedTuple):
    """Results of a dispatch, with the fields of DispatchResult; scales [0] where rows have none.

    In static mode tokens_per_expert is what DispatchResult calls counts; overflow is [], otherwise [0].
    """

    rows: Tensor
    scales: Tensor
    weights: Tensor
    tokens_per_expert: Tensor
    offsets: Tensor
    overflow: Tensor  # see plan_tensor.overflow_of
    plan: Tensor  # the last result of a collective is what the next one comes after


def start_dispatch(
    x: Tensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    plan: Tensor | None,
    *,
    group: str,
    expert_alignment: int,
    output: str,
    capacity: int | None = None,
) -> StartedCall:
    """The first half of a dispatch, or of the replay of a plan, without gradients; arguments as for the operators."""
    if plan is not None:
        native, native_plan = _find_replay(x, plan, group)
        return native.start_replay(x.contiguous(), native_plan, fp8_output=output == "fp8")
    assert topk_idx is not None
    assert topk_weights is not None
    native = group_registry.find(group)
    _check_tokens(native.config, x)
    _check_routing(native, x, topk_idx, topk_weights)
    return native.start_dispatch(
        x.contiguous(),
        topk_idx.contiguous(),
        topk_weights.contiguous(),
        expert_alignment,
        capacity=capacity,
        fp8_output=output == "fp8",
    )


def finish_dispatch(started: StartedCall, *, group: str) -> Dispatched:
    """The second half; of a replay only rows and scales mean anything."""
    native_plan, rows, scales, weights = group_registry.find(group).finish_dispatch(started)
    return _dispatched(native_plan, rows, scales, weights, group=group)


def start_combine(y: Tensor, weights: Tensor | None, plan: Tensor, *, group: str, out: Tensor) -> StartedCall:
    """The first half of a combine into ``out``, without gradients; the group's ``finish`` is the second."""
    native, native_plan = group_registry.find(group), plan_tensor.unwrap(plan, group)
    _check_rows(native.config, y, weights, native_plan.rows)
    if y.dtype != out.dtype:
        raise ValueError(f"y must be {out.dtype} like the waves before, not {y.dtype}")
    return native.start_combine(
        y.contiguous(), native_plan, weights=None if weights is None else weights.contiguous(), out=out
    )


def _dispatched(
    native_plan: _C.Plan, rows: Tensor, scales: Tensor | None, weights: Tensor | None, *, group: str
) -> Dispatched:
    overflow = plan_tensor.overflow_of(native_plan, rows.device)
    tables: PlanTables | None = getattr(native_plan, "tables", None)
    counts_on = torch.device("cpu") if overflow.dim() else rows.device  # in static mode counts are for the next kernels
    return Dispatched(
        rows=rows,
        scales=torch.empty(0, dtype=torch.float32, device=rows.device) if scales is None else scales,
        weights=torch.empty(0, dtype=torch.float32, device=rows.device) if weights is None else weights,
        tokens_per_expert=tables.counts
        if tables
        else _to_device(torch.tensor(native_plan.tokens_per_expert, dtype=torch.int64, device="cpu"), counts_on),
        offsets=tables.offsets
        if tables
        else _to_device(torch.tensor(native_plan.offsets, dtype=torch.int32, device="cpu"), rows.device),
        overflow=overflow,
        plan=plan_tensor.wrap(native_plan, group),
    )


def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    group: str,
    expert_alignment: int,
    output: str,
    capacity: int | None = None,
    after: Tensor | None = None,
) -> list[Tensor]:
    native = group_registry.find(group)
    if output not in ("same", "fp8"):
        raise ValueError(f"output must be 'same' or 'fp8', not {output!r}")
    _check_tokens(native.config, x)
    _check_routing(native, x, topk_idx, topk_weights)
    x, topk_idx, topk_weights = x.contiguous(), topk_idx.contiguous(), topk_weights.contiguous()
    if output == "fp8":
        plan, rows, scales, weights = native.dispatch_fp8(x, topk_idx, topk_weights, expert_alignment, capacity)
    else:
        plan, rows, weights = native.dispatch(x, topk_idx, topk_weights, expert_alignment, capacity)
        scales = None
    return list(_dispatched(plan, rows, scales, weights, group=group))


def replay(
    x: Tensor, plan: Tensor, group: str, rows: int, gradient: bool = False, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    native, native_plan = _find_replay(x, plan, group)
    return native.replay(x.contiguous(), native_plan, gradient=gradient), torch.empty(0, device="cpu")


def replay_fp8(
    x: Tensor, plan: Tensor, group: str, rows: int, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    native, native_plan = _find_replay(x, plan, group)
    return *native.replay_fp8(x.contiguous(), native_plan), torch.empty(0, device="cpu")


def _find_replay(x: Tensor, plan: Tensor, group: str) -> tuple[NativeGroup, _C.Plan]:
    native, native_plan = group_registry.find(group), plan_tensor.unwrap(plan, group)
    _check_tokens(native.config, x)
    if x.shape[0] != native_plan.num_tokens:
        raise ValueError(f"x has {x.shape[0]} tokens, but the handle's dispatch had {native_plan.num_tokens}")
    return native, native_plan


def combine(
    y: Tensor,
    weights: Tensor | None,
    plan: Tensor,
    group: str,
    num_tokens: int,
    gradient: bool = False,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    native, native_plan = group_registry.find(group), plan_tensor.unwrap(plan, group)
    _check_rows(native.config, y, weights, native_plan.rows)
    weights = None if weights is None else weights.contiguous()
    out, _ = native.combine(y.contiguous(), native_plan, weights=weights, gradient=gradient)
    return out, torch.empty(0, device="cpu")


def combine_grads(
    grad_rows: Tensor, grad_weights: Tensor, plan: Tensor, group: str, num_tokens: int, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    native, native_plan = group_registry.find(group), plan_tensor.unwrap(plan, group)
    _check_rows(native.config, grad_rows, grad_weights, native_plan.rows)
    out, topk_weight_grads = native.combine(
        grad_rows.contiguous(), native_plan, weight_grads=grad_weights.contiguous(), gradient=True
    )
    assert topk_weight_grads is not None
    return out, topk_weight_grads, torch.empty(0, device="cpu")


def weight_grads(grad_rows: Tensor, y: Tensor, plan: Tensor, group: str) -> Tensor:
    """[rows] fp32: ``(grad_rows.float() * y.float()).sum(-1)``, and 0 on padding rows, where y may be anything."""
    native_plan = plan_tensor.unwrap(plan, group)
    if not hasattr(native_plan, "tables") and group_registry.find(group).is_capturing():
        raise ValueError("a graph holds gradients of topk_weights only if it holds the dispatch that they belong to")
    grads = torch.cat([(a.float() * b.float()).sum(-1) for a, b in zip(_blocks(grad_rows), _blocks(y), strict=True)])
    if not grads.is_cpu or hasattr(native_plan, "tables"):
        return torch.where(is_padding(native_plan, grads), 0.0, grads)
    offsets = native_plan.offsets
    for start, stop, count in zip(offsets[:-1], offsets[1:], native_plan.tokens_per_expert, strict=True):
        if start + count < stop:
            grads[start + count : stop] = 0.0
    grads[offsets[-1] :] = 0.0
    return grads


def _to_device(small: Tensor, device: torch.device) -> Tensor:
    """There, in the order of the current stream and without waiting for it."""
    if device.type == "cpu":
        return small
    return small.pin_memory().to(device, non_blocking=True)


def is_padding(native_plan: _C.Plan, rows: Tensor) -> Tensor:
    """[rows] bool of a plan, on the device of ``rows``, without waiting for it."""
    tables: PlanTables | None = getattr(native_plan, "tables", None)
    if tables:
        starts, ends = tables.offsets, tables.offsets[:-1] + tables.counts
    else:
        starts = torch.tensor(native_plan.offsets, dtype=torch.int64, device="cpu")
        ends = starts[:-1] + torch.tensor(native_plan.tokens_per_expert, dtype=torch.int64, device="cpu")
        starts, ends = _to_device(starts, rows.device), _to_device(ends, rows.device)
    index = torch.arange(len(rows), device=rows.device)
    expert = torch.searchsorted(starts[1:], index, right=True)
    return index >= ends[expert.clamp(max=len(ends) - 1)]


def weighted_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """[rows, H] in the dtype of rows: ``(weights[:, None] * rows).to(rows.dtype)``, the product in fp32."""
    out = rows.new_empty(rows.shape)
    blocks = _blocks(rows)
    factors = torch.split(weights[:, None], [len(block) for block in blocks])
    for out_block, factor, block in zip(_blocks(out), factors, blocks, strict=True):
        torch.mul(factor, block, out=out_block)
    return out


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in parts of at most _BLOCK_ELEMENTS elements, or one row."""
    most_rows = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    return torch.split(rows, most_rows) if len(rows) > most_rows else (rows,)


def _check_tokens(config: ExpertParallelConfig, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] != config.hidden_size:
        raise ValueError(f"x must be [T, {config.hidden_size}], not {list(x.shape)}")
    if x.shape[0] > config.max_tokens_per_rank:
        raise ValueError(f"x has {x.shape[0]} tokens, more than max_tokens_per_rank={config.max_tokens_per_rank}")


def _check_routing(native: NativeGroup, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> None:
    config = native.config
    shape = (x.shape[0], config.top_k)
    for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        if tensor.shape != shape:
            raise ValueError(shape_error(name, tensor, shape))
    if topk_idx.numel() and not native.on_device:  # there the kernel looks, and nobody waits for it
        lowest, highest = (int(value) for value in topk_idx.aminmax())
        if lowest < -1 or highest >= config.num_experts:
            raise ValueError(
                f"topk_idx holds {lowest if lowest < -1 else highest}; expert ids are in [-1, {config.num_experts})"
            )


def shape_error(name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
    return f"{name} must be [T, top_k] = {list(shape)}, not {list(tensor.shape)}"


def _check_rows(config: ExpertParallelConfig, y: Tensor, weights: Tensor | None, rows: int) -> None:
    if y.dim() != 2 or y.shape[1] != config.hidden_size:
        raise ValueError(f"y must be [{rows}, {config.hidden_size}], not {list(y.shape)}")
    if y.shape[0] != rows:
        raise ValueError(
            f"y has {y.shape[0]} rows, but the handle's dispatch gave {rows}"
            " (with a capacity, those behind offsets[-1] too)"
        )
    if weights is not None and weights.shape != (rows,):
        raise ValueError(f"weights must be [{rows}], not {list(weights.shape)}")
