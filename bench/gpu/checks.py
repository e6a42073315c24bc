"""Comparison of results. Each returns None, or what is wrong in one line."""

from __future__ import annotations

import torch
from torch import Tensor


def bitwise(what: str, got: Tensor, want: Tensor) -> str | None:
    """Every byte."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{what}: {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
    if got.numel() == 0:
        return None
    a, b = (x.contiguous().view(torch.uint8).view(-1) for x in (got, want.to(got.device)))
    if torch.equal(a, b):
        return None
    different = (a != b).nonzero()
    return f"{what}: {len(different)} of {a.numel()} bytes differ, first at byte {int(different[0])}"


def bounded(what: str, got: Tensor, want: Tensor, bound: Tensor | float) -> str | None:
    """Every element within its bound; NaN never passes."""
    if got.shape != want.shape:
        return f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
    error = (got.double() - want.to(got.device).double()).abs()
    limit = bound.to(got.device).double() if isinstance(bound, Tensor) else torch.full_like(error, bound)
    good = error <= limit
    if bool(good.all()):
        return None
    worst = torch.where(good, 0.0, error / limit.clamp(min=1e-300)).nan_to_num(nan=torch.inf).max()
    count = int((~good).sum())
    return f"{what}: {count} of {good.numel()} elements beyond their bound, the worst {float(worst):.2f} times"


def rows_within(what: str, got: Tensor, want: Tensor, relative: float) -> str | None:
    """Every row's error, as a part of the row's norm: for results of FP8 and of long sums."""
    got, want = got.double(), want.to(got.device).double()
    error = (got - want).norm(dim=1)
    return bounded(what, error, torch.zeros_like(error), relative * want.norm(dim=1) + 1e-30)


def first_problem(*problems: str | None) -> str | None:
    """The first that is one."""
    return next((problem for problem in problems if problem is not None), None)


def fixed_order_sum(y: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    """The bits of ``reference.unpermute`` for many tokens at once: terms in row order, each product and each sum
    rounded to fp32, the result once to y's dtype.

    Args:
        y: [R, H] bf16 or fp32.
        positions: [T, K] int32 rows, -1 for none.
        weights: [R] fp32, or None for the plain sum.
    """
    none = torch.iinfo(torch.int32).max
    ordered = positions.masked_fill(positions < 0, none).sort(dim=1).values
    total = torch.zeros(len(positions), y.shape[1], device=y.device)
    if len(y) == 0:
        return total.to(y.dtype)
    for k in range(positions.shape[1]):
        there = ordered[:, k] != none
        row = torch.where(there, ordered[:, k], 0).long()
        term = y[row].float()
        if weights is not None:
            term = weights[row][:, None] * term
        total = torch.where(there[:, None], term if k == 0 else total + term, total)
    return total.to(y.dtype)
