"""Gradients of SwiGLU: of gate and up, quantized too where asked, and of the routing weight, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, FP8_CAPABILITY, check_devices, check_limit, check_scale_format, check_tensor
from .numerics import quantize_blocks, rounded
from .reference import BLOCK_SIZE, SwiGLUGrads
from .rows import check_row_floats

MAX_BLOCKS = 16  # of 128 columns, at a time
BLOCKS_PER_WARP = 2


@triton.jit  # type: ignore[untyped-decorator]
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_hidden_ptr,
    gate_up_ptr,
    weights_ptr,  # None: 1
    grad_gate_up_ptr,
    grad_weights_ptr,
    q_ptr,  # None: grad_gate_up is not quantized
    scales_ptr,
    limit: tl.constexpr,  # None: nothing is clamped
    intermediate_size: tl.constexpr,
    power_of_two: tl.constexpr,
    num_blocks: tl.constexpr,  # at a time
    block_size: tl.constexpr,
):
    dtype: tl.constexpr = grad_gate_up_ptr.dtype.element_ty
    blocks_per_row: tl.constexpr = intermediate_size // block_size
    row = tl.program_id(0).to(tl.int64)
    dots = tl.zeros((num_blocks, block_size), tl.float32)
    for start in range(0, intermediate_size, num_blocks * block_size):
        block_idx = start // block_size + tl.arange(0, num_blocks)
        column = block_idx[:, None] * block_size + tl.arange(0, block_size)[None, :]
        mask = column < intermediate_size
        gate_offsets = row * (2 * intermediate_size) + column
        gate = tl.load(gate_up_ptr + gate_offsets, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + gate_offsets + intermediate_size, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_hidden_ptr + row * intermediate_size + column, mask=mask, other=0.0).to(tl.float32)
        if limit is not None:
            gate_is_free = gate <= limit
            up_is_free = tl.abs(up) <= limit
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        divisor = 1.0 + tl.exp(-gate)
        silu = tl.div_rn(gate, divisor)
        sigmoid = tl.div_rn(tl.full(gate.shape, 1.0, tl.float32), divisor)
        if weights_ptr is not None:
            dots += grad * (silu * up)
            grad = grad * tl.load(weights_ptr + row)
        grad_gate = ((grad * up) * sigmoid) * (1.0 + gate * (1.0 - sigmoid))
        grad_up = grad * silu
        if limit is not None:
            grad_gate = tl.where(gate_is_free, grad_gate, 0.0)
            grad_up = tl.where(up_is_free, grad_up, 0.0)
        tl.store(grad_gate_up_ptr + gate_offsets, rounded(grad_gate, dtype), mask=mask)
        tl.store(grad_gate_up_ptr + gate_offsets + intermediate_size, rounded(grad_up, dtype), mask=mask)
        if q_ptr is not None:
            scale_offsets = row * (2 * blocks_per_row) + block_idx
            q, scales = quantize_blocks(grad_gate, power_of_two)
            tl.store(q_ptr + gate_offsets, q, mask=mask)
            tl.store(scales_ptr + scale_offsets, scales, mask=block_idx < blocks_per_row)
            q, scales = quantize_blocks(grad_up, power_of_two)
            tl.store(q_ptr + gate_offsets + intermediate_size, q, mask=mask)
            tl.store(scales_ptr + scale_offsets + blocks_per_row, scales, mask=block_idx < blocks_per_row)
    if weights_ptr is not None:
        tl.store(grad_weights_ptr + row, tl.sum(tl.sum(dots, axis=1), axis=0))


def swiglu_backward(
    grad_hidden: Tensor,
    gate_up: Tensor,
    *,
    weights: Tensor | None = None,
    limit: float | None = None,
    quantized: bool = False,
    scale_format: str = "fp32",
) -> SwiGLUGrads:
    """Gradients of :func:`~moe_efa.triton_kernels.swiglu.swiglu` and of ``swiglu_quantize`` (straight through).

    With ``g = grad_hidden * weight``, in fp32, and where nothing was clamped::

        grad_up   = g * silu(gate)
        grad_gate = g * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
        grad_weight = sum of grad_hidden * silu(gate) * up      # unweighted activations

    Bitwise equal to ``reference.swiglu_backward`` where exp is, but for ``grad_weight``: it is summed in an order of
    its own, the same in every run, and within ``intermediate_size * 2**-24 * sum |terms|`` of the exact sum.

    Args:
        grad_hidden: ``[num_rows, intermediate_size]`` in gate_up's dtype, contiguous.
        gate_up, weights, limit: those of the forward pass.
        quantized: also give the gradient of gate_up in FP8, quantized from fp32, for the matrix products of backward;
            intermediate_size is a multiple of 128 then, and the device has compute capability 8.9 or newer.
        scale_format: ``"fp32"`` or ``"ue8m0"``.

    Returns:
        ``grad_gate_up`` ``[num_rows, 2 * intermediate_size]`` in gate_up's dtype; ``grad_weights`` ``[num_rows]`` fp32
        or None; ``q`` ``[num_rows, 2 * intermediate_size]`` float8_e4m3fn and ``scales`` ``[num_rows, 2 *
        intermediate_size / 128]`` fp32, or None.

    Raises:
        ValueError: shape, dtype, layout, device or a number is not supported.

    Example (a test reuses it): silu'(0) is 1/2, and silu(64) is 64 to fp32.

        >>> gate_up = torch.tensor([[0.0, 64.0, 6.0, -3.0]])
        >>> grads = swiglu_backward(torch.tensor([[1.0, 10.0]]), gate_up, weights=torch.tensor([0.5]))
        >>> grads.grad_gate_up.tolist(), grads.grad_weights.tolist()
        ([[1.5, -15.0, 0.0, 320.0]], [-1920.0])
    """
    check_scale_format(scale_format)
    check_tensor("gate_up", gate_up, shape=("num_rows", "2 * intermediate_size"), dtypes=FLOATS)
    num_rows, columns = gate_up.shape
    if columns % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {columns}")
    intermediate_size = columns // 2
    check_tensor("grad_hidden", grad_hidden, shape=(num_rows, intermediate_size), dtypes=(gate_up.dtype,))
    check_row_floats("weights", weights, (num_rows,))
    check_limit(limit)
    if quantized and intermediate_size % BLOCK_SIZE:
        raise ValueError(f"quantized gradients need a multiple of {BLOCK_SIZE} columns, got {intermediate_size}")
    check_devices(
        swiglu_backward_kernel, gate_up, grad_hidden, weights, capability=FP8_CAPABILITY if quantized else None
    )

    grad_gate_up = torch.empty_like(gate_up)
    grad_weights = None if weights is None else torch.empty_like(weights)
    q, scales = None, None
    if quantized:
        q = torch.empty_like(gate_up, dtype=torch.float8_e4m3fn)
        scales = torch.empty((num_rows, columns // BLOCK_SIZE), dtype=torch.float32, device=gate_up.device)
    if num_rows == 0:
        return SwiGLUGrads(grad_gate_up, grad_weights, q, scales)
    num_blocks = blocks_at_a_time(intermediate_size)
    with torch.cuda.device_of(gate_up):  # type: ignore[no-untyped-call]
        swiglu_backward_kernel[(num_rows,)](
            grad_hidden,
            gate_up,
            weights,
            grad_gate_up,
            grad_weights,
            q,
            scales,
            limit=None if limit is None else float(limit),
            intermediate_size=intermediate_size,
            power_of_two=scale_format == "ue8m0",
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            num_warps=num_warps(num_blocks),
            enable_fp_fusion=False,
        )
    return SwiGLUGrads(grad_gate_up, grad_weights, q, scales)


def blocks_at_a_time(intermediate_size: int) -> int:
    """How many blocks of 128 columns a program has in registers."""
    return min(MAX_BLOCKS, triton.next_power_of_2(triton.cdiv(intermediate_size, BLOCK_SIZE)))


def num_warps(num_blocks: int) -> int:
    """Eight elements a thread: with 16 a thread needs up to 170 registers."""
    return max(1, num_blocks // BLOCKS_PER_WARP)
