"""The differentiable kernels as operators of torch: opcheck, and compiled functions with the bits of eager ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moe_efa.testing import assert_bitwise, routing
from moe_efa.triton_kernels import autograd, reference
from moe_efa.triton_kernels.autograd import permute, plan_rows, router_topk, unpermute

NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 4, 2, 24
OPS = torch.ops.moe_efa_triton


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def calls(device: torch.device) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with its arguments."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device).requires_grad_()

    topk_idx = routing.uniform(5, NUM_EXPERTS, TOP_K, seed=1, drop_fraction=0.2).topk_idx.to(device)
    plan = reference.plan_rows(topk_idx, num_experts=NUM_EXPERTS, expert_alignment=2)
    num_rows = int(plan.offsets[-1])
    x, topk_weights, y, weights = rand(5, HIDDEN_SIZE), rand(5, TOP_K), rand(num_rows, HIDDEN_SIZE), rand(num_rows)
    logits, options = rand(5, NUM_EXPERTS), ("sigmoid", True, 2.5)
    chosen = reference.router_topk(logits.detach(), TOP_K, score_function="sigmoid", routed_scaling_factor=2.5)
    results = (chosen.topk_weights, chosen.scores, chosen.topk_idx)
    no_grad = [t.detach() for t in (x, y, weights, topk_weights)]
    return {
        "plan_rows": (OPS.plan_rows, (topk_idx, NUM_EXPERTS, 2)),
        "permute": (OPS.permute, (x, topk_weights, *plan, None)),
        "permute-to-given-rows": (OPS.permute, (x, topk_weights, *plan, plan.max_rows)),
        "permute_backward": (OPS.permute_backward, (no_grad[1], no_grad[2], *plan)),
        "permute_backward-of-tokens": (OPS.permute_backward, (no_grad[1], None, *plan)),
        "unpermute": (OPS.unpermute, (y, weights, *plan)),
        "unpermute-plain": (OPS.unpermute, (y, None, *plan)),
        "unpermute_backward": (OPS.unpermute_backward, (*no_grad[:3], *plan, num_rows)),
        "unpermute_backward-plain": (OPS.unpermute_backward, (no_grad[0], None, None, *plan, num_rows)),
        "router_topk": (OPS.router_topk, (logits, TOP_K, *options, None, 1, 1, None)),
        "router_topk-pinned": (OPS.router_topk, (logits, TOP_K, *options, None, 1, 1, topk_idx)),
        "router_topk_backward": (
            OPS.router_topk_backward,
            (no_grad[3], None, *results, *options, torch.bfloat16),
        ),
    }


@pytest.mark.parametrize("name", calls(torch.device("cpu")))
def test_opcheck(name: str, device: torch.device) -> None:
    operator, arguments = calls(device)[name]
    torch.library.opcheck(operator.default, arguments)


def layer(num_rows: str, weighted: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    def step(x: torch.Tensor, router: torch.Tensor) -> tuple[torch.Tensor, ...]:
        topk_idx, topk_weights, scores = router_topk(x.float() @ router, TOP_K)
        plan = plan_rows(topk_idx, num_experts=NUM_EXPERTS, expert_alignment=4)
        rows, weights = permute(x, topk_weights, plan, num_rows=plan.max_rows if num_rows == "most" else None)
        if weighted:
            out = unpermute(torch.relu(rows) * 3, plan, weights)
        else:
            out = unpermute((rows * weights[:, None]).to(x.dtype), plan)
        return out, scores.sum(), plan.offsets

    return step


def results(step: Callable[..., tuple[torch.Tensor, ...]], num_tokens: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).bfloat16().to(device).requires_grad_()
    router = torch.randn(HIDDEN_SIZE, NUM_EXPERTS, generator=generator).to(device).requires_grad_()
    out, loss, offsets = step(x, router)
    (out.float().square().sum() + loss).backward()
    assert x.grad is not None and router.grad is not None
    return [out.detach(), offsets, x.grad, router.grad]


@pytest.mark.parametrize(("num_rows", "weighted"), [("exact", True), ("most", False)], ids=["exact", "most-plain"])
def test_compiled_whole_it_has_the_bits_of_eager(num_rows: str, weighted: bool, device: torch.device) -> None:
    step = layer(num_rows, weighted)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for num_tokens in (6, 9, 0):
        for name, got, want in zip(
            ("out", "offsets", "grad_x", "grad_router"),
            results(compiled, num_tokens, device),
            results(step, num_tokens, device),
            strict=True,
        ):
            assert_bitwise(got, want, f"{name} of {num_tokens} tokens")
    assert counter.frame_count <= 3  # sizes differ; torch compiles anew for 0


def test_inductor_takes_them(device: torch.device) -> None:
    topk_idx, topk_weights = (t.to(device) for t in routing.uniform(5, NUM_EXPERTS, TOP_K, seed=1))
    x = torch.randn(5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).to(device)

    def step(x: torch.Tensor) -> torch.Tensor:
        plan = plan_rows(topk_idx, num_experts=NUM_EXPERTS)
        rows, weights = permute(x, topk_weights, plan)
        return unpermute(torch.relu(rows), plan, weights)

    found = []
    for function in (torch.compile(step, fullgraph=True), step):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        found.append([out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out))])
    for name, got, want in zip(("out", "grad_x"), *found, strict=True):
        assert_bitwise(got, want, name)


def test_second_derivatives_are_refused(device: torch.device) -> None:
    operators = calls(device)
    for name in ("permute", "unpermute", "unpermute-plain", "router_topk"):
        operator, arguments = operators[name]
        results = operator(*arguments)
        first = results[1] if isinstance(results, tuple) else results
        (grad,) = torch.autograd.grad(first.square().sum(), arguments[1 if name == "permute" else 0], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            grad.sum().backward()


def test_errors_are_those_of_the_kernels(device: torch.device) -> None:
    plan = plan_rows(torch.tensor([[0, 1], [1, -1]], device=device), num_experts=2, expert_alignment=2)
    with pytest.raises(ValueError, match=r"x must be \[num_tokens, hidden_size\]"):
        autograd.permute(torch.zeros(8, device=device), torch.zeros(2, 2, device=device), plan)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        autograd.unpermute(torch.zeros(4, 8, device=device).half(), plan)
