"""Block-scaled FP8: 1x128 blocks along the hidden dimension, e4m3 values and one fp32 scale per block.

Bitwise equal to ``reference.quantize_1x128``: divisions are IEEE, nothing is fused, and what is cast was clamped
before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import BLOCK_SIZE, FP8_MAX, MIN_SCALE, SCALE_FORMATS

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
    fp8_max: tl.constexpr,
    min_scale: tl.constexpr,
):
    blocks_per_row: tl.constexpr = (hidden_size + block_size - 1) // block_size
    block_idx = tl.program_id(0).to(tl.int64) * blocks_per_program + tl.arange(0, blocks_per_program)
    lane = tl.arange(0, block_size)
    in_range = block_idx < num_blocks
    if hidden_size % block_size == 0:
        offsets = block_idx[:, None] * block_size + lane[None, :]
        mask = tl.broadcast_to(in_range[:, None], (blocks_per_program, block_size))
    else:
        start = block_idx % blocks_per_row * block_size
        offsets = (block_idx // blocks_per_row * hidden_size + start)[:, None] + lane[None, :]
        mask = in_range[:, None] & (start[:, None] + lane[None, :] < hidden_size)

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # Magnitudes are compared as integers, which order like the numbers and put NaN above infinity.
    magnitude = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    amax = magnitude.to(tl.float32, bitcast=True)
    finite = magnitude < 0x7F800000

    scales = tl.maximum(tl.div_rn(amax, tl.full((blocks_per_program,), fp8_max, tl.float32)), min_scale)
    if power_of_two:  # rounds the exponent up unless the mantissa is zero
        scales = ((scales.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scales = tl.where(magnitude == 0, 1.0, scales)
    scales = tl.where(finite, scales, float("nan"))

    divisor = tl.broadcast_to(scales[:, None], (blocks_per_program, block_size))
    q = tl.clamp(tl.div_rn(x, divisor), -fp8_max, fp8_max)
    q = tl.where(finite[:, None], q, float("nan"))
    tl.store(q_ptr + offsets, q.to(tl.float8e4nv), mask=mask)
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
    if scale_format not in SCALE_FORMATS:
        raise ValueError(f"scale_format must be one of {SCALE_FORMATS}, got {scale_format!r}")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be [num_tokens, hidden_size] with hidden_size > 0, got shape {tuple(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"x must be bfloat16 or float32, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got strides {x.stride()}")
    interpreted = not isinstance(quantize_1x128_kernel, triton.JITFunction)
    if not interpreted:
        if x.device.type != "cuda":
            raise ValueError(f"x must be on a CUDA device, got {x.device} (TRITON_INTERPRET=1 runs kernels on the CPU)")
        if torch.cuda.get_device_capability(x.device) < (8, 9):
            raise ValueError(f"{torch.cuda.get_device_name(x.device)} has no FP8: compute capability 8.9 is needed")

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
            fp8_max=FP8_MAX,
            min_scale=MIN_SCALE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return q, scales
