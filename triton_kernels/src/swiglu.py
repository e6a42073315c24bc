"""SwiGLU between the two matrices of an expert, with clamp, routing weight and quantization in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, FP8_CAPABILITY, check_devices, check_limit, check_scale_format, check_tensor
from .numerics import quantize_blocks, rounded
from .reference import BLOCK_SIZE
from .rows import check_row_floats

# 16 elements a thread: two 16-byte loads of bf16 each of gate and up, one 16-byte store of FP8.
BLOCKS_PER_PROGRAM = 8
NUM_WARPS = 2


@triton.jit  # type: ignore[untyped-decorator]
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,
    weights_ptr,  # None: 1
    out_ptr,
    scales_ptr,  # None: out is not quantized
    num_blocks,  # of all rows
    limit: tl.constexpr,  # None: nothing is clamped
    intermediate_size: tl.constexpr,
    power_of_two: tl.constexpr,
    blocks_per_program: tl.constexpr,
    block_size: tl.constexpr,
):
    blocks_per_row: tl.constexpr = (intermediate_size + block_size - 1) // block_size
    block_idx = tl.program_id(0).to(tl.int64) * blocks_per_program + tl.arange(0, blocks_per_program)
    lane = tl.arange(0, block_size)
    in_range = block_idx < num_blocks
    row = block_idx // blocks_per_row
    column = (block_idx % blocks_per_row * block_size)[:, None] + lane[None, :]
    mask = in_range[:, None] & (column < intermediate_size)
    gate_offsets = (row * (2 * intermediate_size))[:, None] + column
    gate = tl.load(gate_up_ptr + gate_offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_offsets + intermediate_size, mask=mask, other=0.0).to(tl.float32)
    if limit is not None:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    hidden = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    if weights_ptr is not None:
        hidden = hidden * tl.load(weights_ptr + row, mask=in_range, other=0.0)[:, None]
    out_offsets = (row * intermediate_size)[:, None] + column
    if scales_ptr is not None:
        q, scales = quantize_blocks(hidden, power_of_two)
        tl.store(out_ptr + out_offsets, q, mask=mask)
        tl.store(scales_ptr + block_idx, scales, mask=in_range)
    else:
        tl.store(out_ptr + out_offsets, rounded(hidden, out_ptr.dtype.element_ty), mask=mask)


def swiglu(gate_up: Tensor, *, weights: Tensor | None = None, limit: float | None = None) -> Tensor:
    """``silu(gate) * up * weight`` in fp32, rounded once to gate_up's dtype.

    ``silu(x) = x / (1 + exp(-x))``. Bitwise equal to ``reference.swiglu`` where exp is (the interpreter of the tests);
    on a GPU exp is within ``2 + |x|`` ulps, before the result is rounded.

    Args:
        gate_up: ``[num_rows, 2 * intermediate_size]`` bf16 or fp32, the gate's columns first, contiguous, on a CUDA
            device (on the CPU only under ``TRITON_INTERPRET=1``).
        weights: ``[num_rows]`` fp32 routing weights, applied before the down projection; None is 1. Their gradient then
            needs no output of the experts.
        limit: gate is clamped to at most this, up to at most this in magnitude; None clamps nothing.

    Returns:
        ``[num_rows, intermediate_size]`` in gate_up's dtype.

    Raises:
        ValueError: shape, dtype, layout, device or ``limit`` is not supported.

    Example (a test reuses it): gate 0 gives 0; a large gate passes through, here clamped to 40.

        >>> gate_up = torch.tensor([[0.0, 64.0, 5.0, -48.0]])
        >>> swiglu(gate_up).tolist()
        [[0.0, -3072.0]]
        >>> swiglu(gate_up, weights=torch.tensor([0.5]), limit=40.0).tolist()
        [[0.0, -800.0]]
    """
    out = torch.empty(_check(gate_up, weights, limit), dtype=gate_up.dtype, device=gate_up.device)
    _launch(gate_up, weights, limit, out, None, power_of_two=False)
    return out


def swiglu_quantize(
    gate_up: Tensor, *, weights: Tensor | None = None, limit: float | None = None, scale_format: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """:func:`swiglu`, quantized from fp32 as :func:`~moe_efa.triton_kernels.quantize.quantize_1x128` does.

    Args:
        gate_up, weights, limit: as for :func:`swiglu`; the device has compute capability 8.9 or newer.
        scale_format: ``"fp32"`` or ``"ue8m0"``.

    Returns:
        ``q`` ``[num_rows, intermediate_size]`` float8_e4m3fn and ``scales`` ``[num_rows, ceil(intermediate_size /
        128)]`` fp32.

    Raises:
        ValueError: as for :func:`swiglu`, or ``scale_format`` is unknown.

    Example (a test reuses it):

        >>> q, scales = swiglu_quantize(torch.tensor([[0.0, 64.0, 5.0, -28.0]]))
        >>> q.tolist(), scales.tolist()
        ([[0.0, -448.0]], [[4.0]])
    """
    check_scale_format(scale_format)
    shape = _check(gate_up, weights, limit, fp8=True)
    q = torch.empty(shape, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = torch.empty((shape[0], triton.cdiv(shape[1], BLOCK_SIZE)), dtype=torch.float32, device=gate_up.device)
    _launch(gate_up, weights, limit, q, scales, power_of_two=scale_format == "ue8m0")
    return q, scales


def _check(gate_up: Tensor, weights: Tensor | None, limit: float | None, *, fp8: bool = False) -> tuple[int, int]:
    """The shape of the result."""
    check_tensor("gate_up", gate_up, shape=("num_rows", "2 * intermediate_size"), dtypes=FLOATS)
    num_rows, columns = gate_up.shape
    if columns % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {columns}")
    check_row_floats("weights", weights, (num_rows,))
    check_limit(limit)
    check_devices(swiglu_kernel, gate_up, weights, capability=FP8_CAPABILITY if fp8 else None)
    return num_rows, columns // 2


def _launch(
    gate_up: Tensor, weights: Tensor | None, limit: float | None, out: Tensor, scales: Tensor | None, power_of_two: bool
) -> None:
    num_rows, intermediate_size = out.shape
    num_blocks = num_rows * triton.cdiv(intermediate_size, BLOCK_SIZE)
    if num_blocks == 0:
        return
    with torch.cuda.device_of(gate_up):  # type: ignore[no-untyped-call]
        swiglu_kernel[(triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM),)](
            gate_up,
            weights,
            out,
            scales,
            num_blocks,
            limit=None if limit is None else float(limit),
            intermediate_size=intermediate_size,
            power_of_two=power_of_two,
            blocks_per_program=BLOCKS_PER_PROGRAM,
            block_size=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
