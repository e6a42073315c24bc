"""The operators on one rank: what torch demands of them, compiled graphs, the life of plans, checkpoints, errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moe_efa
from moe_efa import ExpertParallel, group_registry, host_memory, native_group, op_kernels, ops, plan_tensor
from moe_efa.config import ExpertParallelConfig
from moe_efa.testing import assert_bitwise
from moe_efa.testing.in_process import in_process_ranks

HIDDEN, EXPERTS, TOP_K, MOST_TOKENS = 16, 4, 2, 64
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def open_ep(**changes: Any) -> ExpertParallel:
    options = {
        "num_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "top_k": TOP_K,
        "max_tokens_per_rank": MOST_TOKENS,
        "memory_budget_bytes": 16 << 20,
    }
    return ExpertParallel(None, **{**options, **changes})


@pytest.fixture(scope="module")
def ep() -> Iterator[ExpertParallel]:
    with open_ep() as ep:
        yield ep


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(
            compile_threads=1,  # no pool of processes that outlives the tests
            fx_graph_cache=False,  # graphs of an earlier run prove nothing
        ),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What reaches the native groups: the call and the sum of what it sends."""
    log: list[tuple[str, float]] = []

    def watch(name: str) -> None:
        real = getattr(native_group.NativeGroup, name)

        def watched(self: native_group.NativeGroup, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            log.append((name, float(rows.double().sum())))
            return real(self, rows, *args, **kwargs)

        monkeypatch.setattr(native_group.NativeGroup, name, watched)

    for name in ("dispatch", "replay", "combine"):
        watch(name)
    return log


def make_inputs(tokens: int, *, seed: int = 0, routing: str = "uniform", grad: bool = True) -> Inputs:
    """Small integers, so that every order of additions gives the same bits."""
    generator = torch.Generator().manual_seed(seed + 100 * tokens)
    x = torch.randint(-3, 4, (tokens, HIDDEN), generator=generator).float().requires_grad_(grad)
    topk_idx = torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=generator)
    if routing != "uniform":
        topk_idx.fill_({"nothing": -1, "one_expert": 2}[routing])
    topk_weights = torch.randint(1, 4, (tokens, TOP_K), generator=generator).float().requires_grad_(grad)
    return x, topk_idx, topk_weights


def run(step: Step, inputs: Inputs, parameter: torch.Tensor | None = None) -> list[torch.Tensor | None]:
    """The result and all gradients."""
    x, topk_idx, topk_weights = inputs
    leaves = [leaf for leaf in (x, topk_weights, parameter) if leaf is not None]
    for leaf in leaves:
        leaf.grad = None
    out = step(x, topk_idx, topk_weights)
    (out * out).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(actual: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_bitwise(a, b)


def counts(ep: ExpertParallel) -> tuple[int, int]:
    stats = ep.stats()
    return stats["dispatch"]["calls"], stats["combine"]["calls"]


@contextlib.contextmanager
def counted(ep: ExpertParallel, dispatches: int, combines: int) -> Iterator[None]:
    before = counts(ep)
    yield
    after = counts(ep)
    assert (after[0] - before[0], after[1] - before[1]) == (dispatches, combines)


# What torch demands of an operator


@pytest.mark.parametrize(
    ("tokens", "routing", "alignment"), [(6, "uniform", 1), (0, "uniform", 4), (5, "nothing", 1), (7, "one_expert", 4)]
)
def test_opcheck(ep: ExpertParallel, tokens: int, routing: str, alignment: int) -> None:
    x, topk_idx, topk_weights = make_inputs(tokens, routing=routing)
    group = ep._group
    torch.library.opcheck(torch.ops.moe_efa.dispatch.default, (x, topk_idx, topk_weights, group, alignment, "same"))
    handle = ep.dispatch(x.detach(), topk_idx, topk_weights.detach(), expert_alignment=alignment).handle
    y = torch.randn(handle.rows, HIDDEN, requires_grad=True)
    weights = torch.randn(handle.rows, requires_grad=True)
    torch.library.opcheck(torch.ops.moe_efa.replay.default, (x, handle.plan, group, handle.rows))
    torch.library.opcheck(torch.ops.moe_efa.combine.default, (y, weights, handle.plan, group, tokens))
    if routing != "uniform":
        return
    torch.library.opcheck(torch.ops.moe_efa.combine.default, (y, None, handle.plan, group, tokens))
    rest = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]  # these two have no gradient
    torch.library.opcheck(
        torch.ops.moe_efa.combine_grads.default,
        (y.detach(), weights.detach(), handle.plan, group, tokens),
        test_utils=rest,
    )
    torch.library.opcheck(
        torch.ops.moe_efa.weight_grads.default, (y.detach(), y.detach(), handle.plan, group), test_utils=rest
    )
    torch.library.opcheck(torch.ops.moe_efa.weighted_rows.default, (y.detach(), weights.detach()), test_utils=rest)


def test_fake_rows_are_a_size_found_at_run_time(ep: ExpertParallel) -> None:
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=False) as mode:
        x, topk_idx, topk_weights = (mode.from_tensor(t) for t in make_inputs(5, grad=False))
        d = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=8)
        assert isinstance(d.x.shape[0], torch.SymInt)
        rows = d.x.shape[0].node.expr
        assert d.x.shape == (rows, HIDDEN)
        assert d.weights.shape[0] == d.x.shape[0] == d.handle.rows
        assert ep.combine(d.x, d.handle).shape == (5, HIDDEN)
        assert ep.dispatch(x, handle=d.handle).x.shape[0] == d.x.shape[0]
    bounds = shape_env.var_to_range[rows]
    assert (bounds.lower, bounds.upper) == (0, MOST_TOKENS * TOP_K + EXPERTS * 7)


# Compiled graphs


def with_parameter(ep: ExpertParallel, parameter: torch.Tensor) -> dict[str, Step]:
    def experts(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return torch.relu(rows * parameter) + rows

    def moe(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return ep.moe(x * 2, topk_idx, topk_weights, experts)

    def parts(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        d = ep.dispatch(x, topk_idx, topk_weights, expert_alignment=4)
        again = ep.dispatch(x + 1, handle=d.handle)
        y = experts(d.x, d.offsets) * d.weights[:, None] * d.offsets[-1]
        return ep.combine(y, d.handle, weighted=False) + ep.combine(again.x * parameter, again.handle)

    def without_parameter(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return x * parameter + ep.moe(x, topk_idx, topk_weights, lambda rows, offsets: torch.ones_like(rows))

    return {"moe": moe, "parts": parts, "without_parameter": without_parameter}


@pytest.mark.parametrize(
    ("backend", "name"),
    [("aot_eager", "moe"), ("aot_eager", "parts"), ("aot_eager", "without_parameter"), ("inductor", "moe")],
)
def test_compiled_steps_are_the_eager_ones_and_compile_once(ep: ExpertParallel, backend: str, name: str) -> None:
    """One graph for the first size, one for any size; torch itself makes others of sizes 0 and 1."""
    parameter = torch.randint(-2, 3, (HIDDEN,)).float().requires_grad_()
    step = with_parameter(ep, parameter)[name]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True if backend == "inductor" else None)
    for tokens, routing in ((4, "uniform"), (9, "uniform"), (6, "nothing"), (33, "one_expert"), (64, "uniform")):
        inputs = make_inputs(tokens, routing=routing)
        expected = run(step, inputs, parameter)
        assert_same(run(compiled, inputs, parameter), expected)
        assert plan_tensor.num_alive() == 0
    assert counter.frame_count == (1 if backend == "inductor" else 2)
    if backend == "aot_eager":
        for tokens in (0, 1):
            inputs = make_inputs(tokens)
            assert_same(run(compiled, inputs, parameter), run(step, inputs, parameter))
        assert counter.frame_count == 4


def test_gradients_of_part_of_the_inputs_compiled(ep: ExpertParallel) -> None:
    step = with_parameter(ep, torch.ones(HIDDEN))["moe"]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for needs_x, needs_weights in ((True, False), (False, True)):
        x, topk_idx, topk_weights = make_inputs(6, grad=False)
        inputs = x.requires_grad_(needs_x), topk_idx, topk_weights.requires_grad_(needs_weights)
        assert_same(run(compiled, inputs), run(step, inputs))
    with torch.no_grad():
        assert_bitwise(compiled(*inputs), step(*inputs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_no_call_is_dropped_merged_or_moved(ep: ExpertParallel, backend: str, calls: list[tuple[str, float]]) -> None:
    def step(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        ep.dispatch(x, topk_idx, topk_weights, expert_alignment=2)  # nobody wants it
        a = ep.dispatch(x, topk_idx, topk_weights)
        b = ep.dispatch(x, topk_idx, topk_weights)  # the same again
        ep.dispatch(x, handle=b.handle)
        late = ep.combine(b.x, b.handle, weighted=False)
        ep.combine(a.x, a.handle)
        out = late - ep.combine(a.x, a.handle)
        ep.combine(a.x, a.handle)  # nor this, and nothing comes after it
        return out

    inputs = make_inputs(6, seed=3)
    expected = run(step, inputs)
    eager = list(calls)
    calls.clear()
    assert_same(run(torch.compile(step, backend=backend, fullgraph=True), inputs), expected)
    assert calls == eager
    assert [name for name, _ in calls[:8]] == ["dispatch"] * 3 + ["replay"] + ["combine"] * 4
    assert len(calls) == 8 + 2 * 2  # backward: of the two combines and two dispatches that have a say in the result
    assert len({total for _, total in calls[8:]}) > 2  # or their order would not show
    if backend == "aot_eager":
        calls.clear()
        with torch.no_grad():
            torch.compile(step, backend=backend, fullgraph=True)(*inputs)
        assert calls == eager[:8]


def test_handles_leave_and_enter_graphs(ep: ExpertParallel) -> None:
    start = torch.compile(lambda *inputs: ep.dispatch(*inputs, expert_alignment=2), backend="aot_eager", fullgraph=True)
    counter = CompileCounterWithBackend("aot_eager")
    end = torch.compile(lambda y, handle: ep.combine(y, handle), backend=counter, fullgraph=True)
    for tokens in (4, 9, 6, 33):
        inputs = make_inputs(tokens)
        d = start(*inputs)
        assert isinstance(d, moe_efa.DispatchResult)
        assert (d.handle.num_tokens, d.handle.rows, d.handle.expert_alignment) == (tokens, len(d.x), 2)
        e = ep.dispatch(*inputs, expert_alignment=2)
        assert_same([d.x, d.offsets, d.tokens_per_expert, d.weights], [e.x, e.offsets, e.tokens_per_expert, e.weights])
        assert_bitwise(end(d.x, d.handle), ep.combine(e.x, e.handle))
    assert counter.frame_count == 2


def test_graph_breaks_between_the_calls(ep: ExpertParallel) -> None:
    """Also right before an operator, whose kernels Dynamo then must not look into."""

    def step(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        d = ep.dispatch(x, topk_idx, topk_weights)
        torch._dynamo.graph_break()
        return ep.combine(d.x * 3, d.handle)

    inputs = make_inputs(6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter)
    assert_same(run(compiled, inputs), run(step, inputs))
    seen = {node.stack_trace or "" for graph in counter.graphs for node in graph.graph.nodes}
    inner = ("op_kernels.py", "group_registry.py", "native_group.py")
    assert not any(file in trace for trace in seen for file in inner)


# Plans


def test_a_plan_lives_as_long_as_somebody_keeps_it(ep: ExpertParallel) -> None:
    gc.collect()
    assert plan_tensor.num_alive() == 0
    x, topk_idx, topk_weights = make_inputs(6)
    gc.disable()  # whatever goes now goes by itself
    try:
        d = ep.dispatch(x, topk_idx, topk_weights)
        y = (d.x * 2).detach().requires_grad_()
        out = ep.combine(y, d.handle)
        del d
        assert plan_tensor.num_alive() == 1  # kept for backward
        out.sum().backward()
        assert plan_tensor.num_alive() == 0
        assert y.grad is not None
        for step in range(3000):
            d = ep.dispatch(x, topk_idx, topk_weights)
            out = ep.combine(d.x, d.handle)
            if step % 10 == 0:
                out.sum().backward()
            assert plan_tensor.num_alive() <= 2  # this round's, and that of the last result, still unreplaced
        del d, out
        assert plan_tensor.num_alive() == 0
    finally:
        gc.enable()


def test_compiled_steps_keep_no_plans(ep: ExpertParallel) -> None:
    step = with_parameter(ep, torch.ones(HIDDEN))["moe"]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    inputs = make_inputs(6)
    for _ in range(300):
        out = compiled(*inputs)
        assert plan_tensor.num_alive() == 1
        out.sum().backward()
        assert plan_tensor.num_alive() == 0


def test_a_copied_plan_works_while_the_original_lives(ep: ExpertParallel) -> None:
    inputs = make_inputs(6, grad=False)
    d, other = ep.dispatch(*inputs), ep.dispatch(*make_inputs(9, grad=False))
    handle = copy.deepcopy(d.handle)
    assert handle.plan.data_ptr() != d.handle.plan.data_ptr()
    assert_bitwise(ep.combine(d.x, handle), ep.combine(d.x, d.handle))
    rows = d.x
    del d
    with (
        counted(ep, 0, 0),
        pytest.raises(ValueError, match=r"the plan of this handle is gone: a copy works only while"),
    ):
        ep.combine(rows, handle)
    del other
    with pytest.raises(ValueError, match=r"not a plan: torch.int64 \[3\] on cpu"):
        torch.ops.moe_efa.replay(inputs[0], torch.zeros(3, dtype=torch.int64), ep._group, 12)


def test_a_plan_belongs_to_its_group(ep: ExpertParallel) -> None:
    with open_ep(top_k=3) as other:
        d = ep.dispatch(*make_inputs(6, grad=False))
        with pytest.raises(ValueError, match="belongs to another ExpertParallel"):
            torch.ops.moe_efa.combine(d.x, d.weights, d.handle.plan, other._group, 6)
        assert other._group.split(".")[2] != ep._group.split(".")[2]  # also where a cached graph looks the name up


def test_closed_groups_are_not_kept() -> None:
    ep = open_ep(max_tokens_per_rank=8)
    name, group = ep._group, weakref.ref(ep._native)
    assert group_registry.find(name) is ep._native
    out = ep.moe(*make_inputs(6), lambda rows, offsets: rows * 2)
    ep.close()
    with pytest.raises(moe_efa.ClosedError, match="the native group was closed"):
        out.sum().backward(retain_graph=True)
    del ep
    gc.collect()
    assert group() is None
    with pytest.raises(moe_efa.ClosedError, match="the native group was closed"):
        out.sum().backward()


# Autograd


def test_backward_twice(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(6)
    out = ep.moe(x, topk_idx, topk_weights, lambda rows, offsets: rows * 2)
    with counted(ep, 1, 1):
        out.sum().backward(retain_graph=True)
    first = x.grad
    x.grad = None
    with counted(ep, 1, 1):
        out.sum().backward()
    assert_same([x.grad], [first])
    assert plan_tensor.num_alive() == 0  # released, although the graph is there
    with counted(ep, 0, 0), pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_second_derivatives_are_refused(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(6)
    for leaf, call in (
        (x, lambda: ep.moe(x, topk_idx, topk_weights, lambda rows, offsets: rows * rows)),
        (topk_weights, lambda: ep.moe(x, topk_idx, topk_weights, lambda rows, offsets: rows)),
    ):
        (grad,) = torch.autograd.grad(call().square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_saved_tensors_may_be_copied(ep: ExpertParallel) -> None:
    """As save_on_cpu(pin_memory=True) does: of the plan only a copy is saved."""
    step = with_parameter(ep, torch.ones(HIDDEN))["parts"]
    inputs = make_inputs(6)
    expected = run(step, inputs)
    x, _, topk_weights = inputs
    for passes in (1, 2):
        for leaf in (x, topk_weights):
            leaf.grad = None
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            out = step(*inputs)
        loss = (out * out).sum()
        assert plan_tensor.num_alive() == 1
        if passes == 2:
            loss.backward(retain_graph=True)
            assert plan_tensor.num_alive() == 1
            for leaf in (x, topk_weights):
                leaf.grad = None
        loss.backward()
        assert plan_tensor.num_alive() == 0  # given up, although the graph is there
        assert_same([out.detach(), x.grad, topk_weights.grad], expected)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        out = step(*inputs)
    assert plan_tensor.num_alive() == 1
    del out, loss
    assert plan_tensor.num_alive() == 0


def test_tangents_are_refused(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(6, grad=False)
    d = ep.dispatch(x, topk_idx, topk_weights)

    def dual(tensor: torch.Tensor) -> torch.Tensor:
        return forward_ad.make_dual(tensor, torch.ones_like(tensor))

    calls: list[Callable[[], object]] = [
        lambda: ep.dispatch(dual(x), topk_idx, topk_weights),
        lambda: ep.dispatch(x, topk_idx, dual(topk_weights)),
        lambda: ep.dispatch(dual(x), handle=d.handle),
        lambda: ops.replay_fp8(dual(x), d.handle.plan, group=ep._group, rows=d.handle.rows),
        lambda: ep.combine(dual(d.x), d.handle),
        lambda: torch.func.jvp(lambda x: ep.dispatch(x, topk_idx, topk_weights).x, (x,), (x,)),
    ]
    with forward_ad.dual_level(), counted(ep, 0, 0):
        for call in calls[:-1]:
            with pytest.raises(ValueError, match="no forward-mode derivatives, but an input has a tangent"):
                call()
    with counted(ep, 0, 0), pytest.raises(ValueError, match="no forward-mode derivatives"):
        calls[-1]()
    with forward_ad.dual_level(), counted(ep, 1, 0):
        ep.dispatch(x, topk_idx, topk_weights)  # without a tangent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 4, 11])
def test_weighted_rows_in_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    monkeypatch.setattr(op_kernels, "_BLOCK_ELEMENTS", 4 * HIDDEN)
    y, weights = torch.randn(HIDDEN, rows).t().to(dtype), torch.randn(rows)
    sizes: list[int] = []
    real = torch.mul

    def watched(factor: torch.Tensor, block: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(block))
        return real(factor, block, **kwargs)

    monkeypatch.setattr(torch, "mul", watched)
    actual = torch.ops.moe_efa.weighted_rows(y, weights)
    assert sum(sizes) == rows
    assert max(sizes) <= 4
    assert_bitwise(actual, (weights[:, None] * y).to(dtype))


def test_backward_weights_rows_in_blocks(ep: ExpertParallel) -> None:
    """Also in a compiled graph, where only an operator is free to."""
    step: Step = lambda *inputs: ep.moe(*inputs, lambda rows, offsets: rows + 1)  # noqa: E731
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        out = call(*make_inputs(6))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out.sum().backward()
        assert "moe_efa::weighted_rows" in {event.key for event in profile.key_averages()}


# Tensors whose values are not in their own memory as they are


@pytest.mark.parametrize("parameter", [False, True])
def test_every_argument_may_be_a_subclass_or_a_view_with_a_sign_to_change(ep: ExpertParallel, parameter: bool) -> None:
    x, topk_idx, topk_weights = make_inputs(6, grad=False)
    x = torch.nn.Parameter(x) if parameter else x
    d = ep.dispatch(x, topk_idx, topk_weights)
    negative = torch._neg_view((-d.x).detach())
    assert negative.is_neg()
    expected = ep.combine(d.x, d.handle)
    assert_bitwise(ep.combine(negative, d.handle), expected.detach())
    y = TwoTensor(d.x.detach(), 2 * d.x.detach())
    out = ep.combine(y, d.handle)
    assert_bitwise(out.a, expected.detach())
    assert_bitwise(out.b, 2 * expected.detach())
    for idx, weights in (
        (torch._neg_view(-topk_idx), topk_weights),
        (topk_idx, torch._neg_view(-topk_weights)),
        (TwoTensor(topk_idx, topk_idx.clone()), topk_weights),
        (topk_idx, TwoTensor(topk_weights, topk_weights.clone())),
    ):
        e = ep.dispatch(x, idx, weights)
        parts = [t.a if isinstance(t, TwoTensor) else t for t in (e.x, e.weights, e.offsets)]
        assert_same([t.detach() for t in parts], [t.detach() for t in (d.x, d.weights, d.offsets)])
    for wrapped in (x, torch._neg_view(x.detach()), y):
        assert ops._is_plain(wrapped) is (wrapped is x)
    assert ops._goes_straight((x, topk_idx, topk_weights, "group"))


def test_tensors_without_memory_are_errors(ep: ExpertParallel) -> None:
    x, topk_idx, topk_weights = make_inputs(6, grad=False)
    wrapper = TwoTensor(topk_weights, topk_weights)
    with counted(ep, 0, 0), pytest.raises(ValueError, match=r"TwoTensor \[6, 2\] without memory of its own"):
        ep._native.dispatch(x, topk_idx, wrapper, 1)
    plan = torch.zeros(1, dtype=plan_tensor.DTYPE)
    with pytest.raises(ValueError, match="not a plan: a TwoTensor without memory"):
        plan_tensor.unwrap(TwoTensor(plan, plan), ep._group)


# Checkpoints


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_checkpoints_give_the_same_bits_and_ours_send_nothing_again(ep: ExpertParallel, backend: str | None) -> None:
    parameter = torch.randint(-2, 3, (HIDDEN,)).float().requires_grad_()
    step = with_parameter(ep, parameter)["moe"]
    inputs = make_inputs(9)
    expected = run(step, inputs, parameter)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is torch.ops.aten.relu.default:
            return CheckpointPolicy.MUST_SAVE
        return moe_efa.checkpoint_policy(ctx, op, *args, **kwargs)

    own = functools.partial(create_selective_checkpoint_contexts, policy)
    for again, options in (
        (1, {"use_reentrant": False}),
        (1, {"use_reentrant": True}),
        (0, {"use_reentrant": False, "context_fn": moe_efa.checkpoint_context}),
        (0, {"use_reentrant": False, "context_fn": own}),
    ):
        call = functools.partial(checkpoint, step, **options)
        if backend is not None:
            if options["use_reentrant"]:
                continue  # not for compilers
            again = 0  # an ordered operator is never run twice in a graph
            torch._dynamo.reset()
            call = torch.compile(call, backend=backend, fullgraph=True)
        with counted(ep, 2 + again, 2 + again):
            assert_same(run(call, inputs, parameter), expected)
        assert plan_tensor.num_alive() == 0


# Errors


def test_wrong_arguments_of_compiled_calls(ep: ExpertParallel) -> None:
    compiled = torch.compile(
        lambda *inputs: ep.moe(*inputs, lambda rows, offsets: rows * 2), backend="aot_eager", fullgraph=True
    )
    x, topk_idx, topk_weights = make_inputs(6)
    with counted(ep, 1, 1):
        compiled(x, topk_idx, topk_weights)
        with pytest.raises(ValueError, match=r"topk_idx holds 7; expert ids are in \[-1, 4\)"):
            compiled(x, topk_idx.clamp(max=0) + 7, topk_weights)
        with pytest.raises(Exception, match=r"topk_idx must be \[T, top_k\] = \[.+, 2\], not \[.+, 2\]"):
            compiled(x[:5], topk_idx, topk_weights[:5])
        with pytest.raises(Exception, match=r"x must be torch.bfloat16 or torch.float32, not torch.float64"):
            compiled(x.double(), topk_idx, topk_weights)
        large = make_inputs(MOST_TOKENS + 1)
        with pytest.raises(ValueError, match=r"x has 65 tokens, more than max_tokens_per_rank=64"):
            compiled(*large)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_errors_keep_their_type_and_attributes(backend: str | None) -> None:
    with contextlib.suppress(moe_efa.TransportError), open_ep(max_tokens_per_rank=16) as ep:
        step: Step = lambda *inputs: ep.moe(*inputs, lambda rows, offsets: rows * 2)  # noqa: E731
        if backend is not None:
            step = torch.compile(step, backend=backend, fullgraph=True)
        inputs = make_inputs(6)
        out = step(*inputs)
        ep._native.leave(RuntimeError("lost"))
        for call in (lambda: out.sum().backward(), lambda: step(*inputs)):
            with pytest.raises(moe_efa.TransportError, match="lost") as error:
                call()
            assert (error.value.rank, error.value.phase) == (0, None)


def test_error_in_the_middle_of_a_dispatch_is_one_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its type: after the first half has been sent, a ValueError is no refusal."""
    config = ExpertParallelConfig(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        top_k=TOP_K,
        max_tokens_per_rank=MOST_TOKENS,
        memory_budget_bytes=16 << 20,
        timeout_s=30.0,
    )
    real, culprit = host_memory.empty, threading.local()

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        if getattr(culprit, "here", False):
            raise ValueError("no")
        return real(*shape, dtype=dtype)

    def fail(rank: int, group: native_group.NativeGroup) -> list[str]:
        culprit.here = rank == 1
        texts = []
        for _ in range(2):
            try:
                group.dispatch(*make_inputs(6, grad=False), 1)
            except Exception as error:
                texts.append(f"{type(error).__name__}: {error}")
        return texts

    monkeypatch.setattr(host_memory, "empty", empty)
    with in_process_ranks(config, 2) as ranks:
        other, here = ranks.run(fail)
    assert here[0] == "ValueError: no"
    for text in (here[1], *other):
        assert text.startswith("TransportError")
        assert "rank 1 could not finish a dispatch: ValueError: no" in text
    assert other  # at the latest in its second dispatch: what rank 1 sent may have been all that the first needed


def test_calls_of_other_threads_end_when_the_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ep = open_ep(max_tokens_per_rank=32)
    errors: list[BaseException] = []

    def go_on() -> None:
        inputs = make_inputs(6, grad=False)
        try:
            while True:
                ep.dispatch(*inputs)
        except moe_efa.ClosedError as error:
            errors.append(error)

    close = native_group.NativeGroup.close_at_exit

    def close_later(self: native_group.NativeGroup, timeout_s: float) -> None:
        thread.join(10)  # it ends without that somebody else has to get hold of the lock
        assert not thread.is_alive()
        close(self, timeout_s)

    monkeypatch.setattr(group_registry, "_live", {ep._native})
    monkeypatch.setattr(native_group.NativeGroup, "close_at_exit", close_later)
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    group_registry._close_all(os.getpid())
    assert [str(error) for error in errors] == ["the process is ending"]
    with pytest.raises(moe_efa.ClosedError, match="the process is ending"):
        ep.dispatch(*make_inputs(6, grad=False))


def test_an_interrupt_of_close_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    ep, real, calls = open_ep(max_tokens_per_rank=16), native_group._C.Group.close, []

    def close(self: Any, *, collective: bool, **options: Any) -> None:
        calls.append(collective)
        if collective:
            raise KeyboardInterrupt
        real(self, collective=collective, **options)

    monkeypatch.setattr(native_group._C.Group, "close", close)
    pending = ep.dispatch_start(*make_inputs(6, grad=False))
    with pytest.raises(KeyboardInterrupt):
        ep.close()
    assert calls == [True, False]
    assert not ep._native._kept
    with pytest.raises(moe_efa.ClosedError):
        pending.finish()


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_what_the_calls_make_is_not_on_the_default_device(num_tokens: int) -> None:
    x, idx, weights = make_inputs(num_tokens)
    with torch.device("meta"), open_ep(wire_dtype="fp8") as ep:
        fp8 = ep.dispatch(x.detach(), idx, weights.detach(), output="fp8")
        static = ep.dispatch(x, idx, weights, capacity=20)
        pending = ep.dispatch_start(x, idx, weights)
        d = pending.finish()
        out = ep.combine_start(d.x, d.handle).finish() + ep.combine(static.x, static.handle)
        (out.sum() + ep.moe(x, idx, weights, lambda rows, _: rows * 2, waves=2).sum()).backward()
        found = [*vars(fp8).values(), *vars(static).values(), *vars(d).values(), out, x.grad, weights.grad]
        found.append(host_memory.empty(2 << 20, dtype=torch.uint8))
    assert all(tensor.is_cpu for tensor in found if isinstance(tensor, torch.Tensor))
    assert isinstance(x.grad, torch.Tensor)


def test_only_known_outputs(ep: ExpertParallel) -> None:
    with counted(ep, 0, 0), pytest.raises(ValueError, match="output must be 'same' or 'fp8', not 'fp4'"):
        ops.dispatch(*make_inputs(6), group=ep._group, expert_alignment=1, output="fp4")


def test_profiles_name_the_operators(ep: ExpertParallel) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ep.moe(*make_inputs(6), lambda rows, offsets: rows).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {f"moe_efa::{name}" for name in ("dispatch", "combine", "replay", "combine_grads")} <= names


def test_experts_have_to_return_a_tensor() -> None:
    with moe_efa.ExpertParallel(None, num_experts=4, hidden_size=8, top_k=2, max_tokens_per_rank=8) as ep:
        weights, idx = torch.rand(3, 4).topk(2)
        with pytest.raises(ValueError, match=r"experts\(rows, offsets\) must return a tensor .* not NoneType"):
            ep.moe(torch.randn(3, 8), idx, weights, lambda rows, offsets: None)  # type: ignore[arg-type, return-value]


def test_a_group_is_a_process_group_or_none() -> None:
    with pytest.raises(moe_efa.ConfigError, match="process group or None, not 'WORLD'"):
        moe_efa.ExpertParallel("WORLD", num_experts=4, hidden_size=8, top_k=2, max_tokens_per_rank=8)  # type: ignore[arg-type]
