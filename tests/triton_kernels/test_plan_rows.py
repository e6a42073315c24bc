"""plan_rows against its torch twin, against the order of ``moe_efa.reference`` and against the native extension."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import moe_efa
from moe_efa.reference import make_plan
from moe_efa.testing import assert_bitwise, routing
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.plan_rows import plan_rows

# routing, tokens, experts, top_k, alignment
CASES = {
    "no-tokens": (routing.uniform, 0, 3, 2, 4),
    "one-token": (routing.uniform, 1, 5, 1, 1),
    "uniform-over-several-blocks": (routing.uniform, 70, 20, 4, 1),
    "uneven-aligned": (routing.skewed, 33, 9, 4, 16),
    "one-expert-takes-all": (routing.one_expert, 40, 4, 4, 128),
    "nothing-selected": (routing.nothing, 9, 4, 2, 8),
    "same-expert-twice": (routing.duplicates, 17, 4, 4, 3),
    "one-expert-in-all": (routing.uniform, 33, 1, 1, 1),
    "more-blocks-than-a-step": (routing.skewed, 1100, 12, 8, 2),
    "more-experts-than-a-program": (routing.uniform, 40, 300, 8, 2),
}


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, device: torch.device) -> None:
    make, num_tokens, num_experts, top_k, alignment = CASES[case]
    topk_idx = make(num_tokens, num_experts, top_k, seed=1, drop_fraction=0.2).topk_idx.to(device)
    actual = plan_rows(topk_idx, num_experts=num_experts, expert_alignment=alignment)
    expected = reference.plan_rows(topk_idx, num_experts=num_experts, expert_alignment=alignment)
    for name, got, want in zip(actual._fields, actual, expected, strict=True):
        if isinstance(got, torch.Tensor):
            assert_bitwise(got, want, name)
    assert actual.expert_alignment == alignment
    assert int(actual.offsets[-1]) <= actual.max_rows


@pytest.mark.parametrize("case", CASES)
def test_twin_has_the_order_of_the_oracle(case: str) -> None:
    make, num_tokens, num_experts, top_k, alignment = CASES[case]
    topk_idx = make(num_tokens, num_experts, top_k, seed=2, drop_fraction=0.2).topk_idx
    plan = reference.plan_rows(topk_idx, num_experts=num_experts, expert_alignment=alignment)
    oracle = make_plan([topk_idx], num_experts=num_experts, expert_alignment=alignment)
    assert tuple(plan.offsets.tolist()) == oracle.offsets[0]
    assert tuple(plan.tokens_per_expert.tolist()) == oracle.tokens_per_expert[0]
    positions = torch.full_like(plan.positions, -1)
    for i, row in enumerate(oracle.rows[0]):
        if row is not None:
            positions[row.token_idx, row.topk_pos] = i
    assert torch.equal(plan.positions, positions)


def test_order_is_that_of_the_native_extension(device: torch.device) -> None:
    topk_idx, topk_weights = routing.duplicates(40, 6, 4, seed=3, drop_fraction=0.2)
    x = torch.arange(40.0)[:, None].repeat(1, 16)
    with moe_efa.ExpertParallel(None, num_experts=6, hidden_size=16, top_k=4, max_tokens_per_rank=40) as ep:
        d = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=4)
    plan = plan_rows(topk_idx.to(device), num_experts=6, expert_alignment=4)
    assert torch.equal(plan.offsets.cpu(), d.offsets)
    assert torch.equal(plan.tokens_per_expert.cpu(), d.tokens_per_expert)
    for token_idx, positions in enumerate(plan.positions.tolist()):
        for topk_pos, row in enumerate(positions):
            if row >= 0:
                assert d.x[row, 0] == token_idx and d.weights[row] == topk_weights[token_idx, topk_pos]


def test_int32_ids(device: torch.device) -> None:
    topk_idx = torch.tensor([[2, 0], [-1, 2]], dtype=torch.int32, device=device)
    assert plan_rows(topk_idx, num_experts=3).positions.tolist() == [[1, 0], [-1, 2]]


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(plan_rows, reference.plan_rows)


@pytest.mark.parametrize(
    ("topk_idx", "kwargs", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), {}, r"topk_idx must be \[num_tokens, top_k\]"),
        (torch.zeros(4, 0, dtype=torch.int64), {}, "top_k > 0"),
        (torch.zeros(4, 2), {}, "int64 or int32"),
        (torch.zeros(4, 2, dtype=torch.int64).t(), {}, "contiguous"),
        (torch.tensor([[3]]), {}, r"in \[-1, 3\)"),
        (torch.tensor([[-2]]), {}, r"in \[-1, 3\)"),
        (torch.tensor([[1 << 32]]), {}, r"in \[-1, 3\)"),
        (torch.tensor([[0]]), {"num_experts": 0}, "num_experts"),
        (torch.tensor([[0]]), {"expert_alignment": 0}, "expert_alignment"),
        (torch.tensor([[0]]), {"num_experts": np.int64(3)}, "num_experts must be a positive integer"),
        (torch.tensor([[0]]), {"expert_alignment": 2.5}, "expert_alignment must be a positive integer"),
        (torch.tensor([[0]]), {"expert_alignment": 1 << 30}, "too many"),
    ],
    ids=[
        "1d",
        "no-k",
        "float",
        "strided",
        "id-3",
        "id--2",
        "id-2-to-32",
        "no-experts",
        "numpy",
        "align-0",
        "align-2.5",
        "too-many",
    ],
)
def test_bad_arguments_are_refused(topk_idx: torch.Tensor, kwargs: dict[str, int], message: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("ids are checked on the CPU; on a GPU a wrong one is an assertion that ends the process")
    with pytest.raises(ValueError, match=message):
        plan_rows(topk_idx, **{"num_experts": 3, **kwargs})
