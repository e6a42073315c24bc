"""Compiled steps and checkpoints between real processes, with the bytes on the wire as the witness.

One set of processes per setting runs all its scenarios; a test looks up its own outcome.
"""

from __future__ import annotations

import functools
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moe_efa
from moe_efa import ExpertParallel
from moe_efa.testing import assert_bitwise, spawn

HIDDEN, TOP_K, MOST_TOKENS = 24, 2, 64
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Step = Callable[..., torch.Tensor]


def open_ep(group: dist.ProcessGroup, node_size: int, **changes: Any) -> ExpertParallel:
    options: dict[str, Any] = {
        "num_experts": 2 * dist.get_world_size(group),
        "hidden_size": HIDDEN,
        "top_k": TOP_K,
        "max_tokens_per_rank": MOST_TOKENS,
        "node_size": node_size,
        "transport": "shm",
        "timeout_s": 60.0,
        "heartbeat_timeout_s": 60.0,
        "memory_budget_bytes": 16 << 20,
    }
    return ExpertParallel(group, **{**options, **changes})


def make_inputs(ep: ExpertParallel, tokens: int, *, seed: int = 0, routing: str = "uniform") -> Inputs:
    """Of this rank. Small integers, so that every order of additions gives the same bits."""
    generator = torch.Generator().manual_seed(1000 * seed + 100 * ep.rank + tokens)
    x = torch.randint(-3, 4, (tokens, ep.config.hidden_size), generator=generator).float().requires_grad_()
    topk_idx = torch.randint(-1, ep.config.num_experts, (tokens, TOP_K), generator=generator)
    if routing != "uniform":
        topk_idx.fill_({"nothing": -1, "one_expert": 1}[routing])
    topk_weights = torch.randint(1, 4, (tokens, TOP_K), generator=generator).float().requires_grad_()
    return x, topk_idx, topk_weights


def make_step(ep: ExpertParallel) -> tuple[Step, torch.Tensor]:
    parameter = torch.arange(-2.0, ep.config.hidden_size - 2.0).clamp(max=3.0).requires_grad_()

    def experts(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return torch.relu(rows * parameter) - rows

    def step(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return ep.moe(x * 2, topk_idx, topk_weights, experts, expert_alignment=4)

    return step, parameter


def run(step: Step, inputs: Inputs, parameter: torch.Tensor) -> list[torch.Tensor | None]:
    x, topk_idx, topk_weights = inputs
    leaves = (x, topk_weights, parameter)
    for leaf in leaves:
        leaf.grad = None
    out = step(x, topk_idx, topk_weights)
    (out * out).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(actual: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a is not None
        assert b is not None
        assert_bitwise(a, b)


def phases(ep: ExpertParallel) -> dict[str, tuple[int, int]]:
    stats = ep.stats()
    return {name: (stats[name]["calls"], stats[name]["wire_bytes"]) for name in ("dispatch", "combine")}


def spent(ep: ExpertParallel, call: Callable[[], Any]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The result of a call, and its (calls, bytes on the wire) per phase."""
    before = phases(ep)
    result = call()
    after = phases(ep)
    return result, {name: (after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in after}


# Compiled steps


def compiled_steps_are_the_eager_ones(rank: int, group: dist.ProcessGroup, node_size: int) -> None:
    """Also where sizes 0 and 1 make torch compile anew on some ranks and not on others."""
    with open_ep(group, node_size) as ep:
        step, parameter = make_step(ep)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, backend=counter, fullgraph=True)
        tokens_of = ((4, 7, 0, 9), (9, 3, 5, 33), (33, 1, 5, 64), (0, 64, 5, 2), (5, 0, 0, 0), (7, 8, 9, 10))
        for seed, tokens in enumerate(tokens_of):
            routing = ("uniform", "one_expert", "nothing")[seed % 3]
            inputs = make_inputs(ep, tokens[rank], seed=seed, routing=routing)
            assert_same(run(compiled, inputs, parameter), run(step, inputs, parameter))
        compilations = counter.frame_count
        for seed in range(5):
            inputs = make_inputs(ep, 11 + 5 * seed + rank, seed=seed)
            assert_same(run(compiled, inputs, parameter), run(step, inputs, parameter))
        assert compilations <= 4
        assert counter.frame_count == compilations


def inductor_steps_are_the_eager_ones(rank: int, group: dist.ProcessGroup, node_size: int) -> None:
    with open_ep(group, node_size) as ep, torch._inductor.config.patch(compile_threads=1):
        step, parameter = make_step(ep)
        compiled = torch.compile(step, fullgraph=True, dynamic=True)
        for seed, tokens in enumerate((5, 8, 40)):
            inputs = make_inputs(ep, tokens + rank, seed=seed)
            assert_same(run(compiled, inputs, parameter), run(step, inputs, parameter))


def calls_of_two_groups_keep_their_order(rank: int, group: dist.ProcessGroup, node_size: int) -> None:
    """I14: a call that a rank drops or moves meets another call on its peers, which is an error and no hang."""
    with open_ep(group, node_size) as a, open_ep(group, node_size, max_tokens_per_rank=80) as b:

        def step(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            a.dispatch(x, topk_idx, topk_weights)  # nobody wants it
            first = b.dispatch(x, topk_idx, topk_weights)
            second = a.dispatch(x, topk_idx, topk_weights)
            third = b.dispatch(x + 1, handle=first.handle)
            out = a.combine(second.x * 2, second.handle) - b.combine(third.x, first.handle)
            a.combine(second.x, second.handle)
            return out

        # Rank 0 runs as written, the others what was compiled.
        call = step if rank == 0 else torch.compile(step, backend="aot_eager", fullgraph=True)
        none = torch.zeros(1, requires_grad=True)
        for seed in range(3):
            inputs = make_inputs(a, 5 + rank, seed=seed)
            actual, cost = spent(a, lambda inputs=inputs: run(call, inputs, none)[:3])
            assert (cost["dispatch"][0], cost["combine"][0]) == (2 + 1, 2 + 1)
            expected = run(step, inputs, none)[:3]
            assert_same(actual, expected)
            with torch.no_grad():
                actual, cost = spent(a, lambda inputs=inputs: call(*inputs))
            assert (cost["dispatch"][0], cost["combine"][0]) == (2, 2)
            assert_same([actual], expected[:1])


def backward_from_another_thread(rank: int, group: dist.ProcessGroup, node_size: int) -> None:
    with open_ep(group, node_size) as ep:
        step, parameter = make_step(ep)
        inputs = make_inputs(ep, 6 + rank)
        expected = run(step, inputs, parameter)
        inputs[0].grad = None
        out = step(*inputs)
        loss = (out * out).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert_same([inputs[0].grad], [expected[1]])


# Checkpoints


def checkpoints_repeat_the_round_or_not(rank: int, group: dist.ProcessGroup, node_size: int) -> None:
    with open_ep(group, node_size) as ep:
        step, parameter = make_step(ep)
        for tokens, routing in ((9 + rank, "uniform"), (0 if rank else 12, "one_expert"), (5, "nothing")):
            inputs = make_inputs(ep, tokens, routing=routing)
            expected, plain = spent(ep, lambda inputs=inputs: run(step, inputs, parameter))
            for repeats, options in (
                (1, {"use_reentrant": False}),
                (1, {"use_reentrant": True}),
                (0, {"use_reentrant": False, "context_fn": moe_efa.checkpoint_context}),
            ):
                call = functools.partial(checkpoint, step, **options)
                actual, cost = spent(ep, lambda call=call, inputs=inputs: run(call, inputs, parameter))
                assert_same(actual, expected)
                for phase, (calls, _) in plain.items():
                    assert cost[phase][0] == calls + repeats, (phase, options)


def ours_sends_not_one_byte_again(rank: int, group: dist.ProcessGroup, node_size: int) -> None:
    """No gradient reaches the calls here, so that whatever backward sends is recomputation."""
    with open_ep(group, node_size) as ep:
        step, _ = make_step(ep)
        x, topk_idx, topk_weights = make_inputs(ep, 12)

        def layer(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = step(x.detach(), topk_idx, topk_weights.detach())
            return torch.sin(y * scale)

        scale = torch.full((HIDDEN,), 0.5, requires_grad=True)
        grads = []
        for options in ({"use_reentrant": False}, {"use_reentrant": False, "context_fn": moe_efa.checkpoint_context}):
            out, forward = spent(ep, lambda options=options: checkpoint(layer, x, scale, **options))
            _, backward = spent(ep, out.sum().backward)
            dist.barrier(group)
            if "context_fn" in options:
                assert backward == {"dispatch": (0, 0), "combine": (0, 0)}
            else:
                for phase in ("dispatch", "combine"):
                    assert backward[phase][0] == forward[phase][0] == 1
                    assert backward[phase][1] > 12 * HIDDEN  # some of the rows went to the other node
            grads.append(scale.grad)
            scale.grad = None
        layer(x, scale).sum().backward()
        assert_same(grads, [scale.grad, scale.grad])


def checkpoints_within_compiled_steps_send_nothing_again(rank: int, group: dist.ProcessGroup, node_size: int) -> None:
    with open_ep(group, node_size) as ep:
        step, parameter = make_step(ep)
        inputs = make_inputs(ep, 9 + rank)
        expected, plain = spent(ep, lambda: run(step, inputs, parameter))
        for options in ({}, {"context_fn": moe_efa.checkpoint_context}):
            call = functools.partial(checkpoint, step, use_reentrant=False, **options)
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
            actual, cost = spent(ep, lambda compiled=compiled: run(compiled, inputs, parameter))
            assert_same(actual, expected)
            assert {phase: calls for phase, (calls, _) in cost.items()} == {"dispatch": 2, "combine": 2}
        assert {phase: calls for phase, (calls, _) in plain.items()} == {"dispatch": 2, "combine": 2}


# Errors


def a_rank_that_leaves_fails_compiled_calls(rank: int, group: dist.ProcessGroup, node_size: int) -> None:
    """In forward on one object, in backward on another; the type and what it carries come through both."""
    last = dist.get_world_size(group) - 1
    for in_backward in (False, True):
        error = None
        try:
            with open_ep(group, node_size) as ep:
                step, parameter = make_step(ep)
                compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
                inputs = make_inputs(ep, 6)
                run(compiled, inputs, parameter)
                out = compiled(*inputs)
                if rank == last:
                    raise KeyError("lost my way")
                out.sum().backward() if in_backward else compiled(*inputs)
        except (KeyError, moe_efa.TransportError) as caught:
            error = caught
        if rank == last:
            assert isinstance(error, KeyError)
        else:
            assert isinstance(error, moe_efa.TransportError)
            assert "lost my way" in str(error)
            assert error.rank == last
        dist.barrier(group)


SCENARIOS = {
    "2 nodes x 1": [
        compiled_steps_are_the_eager_ones,
        inductor_steps_are_the_eager_ones,
        calls_of_two_groups_keep_their_order,
        backward_from_another_thread,
        checkpoints_repeat_the_round_or_not,
        ours_sends_not_one_byte_again,
        checkpoints_within_compiled_steps_send_nothing_again,
        a_rank_that_leaves_fails_compiled_calls,
    ],
    "2 nodes x 2": [
        compiled_steps_are_the_eager_ones,
        checkpoints_repeat_the_round_or_not,
        ours_sends_not_one_byte_again,
    ],
}
SIZES = {"2 nodes x 1": (2, 1), "2 nodes x 2": (4, 2)}


def run_scenarios(rank: int, group: dist.ProcessGroup, setting: str) -> dict[str, str]:
    failures = {}
    for scenario in SCENARIOS[setting]:
        try:
            torch._dynamo.reset()
            scenario(rank, group, SIZES[setting][1])
        except Exception as error:
            failures[scenario.__name__] = "".join(traceback.format_exception(error))
            traceback.clear_frames(error.__traceback__)
        dist.barrier(group)
    return failures


@functools.cache
def outcomes(setting: str) -> list[dict[str, str]]:
    return spawn(run_scenarios, SIZES[setting][0], setting, timeout=300.0)


@pytest.mark.parametrize(
    ("setting", "name"), [(setting, scenario.__name__) for setting, all_ in SCENARIOS.items() for scenario in all_]
)
def test_between_processes(setting: str, name: str) -> None:
    texts = [f"rank {rank}:\n{failures[name]}" for rank, failures in enumerate(outcomes(setting)) if name in failures]
    assert not texts, "\n".join(texts)


def lose_a_peer(rank: int, group: dist.ProcessGroup) -> tuple[Any, ...]:
    ep = open_ep(group, 1)
    step, _ = make_step(ep)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    inputs = make_inputs(ep, 6)
    out = compiled(*inputs)
    if rank == 1:
        os._exit(1)
    with pytest.raises(moe_efa.PeerLostError) as error:
        out.sum().backward()
    with pytest.raises(moe_efa.PeerLostError) as again:
        compiled(*inputs)
    return type(error.value), error.value.rank, error.value.phase, str(again.value) == str(error.value)


def test_a_lost_peer_is_named_by_a_compiled_backward() -> None:
    assert spawn(lose_a_peer, 2, may_die=[1])[0] == (moe_efa.PeerLostError, 1, "dispatch", True)
