"""quantize_1x128 against its torch twin, bitwise; the twin against numbers worked by hand."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable

import pytest
import torch
import triton

from moe_efa.triton_kernels import quantize, reference
from moe_efa.triton_kernels.quantize import quantize_1x128

Quantize = Callable[..., tuple[torch.Tensor, torch.Tensor]]
BOTH = pytest.mark.parametrize("function", [quantize_1x128, reference.quantize_1x128], ids=["triton", "torch"])
FORMATS = pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAN, INF = float("nan"), float("inf")


def assert_bitwise_equal(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for name, got, want in zip(("q", "scales"), actual, expected, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous(), name
        different = (got.cpu().view(torch.uint8) != want.cpu().view(torch.uint8)).nonzero()
        assert len(different) == 0, f"{name} differs in {len(different)} bytes, first at {different[0].tolist()}"


def rows(num_tokens: int, hidden_size: int, dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    """Normal values whose magnitude differs from row to row by up to 2**80."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden_size, generator=generator)
    exponents = torch.randint(-40, 41, (num_tokens, 1), generator=generator)
    return (x * torch.exp2(exponents.to(torch.float32))).to(dtype)


@pytest.mark.parametrize("hidden_size", [1, 100, 128, 130, 384, 576, 1024])
@pytest.mark.parametrize("num_tokens", [1, 7, 33])
@DTYPES
@FORMATS
def test_equals_reference(
    num_tokens: int, hidden_size: int, dtype: torch.dtype, scale_format: str, device: torch.device
) -> None:
    x = rows(num_tokens, hidden_size, dtype).to(device)
    x[num_tokens // 2] = 0
    actual = quantize_1x128(x, scale_format=scale_format)
    assert_bitwise_equal(actual, reference.quantize_1x128(x, scale_format=scale_format))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([0.0, -0.0], id="zeros"),
        pytest.param([NAN, 1.0], id="nan"),
        pytest.param([1.0, -NAN], id="negative-nan"),
        pytest.param([INF, 1.0], id="inf"),
        pytest.param([1.0, -INF], id="negative-inf"),
        pytest.param([INF, NAN], id="inf-and-nan"),
        pytest.param([2.0**-149, -(2.0**-140)], id="subnormal"),
        pytest.param([448 * 2.0**-126, 2.0**-149], id="smallest-scale"),
        pytest.param([448 * 2.0**-126 * (1 + 2.0**-23), 1.0], id="above-smallest-scale"),
        pytest.param([3.4028234663852886e38, -1e38], id="largest"),
        pytest.param([448.0, 17.0, 18.0, 19.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 2.0**-11], id="ties-to-even"),
        pytest.param([448.0 * (1 + 2.0**-23), 1.0], id="just-above-a-power-of-two"),
        pytest.param([449.0, 448.99, 3.0], id="clamped"),
    ],
)
@DTYPES
@FORMATS
def test_edge_values_equal_reference(
    values: list[float], dtype: torch.dtype, scale_format: str, device: torch.device
) -> None:
    x = torch.ones(3, 300)
    x[1, : len(values)] = torch.tensor(values)  # a full block
    x[2, 300 - len(values) :] = torch.tensor(values)  # a short one
    x = x.to(dtype).to(device)
    actual = quantize_1x128(x, scale_format=scale_format)
    assert_bitwise_equal(actual, reference.quantize_1x128(x, scale_format=scale_format))


@BOTH
@FORMATS
def test_block_of_zeros_has_scale_one(function: Quantize, scale_format: str, device: torch.device) -> None:
    q, scales = function(torch.zeros(2, 200, device=device), scale_format=scale_format)
    assert scales.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert (q.view(torch.uint8) == 0).all()


@BOTH
@FORMATS
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_non_finite_input_makes_its_block_nan(
    function: Quantize, scale_format: str, bad: float, device: torch.device
) -> None:
    x = torch.ones(2, 256, device=device)
    x[0, 5] = bad
    q, scales = function(x, scale_format=scale_format)
    values = q.to(torch.float32)
    assert values[0, :128].isnan().all() and math.isnan(scales[0, 0].item())
    assert (q[0, :128].view(torch.uint8) == 0x7F).all()  # one NaN, whatever the input's payload and sign
    assert values[0, 128:].isfinite().all() and values[1].isfinite().all()
    assert scales[0, 1].isfinite() and scales[1].isfinite().all()


@BOTH
def test_scales_divide_truly(function: Quantize, device: torch.device) -> None:
    """3/448 by a product with the rounded 1/448 would differ in the last bit for some of these."""
    amax = torch.arange(1, 2049, dtype=torch.float32)
    x = torch.zeros(2048, 128)
    x[:, 0] = amax
    _, scales = function(x.to(device))
    assert torch.equal(scales[:, 0].cpu(), (amax.to(torch.float64) / 448).to(torch.float32))
    by_reciprocal = amax * (torch.ones(()) / 448)
    assert not torch.equal(by_reciprocal, scales[:, 0].cpu()), "these amax would not tell the difference"


@BOTH
@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (448.0, 1.0),
        (448.0 * (1 + 2.0**-23), 2.0),
        (447.0, 1.0),
        (224.0, 0.5),
        (225.0, 1.0),
        (1e-44, 2.0**-126),
        (448 * 2.0**-126, 2.0**-126),
        (449 * 2.0**-126, 2.0**-125),
        (3.4028234663852886e38, 2.0**120),
    ],
)
def test_power_of_two_scale_is_the_smallest_that_fits(
    function: Quantize, amax: float, scale: float, device: torch.device
) -> None:
    x = torch.zeros(1, 128, device=device)
    x[0, 77] = -amax
    q, scales = function(x, scale_format="ue8m0")
    assert scales.item() == scale
    assert q[0, 77].to(torch.float32).item() * scale == pytest.approx(-amax, rel=2.0**-4, abs=2.0**-136)


@BOTH
@DTYPES
def test_rounding_error_is_at_most_half_an_ulp(function: Quantize, dtype: torch.dtype, device: torch.device) -> None:
    x = rows(16, 512, dtype, seed=3).to(device)
    q, scales = function(x)
    quotients = (x.to(torch.float64) / scales.repeat_interleave(128, dim=1).to(torch.float64)).cpu()
    # An e4m3 number in [2**e, 2**(e+1)) has ulp 2**(e-3); below 2**-6 the ulp stays 2**-9.
    ulp = torch.exp2(torch.floor(torch.log2(quotients.abs().clamp(min=2.0**-6))) - 3)
    assert ((q.cpu().to(torch.float64) - quotients).abs() <= ulp * (0.5 + 1e-6)).all()


def test_docstring_example(device: torch.device) -> None:
    examples = doctest.DocTestFinder().find(quantize_1x128, globs={"torch": torch})
    example = next(test for test in examples if test.examples)
    for function in (quantize_1x128, reference.quantize_1x128):
        example.globs = {"torch": torch, "quantize_1x128": lambda x, f=function: f(x.to(device))}
        result = doctest.DocTestRunner().run(example, clear_globs=False)
        assert result.attempted >= 6 and result.failed == 0


@DTYPES
def test_nothing_outside_the_output_is_written(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs lie between guard bytes; every byte of them is written."""
    guarded = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((size + 512,), 0xA5, dtype=torch.uint8, device=device)
        guarded.append((memory, size))
        return memory[256 : 256 + size].view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty_like", lambda x, dtype: allocate(tuple(x.shape), dtype))
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: allocate(shape, dtype))
    x = rows(5, 300, dtype).to(device)
    actual = quantize_1x128(x)
    monkeypatch.undo()
    assert len(guarded) == 2
    for memory, size in guarded:
        assert (memory[:256] == 0xA5).all() and (memory[256 + size :] == 0xA5).all()
    assert_bitwise_equal(actual, reference.quantize_1x128(x))


@FORMATS
def test_no_tokens(scale_format: str, device: torch.device) -> None:
    x = torch.empty(0, 300, device=device)
    for function in (quantize_1x128, reference.quantize_1x128):
        q, scales = function(x, scale_format=scale_format)
        assert q.shape == (0, 300) and q.dtype == torch.float8_e4m3fn
        assert scales.shape == (0, 3) and scales.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (torch.zeros(4), {}, "num_tokens, hidden_size"),
        (torch.zeros(2, 3, 4), {}, "num_tokens, hidden_size"),
        (torch.zeros(2, 0), {}, "hidden_size > 0"),
        (torch.zeros(2, 4, dtype=torch.float16), {}, "bfloat16 or float32"),
        (torch.zeros(4, 2).t(), {}, "contiguous"),
        (torch.zeros(2, 4), {"scale_format": "e8m0"}, "scale_format"),
    ],
    ids=["1d", "3d", "no-hidden", "fp16", "strided", "scale-format"],
)
def test_bad_arguments_are_refused(x: torch.Tensor, kwargs: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_1x128(x, **kwargs)


def test_cpu_tensor_is_refused_by_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = triton.JITFunction(quantize.quantize_1x128_kernel.fn)
    monkeypatch.setattr(quantize, "quantize_1x128_kernel", compiled)
    with pytest.raises(ValueError, match="CUDA device, got cpu"):
        quantize_1x128(torch.zeros(1, 128))
