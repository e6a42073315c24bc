"""Static mode on one rank: shapes of the capacity alone, what is lost and told, compiled graphs, checkpoints, errors.

Between ranks: tests/integration/test_dispatch_combine.py and test_properties.py, which compare bitwise.
"""

from __future__ import annotations

import copy
import gc
import itertools
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint

import moe_efa
from moe_efa import ExpertParallel, op_kernels, plan_tensor, reference
from moe_efa.testing import assert_bitwise

HIDDEN, EXPERTS, TOP_K, TOKENS = 16, 4, 2, 6
Results = list[torch.Tensor]


@pytest.fixture(scope="module")
def ep() -> Iterator[ExpertParallel]:
    with ExpertParallel(
        None,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        top_k=TOP_K,
        max_tokens_per_rank=64,
        wire_dtype="fp8",
        memory_budget_bytes=16 << 20,
    ) as ep:
        yield ep


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def make_inputs(tokens: int = TOKENS, *, grad: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers. Every token goes to two experts: 2 * tokens rows without padding."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-3, 4, (tokens, HIDDEN), generator=generator).float().requires_grad_(grad)
    topk_idx = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    topk_weights = torch.randint(1, 4, (tokens, TOP_K), generator=generator).float().requires_grad_(grad)
    return x, topk_idx, topk_weights


def make_step(ep: ExpertParallel, capacity: int | None, **options: Any) -> Callable[..., tuple[torch.Tensor, Any]]:
    def step(
        x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        d = ep.dispatch(x * 2, topk_idx, topk_weights, capacity=capacity, expert_alignment=2)
        return ep.combine(torch.relu(d.x) - d.x * 0.5, d.handle, **options), d.overflow

    return step


def run(step: Callable[..., tuple[torch.Tensor, Any]], tokens: int = TOKENS) -> tuple[Results, int | None]:
    """The result and the gradients of x and topk_weights; and the overflow."""
    x, topk_idx, topk_weights = make_inputs(tokens)
    out, overflow = step(x, topk_idx, topk_weights)
    (out * out).sum().backward()
    assert x.grad is not None
    assert topk_weights.grad is not None
    return [out.detach(), x.grad, topk_weights.grad], None if overflow is None else int(overflow)


def assert_same(actual: Results, expected: Results) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise(a, b)


def required(ep: ExpertParallel, tokens: int = TOKENS) -> int:
    """Rows with an alignment of 2."""
    return len(ep.dispatch(*make_inputs(tokens, grad=False), expert_alignment=2).x)


def test_with_room_for_all_it_is_the_exact_mode(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(grad=False)
    exact = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=2)
    rows = len(exact.x)
    assert exact.counts is None
    assert exact.overflow is None
    for capacity in (rows, rows + 1, rows + 9):
        d = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=2, capacity=capacity)
        assert d.tokens_per_expert is None
        assert d.counts is not None
        assert d.overflow is not None
        assert exact.tokens_per_expert is not None
        assert d.x.shape == (capacity, HIDDEN)
        assert d.weights.shape == (capacity,)
        assert d.overflow.shape == ()
        assert d.overflow.dtype == d.counts.dtype == torch.int64
        assert_bitwise(d.counts, exact.tokens_per_expert)
        assert_bitwise(d.offsets, exact.offsets)
        assert_bitwise(d.x[:rows], exact.x)
        assert_bitwise(d.weights[:rows], exact.weights)
        assert not d.x[rows:].any()
        assert not d.weights[rows:].any()
        y = d.x.masked_fill((torch.arange(capacity) >= rows)[:, None], float("nan"))  # is not read
        assert_bitwise(ep.combine(y, d.handle), ep.combine(exact.x, exact.handle))
        assert int(d.overflow) == 0
        again = ep.dispatch(x, handle=d.handle)
        assert_bitwise(again.x, d.x)
        assert again.overflow is d.overflow
        assert again.counts is d.counts
    steps = [run(make_step(ep, capacity)) for capacity in (None, rows, rows + 7)]
    assert [overflow for _, overflow in steps] == [None, 0, 0]
    for results, _ in steps[1:]:
        assert_same(results, steps[0][0])


def test_fp8_rows_behind_the_last_are_padding(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(grad=False)
    exact = ep.dispatch(x, topk_idx, topk_weights, output="fp8")
    rows = len(exact.x)
    d = ep.dispatch(x, topk_idx, topk_weights, output="fp8", capacity=rows + 3)
    replayed = ep.dispatch(x, handle=d.handle, output="fp8")
    for got in (d, replayed):
        assert got.scales is not None
        assert exact.scales is not None
        assert got.x.dtype == torch.float8_e4m3fn
        assert_bitwise(got.x[:rows].view(torch.uint8), exact.x.view(torch.uint8))
        assert_bitwise(got.scales[:rows], exact.scales)
        assert not got.x[rows:].view(torch.uint8).any()
        assert bool((got.scales[rows:] == 1).all())
        assert got.scales.shape == (rows + 3, 1)


def test_what_is_lost_is_the_end_of_the_rows(ep: ExpertParallel) -> None:
    """Without tokens lost elsewhere, results are those of a routing that never selected the lost rows."""
    rows = required(ep)
    x, topk_idx, topk_weights = make_inputs(grad=False)
    for capacity in (0, 1, rows // 2, rows - 1):
        plan = reference.make_plan([topk_idx], num_experts=EXPERTS, expert_alignment=2, capacity=[capacity])
        kept = topk_idx.clone()
        for row in plan.lost[0]:
            kept[row.token_idx, row.topk_pos] = -1
        results = []
        for selected, room in ((topk_idx, capacity), (kept, None)):
            leaf, weights = x.clone().requires_grad_(), topk_weights.clone().requires_grad_()
            out, overflow = make_step(ep, room)(leaf, selected, weights)
            (out * out).sum().backward()
            assert overflow is None or int(overflow) == rows
            results.append([out.detach(), leaf.grad, weights.grad])
        assert_same(*results)


def test_a_step_is_repeated_with_what_it_needed(ep: ExpertParallel) -> None:
    expected, _ = run(make_step(ep, None))
    capacity, capacities = 3, []
    while True:
        capacities.append(capacity)
        results, overflow = run(make_step(ep, capacity))
        if not overflow:
            break
        capacity = overflow
    assert capacities == [3, required(ep)]
    assert_same(results, expected)


def test_the_flag_outlives_the_plan_and_keeps_nothing_of_it(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(grad=False)
    gc.collect()  # what earlier tests of this process left in cycles
    others = plan_tensor.num_alive()
    d = ep.dispatch(x, topk_idx, topk_weights, capacity=2)
    overflow, copied = d.overflow, copy.deepcopy(d.overflow)
    assert plan_tensor.num_alive() == others + 1
    del d
    assert plan_tensor.num_alive() == others
    assert overflow is not None
    assert int(overflow) == int(copied) == 2 * TOKENS


def test_padding_is_found_without_the_host(ep: ExpertParallel) -> None:
    """As on a GPU, where a loop over the experts would wait for it."""
    x, topk_idx, topk_weights = make_inputs(grad=False)
    one_expert = torch.full_like(topk_idx, 2)
    for idx, capacity in itertools.product((topk_idx, one_expert, one_expert - 3), (None, 0, 1, 5, 2 * TOKENS, 30)):
        d = ep.dispatch(x, idx, topk_weights, capacity=capacity, expert_alignment=2)
        padding = op_kernels.is_padding(plan_tensor.unwrap(d.handle.plan, ep._group), d.weights)
        assert_bitwise(padding, d.weights == 0)


def test_calls_in_halves(ep: ExpertParallel) -> None:
    rows = required(ep)
    for capacity in (rows - 1, rows):

        def halves(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, room: int = capacity) -> Any:
            d = ep.dispatch_start(x * 2, topk_idx, topk_weights, capacity=room, expert_alignment=2).finish()
            assert d.x.shape[0] == room
            return ep.combine_start(torch.relu(d.x) - d.x * 0.5, d.handle).finish(), d.overflow

        (actual, overflow), (expected, same) = run(halves), run(make_step(ep, capacity))
        assert_same(actual, expected)
        assert overflow == same == (0 if capacity == rows else rows)


def test_bad_capacities_are_refused(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(grad=False)
    before = ep.stats()["dispatch"]["calls"]
    for capacity in (-1, 2**31, 1.5, 4.0, "4", True, torch.tensor(4)):
        for call in (ep.dispatch, ep.dispatch_start):
            with pytest.raises(ValueError, match="capacity must be an integer from 0 to 2147483647, not"):
                call(x, topk_idx, topk_weights, capacity=capacity)  # type: ignore[operator]
    assert ep.stats()["dispatch"]["calls"] == before
    d = ep.dispatch(x, topk_idx, topk_weights, capacity=4)
    for call in (ep.dispatch, ep.dispatch_start):
        with pytest.raises(ValueError, match="capacity is not allowed with a handle"):
            call(x, handle=d.handle, capacity=4)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"capacity -3 is outside \[0, 2\^31\)"):
        torch.ops.moe_efa.dispatch(x, topk_idx, topk_weights, ep._group, 1, "same", -3)
    with pytest.raises(ValueError, match="y has 5 rows, but the handle's dispatch gave 4"):
        ep.combine(torch.zeros(5, HIDDEN), d.handle)


def test_a_capacity_that_is_too_much_memory_sends_nothing(
    ep: ExpertParallel,
) -> None:
    inputs = make_inputs(grad=False)
    before = ep.stats()["dispatch"]["calls"]
    for call in (ep.dispatch, ep.dispatch_start):
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (2**36, hard))  # whatever this machine would promise
        try:
            with pytest.raises(MemoryError):
                call(*inputs, capacity=2**31 - 1)  # type: ignore[operator]
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert ep.stats()["dispatch"]["calls"] == before
    assert ep.dispatch(*inputs, capacity=4).x.shape == (4, HIDDEN)  # the group goes on


# Graphs


@pytest.mark.parametrize(("tokens", "capacity"), [(TOKENS, 64), (TOKENS, 5), (0, 3), (3, 0)])
def test_opcheck(ep: ExpertParallel, tokens: int, capacity: int) -> None:
    x, topk_idx, topk_weights = make_inputs(tokens)
    group = ep._group
    torch.library.opcheck(torch.ops.moe_efa.dispatch.default, (x, topk_idx, topk_weights, group, 2, "same", capacity))
    handle = ep.dispatch(x.detach(), topk_idx, topk_weights.detach(), capacity=capacity).handle
    y = torch.randn(capacity, HIDDEN, requires_grad=True)
    weights = torch.randn(capacity, requires_grad=True)
    torch.library.opcheck(torch.ops.moe_efa.replay.default, (x, handle.plan, group, capacity))
    torch.library.opcheck(torch.ops.moe_efa.combine.default, (y, weights, handle.plan, group, tokens))


def test_a_tracer_finds_the_capacity_and_no_size_of_run_time(ep: ExpertParallel) -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x, topk_idx, topk_weights = (mode.from_tensor(t) for t in make_inputs(grad=False))
        d = ep.dispatch(x, topk_idx, topk_weights, capacity=7, output="fp8")
        assert d.scales is not None
        assert d.counts is not None
        assert d.overflow is not None
        shapes = [tuple(t.shape) for t in (d.x, d.scales, d.weights, d.counts, d.offsets, d.overflow)]
        assert shapes == [(7, HIDDEN), (7, 1), (7,), (EXPERTS,), (EXPERTS + 1,), ()]
        assert all(type(size) is int for shape in shapes for size in shape)


def test_compiled_steps(ep: ExpertParallel) -> None:
    """One graph for all routings of a number of tokens, and the flag is right when it has run."""
    rows = required(ep)
    for capacity in (rows, rows - 1):
        step = make_step(ep, capacity)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, backend=counter, fullgraph=True)
        (actual, overflow), (expected, same) = run(compiled), run(step)
        assert_same(actual, expected)
        assert overflow == same == (0 if capacity == rows else rows)
        x, topk_idx, topk_weights = make_inputs()
        out, told = compiled(x, torch.zeros_like(topk_idx), topk_weights)
        assert int(told) == (0 if capacity >= 2 * TOKENS else 2 * TOKENS)
        assert out.shape == x.shape
        assert counter.frame_count == 1


def test_a_capacity_may_change_without_another_graph(ep: ExpertParallel) -> None:
    rows = required(ep)

    def step(inputs: Any, capacity: int) -> Any:
        return make_step(ep, capacity)(*inputs)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for capacity in (rows, 5, 7, rows - 1, rows + 9, 64):  # the second finds that it is not a constant
        (actual, overflow), (expected, same) = (
            run(lambda *inputs, call=call, room=capacity: call(inputs, room)) for call in (compiled, step)
        )
        assert_same(actual, expected)
        assert overflow == same == (0 if capacity >= rows else rows)
    assert counter.frame_count == 2


def test_inductor(ep: ExpertParallel) -> None:
    rows = required(ep)
    step = make_step(ep, rows - 2)
    (actual, overflow), (expected, same) = run(torch.compile(step, fullgraph=True)), run(step)
    assert_same(actual, expected)
    assert overflow == same == rows


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("ours", [False, True], ids=["plain", "ours"])
def test_checkpoints(ep: ExpertParallel, ours: bool, compiled: bool) -> None:
    rows = required(ep)
    options = {"context_fn": moe_efa.checkpoint_context} if ours else {}
    step = make_step(ep, rows - 2)

    def checkpointed(*inputs: torch.Tensor) -> Any:
        return checkpoint(step, *inputs, use_reentrant=False, **options)

    call = torch.compile(checkpointed, backend="aot_eager", fullgraph=True) if compiled else checkpointed
    (actual, overflow), (expected, same) = run(call), run(step)
    assert_same(actual, expected)
    assert overflow == same == rows


def test_handles_cross_graphs(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(grad=False)
    d = torch.compile(lambda *inputs: ep.dispatch(*inputs, capacity=5), backend="aot_eager", fullgraph=True)(
        x, topk_idx, topk_weights
    )
    assert d.tokens_per_expert is None
    assert d.overflow is not None
    out = torch.compile(ep.combine, backend="aot_eager", fullgraph=True)(d.x, d.handle)
    again = torch.compile(lambda x, h: ep.dispatch(x, handle=h).x, backend="aot_eager", fullgraph=True)(x, d.handle)
    eager = ep.dispatch(x, topk_idx, topk_weights, capacity=5)
    assert_bitwise(out, ep.combine(eager.x, eager.handle))
    assert_bitwise(again, eager.x)
    assert int(d.overflow) == 2 * TOKENS
