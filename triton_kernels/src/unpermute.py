"""Brings the experts' rows home: the sum of each token's rows, weighted or plain, in a fixed order and in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import ASSERTING, FLOATS, check_devices, check_tensor
from .numerics import rounded
from .reference import RowPlan
from .rows import check_plan, check_row_floats, check_rows_of_plan, column_blocks

MAX_BLOCK = 1024
_NO_ROW = tl.constexpr(0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def unpermute_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    weights_ptr,  # None: the plain sum
    positions_ptr,
    offsets_ptr,
    row_values_ptr,  # None: nothing to move
    out_ptr,
    topk_values_ptr,
    num_rows,
    hidden_size: tl.constexpr,
    top_k: tl.constexpr,
    padded_top_k: tl.constexpr,
    num_experts: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    if token == 0:
        tl.device_assert(tl.load(offsets_ptr + num_experts) <= num_rows, "fewer rows than offsets[-1]")
    topk_pos = tl.arange(0, padded_top_k)
    rows = tl.load(positions_ptr + token * top_k + topk_pos, mask=topk_pos < top_k, other=-1)
    left = tl.where(rows < 0, _NO_ROW, rows)
    total = tl.zeros((block,), tl.float32)
    for i in tl.static_range(top_k):
        row = tl.min(left, axis=0)  # rows ascend by (expert, k)
        left = tl.where(left == row, _NO_ROW, left)
        mask = column < tl.where(row != _NO_ROW, hidden_size, 0)
        term = tl.load(y_ptr + row.to(tl.int64) * hidden_size + column, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            term = tl.load(weights_ptr + row, mask=row != _NO_ROW, other=0.0) * term
        # A sum starts from its first term, and zeros that stand for no row are not added: -0.0 would become 0.0.
        total = term if i == 0 else tl.where(mask, total + term, total)
    tl.store(
        out_ptr + token * hidden_size + column, rounded(total, out_ptr.dtype.element_ty), mask=column < hidden_size
    )
    if row_values_ptr is not None:  # noqa: SIM102  # constexpr, unlike the next
        if tl.program_id(1) == 0:
            values = tl.load(row_values_ptr + rows, mask=rows >= 0, other=0.0)
            tl.store(topk_values_ptr + token * top_k + topk_pos, values, mask=topk_pos < top_k)


def num_warps(block: int) -> int:
    """Eight columns a thread: a 16-byte load of bf16 for each of the rows, all of them in flight at once."""
    return max(1, block // 256)


def unpermute(
    y: Tensor,
    plan: RowPlan,
    *,
    weights: Tensor | None = None,
    row_values: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``out[t]`` = sum over k of ``weights[row(t, k)] * y[row(t, k)]``; :mod:`.autograd` has it with gradients.

    The terms are added in (expert, k) order; products and sums are rounded to fp32 one by one, the result once to
    ``dtype``: the bits of ``ExpertParallel.combine`` on one rank, and of ``reference.unpermute``.

    Args:
        y: ``[num_rows, hidden_size]`` bf16 or fp32, contiguous, on a CUDA device (on the CPU only under
            ``TRITON_INTERPRET=1``). Padding rows are not read.
        plan: from :func:`~moe_efa.triton_kernels.plan_rows.plan_rows`.
        weights: ``[num_rows]`` fp32, as ``permute`` gives them; None is the plain sum.
        row_values: ``[num_rows]`` fp32, numbers of rows to be moved to their (token, k).
        dtype: bf16 or fp32; None is y's.

    Returns:
        ``out`` ``[num_tokens, hidden_size]`` in ``dtype``, zeros for a token that selected nothing; and ``row_values``
        as ``[num_tokens, top_k]``, 0 for -1 selections (None without).

    Raises:
        ValueError: shape, dtype, layout or device is not supported.

    Example (a test reuses it):

        >>> plan = plan_rows(torch.tensor([[1, -1], [0, 1]]), num_experts=2)
        >>> y = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> unpermute(y, plan)[0].tolist()
        [[3.0, 4.0], [6.0, 8.0]]
        >>> out, values = unpermute(y, plan, weights=torch.tensor([1.0, 0.5, 2.0]), row_values=torch.arange(3.0))
        >>> out.tolist(), values.tolist()
        ([[1.5, 2.0], [11.0, 14.0]], [[1.0, 0.0], [0.0, 2.0]])
    """
    check_tensor("y", y, shape=("num_rows", "hidden_size"), dtypes=FLOATS)
    num_tokens, top_k = plan.positions.shape
    num_rows, hidden_size = y.shape
    check_plan(plan, num_tokens)
    check_row_floats("weights", weights, (num_rows,))
    check_row_floats("row_values", row_values, (num_rows,))
    dtype = y.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be bfloat16 or float32, got {dtype}")
    check_devices(unpermute_kernel, y, weights, row_values, plan.positions, plan.offsets)
    check_rows_of_plan(plan, num_rows)

    out = torch.empty(num_tokens, hidden_size, dtype=dtype, device=y.device)
    values = None if row_values is None else torch.empty(num_tokens, top_k, dtype=torch.float32, device=y.device)
    block, blocks, _ = column_blocks(hidden_size, MAX_BLOCK)
    if num_tokens == 0:
        return out, values
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        unpermute_kernel[(num_tokens, blocks)](
            y,
            weights,
            plan.positions,
            plan.offsets,
            row_values,
            out,
            values,
            num_rows,
            hidden_size=hidden_size,
            top_k=top_k,
            padded_top_k=triton.next_power_of_2(top_k),
            num_experts=len(plan.tokens_per_expert),
            block=block,
            num_warps=num_warps(block),
            enable_fp_fusion=False,
            **ASSERTING,
        )
    return out, values
