"""permute against its torch twin, bitwise; every row of the output is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from moe_efa.testing import assert_bitwise, routing
from moe_efa.triton_kernels import autograd, reference
from moe_efa.triton_kernels.permute import permute

# routing, tokens, experts, top_k, alignment, hidden size
CASES = {
    "no-tokens": (routing.uniform, 0, 3, 2, 4, 130),
    "odd-hidden-size": (routing.uniform, 9, 5, 3, 4, 131),
    "unaligned": (partial(routing.skewed, drop_fraction=0.3), 8, 6, 4, 1, 64),
    "one-expert-takes-all": (routing.one_expert, 5, 3, 2, 8, 256),
    "nothing-selected": (routing.nothing, 4, 3, 2, 2, 64),
    "same-expert-twice": (routing.duplicates, 5, 3, 3, 2, 1),
    "last-partial-block-of-a-wide-row": (routing.uniform, 2, 2, 2, 2, 8200),
}


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_reference(case: str, dtype: torch.dtype, device: torch.device) -> None:
    make, num_tokens, num_experts, top_k, alignment, hidden_size = CASES[case]
    topk_idx, topk_weights = (t.to(device) for t in make(num_tokens, num_experts, top_k, seed=1))
    topk_weights = topk_weights.masked_fill(topk_idx < 0, torch.nan)  # must not be read
    plan = reference.plan_rows(topk_idx, num_experts=num_experts, expert_alignment=alignment)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype).to(device)
    x[: num_tokens // 2, 0] = torch.nan  # moved as it is
    extra = plan.max_rows + 3  # more rows than any routing needs
    for weights, num_rows in [(topk_weights, None), (None, None), (topk_weights, extra)]:
        actual = permute(x, plan, topk_weights=weights, num_rows=num_rows)
        expected = reference.permute(x, plan, topk_weights=weights, num_rows=num_rows)
        assert_bitwise(actual[0], expected[0], "rows")
        assert (actual[1] is None) == (weights is None)
        if actual[1] is not None and expected[1] is not None:
            assert_bitwise(actual[1], expected[1], "weights")


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(permute, reference.permute, plan_rows=reference.plan_rows)


def test_bad_arguments_are_refused() -> None:
    plan = reference.plan_rows(torch.tensor([[0, 1], [1, -1]]), num_experts=2, expert_alignment=2)
    x = torch.zeros(2, 8)
    for arguments, kwargs, message in [
        ((torch.zeros(8), plan), {}, r"x must be \[num_tokens, hidden_size\]"),
        ((torch.zeros(2, 0), plan), {}, "hidden_size > 0"),
        ((x.half(), plan), {}, "bfloat16 or float32"),
        ((torch.zeros(3, 8), plan), {}, "there are 3 tokens, the plan is of 2"),
        ((x, plan._replace(tokens_per_expert=torch.ones(2, 2).long()[:, 0])), {}, "tokens_per_expert must be contig"),
        ((x, plan._replace(tokens_per_expert=torch.ones(2))), {}, "tokens_per_expert must be int64"),
        ((x, plan), {"num_rows": -1}, "num_rows must not be negative"),
        ((x, plan._replace(offsets=plan.offsets[1:])), {}, r"offsets must be \[3\]"),
        ((x, plan), {"topk_weights": torch.zeros(2, 3)}, r"topk_weights must be \[2, 2\]"),
        ((x, plan), {"topk_weights": torch.zeros(2, 2).double()}, "topk_weights must be float32"),
        ((x, plan), {"num_rows": 3}, "num_rows=3 is less than the 4 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            permute(*arguments, **kwargs)


def test_num_rows_may_be_a_number_of_the_plan() -> None:
    plan = reference.plan_rows(torch.tensor([[0, 1], [1, -1]]), num_experts=2, expert_alignment=2)
    rows, _ = permute(torch.ones(2, 8), plan, num_rows=plan.offsets[-1])
    assert rows.shape == (4, 8)


def test_gradients_need_weights() -> None:
    plan = reference.plan_rows(torch.tensor([[0, 1]]), num_experts=2)
    with pytest.raises(ValueError, match="topk_weights are needed"):
        autograd.permute(torch.ones(1, 8), None, plan)  # type: ignore[arg-type]
