"""Plain-torch twins of the kernels, under the same names: slow, obvious, and bitwise what the kernels must return."""

from __future__ import annotations

from moe_efa.quantization import BLOCK_SIZE, FP8_MAX, MIN_SCALE, SCALE_FORMATS, quantize_1x128

__all__ = ["BLOCK_SIZE", "FP8_MAX", "MIN_SCALE", "SCALE_FORMATS", "quantize_1x128"]
