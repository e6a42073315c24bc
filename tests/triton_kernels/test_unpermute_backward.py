"""unpermute_backward: rows' gradients bitwise, weights' within the bound of their sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from moe_efa.testing import assert_bitwise, routing
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.unpermute_backward import unpermute_backward

# routing, tokens, experts, top_k, alignment, hidden size
CASES = {
    "no-tokens": (routing.uniform, 0, 3, 2, 4, 130),
    "odd-hidden-size": (routing.uniform, 6, 5, 3, 4, 131),
    "unaligned": (partial(routing.skewed, drop_fraction=0.3), 5, 6, 4, 1, 64),
    "one-expert-takes-all": (routing.one_expert, 4, 3, 2, 8, 256),
    "nothing-selected": (routing.nothing, 4, 3, 2, 2, 64),
    "same-expert-twice": (routing.duplicates, 4, 3, 3, 2, 1),
    "last-partial-block-of-a-wide-row": (routing.uniform, 1, 2, 2, 1, 8200),
}


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_reference(case: str, dtype: torch.dtype, device: torch.device) -> None:
    make, num_tokens, num_experts, top_k, alignment, hidden_size = CASES[case]
    topk_idx = make(num_tokens, num_experts, top_k, seed=1).topk_idx.to(device)
    plan = reference.plan_rows(topk_idx, num_experts=num_experts, expert_alignment=alignment)
    num_rows = int(plan.offsets[-1]) + 2  # y may have more rows than the plan
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(num_rows, hidden_size, generator=generator).to(dtype).to(device)
    is_row = torch.zeros(num_rows, dtype=torch.bool, device=device)
    is_row[plan.positions[plan.positions >= 0].long()] = True
    y[~is_row] = torch.nan  # must not be read
    weights = torch.randn(num_rows, generator=generator).to(device)
    grad_out = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype).to(device)
    actual = unpermute_backward(grad_out, y, plan, weights=weights)
    expected = reference.unpermute_backward(grad_out, y, plan, weights=weights)
    assert_bitwise(actual[0], expected[0], "grad_y")

    grad_rows = reference.permute(grad_out, plan, num_rows=num_rows)[0].double()
    products = (grad_rows * y.double()).nan_to_num(0.0)
    bound = hidden_size * 2.0**-24 * products.abs().sum(1)
    assert ((actual[1].double() - products.sum(1)).abs() <= bound).all()
    assert_bitwise(actual[1][~is_row], torch.zeros_like(actual[1][~is_row]), "padding")


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(unpermute_backward, reference.unpermute_backward, plan_rows=reference.plan_rows)


def test_bad_arguments_are_refused() -> None:
    plan = reference.plan_rows(torch.tensor([[0, 1], [1, -1]]), num_experts=2)
    y, grad_out, weights = torch.zeros(3, 8), torch.zeros(2, 8), torch.zeros(3)
    for arguments, message in [
        ((grad_out, y.half(), weights), "y must be bfloat16 or float32"),
        ((grad_out.bfloat16(), y, weights), "grad_out must be float32"),
        ((grad_out[:1], y, weights), r"grad_out must be \[2, 8\]"),
        ((grad_out, y, weights[:2]), r"weights must be \[3\]"),
        ((grad_out, y[:2], weights[:2]), "there are 2 rows, the plan has 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            unpermute_backward(*arguments[:2], plan, weights=arguments[2])
