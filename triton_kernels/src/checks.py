"""What every wrapper asks of its tensors. All refusals are ValueErrors, raised before anything is launched."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import triton
from torch import Tensor

from .reference import SCALE_FORMATS

FP8_CAPABILITY = (8, 9)
FLOATS = (torch.bfloat16, torch.float32)

# Options of a launch that keep its device_asserts, and add none of Triton's own to integer arithmetic.
ASSERTING = {"debug": True, "sanitize_overflow": False}


def check_tensor(name: str, x: Tensor, *, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Shape (a word stands for any size, 0 only if it is the first), dtype and layout."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor {_words(shape)}, got {type(x).__name__}")
    if x.dim() != len(shape) or any(
        isinstance(want, int) and size != want for size, want in zip(x.shape, shape, strict=False)
    ):
        raise ValueError(f"{name} must be {_words(shape)}, got shape {tuple(x.shape)}")
    for size, want in zip(x.shape[1:], shape[1:], strict=True):
        if size == 0:
            raise ValueError(f"{name} must be {_words(shape)} with {want} > 0, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {allowed}, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")


def check_positive(**numbers: int) -> None:
    """Sizes, which become part of a kernel or of shapes."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")


def check_number(name: str, number: float) -> None:
    """A factor or a bound, which becomes part of a kernel: no tensor."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError(f"{name} must be a number, got {type(number).__name__}")


def check_ids(topk_idx: Tensor, num_experts: int) -> None:
    """-1 or an expert. Looked at on the CPU; on a GPU that would wait."""
    if topk_idx.is_cpu and topk_idx.numel():
        least, largest = int(topk_idx.min()), int(topk_idx.max())
        if not -1 <= least <= largest < num_experts:
            raise ValueError(f"topk_idx must be in [-1, {num_experts}), got {least} to {largest}")


def check_limit(limit: float | None) -> None:
    """Of the inputs of an activation; None is no limit."""
    if limit is not None:
        check_number("limit", limit)
        if not limit > 0:
            raise ValueError(f"limit must be positive, got {limit}")


def _words(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_devices(kernel: Any, *tensors: Tensor | None, capability: tuple[int, int] | None = None) -> None:
    """All on one CUDA device, of at least this compute capability; under TRITON_INTERPRET=1 on the CPU."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors are on several devices: {', '.join(sorted(map(str, devices)))}")
    device = devices.pop()
    if not isinstance(kernel, triton.JITFunction):
        return
    if device.type != "cuda":
        raise ValueError(f"tensors must be on a CUDA device, got {device} (TRITON_INTERPRET=1 runs kernels on the CPU)")
    if capability is not None and torch.cuda.get_device_capability(device) < capability:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise ValueError(f"{name} does not suffice: compute capability {major}.{minor} is needed")


def check_scale_format(scale_format: str) -> None:
    if scale_format not in SCALE_FORMATS:
        raise ValueError(f"scale_format must be one of {SCALE_FORMATS}, got {scale_format!r}")
