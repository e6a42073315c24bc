"""Device functions that kernels share: FP8 blocks and roundings, in the bits of moe_efa.quantization.

Nothing here may be fused: kernels are launched with enable_fp_fusion=False.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import FP8_MAX, MIN_SCALE

_FP8_MAX = tl.constexpr(FP8_MAX)
_MIN_SCALE = tl.constexpr(MIN_SCALE)


@triton.jit  # type: ignore[untyped-decorator]
def block_places(block_idx, in_range, hidden_size: tl.constexpr, block_size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of blocks of dense rows, by number: [blocks, 128] offsets of their elements, and which there are."""
    lane = tl.arange(0, block_size)
    if hidden_size % block_size == 0:
        offsets = block_idx[:, None] * block_size + lane[None, :]
        mask = tl.broadcast_to(in_range[:, None], offsets.shape)
    else:
        blocks_per_row: tl.constexpr = (hidden_size + block_size - 1) // block_size
        start = block_idx % blocks_per_row * block_size
        offsets = (block_idx // blocks_per_row * hidden_size + start)[:, None] + lane[None, :]
        mask = in_range[:, None] & (start[:, None] + lane[None, :] < hidden_size)
    return offsets, mask


@triton.jit  # type: ignore[untyped-decorator]
def scales_of(magnitude, power_of_two: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of each block, from the bits of its largest magnitude."""
    amax = magnitude.to(tl.float32, bitcast=True)
    scales = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, _FP8_MAX, tl.float32)), _MIN_SCALE)
    if power_of_two:  # rounds the exponent up unless the mantissa is zero
        scales = ((scales.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scales = tl.where(magnitude == 0, 1.0, scales)
    return tl.where(magnitude < 0x7F800000, scales, float("nan"))


@triton.jit
def quantize_values(x, magnitude, scales):  # type: ignore[no-untyped-def]
    """fp32 -> e4m3; magnitudes and scales of the blocks broadcast over x."""
    q = tl.clamp(tl.div_rn(x, tl.broadcast_to(scales, x.shape)), -_FP8_MAX, _FP8_MAX)
    return tl.where(magnitude < 0x7F800000, q, float("nan")).to(tl.float8e4nv)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_blocks(x, power_of_two: tl.constexpr):  # type: ignore[no-untyped-def]
    """[blocks, 128] fp32 -> the same as e4m3, and the scale of each block."""
    # Magnitudes are compared as integers, which order like the numbers and put NaN above infinity.
    magnitude = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scales = scales_of(magnitude, power_of_two)
    return quantize_values(x, magnitude[:, None], scales[:, None]), scales


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 -> bf16 or fp32, to nearest even; every NaN becomes the same one, whatever the hardware gives."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
        y = tl.where(x != x, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = tl.where(x != x, float("nan"), x)
    return y
