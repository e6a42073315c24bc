"""swiglu and swiglu_quantize against their torch twins, and the twins against the experts of ``moe_efa.nn``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_efa.nn.experts import weighted_swiglu
from moe_efa.testing import assert_bitwise, assert_within_ulps
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.swiglu import swiglu, swiglu_quantize

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize(("num_rows", "intermediate_size"), [(1, 1), (7, 130), (33, 128), (3, 1100)])
EDGES = [0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 7.0, -7.0, 7.5, -7.5, 88.0, -88.0, -104.0, 3e38, -3e38]
EDGES += [float("inf"), float("-inf"), float("nan")]


def gates(num_rows: int, intermediate_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (5 * torch.randn(num_rows, 2 * intermediate_size, generator=generator)).to(dtype).to(device)


def edges(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Every pair of edge values as (gate, up)."""
    values = torch.tensor(EDGES)
    return torch.cat([values.repeat(len(EDGES), 1), values[:, None].repeat(1, len(EDGES))], 1).to(dtype).to(device)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bitwise where exp is that of the twin."""
    if actual.is_cpu:
        assert_bitwise(actual, expected, what)
    else:
        fmt = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "e4m3"}[actual.dtype]
        assert_within_ulps(actual.float(), expected.float(), ulps=16 if fmt == "fp32" else 1, fmt=fmt, what=what)


@pytest.mark.usefixtures("guarded_outputs")
@SHAPES
@DTYPES
@pytest.mark.parametrize(("weighted", "limit"), [(True, 7.0), (False, None)], ids=["weighted-clamped", "plain"])
def test_equals_reference(
    num_rows: int, intermediate_size: int, dtype: torch.dtype, weighted: bool, limit: float | None, device: torch.device
) -> None:
    gate_up = gates(num_rows, intermediate_size, dtype, device)
    weights = torch.rand(num_rows, generator=torch.Generator().manual_seed(1)).to(device) if weighted else None
    options = {"weights": weights, "limit": limit}
    assert_same(swiglu(gate_up, **options), reference.swiglu(gate_up, **options), "swiglu")
    for scale_format in reference.SCALE_FORMATS:
        q, scales = swiglu_quantize(gate_up, **options, scale_format=scale_format)
        expected_q, expected_scales = reference.swiglu_quantize(gate_up, **options, scale_format=scale_format)
        assert_same(q, expected_q, "q")
        assert_same(scales, expected_scales, "scales")


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
@DTYPES
@pytest.mark.parametrize("limit", [7.0, None], ids=["clamped", "plain"])
def test_edge_values(dtype: torch.dtype, limit: float | None, device: torch.device) -> None:
    gate_up = edges(dtype, device)
    assert_same(swiglu(gate_up, limit=limit), reference.swiglu(gate_up, limit=limit), "swiglu")
    for got, want in zip(
        swiglu_quantize(gate_up, limit=limit), reference.swiglu_quantize(gate_up, limit=limit), strict=True
    ):
        assert_same(got, want, "quantized")


@DTYPES
def test_twin_is_what_the_experts_compute(dtype: torch.dtype) -> None:
    gate_up, weights = gates(9, 130, dtype, torch.device("cpu")), torch.rand(9)
    assert_within_ulps(
        reference.swiglu(gate_up, weights=weights),
        weighted_swiglu(gate_up, weights),
        ulps=1,
        fmt="fp32" if dtype == torch.float32 else "bf16",
    )


def test_twin_clamps_as_gpt_oss_and_deepseek_do() -> None:
    gate_up = torch.tensor([[9.0, -9.0, 1.0, 1.0, 2.0, 2.0, 9.0, -9.0]])
    gate, up = torch.tensor([7.0, -9.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 7.0, -7.0])
    expected = (torch.nn.functional.silu(gate) * up)[None]
    torch.testing.assert_close(reference.swiglu(gate_up, limit=7.0), expected)


def test_docstring_examples(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(swiglu, reference.swiglu)
    run_docstring_example(swiglu_quantize, reference.swiglu_quantize)


def test_no_rows(device: torch.device) -> None:
    gate_up = torch.empty(0, 260, device=device)
    assert swiglu(gate_up).shape == (0, 130)
    q, scales = swiglu_quantize(gate_up)
    assert q.shape == (0, 130) and scales.shape == (0, 2)


@pytest.mark.parametrize(
    ("gate_up", "kwargs", "message"),
    [
        (torch.zeros(4), {}, r"gate_up must be \[num_rows, 2 \* intermediate_size\]"),
        (torch.zeros(2, 5), {}, "even number of columns"),
        (torch.zeros(2, 4).half(), {}, "bfloat16 or float32"),
        (torch.zeros(2, 4), {"weights": torch.zeros(3)}, r"weights must be \[2\]"),
        (torch.zeros(2, 4), {"limit": 0.0}, "limit must be positive"),
        (torch.zeros(2, 4), {"scale_format": "e8m0"}, "scale_format"),
    ],
    ids=["1d", "odd", "fp16", "too-many-weights", "limit-0", "scale-format"],
)
def test_bad_arguments_are_refused(gate_up: torch.Tensor, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu_quantize(gate_up, **kwargs)
