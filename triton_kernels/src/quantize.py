"""Block-scaled FP8: 1x128 blocks along the hidden dimension, e4m3 values and one fp32 scale per block.

Bitwise equal to ``reference.quantize_1x128``: divisions are IEEE, nothing is fused, and what is cast was clamped
before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import FLOATS, FP8_CAPABILITY, check_devices, check_scale_format, check_tensor
from .numerics import block_places, quantize_blocks
from .reference import BLOCK_SIZE

# 16 elements a thread: two 16-byte loads of bf16, one 16-byte store of FP8.
BLOCKS_PER_PROGRAM = 16
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def quantize_1x128_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    q_ptr,
    scales_ptr,
    num_blocks,  # of all rows
    hidden_size: tl.constexpr,
    power_of_two: tl.constexpr,
    blocks_per_program: tl.constexpr,
    block_size: tl.constexpr,
):
    block_idx = tl.program_id(0).to(tl.int64) * blocks_per_program + tl.arange(0, blocks_per_program)
    in_range = block_idx < num_blocks
    offsets, mask = block_places(block_idx, in_range, hidden_size, block_size)

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    q, scales = quantize_blocks(x, power_of_two)
    tl.store(q_ptr + offsets, q, mask=mask)
    tl.store(scales_ptr + block_idx, scales, mask=in_range)


def quantize_1x128(x: torch.Tensor, *, scale_format: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes the rows of ``x`` to e4m3 in blocks of 128 along the hidden dimension; the last block may be short.

    For each block, with ``amax`` its largest magnitude in fp32::

        scale = max(amax / 448, 2**-126)              # 1.0 where amax is 0
        q     = e4m3(clamp(x / scale, -448, 448))     # true division, round to nearest even

    With ``scale_format="ue8m0"`` the scale is the smallest power of two that is not below ``max(amax / 448, 2**-126)``,
    the quotient rounded to fp32; it is still returned as fp32. A block with a NaN or an infinity gets NaN for its scale
    and all of its values. The formula is that of 1x128 activation scaling in the DeepSeek-V3 report (arXiv 2412.19437,
    section 3.3), without its lower bound on amax.

    Args:
        x: ``[num_tokens, hidden_size]``, bf16 or fp32, contiguous, on a CUDA device of compute capability 8.9 or newer
            (on the CPU only under ``TRITON_INTERPRET=1``).
        scale_format: ``"fp32"`` or ``"ue8m0"``.

    Returns:
        ``q`` ``[num_tokens, hidden_size]`` float8_e4m3fn and ``scales`` ``[num_tokens, ceil(hidden_size / 128)]`` fp32.

    Raises:
        ValueError: shape, dtype, layout, device or ``scale_format`` is not supported.

    Example (a test reuses it): one row of 130 elements, so a full block and a short one.

        >>> x = torch.zeros(1, 130)
        >>> x[0, :4] = torch.tensor([896.0, -3.0, 17.0, 1.0])
        >>> x[0, 128:] = torch.tensor([-7.0, 0.25])
        >>> q, scales = quantize_1x128(x)
        >>> scales.tolist()
        [[2.0, 0.015625]]
        >>> q[0, :4].tolist(), q[0, 128:].tolist()
        ([448.0, -1.5, 8.0, 0.5], [-448.0, 16.0])
    """
    check_scale_format(scale_format)
    check_tensor("x", x, shape=("num_tokens", "hidden_size"), dtypes=FLOATS)
    check_devices(quantize_1x128_kernel, x, capability=FP8_CAPABILITY)
    num_tokens, hidden_size = x.shape
    blocks_per_row = triton.cdiv(hidden_size, BLOCK_SIZE)
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(num_tokens, blocks_per_row, dtype=torch.float32, device=x.device)
    num_blocks = num_tokens * blocks_per_row
    if num_blocks == 0:
        return q, scales
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        quantize_1x128_kernel[(triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM),)](
            x,
            q,
            scales,
            num_blocks,
            hidden_size=hidden_size,
            power_of_two=scale_format == "ue8m0",
            blocks_per_program=BLOCKS_PER_PROGRAM,
            block_size=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return q, scales
