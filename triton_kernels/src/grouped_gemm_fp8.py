"""Block-scaled FP8 matrix products of rows grouped by expert: by DeepGEMM where it is installed, else by our kernel.

Activations have a scale for each 1x128, weights for each 128x128: a tile of 128x128 has one scale of weights for each
step of 128 along K, so that products of FP8 are added in the tensor core within a step and scaled into fp32 after it.
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .checks import FLOATS, check_devices, check_positive, check_tensor
from .reference import BLOCK_SIZE

NUM_WARPS = 8  # with 4 the accumulator does not fit in registers
NUM_STAGES = 4
IMPLEMENTATIONS = ("auto", "triton", "deep_gemm")


@triton.jit  # type: ignore[untyped-decorator]
def grouped_gemm_fp8_kernel(  # type: ignore[no-untyped-def]
    a_desc,  # [num_rows, k] in tiles of block_size x block_size
    a_scales_ptr,
    b_desc,  # [num_experts * n, k], likewise
    b_scales_ptr,
    offsets_ptr,
    out_ptr,
    num_rows,
    n: tl.constexpr,
    k: tl.constexpr,
    num_experts: tl.constexpr,
    padded_groups: tl.constexpr,  # of num_experts + 1
    block_size: tl.constexpr,
):
    n_blocks: tl.constexpr = (n + block_size - 1) // block_size
    k_blocks: tl.constexpr = (k + block_size - 1) // block_size
    row_tile, n_block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks

    # Which expert a tile belongs to. The rows behind the last expert are a group of their own, which gets zeros.
    group = tl.arange(0, padded_groups)
    begin = tl.load(offsets_ptr + group, mask=group <= num_experts, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=group < num_experts, other=0)
    # Whatever offsets say, nothing is written outside out.
    begin = tl.maximum(begin, 0)
    end = tl.minimum(tl.where(group == num_experts, num_rows, end), num_rows)
    tiles = tl.where(group <= num_experts, (end - begin + block_size - 1) // block_size, 0)
    tiles_until = tl.cumsum(tiles, axis=0)
    expert = tl.sum((tiles_until <= row_tile).to(tl.int32), axis=0)
    if expert <= num_experts:
        is_mine = group == expert
        first = tl.sum(tl.where(is_mine, begin + (row_tile - tiles_until + tiles) * block_size, 0), axis=0)
        stop = tl.sum(tl.where(is_mine, end, 0), axis=0)
        row = first + tl.arange(0, block_size)
        column = n_block * block_size + tl.arange(0, block_size)
        total = tl.zeros((block_size, block_size), tl.float32)
        if expert < num_experts:
            a_scales = a_scales_ptr + row.to(tl.int64) * k_blocks
            b_scales = b_scales_ptr + (expert * n_blocks + n_block) * k_blocks
            for k_block in range(k_blocks):
                a = a_desc.load([first, k_block * block_size])
                b = b_desc.load([expert * n + n_block * block_size, k_block * block_size])
                scales = tl.load(a_scales + k_block, mask=row < stop, other=0.0) * tl.load(b_scales + k_block)
                total += tl.dot(a, b.T) * scales[:, None]
        out = out_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < stop)[:, None] & (column < n)[None, :])


def grouped_gemm_fp8(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    *,
    expert_alignment: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    implementation: str = "auto",
) -> Tensor:
    """``out[i] = b[e] @ a[i]`` for the rows i of each expert e, of block-scaled e4m3 numbers, added up in fp32.

    Against exact arithmetic on the dequantized operands, the error of an element is at most ``(k + 2) * 2**-24 * sum
    |a * b|``, and the rounding to ``dtype``, where products of FP8 are added in fp32: in the interpreter, and in
    ``reference.grouped_gemm_fp8``. It holds where the product of a row's and a weight's scale is a normal fp32 number,
    for these two are multiplied first, as in DeepGEMM. A Hopper tensor core adds 128 products at a time with fewer
    bits, about 14. Neither this kernel nor the call of DeepGEMM has been run on a GPU yet.

    Args:
        a: ``[num_rows, k]`` float8_e4m3fn, contiguous, on a CUDA device of compute capability 9.0 or newer (on the CPU
            only under ``TRITON_INTERPRET=1``); n and k are multiples of 16.
        a_scales: ``[num_rows, ceil(k / 128)]`` fp32, as of ``permute_quantize`` and ``swiglu_quantize``.
        b: ``[num_experts, n, k]`` float8_e4m3fn.
        b_scales: ``[num_experts, ceil(n / 128), ceil(k / 128)]`` fp32, as of ``quantize_128x128``.
        offsets: ``[num_experts + 1]`` int32, where each expert's rows begin; any alignment will do. Ascending from 0 to
            at most num_rows.
        expert_alignment: what all offsets are multiples of, if it is known. DeepGEMM needs a multiple of 128.
        dtype: bf16 or fp32, of the result.
        implementation: ``"triton"``, ``"deep_gemm"``, or ``"auto"``: DeepGEMM where it is installed and serves the
            arguments (Hopper, bf16, alignment of 128), otherwise Triton.

    Returns:
        ``[num_rows, n]`` in ``dtype``; zeros behind ``offsets[-1]``.

    Raises:
        ValueError: shape, dtype, layout, device or a number is not supported, DeepGEMM was asked for and cannot be had,
            or (on the CPU) offsets are not as they must be; on a GPU rows of such offsets mean nothing.

    Example (a test reuses it): two experts, one row each.

        >>> one = torch.full((2, 16), 1.0).to(torch.float8_e4m3fn)
        >>> b = torch.stack([torch.full((16, 16), 2.0), torch.full((16, 16), -0.5)]).to(torch.float8_e4m3fn)
        >>> scales = torch.tensor([[0.5], [4.0]])
        >>> out = grouped_gemm_fp8(one, scales, b, torch.ones(2, 1, 1), torch.tensor([0, 1, 2], dtype=torch.int32))
        >>> out.shape, out[:, 0].tolist()
        (torch.Size([2, 16]), [16.0, -32.0])
    """
    check_tensor("a", a, shape=("num_rows", "k"), dtypes=(torch.float8_e4m3fn,))
    num_rows, k = a.shape
    check_tensor("b", b, shape=("num_experts", "n", k), dtypes=(torch.float8_e4m3fn,))
    num_experts, n, _ = b.shape
    k_blocks, n_blocks = triton.cdiv(k, BLOCK_SIZE), triton.cdiv(n, BLOCK_SIZE)
    check_tensor("a_scales", a_scales, shape=(num_rows, k_blocks), dtypes=(torch.float32,))
    check_tensor("b_scales", b_scales, shape=(num_experts, n_blocks, k_blocks), dtypes=(torch.float32,))
    check_tensor("offsets", offsets, shape=(num_experts + 1,), dtypes=(torch.int32,))
    check_positive(num_experts=num_experts, expert_alignment=expert_alignment)
    if n % 16 or k % 16:
        raise ValueError(f"n and k must be multiples of 16, got {n} and {k}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be bfloat16 or float32, got {dtype}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    check_devices(grouped_gemm_fp8_kernel, a, a_scales, b, b_scales, offsets, capability=(9, 0))
    for name, operand in (("a", a), ("b", b)):
        if operand.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes, as every new tensor does")
    if offsets.is_cpu:
        _check_offsets(offsets.tolist(), num_rows)
    if implementation != "triton":
        obstacle = _obstacle_to_deep_gemm(a, expert_alignment, dtype)
        if obstacle is None:
            return _deep_gemm(a, a_scales, b, b_scales, offsets)
        if implementation == "deep_gemm":
            raise ValueError(f"DeepGEMM cannot be used: {obstacle}")

    out = torch.empty((num_rows, n), dtype=dtype, device=a.device)
    if num_rows == 0:
        return out
    tile = [BLOCK_SIZE, BLOCK_SIZE]
    most_tiles = triton.cdiv(num_rows, BLOCK_SIZE) + num_experts
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        grouped_gemm_fp8_kernel[(most_tiles * n_blocks,)](
            TensorDescriptor.from_tensor(a, tile),
            a_scales,
            TensorDescriptor.from_tensor(b.view(num_experts * n, k), tile),
            b_scales,
            offsets,
            out,
            num_rows,
            n=n,
            k=k,
            num_experts=num_experts,
            padded_groups=triton.next_power_of_2(num_experts + 1),
            block_size=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out


def _check_offsets(offsets: list[int], num_rows: int) -> None:
    ascending = all(first <= second for first, second in itertools.pairwise(offsets))
    if offsets[0] != 0 or not ascending or offsets[-1] > num_rows:
        raise ValueError(f"offsets must ascend from 0 to at most the {num_rows} rows, got {offsets}")


def _find_deep_gemm() -> ModuleType | None:
    """DeepGEMM is imported when it is first needed: it looks for a GPU and a compiler when it is imported."""
    try:
        return importlib.import_module("deep_gemm")
    except Exception:  # whatever it lacks, Triton serves
        return None


def _obstacle_to_deep_gemm(a: Tensor, expert_alignment: int, dtype: torch.dtype) -> str | None:
    if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device)[0] != 9:
        return "it takes scales as ours on Hopper GPUs"
    if dtype != torch.bfloat16:
        return f"it gives bfloat16, not {dtype}"
    if expert_alignment % BLOCK_SIZE:
        return f"expert_alignment is {expert_alignment}, not a multiple of {BLOCK_SIZE}"
    if a.shape[1] % BLOCK_SIZE:
        return f"k is {a.shape[1]}, not a multiple of {BLOCK_SIZE}"
    if not hasattr(_find_deep_gemm(), "m_grouped_fp8_gemm_nt_contiguous"):
        return "the package deep_gemm is not installed, or too old"
    return None


def _deep_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor) -> Tensor:
    deep_gemm = _find_deep_gemm()
    assert deep_gemm is not None
    num_rows, num_experts = len(a), len(b)
    out = torch.zeros((num_rows, b.shape[1]), dtype=torch.bfloat16, device=a.device)  # it skips rows without expert
    # The expert of every row; -1 behind the last one.
    rows = torch.arange(num_rows, dtype=torch.int32, device=a.device)
    experts = torch.bucketize(rows, offsets[1:], right=True, out_int32=True)
    experts = experts.masked_fill(experts == num_experts, -1)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a, a_scales), (b, b_scales), out, experts, disable_ue8m0_cast=True)
    return out
