"""Plain-torch twins of the kernels, under the same names: slow, obvious, and bitwise what the kernels must return."""

from __future__ import annotations

import torch

FP8_MAX = 448.0  # the largest finite e4m3fn
MIN_SCALE = 2.0**-126  # the smallest normal fp32: a scale is never subnormal
BLOCK_SIZE = 128


def quantize_1x128(x: torch.Tensor, *, scale_format: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`moe_efa.triton_kernels.quantize.quantize_1x128`."""
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
