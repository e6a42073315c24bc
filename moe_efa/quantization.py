"""Block-scaled FP8 in plain torch: slow, obvious, and bitwise what every kernel must return (csrc/kernels, Triton)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_efa.config import FP8_SCALES as SCALE_FORMATS

FP8_MAX = 448.0  # the largest finite e4m3fn
MIN_SCALE = 2.0**-126  # the smallest normal fp32: a scale is never subnormal
BLOCK_SIZE = 128


def quantize_1x128(x: Tensor, *, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
    """Quantize rows to e4m3 in blocks of 128 along the hidden dimension; the last block may be short.

    For each block, with ``amax`` its largest magnitude in fp32::

        scale = max(amax / 448, 2**-126)              # 1.0 where amax is 0
        q     = e4m3(clamp(x / scale, -448, 448))     # true division, round to nearest even

    With ``scale_format="ue8m0"`` the scale is the smallest power of two that is not below ``max(amax / 448, 2**-126)``,
    the quotient rounded to fp32; it is still returned as fp32. A block with a NaN or an infinity gets NaN for its scale
    and all of its values.

    Args:
        x: [T, H] bf16 or fp32.
        scale_format: "fp32" or "ue8m0".

    Returns:
        ``(q, scales)``: [T, H] float8_e4m3fn and [T, ceil(H / 128)] fp32.

    A full block and a short one:

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
    num_tokens, hidden_size = x.shape
    num_blocks = -(-hidden_size // BLOCK_SIZE)
    values = torch.zeros(num_tokens, num_blocks * BLOCK_SIZE, dtype=torch.float32, device=x.device)
    values[:, :hidden_size] = x.to(torch.float32)
    values = values.view(num_tokens, num_blocks, BLOCK_SIZE)

    amax = values.abs().amax(dim=-1)  # NaN where a value of the block is NaN
    # Divided by a tensor: on CUDA torch turns a division by a number into a product with its reciprocal.
    scales = (amax / torch.full_like(amax, FP8_MAX)).clamp(min=MIN_SCALE)
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scales)  # scales = mantissa * 2**exponent with 0.5 <= mantissa < 1
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scales = torch.ldexp(torch.ones_like(scales, dtype=torch.float64), exponent).to(torch.float32)
    scales = torch.where(amax == 0, 1.0, scales)
    finite = torch.isfinite(amax)
    scales = torch.where(finite, scales, torch.nan)

    quotients = (values / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    quotients = torch.where(finite.unsqueeze(-1), quotients, torch.nan)
    q = quotients.flatten(1)[:, :hidden_size].to(torch.float8_e4m3fn).contiguous()
    return q, scales.contiguous()


def dequantize_1x128(q: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of quantized rows: ``q * scale`` in fp32, rounded once to ``dtype``.

    Args:
        q: [T, H] float8_e4m3fn.
        scales: [T, ceil(H / 128)] fp32.
        dtype: bf16 or fp32.

    Returns:
        [T, H] in ``dtype``.

    >>> q = torch.tensor([[448.0, -1.5, 8.0, 0.5]]).to(torch.float8_e4m3fn)
    >>> dequantize_1x128(q, torch.tensor([[2.0]])).tolist()
    [[896.0, -3.0, 16.0, 1.0]]
    """
    of_column = torch.arange(q.shape[1], device=q.device) // BLOCK_SIZE
    values = q.to(torch.float32) * scales[:, of_column]
    return values.to(dtype).masked_fill(values.isnan(), torch.nan)  # one NaN: torch's casts give several
