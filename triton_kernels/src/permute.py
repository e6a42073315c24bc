"""Copies tokens to the rows of their experts: every token is read once and stored to each of its rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import ASSERTING, FLOATS, check_devices, check_tensor
from .reference import RowPlan
from .rows import (
    check_num_rows,
    check_plan,
    check_row_floats,
    column_blocks,
    padding_programs,
    padding_rows,
    resolve_num_rows,
    store_row_weights,
)


@triton.jit  # type: ignore[untyped-decorator]
def permute_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    positions_ptr,
    topk_weights_ptr,  # None: no weights
    offsets_ptr,
    tokens_per_expert_ptr,
    rows_ptr,
    weights_ptr,
    num_tokens,
    num_rows,
    hidden_size: tl.constexpr,
    top_k: tl.constexpr,
    padded_top_k: tl.constexpr,
    num_experts: tl.constexpr,
    tail_programs: tl.constexpr,
    block: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    if program < num_tokens:
        token = program.to(tl.int64)
        x = tl.load(x_ptr + token * hidden_size + column, mask=column < hidden_size)
        for k in tl.static_range(top_k):
            row = tl.load(positions_ptr + token * top_k + k).to(tl.int64)
            width = tl.where(row >= 0, hidden_size, 0)
            tl.store(rows_ptr + row * hidden_size + column, x, mask=column < width)
        if topk_weights_ptr is not None:  # noqa: SIM102  # constexpr, unlike the next
            if tl.program_id(1) == 0:
                store_row_weights(token, topk_weights_ptr, positions_ptr, weights_ptr, top_k, padded_top_k)
    else:
        first, stop, step = padding_rows(
            program - num_tokens, offsets_ptr, tokens_per_expert_ptr, num_rows, num_experts, tail_programs
        )
        zeros = tl.zeros((block,), rows_ptr.dtype.element_ty)
        for padding in range(first, stop, step):
            row = tl.full((), padding, tl.int64)
            tl.store(rows_ptr + row * hidden_size + column, zeros, mask=column < hidden_size)
            if topk_weights_ptr is not None:
                tl.store(weights_ptr + row, 0.0)


def permute(
    x: Tensor, plan: RowPlan, *, topk_weights: Tensor | None = None, num_rows: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The rows of all experts; bitwise equal to ``reference.permute``. :mod:`.autograd` has it with gradients.

    Args:
        x: ``[num_tokens, hidden_size]`` bf16 or fp32, contiguous, on a CUDA device (on the CPU only under
            ``TRITON_INTERPRET=1``).
        plan: of the same tokens, from :func:`~moe_efa.triton_kernels.plan_rows.plan_rows`.
        topk_weights: ``[num_tokens, top_k]`` fp32; those of -1 selections are not read.
        num_rows: how many rows to allocate. None is ``plan.offsets[-1]``, which waits for the device;
            ``plan.max_rows`` is always enough and waits for nothing.

    Returns:
        ``rows`` ``[num_rows, hidden_size]`` in x's dtype and ``weights`` ``[num_rows]`` fp32 (None without
        ``topk_weights``). Padding rows are zeros with weight 0, those behind ``plan.offsets[-1]`` too.

    Raises:
        ValueError: shape, dtype, layout or device is not supported, or (on the CPU) ``num_rows`` is too small; on a GPU
            that is a device-side assertion.

    Example (a test reuses it): expert 0 gets token 1, expert 1 both, each padded to two rows.

        >>> plan = plan_rows(torch.tensor([[1, -1], [0, 1]]), num_experts=2, expert_alignment=2)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> rows, weights = permute(x, plan, topk_weights=torch.tensor([[0.5, float("nan")], [0.25, 0.75]]))
        >>> rows.tolist(), weights.tolist()
        ([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [3.0, 4.0]], [0.25, 0.0, 0.5, 0.75])
    """
    check_tensor("x", x, shape=("num_tokens", "hidden_size"), dtypes=FLOATS)
    num_tokens, hidden_size = x.shape
    check_plan(plan, num_tokens)
    top_k = plan.positions.shape[1]
    check_row_floats("topk_weights", topk_weights, (num_tokens, top_k))
    check_devices(permute_kernel, x, topk_weights, plan.positions, plan.offsets, plan.tokens_per_expert)
    num_rows = check_num_rows(num_rows)
    num_padding, tail_programs = padding_programs(plan, num_rows)
    num_rows = resolve_num_rows(plan, num_rows)

    rows = torch.empty(num_rows, hidden_size, dtype=x.dtype, device=x.device)
    weights = None if topk_weights is None else torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block, blocks, num_warps = column_blocks(hidden_size)
    if num_rows == 0:
        return rows, weights
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        permute_kernel[(num_tokens + num_padding, blocks)](
            x,
            plan.positions,
            topk_weights,
            plan.offsets,
            plan.tokens_per_expert,
            rows,
            weights,
            num_tokens,
            num_rows,
            hidden_size=hidden_size,
            top_k=top_k,
            padded_top_k=triton.next_power_of_2(top_k),
            num_experts=len(plan.tokens_per_expert),
            tail_programs=tail_programs,
            block=block,
            num_warps=num_warps,
            **ASSERTING,
        )
    return rows, weights
