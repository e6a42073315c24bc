"""Gradients of unpermute: rows get their token's gradient times the weight, weights get <gradient, row>."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import ASSERTING, FLOATS, check_devices, check_tensor
from .numerics import rounded
from .reference import RowPlan
from .rows import (
    check_plan,
    check_row_floats,
    check_rows_of_plan,
    column_blocks,
    padding_programs,
    padding_rows,
)


@triton.jit  # type: ignore[untyped-decorator]
def unpermute_backward_kernel(  # type: ignore[no-untyped-def]
    grad_out_ptr,
    y_ptr,
    weights_ptr,
    positions_ptr,
    offsets_ptr,
    tokens_per_expert_ptr,
    grad_y_ptr,
    grad_weights_ptr,
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
    lane = tl.arange(0, block)
    if program < num_tokens:
        token = program.to(tl.int64)
        topk_pos = tl.arange(0, padded_top_k)
        dots = tl.zeros((padded_top_k,), tl.float32)
        for start in tl.static_range(0, hidden_size, block):
            column = start + lane
            grad = tl.load(grad_out_ptr + token * hidden_size + column, mask=column < hidden_size, other=0.0)
            grad = grad.to(tl.float32)
            for k in tl.static_range(top_k):
                row = tl.load(positions_ptr + token * top_k + k).to(tl.int64)
                mask = column < tl.where(row >= 0, hidden_size, 0)
                y = tl.load(y_ptr + row * hidden_size + column, mask=mask, other=0.0).to(tl.float32)
                weight = tl.load(weights_ptr + row, mask=row >= 0, other=0.0)
                grad_y = rounded(weight * grad, grad_y_ptr.dtype.element_ty)
                tl.store(grad_y_ptr + row * hidden_size + column, grad_y, mask=mask)
                dots += tl.where(topk_pos == k, tl.sum(grad * y, axis=0), 0.0)
        rows = tl.load(positions_ptr + token * top_k + topk_pos, mask=topk_pos < top_k, other=-1)
        tl.store(grad_weights_ptr + rows, dots, mask=rows >= 0)
    else:
        first, stop, step = padding_rows(
            program - num_tokens, offsets_ptr, tokens_per_expert_ptr, num_rows, num_experts, tail_programs
        )
        zeros = tl.zeros((block,), grad_y_ptr.dtype.element_ty)
        for padding in range(first, stop, step):
            row = tl.full((), padding, tl.int64)
            tl.store(grad_weights_ptr + row, 0.0)
            for start in tl.static_range(0, hidden_size, block):
                column = start + lane
                tl.store(grad_y_ptr + row * hidden_size + column, zeros, mask=column < hidden_size)


def unpermute_backward(grad_out: Tensor, y: Tensor, plan: RowPlan, *, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted :func:`~moe_efa.triton_kernels.unpermute.unpermute`; the plain sum's is ``permute``.

    ``grad_y[row] = weights[row] * grad_out[token]`` as an fp32 product, rounded once: bitwise that of
    ``reference.unpermute_backward``. ``grad_weights[row] = <grad_out[token], y[row]>`` is summed in fp32 in an order of
    its own, the same in every run: within ``hidden_size * 2**-24 * sum |grad_out * y|`` of the exact sum.

    Args:
        grad_out: ``[num_tokens, hidden_size]`` in y's dtype, contiguous.
        y: ``[num_rows, hidden_size]`` bf16 or fp32, contiguous, on a CUDA device (on the CPU only under
            ``TRITON_INTERPRET=1``). Padding rows are not read.
        plan: that of the forward pass.
        weights: ``[num_rows]`` fp32.

    Returns:
        ``grad_y`` ``[num_rows, hidden_size]`` in y's dtype and ``grad_weights`` ``[num_rows]`` fp32, 0 on padding rows.

    Raises:
        ValueError: shape, dtype, layout or device is not supported.

    Example (a test reuses it):

        >>> plan = plan_rows(torch.tensor([[1, 0]]), num_experts=2, expert_alignment=2)
        >>> y = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0], [9.0, 9.0]])
        >>> weights = torch.tensor([0.5, 0.0, 2.0, 0.0])
        >>> grad_y, grad_weights = unpermute_backward(torch.tensor([[1.0, 10.0]]), y, plan, weights=weights)
        >>> grad_y.tolist(), grad_weights.tolist()
        ([[0.5, 5.0], [0.0, 0.0], [2.0, 20.0], [0.0, 0.0]], [21.0, 0.0, 43.0, 0.0])
    """
    check_tensor("y", y, shape=("num_rows", "hidden_size"), dtypes=FLOATS)
    num_tokens, top_k = plan.positions.shape
    num_rows, hidden_size = y.shape
    check_plan(plan, num_tokens)
    check_tensor("grad_out", grad_out, shape=(num_tokens, hidden_size), dtypes=(y.dtype,))
    check_row_floats("weights", weights, (num_rows,))
    check_devices(unpermute_backward_kernel, y, grad_out, weights, plan.positions, plan.offsets, plan.tokens_per_expert)
    check_rows_of_plan(plan, num_rows)

    grad_y = torch.empty_like(y)
    grad_weights = torch.empty_like(weights)
    block, _, num_warps = column_blocks(hidden_size)
    # y may have rows behind plan.offsets[-1].
    num_padding, tail_programs = padding_programs(plan, num_rows)
    if num_rows == 0:
        return grad_y, grad_weights
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        unpermute_backward_kernel[(num_tokens + num_padding,)](
            grad_out,
            y,
            weights,
            plan.positions,
            plan.offsets,
            plan.tokens_per_expert,
            grad_y,
            grad_weights,
            num_tokens,
            num_rows,
            hidden_size=hidden_size,
            top_k=top_k,
            padded_top_k=triton.next_power_of_2(top_k),
            num_experts=len(plan.tokens_per_expert),
            tail_programs=tail_programs,
            block=block,
            num_warps=num_warps,
            enable_fp_fusion=False,
            **ASSERTING,
        )
    return grad_y, grad_weights
