"""permute_quantize against quantize, then permute, bitwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from moe_efa.testing import assert_bitwise, routing
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.permute_quantize import permute_quantize

# routing, tokens, experts, top_k, alignment, hidden size
CASES = {
    "no-tokens": (routing.uniform, 0, 3, 2, 4, 130),
    "short-last-block": (routing.uniform, 6, 5, 3, 4, 130),
    "unaligned": (partial(routing.skewed, drop_fraction=0.3), 5, 6, 4, 1, 64),
    "one-expert-takes-all": (routing.one_expert, 4, 3, 2, 8, 256),
    "nothing-selected": (routing.nothing, 2, 3, 2, 2, 64),
    "same-expert-twice": (routing.duplicates, 4, 3, 3, 2, 1),
    "deepseek-row": (routing.uniform, 1, 2, 2, 1, 7168),
    "last-partial-program": (routing.uniform, 2, 2, 1, 1, 1100),
}


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_equals_reference(case: str, dtype: torch.dtype, scale_format: str, device: torch.device) -> None:
    make, num_tokens, num_experts, top_k, alignment, hidden_size = CASES[case]
    topk_idx, topk_weights = (t.to(device) for t in make(num_tokens, num_experts, top_k, seed=1))
    plan = reference.plan_rows(topk_idx, num_experts=num_experts, expert_alignment=alignment)
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 30, (num_tokens, 1), generator=generator).float()
    x = (torch.randn(num_tokens, hidden_size, generator=generator) * torch.exp2(exponents)).to(dtype).to(device)
    x[: num_tokens // 3] = 0
    x[num_tokens // 2 : num_tokens // 2 + 1, 0] = torch.inf
    with_extra_rows = scale_format == "fp32" and hidden_size < 1000  # many programs
    options = {
        "scale_format": scale_format,
        "topk_weights": topk_weights if with_extra_rows else None,
        "num_rows": plan.max_rows + 3 if with_extra_rows else None,
    }
    actual, expected = permute_quantize(x, plan, **options), reference.permute_quantize(x, plan, **options)
    assert_bitwise(actual.q.view(torch.uint8), expected.q.view(torch.uint8), "q")
    assert_bitwise(actual.scales, expected.scales, "scales")
    assert (actual.weights is None) == (expected.weights is None)
    if actual.weights is not None and expected.weights is not None:
        assert_bitwise(actual.weights, expected.weights, "weights")


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(permute_quantize, reference.permute_quantize, plan_rows=reference.plan_rows)


def test_bad_arguments_are_refused() -> None:
    plan = reference.plan_rows(torch.tensor([[0, 1]]), num_experts=2)
    with pytest.raises(ValueError, match="scale_format"):
        permute_quantize(torch.zeros(1, 8), plan, scale_format="e8m0")
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        permute_quantize(torch.zeros(1, 8).half(), plan)
    with pytest.raises(ValueError, match="there are 2 tokens, the plan is of 1"):
        permute_quantize(torch.zeros(2, 8), plan)
    with pytest.raises(ValueError, match="num_rows=1 is less"):
        permute_quantize(torch.zeros(1, 8), plan, num_rows=1)
