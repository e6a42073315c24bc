"""From block-scaled FP8 back to bf16 or fp32, bitwise as ``reference.dequantize_1x128``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, FP8_CAPABILITY, check_devices, check_tensor
from .numerics import block_places, rounded
from .reference import BLOCK_SIZE

# 16 elements a thread: one 16-byte load of FP8, two 16-byte stores of bf16.
BLOCKS_PER_PROGRAM = 16
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_1x128_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    scales_ptr,
    x_ptr,
    num_blocks,  # of all rows
    hidden_size: tl.constexpr,
    blocks_per_program: tl.constexpr,
    block_size: tl.constexpr,
):
    block_idx = tl.program_id(0).to(tl.int64) * blocks_per_program + tl.arange(0, blocks_per_program)
    in_range = block_idx < num_blocks
    offsets, mask = block_places(block_idx, in_range, hidden_size, block_size)
    q = tl.load(q_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scales = tl.load(scales_ptr + block_idx, mask=in_range, other=0.0)
    tl.store(x_ptr + offsets, rounded(q * scales[:, None], x_ptr.dtype.element_ty), mask=mask)


def dequantize_1x128(q: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of quantized rows: ``q * scale`` in fp32, rounded once to ``dtype``; a NaN is always the same one.

    Args:
        q: ``[num_tokens, hidden_size]`` float8_e4m3fn, contiguous, on a CUDA device of compute capability 8.9 or newer
            (on the CPU only under ``TRITON_INTERPRET=1``).
        scales: ``[num_tokens, ceil(hidden_size / 128)]`` fp32, contiguous.
        dtype: bf16 or fp32.

    Returns:
        ``[num_tokens, hidden_size]`` in ``dtype``.

    Raises:
        ValueError: shape, dtype, layout or device is not supported.

    Example (a test reuses it):

        >>> q = torch.zeros(1, 130).to(torch.float8_e4m3fn)
        >>> q[0, :3] = torch.tensor([448.0, -1.5, 8.0])
        >>> q[0, 129] = -448.0
        >>> x = dequantize_1x128(q, torch.tensor([[2.0, 0.015625]]))
        >>> x[0, :3].tolist(), x[0, 129].item()
        ([896.0, -3.0, 16.0], -7.0)
    """
    check_tensor("q", q, shape=("num_tokens", "hidden_size"), dtypes=(torch.float8_e4m3fn,))
    num_tokens, hidden_size = q.shape
    blocks_per_row = triton.cdiv(hidden_size, BLOCK_SIZE)
    check_tensor("scales", scales, shape=(num_tokens, blocks_per_row), dtypes=(torch.float32,))
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be bfloat16 or float32, got {dtype}")
    check_devices(dequantize_1x128_kernel, q, scales, capability=FP8_CAPABILITY)
    x = torch.empty_like(q, dtype=dtype)
    num_blocks = num_tokens * blocks_per_row
    if num_blocks == 0:
        return x
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        dequantize_1x128_kernel[(triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM),)](
            q,
            scales,
            x,
            num_blocks,
            hidden_size=hidden_size,
            blocks_per_program=BLOCKS_PER_PROGRAM,
            block_size=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return x
