"""dequantize_1x128 against its torch twin, bitwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_efa.testing import assert_bitwise
from moe_efa.triton_kernels import dequantize, reference
from moe_efa.triton_kernels.dequantize import dequantize_1x128

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EDGES = [1.0, 0.0, 2.0**-126, 2.0**-149, 3e38, float("inf"), float("nan"), 0.3]


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 1), (7, 130), (33, 128), (3, 1100)])
@DTYPES
def test_equals_reference(num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (num_tokens, hidden_size), generator=generator).to(torch.uint8)  # NaNs among them
    exponents = torch.randint(-126, 120, (num_tokens, -(-hidden_size // 128)), generator=generator)
    scales = (torch.rand(exponents.shape, generator=generator) + 1) * torch.exp2(exponents.float())
    q, scales = codes.view(torch.float8_e4m3fn).to(device), scales.to(device)
    actual = dequantize_1x128(q, scales, dtype=dtype)
    assert_bitwise(actual, reference.dequantize_1x128(q, scales, dtype=dtype))


@DTYPES
def test_every_code_with_edge_scales(dtype: torch.dtype, device: torch.device) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(len(EDGES), 1)
    q, scales = codes.view(torch.float8_e4m3fn).to(device), torch.tensor(EDGES)[:, None].repeat(1, 2).to(device)
    actual = dequantize_1x128(q, scales, dtype=dtype)
    assert_bitwise(actual, reference.dequantize_1x128(q, scales, dtype=dtype))


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(dequantize_1x128, reference.dequantize_1x128)


def test_no_tokens(device: torch.device) -> None:
    q = torch.empty(0, 130, dtype=torch.float8_e4m3fn, device=device)
    assert dequantize_1x128(q, torch.empty(0, 2, device=device)).shape == (0, 130)


@pytest.mark.parametrize(
    ("q", "scales", "dtype", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1), torch.float32, "q must be float8_e4m3fn"),
        (torch.zeros(2, 130).to(torch.float8_e4m3fn), torch.zeros(2, 1), torch.float32, r"scales must be \[2, 2\]"),
        (torch.zeros(2, 3).to(torch.float8_e4m3fn), torch.zeros(2, 1), torch.float16, "dtype must be"),
    ],
    ids=["not-fp8", "too-few-scales", "fp16"],
)
def test_bad_arguments_are_refused(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize.dequantize_1x128(q, scales, dtype=dtype)
