"""Permute and quantize in one pass: a token is read and quantized once, its FP8 row is stored to each of its rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import ASSERTING, FLOATS, FP8_CAPABILITY, check_devices, check_scale_format, check_tensor
from .numerics import quantize_blocks
from .reference import BLOCK_SIZE, QuantizedRows, RowPlan
from .rows import (
    check_num_rows,
    check_plan,
    check_row_floats,
    padding_programs,
    padding_rows,
    resolve_num_rows,
    store_row_weights,
)

# 16 elements a thread: two 16-byte loads of bf16, one 16-byte store of FP8.
BLOCKS_PER_PROGRAM = 8
NUM_WARPS = 2


@triton.jit  # type: ignore[untyped-decorator]
def permute_quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    positions_ptr,
    topk_weights_ptr,  # None: no weights
    offsets_ptr,
    tokens_per_expert_ptr,
    q_ptr,
    scales_ptr,
    weights_ptr,
    num_tokens,
    num_rows,
    hidden_size: tl.constexpr,
    top_k: tl.constexpr,
    padded_top_k: tl.constexpr,
    num_experts: tl.constexpr,
    tail_programs: tl.constexpr,
    power_of_two: tl.constexpr,
    blocks_per_program: tl.constexpr,
    block_size: tl.constexpr,
):
    blocks_per_row: tl.constexpr = (hidden_size + block_size - 1) // block_size
    program = tl.program_id(0)
    block_idx = tl.program_id(1) * blocks_per_program + tl.arange(0, blocks_per_program)
    column = block_idx[:, None] * block_size + tl.arange(0, block_size)[None, :]
    if program < num_tokens:
        token = program.to(tl.int64)
        x = tl.load(x_ptr + token * hidden_size + column, mask=column < hidden_size, other=0.0).to(tl.float32)
        q, scales = quantize_blocks(x, power_of_two)
        for k in tl.static_range(top_k):
            row = tl.load(positions_ptr + token * top_k + k).to(tl.int64)
            tl.store(q_ptr + row * hidden_size + column, q, mask=column < tl.where(row >= 0, hidden_size, 0))
            num_scales = tl.where(row >= 0, blocks_per_row, 0)
            tl.store(scales_ptr + row * blocks_per_row + block_idx, scales, mask=block_idx < num_scales)
        if topk_weights_ptr is not None:  # noqa: SIM102  # constexpr, unlike the next
            if tl.program_id(1) == 0:
                store_row_weights(token, topk_weights_ptr, positions_ptr, weights_ptr, top_k, padded_top_k)
    else:
        first, stop, step = padding_rows(
            program - num_tokens, offsets_ptr, tokens_per_expert_ptr, num_rows, num_experts, tail_programs
        )
        zeros = tl.zeros((blocks_per_program, block_size), tl.float32).to(q_ptr.dtype.element_ty)
        ones = tl.full((blocks_per_program,), 1.0, tl.float32)
        for padding in range(first, stop, step):
            row = tl.full((), padding, tl.int64)
            tl.store(q_ptr + row * hidden_size + column, zeros, mask=column < hidden_size)
            tl.store(scales_ptr + row * blocks_per_row + block_idx, ones, mask=block_idx < blocks_per_row)
            if topk_weights_ptr is not None:
                tl.store(weights_ptr + row, 0.0)


def permute_quantize(
    x: Tensor,
    plan: RowPlan,
    *,
    topk_weights: Tensor | None = None,
    scale_format: str = "fp32",
    num_rows: int | None = None,
) -> QuantizedRows:
    """The rows of all experts as :func:`~moe_efa.triton_kernels.quantize.quantize_1x128` gives them.

    Bitwise equal to ``reference.permute_quantize``, which quantizes and then permutes.

    Args:
        x: ``[num_tokens, hidden_size]`` bf16 or fp32, contiguous, on a CUDA device of compute capability 8.9 or newer
            (on the CPU only under ``TRITON_INTERPRET=1``).
        plan, topk_weights, num_rows: as for :func:`~moe_efa.triton_kernels.permute.permute`.
        scale_format: ``"fp32"`` or ``"ue8m0"``.

    Returns:
        ``q`` ``[num_rows, hidden_size]`` float8_e4m3fn, ``scales`` ``[num_rows, ceil(hidden_size / 128)]`` fp32,
        ``weights`` ``[num_rows]`` fp32 or None. Padding rows are zeros with scales 1 and weight 0.

    Raises:
        ValueError: as for ``permute``, or ``scale_format`` is unknown.

    Example (a test reuses it):

        >>> plan = plan_rows(torch.tensor([[1, 0]]), num_experts=2, expert_alignment=2)
        >>> q, scales, _ = permute_quantize(torch.tensor([[896.0, -3.0]]), plan)
        >>> q.tolist(), scales.tolist()
        ([[448.0, -1.5], [0.0, 0.0], [448.0, -1.5], [0.0, 0.0]], [[2.0], [1.0], [2.0], [1.0]])
    """
    check_scale_format(scale_format)
    check_tensor("x", x, shape=("num_tokens", "hidden_size"), dtypes=FLOATS)
    num_tokens, hidden_size = x.shape
    check_plan(plan, num_tokens)
    top_k = plan.positions.shape[1]
    check_row_floats("topk_weights", topk_weights, (num_tokens, top_k))
    check_devices(
        permute_quantize_kernel,
        x,
        topk_weights,
        plan.positions,
        plan.offsets,
        plan.tokens_per_expert,
        capability=FP8_CAPABILITY,
    )
    num_rows = check_num_rows(num_rows)
    num_padding, tail_programs = padding_programs(plan, num_rows)
    num_rows = resolve_num_rows(plan, num_rows)

    blocks_per_row = triton.cdiv(hidden_size, BLOCK_SIZE)
    q = torch.empty(num_rows, hidden_size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, blocks_per_row, dtype=torch.float32, device=x.device)
    weights = None if topk_weights is None else torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return QuantizedRows(q, scales, weights)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        permute_quantize_kernel[(num_tokens + num_padding, triton.cdiv(blocks_per_row, BLOCKS_PER_PROGRAM))](
            x,
            plan.positions,
            topk_weights,
            plan.offsets,
            plan.tokens_per_expert,
            q,
            scales,
            weights,
            num_tokens,
            num_rows,
            hidden_size=hidden_size,
            top_k=top_k,
            padded_top_k=triton.next_power_of_2(top_k),
            num_experts=len(plan.tokens_per_expert),
            tail_programs=tail_programs,
            power_of_two=scale_format == "ue8m0",
            blocks_per_program=BLOCKS_PER_PROGRAM,
            block_size=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
            **ASSERTING,
        )
    return QuantizedRows(q, scales, weights)
