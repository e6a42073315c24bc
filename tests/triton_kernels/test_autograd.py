"""permute and unpermute with gradients are dispatch and combine of one rank: the native extension's bits."""

from __future__ import annotations

import pytest
import torch

import moe_efa
from moe_efa.testing import assert_bitwise, routing
from moe_efa.triton_kernels.autograd import permute, unpermute
from moe_efa.triton_kernels.plan_rows import plan_rows

NUM_TOKENS, NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 6, 4, 3, 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_equals_expert_parallel_on_one_rank(dtype: torch.dtype, weighted: bool, device: torch.device) -> None:
    topk_idx, topk_weights = routing.duplicates(NUM_TOKENS, NUM_EXPERTS, TOP_K, seed=0, drop_fraction=0.2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator).to(dtype)
    grad_out = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator).to(dtype)

    def results(x: torch.Tensor, topk_weights: torch.Tensor, native: bool) -> list[torch.Tensor]:
        x, topk_weights = x.clone().requires_grad_(), topk_weights.clone().requires_grad_()
        if native:
            sizes = {"num_experts": NUM_EXPERTS, "hidden_size": HIDDEN_SIZE, "top_k": TOP_K}
            with moe_efa.ExpertParallel(None, **sizes, max_tokens_per_rank=NUM_TOKENS) as ep:
                d = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=4)
                y = d.x * 3 + (0 if weighted else d.weights[:, None].to(dtype))
                out = ep.combine(y, d.handle, weighted=weighted)
                out.backward(grad_out)
                rows, weights = d.x, d.weights
        else:
            plan = plan_rows(topk_idx.to(device), num_experts=NUM_EXPERTS, expert_alignment=4)
            rows, weights = permute(x, topk_weights, plan)
            y = rows * 3 + (0 if weighted else weights[:, None].to(dtype))
            out = unpermute(y, plan, weights if weighted else None)
            out.backward(grad_out.to(device))
        assert x.grad is not None and topk_weights.grad is not None
        return [rows, weights, out, x.grad, topk_weights.grad]

    actual = results(x.to(device), topk_weights.to(device), native=False)
    expected = results(x, topk_weights, native=True)
    names = ("rows", "weights", "out", "grad_x")
    for name, got, want in zip(names, actual, expected, strict=False):
        assert_bitwise(got.detach().cpu(), want.detach(), name)
    # <grad, y> is summed in orders of their own.
    torch.testing.assert_close(actual[4].cpu(), expected[4], rtol=1e-5, atol=1e-5)
    assert (actual[4][topk_idx.to(device) < 0] == 0).all()


def test_gradients_are_those_of_dense_torch(device: torch.device) -> None:
    topk_idx, topk_weights = routing.uniform(NUM_TOKENS, NUM_EXPERTS, TOP_K, seed=2, drop_fraction=0.2)
    topk_idx = topk_idx.to(device)
    x = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3)).to(device)
    inputs = [t.to(device).requires_grad_() for t in (x, topk_weights)]
    plan = plan_rows(topk_idx, num_experts=NUM_EXPERTS)
    rows, weights = permute(*inputs, plan, num_rows=plan.max_rows)
    factor = torch.zeros(len(rows), 1, device=device)
    for expert_idx in range(NUM_EXPERTS):
        factor[plan.offsets[expert_idx] : plan.offsets[expert_idx + 1]] = expert_idx + 1.0
    grads = torch.autograd.grad(unpermute(rows * factor, plan, weights).square().sum(), inputs)

    dense = [t.detach().double().requires_grad_() for t in inputs]
    of_token = (dense[1] * (topk_idx + 1) * (topk_idx >= 0)).sum(1, keepdim=True)
    expected = torch.autograd.grad((dense[0] * of_token).square().sum(), dense)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_no_tokens(device: torch.device) -> None:
    plan = plan_rows(torch.empty(0, 2, dtype=torch.int64, device=device), num_experts=3)
    x = torch.empty(0, 8, device=device, requires_grad=True)
    weights = torch.empty(0, 2, device=device, requires_grad=True)
    rows, row_weights = permute(x, weights, plan)
    out = unpermute(rows, plan, row_weights)
    out.sum().backward()
    assert out.shape == (0, 8) and x.grad is not None and x.grad.shape == (0, 8)
    assert weights.grad is not None and weights.grad.shape == (0, 2)
