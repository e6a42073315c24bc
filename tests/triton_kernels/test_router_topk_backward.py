"""router_topk_backward against its torch twin, and the twin and the autograd wrapper against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_efa.routing import Routing, sigmoid_group_topk, softmax_topk
from moe_efa.testing import assert_bitwise
from moe_efa.triton_kernels import autograd, reference
from moe_efa.triton_kernels.router_topk import router_topk
from moe_efa.triton_kernels.router_topk_backward import router_topk_backward

# tokens, experts, top_k, options of backward
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "softmax": (4, 8, 2, {}),
    "softmax-no-tokens": (0, 8, 2, {}),
    "softmax-raw-scaled": (4, 60, 4, {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    "softmax-one-expert": (3, 1, 1, {}),
    "sigmoid": (3, 100, 8, {"score_function": "sigmoid", "routed_scaling_factor": 2.5}),
    "sigmoid-raw": (5, 20, 3, {"score_function": "sigmoid", "norm_topk_prob": False}),
}


def inputs(case: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, gradients of weights and scores, a selection with -1 among it."""
    num_tokens, num_experts, top_k, _ = CASES[case]
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    grad_weights = torch.randn(num_tokens, top_k, generator=generator)
    grad_scores = torch.randn(num_tokens, num_experts, generator=generator)
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=1).indices
    topk_idx[::3, 0] = -1
    topk_idx[1:2] = -1
    return logits.to(device), grad_weights.to(device), grad_scores.to(device), topk_idx.to(device)


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_reference(case: str, dtype: torch.dtype, device: torch.device) -> None:
    _, num_experts, top_k, options = CASES[case]
    logits, grad_weights, grad_scores, topk_idx = inputs(case, device)
    routing = reference.router_topk(logits, top_k, **options, topk_idx=topk_idx)
    grad_weights[topk_idx < 0] = torch.nan  # must not matter
    for of_scores in (grad_scores, None):
        arguments = {"grad_scores": of_scores, **options}
        actual = router_topk_backward(grad_weights, routing, **arguments, dtype=dtype)
        expected = reference.router_topk_backward(grad_weights, routing, **arguments, dtype=dtype)
        if "score_function" in options:
            assert_bitwise(actual, expected)
            continue
        # No gradient of a score is larger than this; the kernel adds num_experts products with scores that add up to 1.
        selected = routing.scores.gather(1, topk_idx.clamp(min=0)).masked_fill(topk_idx < 0, 0.0).sum(1, keepdim=True)
        factor = 2.5 if "norm_topk_prob" in options else 1 / selected.masked_fill(selected == 0, 1.0)
        largest = 2 * grad_weights.nan_to_num(0).abs().sum(1, keepdim=True) * factor + 5
        exact = reference.router_topk_backward(grad_weights.double(), routing, **arguments).double()
        bound = (num_experts + 8) * 2.0**-23 * routing.scores * largest
        bound += exact.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0.0
        assert ((actual.double() - exact).abs() <= bound).all()
        assert actual.dtype == dtype


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_equals_autograd_of_the_layer(case: str, implementation: str, device: torch.device) -> None:
    _, _, top_k, options = CASES[case]
    logits, grad_weights, grad_scores, topk_idx = inputs(case, device)
    leaf = logits.clone().requires_grad_()
    function = sigmoid_group_topk if "score_function" in options else softmax_topk
    arguments = {name: value for name, value in options.items() if name != "score_function"}
    routing = function(leaf, top_k, **arguments, topk_idx=topk_idx)
    outputs, grads = [routing.topk_weights, routing.scores], [grad_weights, grad_scores]
    (expected,) = torch.autograd.grad(outputs, leaf, grads, allow_unused=True)
    if implementation == "torch":
        mine = reference.router_topk(logits, top_k, **options, topk_idx=topk_idx)
        actual = reference.router_topk_backward(grad_weights, mine, grad_scores=grad_scores, **options)
    else:
        other = logits.clone().requires_grad_()
        mine = autograd.router_topk(other, top_k, **options, topk_idx=topk_idx)
        (actual,) = torch.autograd.grad([mine.topk_weights, mine.scores], other, grads)
    if function is sigmoid_group_topk and options.get("norm_topk_prob", True):
        # Where nothing is selected the layer divides 0 by 1e-20, and its gradient is 0 * 1e20.
        expected = torch.where((topk_idx < 0).all(1, keepdim=True), actual, expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_weights_alone(device: torch.device) -> None:
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).to(device)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    routings = [autograd.router_topk(leaves[0], 2), softmax_topk(leaves[1], 2)]
    for routing in routings:
        assert not routing.topk_idx.requires_grad
        (routing.topk_weights[:, 0] * torch.arange(4.0, device=device)).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-6)


def test_docstring_example(run_docstring_example: Callable[..., None]) -> None:
    run_docstring_example(router_topk_backward, reference.router_topk_backward, router_topk=router_topk)


@pytest.mark.parametrize(
    ("grad_weights", "kwargs", "message"),
    [
        (torch.zeros(3, 2), {}, r"grad_weights must be \[1, 2\]"),
        (torch.zeros(1, 2).bfloat16(), {}, "grad_weights must be float32"),
        (torch.zeros(1, 2), {"grad_scores": torch.zeros(1, 3)}, r"grad_scores must be \[1, 8\]"),
        (torch.zeros(1, 2), {"score_function": "relu"}, "score_function"),
        (torch.zeros(1, 2), {"dtype": torch.float16}, "dtype must be"),
    ],
    ids=["shape", "dtype", "scores", "function", "fp16"],
)
def test_bad_arguments_are_refused(grad_weights: torch.Tensor, kwargs: dict[str, Any], message: str) -> None:
    routing = Routing(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2), torch.zeros(1, 8))
    with pytest.raises(ValueError, match=message):
        router_topk_backward(grad_weights, routing, **kwargs)
    wrong = routing._replace(topk_idx=torch.tensor([[9, 0]]))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"topk_idx must be in \[-1, 8\)"):
            router_topk_backward(torch.zeros(1, 2), wrong)
