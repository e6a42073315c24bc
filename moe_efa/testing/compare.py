"""Comparisons row by row: one similarity number for a whole tensor hides a wrong row."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Stored mantissa bits and the exponent of the smallest normal number.
_FORMATS = {"e4m3": (3, -6), "bf16": (7, -126), "fp32": (23, -126)}


def assert_bitwise(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Raise AssertionError unless both have equal shape, dtype and bits (so -0.0 is not 0.0, and NaN is NaN).

    The message names the number of wrong rows, the first of them with its first wrong columns, and the largest error.
    """
    _assert_alike(actual, expected, what)
    wrong = _bits(actual) != _bits(expected)
    if bool(wrong.any()):
        raise AssertionError(_report(actual, expected, wrong, f"{what}: not bitwise equal"))


def assert_within_ulps(actual: Tensor, expected: Tensor, *, ulps: float, fmt: str, what: str = "tensor") -> None:
    """Raise AssertionError unless every element is within ``ulps`` units in the last place of its row.

    The unit of a row is that of format ``fmt`` ("e4m3", "bf16" or "fp32") at the row's largest expected magnitude:
    ``2 ** (floor(log2(max |expected|)) - mantissa bits)``. Values that are not finite must be equal.
    """
    _assert_alike(actual, expected, what)
    bound = (ulps * ulp(_as_rows(expected.detach()).double().abs().nan_to_num(0, 0, 0).amax(1), fmt))[:, None]
    a, e = _as_rows(actual.detach()).double(), _as_rows(expected.detach()).double()
    both_finite = a.isfinite() & e.isfinite()
    wrong = torch.where(both_finite, (a - e).abs() > bound, ~((a == e) | (a.isnan() & e.isnan())))
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        title = f"{what}: off by more than {ulps:g} {fmt} ulps of its row ({float(bound[row, 0]):.3g} in the first)"
        raise AssertionError(_report(actual, expected, wrong.reshape(expected.shape), title))


def ulp(magnitude: Tensor, fmt: str) -> Tensor:
    """Unit in the last place of format ``fmt`` at the given magnitudes (float64, elementwise)."""
    mantissa_bits, min_exponent = _FORMATS[fmt]
    _, exponent = torch.frexp(magnitude.double())  # magnitude = m * 2 ** exponent, m in [0.5, 1)
    exponent = torch.where(magnitude > 0, exponent - 1, min_exponent).clamp(min=min_exponent)
    return torch.ldexp(torch.ones_like(magnitude, dtype=torch.float64), exponent - mantissa_bits)


def _assert_alike(actual: Tensor, expected: Tensor, what: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: dtype {actual.dtype}, expected {expected.dtype}")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_BITS_DTYPE[tensor.element_size()])


def _as_rows(tensor: Tensor) -> Tensor:
    """[rows, columns]: a vector has one column, more dimensions are joined with the first ones."""
    if tensor.dim() < 2:
        return tensor.reshape(-1, 1)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.shape[-1] else tensor.new_zeros(0, 1)


def _report(actual: Tensor, expected: Tensor, wrong: Tensor, title: str) -> str:
    a, e, w = _as_rows(actual.detach()), _as_rows(expected.detach()), _as_rows(wrong)
    bad_rows = w.any(1).nonzero()[:, 0]
    row = int(bad_rows[0])
    columns = w[row].nonzero()[:, 0]
    lines = [
        title,
        f"  {len(bad_rows)} of {len(a)} rows differ, first row {row}: {len(columns)} of {a.shape[1]} columns",
    ]
    for column in columns[:4].tolist():
        got, want = a[row, column], e[row, column]
        lines.append(f"    [{row}, {column}] got {got.item()!r} ({_hex(got)}), expected {want.item()!r} ({_hex(want)})")
    error = (a.double() - e.double()).abs().nan_to_num(0, 0, 0)
    lines.append(f"  rows that differ: {_shorten(bad_rows.tolist())}; largest finite error {float(error.max()):.6g}")
    return "\n".join(lines)


def _hex(value: Tensor) -> str:
    size = value.element_size()
    return f"0x{int(_bits(value.reshape(1))[0]) & ((1 << 8 * size) - 1):0{2 * size}x}"


def _shorten(rows: list[int], limit: int = 12) -> str:
    text = ", ".join(map(str, rows[:limit]))
    return text + ", ..." if len(rows) > limit else text
