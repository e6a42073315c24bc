"""Matrix products of rows grouped by expert: one call where torch has one for dtype, device and shape, else a loop.

Without autograd: ``experts.py`` knows what to save. Groups without rows are ordinary: they give zero weight gradients.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, N]: ``rows[start:stop] @ weight[e]`` for each expert.

    Args:
        rows: [R, K].
        weight: [E, K, N], of any strides.
        offsets: [E + 1] int32, where each expert's rows begin; ``offsets[-1] == R``.
    """
    if not rows.shape[0]:
        return rows.new_zeros(0, weight.shape[2])
    rows = rows.contiguous()
    if _suits(rows, weight.shape[1], weight.shape[2]):
        return _native()(rows, weight, offs=offsets[1:])
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for expert, group in _groups(offsets):
        torch.mm(rows[group], weight[expert], out=out[group])
    return out


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """[E, M, N]: ``left[start:stop].T @ right[start:stop]`` for each expert, zeros where there are no rows.

    Args:
        left: [R, M].
        right: [R, N].
        offsets: [E + 1] int32.
    """
    num_experts = offsets.numel() - 1
    if not left.shape[0]:
        return left.new_zeros(num_experts, left.shape[1], right.shape[1])
    left, right = left.contiguous(), right.contiguous()
    if _suits(left, left.shape[1], right.shape[1]):
        out = _native()(left.t(), right, offs=offsets[1:])
        empty = offsets.diff() == 0
        # Kernels that sum over no rows may leave what was in memory.
        if not empty.is_cpu or bool(empty.any()):
            out.masked_fill_(empty[:, None, None], 0.0)
        return out
    out = left.new_zeros(num_experts, left.shape[1], right.shape[1])
    for expert, group in _groups(offsets):
        torch.mm(left[group].t(), right[group], out=out[expert])
    return out


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of those that have any."""
    if _is_capturing(offsets.device):
        raise RuntimeError("a CUDA graph holds the experts' products in bf16, of sizes that are multiples of 8, only")
    bounds = offsets.tolist()
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            yield expert, slice(start, stop)


def _suits(rows: Tensor, *sizes: int) -> bool:
    """Strides must be multiples of 16 bytes, and the kernel must exist."""
    aligned = all(size * rows.element_size() % 16 == 0 for size in sizes)
    return aligned and _works(rows.device, rows.dtype)


@functools.lru_cache
def _native() -> Callable[..., Tensor]:
    """torch.nn.functional.grouped_mm, or what it is called in older releases."""
    return getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Try it: which dtypes and devices are served differs between releases and builds."""
    if _is_capturing(device):
        raise RuntimeError("call the experts once before they are captured in a CUDA graph: first uses cannot be")
    try:
        rows = torch.ones(16, 16, device=device, dtype=dtype)
        offs = torch.tensor([0, 16], device=device, dtype=torch.int32)
        _native()(rows, torch.ones(2, 16, 16, device=device, dtype=dtype), offs=offs)
        _native()(rows.t(), rows, offs=offs)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True
