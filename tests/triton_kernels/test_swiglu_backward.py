"""swiglu_backward against its torch twin, and the twin against autograd in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_efa.testing import assert_bitwise, assert_within_ulps
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.swiglu_backward import swiglu_backward

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def inputs(
    num_rows: int, intermediate_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_hidden, gate_up, weights."""
    generator = torch.Generator().manual_seed(0)
    gate_up = 5 * torch.randn(num_rows, 2 * intermediate_size, generator=generator)
    gate_up[:, :1], gate_up[:, -1:] = 7.0, -7.0  # at the limit, not beyond
    grad_hidden = torch.randn(num_rows, intermediate_size, generator=generator)
    weights = torch.rand(num_rows, generator=generator)
    return grad_hidden.to(dtype).to(device), gate_up.to(dtype).to(device), weights.to(device)


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize(("num_rows", "intermediate_size"), [(1, 1), (3, 130), (4, 256), (2, 2176)])
@DTYPES
@pytest.mark.parametrize("limit", [7.0, None], ids=["clamped", "free"])
def test_equals_reference(
    num_rows: int, intermediate_size: int, dtype: torch.dtype, limit: float | None, device: torch.device
) -> None:
    grad_hidden, gate_up, weights = inputs(num_rows, intermediate_size, dtype, device)
    options = {
        "weights": weights if limit else None,
        "limit": limit,
        "quantized": intermediate_size % 128 == 0,
        "scale_format": "ue8m0" if limit else "fp32",
    }
    actual = swiglu_backward(grad_hidden, gate_up, **options)
    expected = reference.swiglu_backward(grad_hidden, gate_up, **options)
    for name in ("grad_gate_up", "q", "scales"):
        got, want = getattr(actual, name), getattr(expected, name)
        assert (got is None) == (want is None)
        if got is not None and got.is_cpu:
            assert_bitwise(got, want, name)
        elif got is not None:
            assert_within_ulps(got.float(), want.float(), ulps=4, fmt="bf16" if name == "grad_gate_up" else "e4m3")
    assert (actual.grad_weights is None) == (limit is None)
    if actual.grad_weights is not None:
        terms = grad_hidden.double() * reference.swiglu(gate_up.float(), limit=limit).double()
        # The terms are rounded three times before they are added.
        bound = (intermediate_size + 3) * 2.0**-24 * terms.abs().sum(1)
        assert ((actual.grad_weights.double() - terms.sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("limit", [7.0, None], ids=["clamped", "free"])
def test_twin_equals_autograd_in_double_precision(limit: float | None) -> None:
    grad_hidden, gate_up, weights = inputs(5, 130, torch.float32, torch.device("cpu"))
    grads = reference.swiglu_backward(grad_hidden, gate_up, weights=weights, limit=limit)
    leaves = [t.double().requires_grad_() for t in (gate_up, weights)]
    gate, up = leaves[0].chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    hidden = torch.nn.functional.silu(gate) * up * leaves[1][:, None]
    expected = torch.autograd.grad(hidden, leaves, grad_hidden.double())
    assert_within_ulps(grads.grad_gate_up.double(), expected[0], ulps=8, fmt="fp32")
    assert grads.grad_weights is not None
    torch.testing.assert_close(grads.grad_weights.double(), expected[1], rtol=1e-4, atol=1e-4)


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(swiglu_backward, reference.swiglu_backward)


def test_no_rows(device: torch.device) -> None:
    grads = swiglu_backward(
        torch.empty(0, 128, device=device),
        torch.empty(0, 256, device=device),
        weights=torch.empty(0, device=device),
        quantized=True,
    )
    assert [tuple(t.shape) for t in grads if t is not None] == [(0, 256), (0,), (0, 256), (0, 2)]


@pytest.mark.parametrize(
    ("grad_hidden", "gate_up", "kwargs", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 5), {}, "even number of columns"),
        (torch.zeros(2, 3), torch.zeros(2, 4), {}, r"grad_hidden must be \[2, 2\]"),
        (torch.zeros(2, 2).bfloat16(), torch.zeros(2, 4), {}, "grad_hidden must be float32"),
        (torch.zeros(2, 2), torch.zeros(2, 4), {"weights": torch.zeros(3)}, r"weights must be \[2\]"),
        (torch.zeros(2, 2), torch.zeros(2, 4), {"limit": -1.0}, "limit must be positive"),
        (torch.zeros(2, 2), torch.zeros(2, 4), {"quantized": True}, "a multiple of 128 columns"),
        (torch.zeros(2, 2), torch.zeros(2, 4), {"scale_format": "e8m0"}, "scale_format"),
    ],
    ids=["odd", "grad-shape", "grad-dtype", "too-many-weights", "limit", "quantized-short-block", "scale-format"],
)
def test_bad_arguments_are_refused(
    grad_hidden: torch.Tensor, gate_up: torch.Tensor, kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu_backward(grad_hidden, gate_up, **kwargs)
