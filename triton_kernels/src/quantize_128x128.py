"""Block-scaled FP8 of weights: blocks of 128x128, e4m3 values and one fp32 scale per block, bitwise as
``reference.quantize_128x128``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, FP8_CAPABILITY, check_devices, check_tensor
from .numerics import quantize_values, scales_of
from .reference import BLOCK_SIZE

NUM_WARPS = 8  # 64 elements a thread


@triton.jit  # type: ignore[untyped-decorator]
def quantize_128x128_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    q_ptr,
    scales_ptr,
    n: tl.constexpr,
    k: tl.constexpr,
    block_size: tl.constexpr,
):
    """One block for each program."""
    n_blocks: tl.constexpr = (n + block_size - 1) // block_size
    k_blocks: tl.constexpr = (k + block_size - 1) // block_size
    block = tl.program_id(0).to(tl.int64)
    expert, n_block, k_block = block // (n_blocks * k_blocks), block // k_blocks % n_blocks, block % k_blocks
    row = n_block * block_size + tl.arange(0, block_size)
    column = k_block * block_size + tl.arange(0, block_size)
    offsets = (expert * n + row)[:, None] * k + column[None, :]
    mask = (row < n)[:, None] & (column < k)[None, :]

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    magnitude = tl.max(tl.max(magnitudes, axis=1, keep_dims=True), axis=0, keep_dims=True)
    scales = scales_of(magnitude, False)
    tl.store(q_ptr + offsets, quantize_values(x, magnitude, scales), mask=mask)
    tl.store(scales_ptr + block + tl.zeros((1, 1), tl.int64), scales)


def quantize_128x128(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes weights to e4m3 in blocks of 128x128; the last blocks of a matrix may be short.

    The formula is that of :func:`~moe_efa.triton_kernels.quantize.quantize_1x128`, ``amax`` being the largest magnitude
    of a block; as there, a NaN or an infinity makes its block NaN. It is the 128x128 weight scaling of the DeepSeek-V3
    report (arXiv 2412.19437, section 3.3), and what ``grouped_gemm_fp8`` takes.

    Args:
        x: ``[num_experts, n, k]``, bf16 or fp32, contiguous, on a CUDA device of compute capability 8.9 or newer (on
            the CPU only under ``TRITON_INTERPRET=1``).

    Returns:
        ``q`` ``[num_experts, n, k]`` float8_e4m3fn and ``scales`` ``[num_experts, ceil(n / 128), ceil(k / 128)]`` fp32.

    Raises:
        ValueError: shape, dtype, layout or device is not supported.

    Example (a test reuses it): one matrix of 2 x 130, so that its second block has two columns.

        >>> x = torch.zeros(1, 2, 130)
        >>> x[0, 0, 0], x[0, 1, 5], x[0, 1, 129] = 896.0, -3.0, 7.0
        >>> q, scales = quantize_128x128(x)
        >>> scales.tolist()
        [[[2.0, 0.015625]]]
        >>> q[0, 0, 0].item(), q[0, 1, 5].item(), q[0, 1, 129].item()
        (448.0, -1.5, 448.0)
    """
    check_tensor("x", x, shape=("num_experts", "n", "k"), dtypes=FLOATS)
    check_devices(quantize_128x128_kernel, x, capability=FP8_CAPABILITY)
    num_experts, n, k = x.shape
    blocks = (num_experts, triton.cdiv(n, BLOCK_SIZE), triton.cdiv(k, BLOCK_SIZE))
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(blocks, dtype=torch.float32, device=x.device)
    if num_experts == 0:
        return q, scales
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        quantize_128x128_kernel[(scales.numel(),)](
            x,
            q,
            scales,
            n=n,
            k=k,
            block_size=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return q, scales
