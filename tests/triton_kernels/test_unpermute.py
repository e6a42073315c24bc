"""unpermute against its torch twin and against the combine of one rank, bitwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from moe_efa.reference import combine, make_plan
from moe_efa.testing import assert_bitwise, routing
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.unpermute import unpermute

# routing, tokens, experts, top_k, alignment, hidden size
CASES = {
    "no-tokens": (routing.uniform, 0, 3, 2, 4, 130),
    "odd-hidden-size": (routing.uniform, 9, 5, 3, 4, 131),
    "unaligned": (partial(routing.skewed, drop_fraction=0.3), 8, 6, 4, 1, 64),
    "one-expert-takes-all": (routing.one_expert, 5, 3, 2, 8, 256),
    "nothing-selected": (routing.nothing, 4, 3, 2, 2, 64),
    "same-expert-twice": (routing.duplicates, 5, 3, 3, 2, 1),
    "last-partial-block": (routing.uniform, 3, 8, 8, 1, 1100),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("case", CASES)
@DTYPES
def test_equals_reference_and_oracle(case: str, dtype: torch.dtype, device: torch.device) -> None:
    make, num_tokens, num_experts, top_k, alignment, hidden_size = CASES[case]
    topk_idx = make(num_tokens, num_experts, top_k, seed=1).topk_idx
    plan = reference.plan_rows(topk_idx.to(device), num_experts=num_experts, expert_alignment=alignment)
    oracle = make_plan([topk_idx], num_experts=num_experts, expert_alignment=alignment)
    num_rows = int(plan.offsets[-1])
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    y[torch.rand(num_rows, generator=generator) < 0.2] = -0.0
    y[torch.tensor([row is None for row in oracle.rows[0]], dtype=torch.bool)] = torch.nan  # must not be read
    weights = torch.rand(num_rows, generator=generator)
    for row_weights in (weights, None):
        on_device = None if row_weights is None else row_weights.to(device)
        out, values = unpermute(y.to(device), plan, weights=on_device, row_values=on_device)
        expected, expected_values = reference.unpermute(y.to(device), plan, weights=on_device, row_values=on_device)
        assert_bitwise(out, expected, "out")
        if values is not None and expected_values is not None:
            assert_bitwise(values, expected_values, "values")
        of_oracle = combine([y], oracle, weights=None if row_weights is None else [row_weights], node_size=1)
        assert_bitwise(out.cpu(), of_oracle[0], "combine")
        for other in (torch.float32, torch.bfloat16):
            out, _ = unpermute(y.to(device), plan, weights=on_device, dtype=other)
            expected, _ = reference.unpermute(y.to(device), plan, weights=on_device, dtype=other)
            assert_bitwise(out, expected, f"as {other}")


@DTYPES
def test_every_nan_is_the_same(dtype: torch.dtype, device: torch.device) -> None:
    plan = reference.plan_rows(torch.tensor([[0, 1], [1, -1]], device=device), num_experts=2)
    y = torch.tensor([[torch.nan, torch.inf], [1.0, -torch.inf], [-torch.nan, 3.0]]).to(dtype).to(device)
    out, _ = unpermute(y, plan)
    assert out.isnan().tolist() == [[True, True], [True, False]]
    assert_bitwise(out, reference.unpermute(y, plan)[0])
    assert_bitwise(out[out.isnan()], torch.full((3,), torch.nan, dtype=dtype, device=device))


def test_products_and_sums_are_rounded_one_by_one(device: torch.device) -> None:
    """Fused, 1 - (1 + 2**-12)**2 would keep the 2**-24 that the product loses."""
    plan = reference.plan_rows(torch.tensor([[0, 1]], device=device), num_experts=2)
    y = torch.tensor([[1.0], [1.0 + 2.0**-12]], device=device)
    out, _ = unpermute(y, plan, weights=torch.tensor([1.0, -1.0 - 2.0**-12], device=device))
    assert out.item() == -(2.0**-11)


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(unpermute, reference.unpermute, plan_rows=reference.plan_rows)


def test_bad_arguments_are_refused() -> None:
    plan = reference.plan_rows(torch.tensor([[0, 1], [1, -1]]), num_experts=2, expert_alignment=2)
    for y, kwargs, message in [
        (torch.zeros(4), {}, r"y must be \[num_rows, hidden_size\]"),
        (torch.zeros(4, 8).half(), {}, "bfloat16 or float32"),
        (torch.zeros(3, 8), {}, "there are 3 rows, the plan has 4"),
        (torch.zeros(4, 8), {"weights": torch.zeros(3)}, r"weights must be \[4\]"),
        (torch.zeros(4, 8), {"dtype": torch.float16}, "dtype must be bfloat16 or float32"),
        (torch.zeros(4, 8), {"row_values": torch.zeros(4, 1)}, r"row_values must be \[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            unpermute(y, plan, **kwargs)
