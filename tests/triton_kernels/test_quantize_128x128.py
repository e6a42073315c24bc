"""quantize_128x128 against its torch twin, bitwise, and against numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_efa.testing import assert_bitwise
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.quantize_128x128 import quantize_128x128

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def assert_equals_twin(x: torch.Tensor) -> None:
    for name, got, want in zip(("q", "scales"), quantize_128x128(x), reference.quantize_128x128(x), strict=True):
        assert got.shape == want.shape and got.is_contiguous(), name
        assert_bitwise(got, want, name)


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize(
    ("num_experts", "n", "k"), [(1, 1, 1), (2, 128, 256), (3, 130, 129), (2, 16, 300), (1, 257, 16)]
)
@DTYPES
def test_equals_reference(num_experts: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_experts, n, k, generator=generator)
    x *= torch.exp2(torch.randint(-30, 31, (num_experts, n, 1), generator=generator).float())
    x[0, n // 2] = 0
    assert_equals_twin(x.to(dtype).to(device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_non_finite_input_makes_its_block_nan(bad: float, device: torch.device) -> None:
    x = torch.ones(2, 130, 256, device=device)
    x[1, 129, 200] = bad
    q, scales = quantize_128x128(x)
    is_nan = torch.zeros(2, 130, 256, dtype=torch.bool)
    is_nan[1, 128:, 128:] = True
    assert torch.equal(q.float().isnan().cpu(), is_nan)
    assert (q.view(torch.uint8).cpu()[is_nan] == 0x7F).all()
    assert scales.isnan().cpu().nonzero().tolist() == [[1, 1, 1]]


def test_the_sign_of_a_nan_is_not_kept(device: torch.device) -> None:
    x = torch.ones(1, 16, 16, device=device)
    x[0, 3, 5] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)
    assert_equals_twin(x)


def test_blocks_of_zeros_and_of_subnormals(device: torch.device) -> None:
    x = torch.zeros(1, 128, 384, device=device)
    x[0, 7, 130], x[0, 9, 300] = 2.0**-140, 448 * 2.0**-126
    assert_equals_twin(x)
    assert quantize_128x128(x)[1].flatten().tolist() == [1.0, 2.0**-126, 2.0**-126]


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(quantize_128x128, reference.quantize_128x128)


def test_no_experts(device: torch.device) -> None:
    q, scales = quantize_128x128(torch.empty(0, 200, 130, device=device))
    assert q.shape == (0, 200, 130) and q.dtype == torch.float8_e4m3fn and scales.shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 4), "num_experts, n, k"),
        (torch.zeros(1, 0, 4), "n > 0"),
        (torch.zeros(1, 4, 0), "k > 0"),
        (torch.zeros(1, 2, 4, dtype=torch.float16), "bfloat16 or float32"),
        (torch.zeros(1, 4, 2).transpose(1, 2), "contiguous"),
    ],
    ids=["2d", "no-n", "no-k", "fp16", "strided"],
)
def test_bad_arguments_are_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_128x128(x)
