"""The CPU kernels against FP8 in plain torch, bitwise: the rows and scales that a dispatch hands through."""

import doctest

import pytest
import torch

import moe_efa
from moe_efa import quantization
from moe_efa.quantization import dequantize_1x128, quantize_1x128
from moe_efa.testing import assert_bitwise

NAN, INF = float("nan"), float("inf")
FORMATS = pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])


def through_the_wire(x: torch.Tensor, scale_format: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and values that one rank gets from itself."""
    tokens, hidden_size = x.shape
    with moe_efa.ExpertParallel(
        None,
        num_experts=1,
        hidden_size=hidden_size,
        top_k=1,
        max_tokens_per_rank=tokens,
        wire_dtype="fp8",
        fp8_scale=scale_format,
    ) as ep:
        d = ep.dispatch(x, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1), output="fp8")
        assert d.scales is not None
        return d.x, d.scales, ep.dispatch(x, handle=d.handle).x


def check(x: torch.Tensor, scale_format: str) -> None:
    q, scales, values = through_the_wire(x, scale_format)
    expected_q, expected_scales = quantize_1x128(x, scale_format=scale_format)
    assert_bitwise(q.view(torch.uint8), expected_q.view(torch.uint8), "codes")
    assert_bitwise(scales, expected_scales, "scales")
    assert_bitwise(values, dequantize_1x128(expected_q, expected_scales, dtype=x.dtype), "values")


def test_docstring_examples_are_true():
    result = doctest.testmod(quantization, extraglobs={"torch": torch})
    assert result.attempted >= 8
    assert result.failed == 0


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [1, 40, 127, 128, 129, 200, 700, 1024])
def test_rows_of_all_sizes(hidden_size, dtype, scale_format):
    generator = torch.Generator().manual_seed(hidden_size)
    x = torch.randn(33, hidden_size, generator=generator)
    x *= torch.exp2(torch.randint(-40, 41, (33, 1), generator=generator).float())
    x[5] = 0
    check(x.to(dtype), scale_format)


@FORMATS
def test_every_bf16_in_blocks_of_its_size_and_in_any_company(scale_format):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    check(every.reshape(512, 128), scale_format)
    finite = every[every.isfinite()]
    order = torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))
    check(finite[order].reshape(510, 128), scale_format)


@FORMATS
def test_special_values(scale_format):
    x = torch.ones(12, 300)
    for row, values in enumerate(
        (
            [0.0, -0.0],
            [NAN],
            [-NAN, INF],
            [INF],
            [-INF, 1.0],
            [2.0**-149, -(2.0**-140)],
            [448 * 2.0**-126, 2.0**-149],
            [3.4028234663852886e38, -1e38],
            [448.0, 17.0, 18.0, 19.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 2.0**-11],
            [448.0 * (1 + 2.0**-23)],
            [449.0, 448.99, 3.0],
            [1e-44],
        )
    ):
        if row in (0, 5, 11):
            x[row] = 0
        x[row, : len(values)] = torch.tensor(values)
        x[row, 300 - len(values) :] = torch.tensor(values)
    check(x, scale_format)
    check(x.bfloat16(), scale_format)


def test_a_word_that_is_no_scale_format_is_refused():
    with pytest.raises(ValueError, match="scale_format must be one of"):
        quantize_1x128(torch.zeros(1, 4), scale_format="e8m0")
