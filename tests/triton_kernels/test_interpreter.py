"""The repaired interpreter casts as the hardware does: nearest even, saturating to FP8, NaN kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl


def cast(x_ptr, y_ptr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, size)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@pytest.fixture
def cast_kernel(interpreter_environment: None) -> Any:
    return triton.jit(cast)


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.exp2(torch.rand(4064, generator=generator) * 40 - 20)
    signs = torch.randint(0, 2, (4064,), generator=generator) * 2 - 1
    edges = [0.0, -0.0, 125.06, 447.9, 448.0, 464.0, 1e9, -1e9, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 2.0**-126]
    edges += [1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 57344.0, 61440.0, float("nan"), float("inf"), float("-inf")]
    return torch.cat([magnitudes * signs, torch.tensor(edges), torch.zeros(4096 - 4064 - len(edges))])


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_cast_from_fp32_equals_torch(target: torch.dtype, cast_kernel: Any, device: torch.device) -> None:
    x = values().to(device)
    y = torch.empty(x.shape, dtype=target, device=device)
    cast_kernel[(1,)](x, y, size=x.numel())
    limit = torch.finfo(target).max
    expected = (x.clamp(-limit, limit) if target.itemsize == 1 else x).to(target)
    assert torch.equal(y.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_bit_pattern_reads_as_in_torch(source: torch.dtype, cast_kernel: Any, device: torch.device) -> None:
    integer = torch.uint8 if source.itemsize == 1 else torch.int16
    patterns = torch.arange(1 << 8 * source.itemsize, dtype=torch.int32).to(integer)
    x = patterns.view(source).to(device)
    y = torch.empty(x.shape, dtype=torch.float32, device=device)
    cast_kernel[(1,)](x, y, size=x.numel())
    assert torch.equal(y.nan_to_num(nan=1e30), x.to(torch.float32).nan_to_num(nan=1e30))
    assert torch.equal(y.isnan(), x.to(torch.float32).isnan())


def exponential(x_ptr, y_ptr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, size)
    tl.store(y_ptr + offsets, tl.exp(tl.load(x_ptr + offsets)))


def test_exp_is_that_of_torch(interpreter_environment: None, device: torch.device) -> None:
    x = torch.linspace(-110, 90, 4096, device=device)
    y = torch.empty_like(x)
    triton.jit(exponential)[(1,)](x, y, size=x.numel())
    expected = torch.exp(x)
    assert torch.equal(y, expected) if x.is_cpu else torch.allclose(y, expected, rtol=1e-5, atol=1e-37)
