"""router_topk against its torch twin and against ``moe_efa.routing``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_efa.routing import Routing, sigmoid_group_topk, softmax_topk
from moe_efa.testing import assert_bitwise
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.router_topk import router_topk

# tokens, experts, top_k, options
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "softmax": (5, 8, 2, {}),
    "softmax-no-tokens": (0, 8, 2, {}),
    "softmax-raw-scaled-60-experts": (5, 60, 4, {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    "softmax-one-expert": (3, 1, 1, {}),
    "softmax-all-experts": (3, 5, 5, {}),
    "sigmoid": (3, 100, 8, {"score_function": "sigmoid"}),
    "sigmoid-groups": (4, 64, 8, {"score_function": "sigmoid", "n_group": 8, "topk_group": 4}),
    "sigmoid-uneven-powers": (5, 60, 4, {"score_function": "sigmoid", "n_group": 6, "topk_group": 2}),
    "sigmoid-raw-scaled": (
        5,
        48,
        6,
        {
            "score_function": "sigmoid",
            "n_group": 3,
            "topk_group": 3,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
        },
    ),
    "kimi": (2, 384, 8, {"score_function": "sigmoid", "routed_scaling_factor": 2.827}),
}


def inputs(case: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits and options; with a bias where the case has sigmoids."""
    num_tokens, num_experts, _, options = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    if options.get("score_function") == "sigmoid":
        options = options | {"e_score_correction_bias": torch.randn(num_experts, generator=generator).to(device)}
    return logits.to(dtype).to(device), options


def assert_same(actual: Routing, expected: Routing, *, exact: bool) -> None:
    """The same experts; weights and scores bitwise, or within the bound that the docstring states."""
    assert_bitwise(actual.topk_idx, expected.topk_idx, "topk_idx")
    num_experts = expected.scores.shape[1]
    for name in ("topk_weights", "scores"):
        got, want = getattr(actual, name), getattr(expected, name)
        if exact:
            assert_bitwise(got, want, name)
        else:
            assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
            assert ((got - want).abs() <= num_experts * 2.0**-23 * want.abs()).all(), name


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_reference(case: str, dtype: torch.dtype, device: torch.device) -> None:
    top_k = CASES[case][2]
    logits, options = inputs(case, device, dtype)
    actual, expected = router_topk(logits, top_k, **options), reference.router_topk(logits, top_k, **options)
    assert_same(actual, expected, exact=device.type == "cpu" and "sigmoid" in options.get("score_function", ""))

    pinned = expected.topk_idx.flip(1)
    pinned[::2, 0] = -1
    pinned[:1] = -1
    without_bias = {name: value for name, value in options.items() if name != "e_score_correction_bias"}
    actual = router_topk(logits, top_k, **without_bias, topk_idx=pinned)
    expected = reference.router_topk(logits, top_k, **without_bias, topk_idx=pinned)
    assert_same(actual, expected, exact=device.type == "cpu" and "sigmoid" in options.get("score_function", ""))
    assert (actual.topk_weights[pinned < 0] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_twin_selects_as_the_layer_does(case: str) -> None:
    """The same experts, each with the same weight to rounding. The layer does not order its sigmoid selections."""
    top_k = CASES[case][2]
    logits, options = inputs(case, torch.device("cpu"))
    arguments = {name: value for name, value in options.items() if name != "score_function"}
    function = sigmoid_group_topk if "score_function" in options else softmax_topk
    actual, expected = reference.router_topk(logits, top_k, **options), function(logits, top_k, **arguments)
    if function is softmax_topk:
        assert torch.equal(actual.topk_idx, expected.topk_idx)
    (mine, order), (theirs, their_order) = actual.topk_idx.sort(1), expected.topk_idx.sort(1)
    assert torch.equal(mine, theirs)
    for got, want in [
        (actual.topk_weights.gather(1, order), expected.topk_weights.gather(1, their_order)),
        (actual.scores, expected.scores),
    ]:
        assert ((got - want).abs() <= (logits.shape[1] + top_k + 2) * 2.0**-24 * want.abs()).all()


@pytest.mark.parametrize("function", [router_topk, reference.router_topk], ids=["triton", "torch"])
def test_ties_go_to_the_smaller_id(function: Callable[..., Routing], device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0, 1.0, 3.0]], device=device)
    assert function(logits, 3).topk_idx.tolist() == [[1, 2, 4]]
    assert function(logits, 5, score_function="sigmoid").topk_idx.tolist() == [[1, 2, 4, 7, 0]]
    saturated = torch.tensor([[-200.0, 100.0, 200.0, -150.0]], device=device)  # sigmoids 0, 1, 1, 0
    assert function(saturated, 4, score_function="sigmoid").topk_idx.tolist() == [[1, 2, 0, 3]]
    groups = {"score_function": "sigmoid", "n_group": 4, "topk_group": 2}
    assert function(torch.zeros(1, 8, device=device), 3, **groups).topk_idx.tolist() == [[0, 1, 2]]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("options", [{}, {"score_function": "sigmoid", "n_group": 3, "topk_group": 2}], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_ids_are_in_range_whatever_the_logits(options: dict[str, Any], bad: float, device: torch.device) -> None:
    logits = torch.zeros(3, 15, device=device)
    logits[0], logits[1, 14], logits[2, 3:9] = bad, bad, bad
    chosen = router_topk(logits, 4, **options).topk_idx
    assert ((chosen >= 0) & (chosen < 15)).all()
    assert all(len(set(row)) == 4 for row in chosen.tolist())


@pytest.mark.parametrize("function", [router_topk, reference.router_topk], ids=["triton", "torch"])
def test_an_expert_that_a_bias_takes_out_still_comes_before_other_groups(
    function: Callable[..., Routing], device: torch.device
) -> None:
    logits = torch.tensor([[0.0, 0, 0, 0, 3, 3, 0, 0]], device=device)
    bias = torch.tensor([-torch.inf, -torch.inf, 0, 0, 0, 0, -torch.inf, -torch.inf], device=device)
    options = {"score_function": "sigmoid", "e_score_correction_bias": bias, "n_group": 2, "topk_group": 1}
    assert function(logits, 3, **options).topk_idx.tolist() == [[4, 5, 6]]


@pytest.mark.parametrize("function", [router_topk, reference.router_topk], ids=["triton", "torch"])
def test_no_tokens_with_groups(function: Callable[..., Routing], device: torch.device) -> None:
    routing = function(torch.zeros(0, 6, device=device), 2, score_function="sigmoid", n_group=3, topk_group=2)
    assert [tuple(tensor.shape) for tensor in routing] == [(0, 2), (0, 2), (0, 6)]


def test_a_factor_of_numpy_is_a_number(device: torch.device) -> None:
    logits = torch.randn(3, 8, device=device)
    weights = [router_topk(logits, 2, routed_scaling_factor=two).topk_weights for two in (2.0, np.float32(2))]
    assert torch.equal(*weights)


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(router_topk, reference.router_topk)


@pytest.mark.parametrize(
    ("logits", "kwargs", "message"),
    [
        (torch.zeros(8), {}, r"logits must be \[num_tokens, num_experts\]"),
        (torch.zeros(2, 8).half(), {}, "bfloat16 or float32"),
        (torch.zeros(2, 8), {"score_function": "relu"}, "score_function"),
        (torch.zeros(2, 8), {"n_group": 2}, "go with score_function='sigmoid'"),
        (torch.zeros(2, 8), {"score_function": "sigmoid", "n_group": 3, "topk_group": 1}, "n_group=3"),
        (torch.zeros(2, 1), {}, "top_k=2 of 1 experts"),
        (torch.zeros(2, 5000), {}, "at most 4096"),
        (torch.zeros(2, 8), {"score_function": "sigmoid", "n_group": 2.0}, "n_group must be a positive integer"),
        (torch.zeros(2, 8), {"routed_scaling_factor": torch.ones(())}, "routed_scaling_factor must be a number"),
        (None, {}, "logits must be a tensor"),
        (torch.zeros(2, 8), {"topk_idx": torch.zeros(2, 3, dtype=torch.int64)}, r"topk_idx must be \[2, 2\]"),
        (torch.zeros(1, 8), {"topk_idx": torch.tensor([[0, 8]])}, r"in \[-1, 8\)"),
        (
            torch.zeros(1, 8),
            {"score_function": "sigmoid", "e_score_correction_bias": torch.zeros(7)},
            r"e_score_correction_bias must be \[8\]",
        ),
    ],
    ids=[
        "1d",
        "fp16",
        "function",
        "softmax-groups",
        "groups",
        "top-k",
        "many",
        "float",
        "factor",
        "none",
        "pinned",
        "pinned-id",
        "bias",
    ],
)
def test_bad_arguments_are_refused(logits: torch.Tensor, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_topk(logits, 2, **kwargs)
