"""Rounds in waves and calls in two halves: the bits of calls in one, going on while nobody waits, and failures."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import moe_efa
from moe_efa import ClosedError, ExpertParallel, TransportError, overlap
from moe_efa.testing import assert_bitwise, spawn
from moe_efa.testing.outcomes import run_ranks
from moe_efa.testing.routing import uneven_token_counts

HIDDEN_SIZE, EXPERTS_PER_RANK, TOP_K = 40, 3, 2
WAVES = (2, 3, 7, 40)
_seeds = itertools.count(1)


@dataclass(frozen=True)
class Setting:
    num_ranks: int
    node_size: int
    transport: str = "auto"
    reorder: bool = False

    @property
    def id(self) -> str:
        joined = "" if self.node_size == self.num_ranks else f"-{self.transport}"
        return f"ep{self.num_ranks}-node{self.node_size}{joined}{'-reordered' if self.reorder else ''}"

    def open(self, group: dist.ProcessGroup | None, **changes: Any) -> ExpertParallel:
        options: dict[str, Any] = {
            "num_experts": EXPERTS_PER_RANK * self.num_ranks,
            "hidden_size": HIDDEN_SIZE,
            "top_k": TOP_K,
            "max_tokens_per_rank": 32,
            "node_size": self.node_size,
            "transport": self.transport,
            "provider": "tcp" if self.transport == "libfabric" else None,
            "timeout_s": 30.0,
            "memory_budget_bytes": 64 << 20,
        }
        with pytest.MonkeyPatch.context() as patch:
            if self.reorder:
                patch.setenv("MOE_EFA_REORDER", str(next(_seeds)))
            return ExpertParallel(group, **{**options, **changes})


SETTINGS = (
    Setting(2, 2),
    Setting(4, 2, "shm"),
    Setting(4, 2, "shm", reorder=True),
    Setting(2, 1, "libfabric"),
    Setting(2, 1, "libfabric", reorder=True),
)


def routing(pattern: str, num_tokens: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    idx = torch.randint(0, num_experts, (num_tokens, TOP_K), generator=generator)
    if pattern == "one expert takes all":
        idx.fill_(num_experts - 1)
    elif pattern == "nothing selected":
        idx.fill_(-1)
    elif pattern == "some selected":
        idx[torch.rand(num_tokens, TOP_K, generator=generator) < 0.4] = -1
    return idx


# (pattern, tokens per rank or "uneven" or "none on the last rank", dtype, expert_alignment, weighted weights need grad)
CASES = (
    ("uniform", "even", torch.float32, 1),
    ("uniform", "uneven", torch.bfloat16, 8),
    ("some selected", "none on the last rank", torch.float32, 1),
    ("one expert takes all", "uneven", torch.float32, 4),
    ("nothing selected", "even", torch.float32, 1),
    ("uniform", "none", torch.bfloat16, 1),
)


def num_tokens_of(tokens: str, rank: int, num_ranks: int) -> int:
    if tokens == "uneven":
        return uneven_token_counts(num_ranks, 29, seed=3)[rank]
    if tokens == "none" or (tokens == "none on the last rank" and rank == num_ranks - 1):
        return 0
    return 23


def gradients_of(ep: ExpertParallel, case: tuple[Any, ...], waves: int | None) -> dict[str, torch.Tensor]:
    """One step with experts that scale and shift every element of a row, so that every row is computed by itself."""
    pattern, tokens, dtype, alignment = case
    generator = torch.Generator().manual_seed(7 + ep.rank)
    num_tokens = num_tokens_of(tokens, ep.rank, ep.num_ranks)
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype).requires_grad_()
    idx = routing(pattern, num_tokens, ep.config.num_experts, generator)
    topk_weights = torch.rand(num_tokens, TOP_K, generator=generator).requires_grad_()
    scale = torch.randn(EXPERTS_PER_RANK, HIDDEN_SIZE, generator=generator).requires_grad_()
    called: list[int] = []
    magnitudes = torch.zeros_like(scale, requires_grad=False)  # of what is added up for the gradient of scale

    def add_magnitudes(terms: torch.Tensor, expert_of_row: torch.Tensor) -> None:
        magnitudes.index_add_(0, expert_of_row, terms.abs())

    def experts(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        called.append(len(rows))
        if len(rows) == 0 and len(called) % 2:
            return torch.zeros_like(rows)  # without a graph
        expert_of_row = torch.repeat_interleave(torch.arange(EXPERTS_PER_RANK), offsets.diff().long())
        scales = scale[expert_of_row]
        scales.register_hook(lambda terms: add_magnitudes(terms, expert_of_row))
        return (rows.float() * scales).tanh().to(rows.dtype)

    out = ep.moe(x, idx, topk_weights, experts, expert_alignment=alignment, waves=waves)
    grad_out = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    out.backward(grad_out.to(dtype))
    assert len(called) == (waves or 1)
    assert x.grad is not None
    assert topk_weights.grad is not None
    gradient = torch.zeros_like(scale) if scale.grad is None else scale.grad
    return {
        "out": out.detach(),
        "x": x.grad,
        "topk_weights": topk_weights.grad,
        "scale": gradient,
        "magnitudes": magnitudes,
        "rows": torch.tensor(sum(called)),
    }


def compare_waves(rank: int, group: dist.ProcessGroup, setting: Setting) -> dict[str, str]:
    """What is wrong, by case and waves; empty if nothing is."""
    wrong = {}
    with setting.open(group) as ep:
        for case in CASES:
            expected = gradients_of(ep, case, 1)
            for waves in WAVES:
                found = gradients_of(ep, case, waves)
                for name in ("out", "x", "topk_weights"):
                    try:
                        assert_bitwise(found[name], expected[name])
                    except AssertionError as error:
                        wrong[f"{case[:2]} waves {waves} {name}"] = str(error)
                # The same terms in another order: an fp32 sum of n terms is within n 2^-24 of the sum of their
                # magnitudes, to first order, and so is the other one. Padding and zeros add nothing.
                bound = 2 * 1.01 * int(found["rows"]) * 2.0**-24 * expected["magnitudes"]
                if not bool(((found["scale"] - expected["scale"]).abs() <= bound).all()):
                    wrong[f"{case[:2]} waves {waves} scale"] = "beyond the bound"
        stats = ep.stats()
        rounds = 2 * len(CASES) * (1 + sum(WAVES))  # a wave is a round; the dispatch's backward is a combine
        if stats["rounds"] != rounds or stats["dispatch"]["calls"] != rounds:
            wrong["stats"] = f"{stats} where {rounds} rounds were made"
    return wrong


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.id)
def test_waves_give_the_bits_of_one_wave(setting):
    assert spawn(compare_waves, setting.num_ranks, setting) == [{}] * setting.num_ranks


# --- calls in two halves


def inputs_of(rank: int, num_ranks: int, seed: int, num_tokens: int = 23) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    idx = routing("some selected", num_tokens, EXPERTS_PER_RANK * num_ranks, generator)
    return x, idx, torch.rand(num_tokens, TOP_K, generator=generator)


def use_halves(rank: int, group: dist.ProcessGroup, setting: Setting) -> None:
    # Few slots: no round fits, so that a dispatch and a combine wait for credits at the same time.
    with setting.open(group, chunk_rows=2, slots=2) as ep:
        inputs = [inputs_of(rank, ep.num_ranks, seed) for seed in range(4)]
        expected = [ep.dispatch(*tensors) for tensors in inputs]
        sums = [ep.combine(received.x, received.handle) for received in expected]

        first, second = (ep.dispatch_start(*tensors) for tensors in inputs[:2])
        with pytest.raises(ValueError, match="expert ids are in"):
            ep.dispatch_start(inputs[2][0], inputs[2][1] + 1000, inputs[2][2])  # it poisons nothing (I17)
        third = ep.dispatch(*inputs[2])  # in one, after those that were started
        replay = ep.dispatch_start(inputs[3][0], handle=expected[3].handle)
        received = {1: second.finish(), 0: first.finish(), 2: third}  # in any order
        with pytest.raises(ValueError, match="finished before"):
            first.finish()
        combines = [ep.combine_start(received[at].x, received[at].handle) for at in range(3)]
        later = ep.dispatch_start(*inputs[0])  # while combines are under way
        for at in (2, 0, 1):
            assert_bitwise(received[at].x, expected[at].x)
            assert_bitwise(received[at].weights, expected[at].weights)
            assert received[at].offsets.tolist() == expected[at].offsets.tolist()
            assert_bitwise(combines[at].finish(), sums[at])
        replayed = replay.finish()
        plain_sum = ep.combine(expected[3].x, expected[3].handle, weighted=False)
        assert_bitwise(replayed.x, expected[3].x)
        assert_bitwise(ep.combine_start(replayed.x, replayed.handle, weighted=False).finish(), plain_sum)
        assert_bitwise(later.finish().x, expected[0].x)
        assert not ep._native._kept, "finished calls keep nothing"

        # Gradients, of x and of the weights, through the halves and through the calls in one.
        gradients = []
        for halves in (False, True):
            x, idx, weights = inputs_of(rank, ep.num_ranks, 9)
            x.requires_grad_()
            weights.requires_grad_()
            if halves:
                result = ep.dispatch_start(x, idx, weights).finish()
                out = ep.combine_start(result.x.sin(), result.handle).finish()
            else:
                result = ep.dispatch(x, idx, weights)
                out = ep.combine(result.x.sin(), result.handle)
            out.square().sum().backward()
            gradients.append((x.grad, weights.grad))
        for once, in_halves in zip(*gradients, strict=True):
            assert_bitwise(in_halves, once)


@pytest.mark.parametrize(
    "setting",
    [Setting(4, 4), Setting(4, 2, "shm", reorder=True), Setting(2, 1, "libfabric")],
    ids=lambda setting: setting.id,
)
def test_halves_give_the_bits_of_calls_in_one(setting):
    spawn(use_halves, setting.num_ranks, setting)


def hand_fp8_through(rank: int, group: dist.ProcessGroup) -> None:
    with Setting(2, 1, "shm").open(group, wire_dtype="fp8", hidden_size=136) as ep:
        x = torch.randn(9, 136, generator=torch.Generator().manual_seed(rank))
        idx = torch.randint(0, 6, (9, TOP_K), generator=torch.Generator().manual_seed(rank))
        once = ep.dispatch(x, idx, torch.ones(9, TOP_K), output="fp8", expert_alignment=4)
        fresh = ep.dispatch_start(x, idx, torch.ones(9, TOP_K), output="fp8", expert_alignment=4).finish()
        again = ep.dispatch_start(x, handle=once.handle, output="fp8").finish()
        for found in (fresh, again):
            assert_bitwise(found.x.view(torch.uint8), once.x.view(torch.uint8))
            assert_bitwise(found.scales, once.scales)


def test_halves_hand_fp8_rows_through():
    spawn(hand_fp8_through, 2)


def go_on_alone(rank: int, group: dist.ProcessGroup, setting: Setting) -> tuple[int, int]:
    """Bytes on the wire of a dispatch, and of one that was started and for which nobody waits."""
    with setting.open(group, chunk_rows=2, slots=2) as ep:  # most chunks need a slot that a peer gives back
        tensors = inputs_of(rank, ep.num_ranks, 1, num_tokens=32)
        ep.dispatch(*tensors)
        once = ep.stats()["dispatch"]["wire_bytes"]
        dist.barrier(group)
        pending = ep.dispatch_start(*tensors)
        deadline = time.monotonic() + 20
        while ep.stats()["dispatch"]["wire_bytes"] < 2 * once and time.monotonic() < deadline:
            time.sleep(0.01)
        alone = ep.stats()["dispatch"]["wire_bytes"] - once
        pending.finish()
        threads = len(os.listdir("/proc/self/task"))
    assert len(os.listdir("/proc/self/task")) < threads, "closing leaves no thread"
    return once, alone


@pytest.mark.parametrize("setting", [Setting(4, 2, "shm"), Setting(2, 1, "libfabric")], ids=lambda setting: setting.id)
def test_a_started_call_goes_on_while_nobody_waits(setting):
    for once, alone in spawn(go_on_alone, setting.num_ranks, setting):
        assert alone == once > 0


def checkpointed(rank: int, group: dist.ProcessGroup) -> None:
    with Setting(2, 1, "shm").open(group) as ep:
        gradients = []
        for mode in ("one wave", "waves", "plain", "reentrant", "policy"):
            x, idx, weights = inputs_of(rank, ep.num_ranks, 5)
            x.requires_grad_()
            waves = 1 if mode == "one wave" else 3

            def layer(x: torch.Tensor, waves: int = waves, idx: Any = idx, weights: Any = weights) -> torch.Tensor:
                return ep.moe(x.sin(), idx, weights, lambda rows, offsets: rows.tanh(), waves=waves).cos()

            options: dict[str, Any] = {"use_reentrant": mode == "reentrant"}
            if mode == "policy":
                options["context_fn"] = moe_efa.checkpoint_context
            if mode in ("one wave", "waves"):
                out = layer(layer(x))
            else:
                out = checkpoint(layer, checkpoint(layer, x, **options), **options)
            out.sum().backward()
            gradients.append(x.grad)
        for gradient in gradients[1:]:
            assert_bitwise(gradient, gradients[0])

        # A compiled function has one wave, and none of the halves.
        x, idx, weights = inputs_of(rank, ep.num_ranks, 6)
        expected = ep.moe(x, idx, weights, lambda rows, offsets: rows * 2, waves=1)
        compiled = torch.compile(
            lambda *tensors: ep.moe(*tensors, lambda rows, offsets: rows * 2, waves=3), backend="aot_eager"
        )
        assert_bitwise(compiled(x, idx, weights), expected)


def test_waves_under_checkpoints_and_compilers():
    spawn(checkpointed, 2)


# --- failures


def fail_between(rank: int, group: dist.ProcessGroup, setting: Setting, what: str) -> tuple[str, float]:
    """The error of this rank, and how long it took."""
    ep = setting.open(group, timeout_s=20.0, heartbeat_timeout_s=5.0)
    tensors = inputs_of(rank, ep.num_ranks, 1)
    culprit = rank == ep.num_ranks - 1
    begin = time.monotonic()
    try:
        if what == "waves differ":
            ep.moe(*tensors, lambda rows, offsets: rows, waves=2 + culprit)
        elif what == "a rank closes" and culprit:
            ep.dispatch_start(*tensors)
            ep.close()
            return "closed", 0.0
        else:
            received = ep.dispatch_start(*tensors).finish()
            first = ep.combine_start(received.x, received.handle)
            second = ep.dispatch_start(*tensors)
            if what == "a rank dies" and culprit:
                os._exit(1)
            time.sleep(0.5)
            if what == "the experts fail" and culprit:
                with ep:
                    raise ArithmeticError("in an expert")
            second.finish()
            first.finish()
            third = ep.dispatch_start(*tensors)
            third.finish()
    except (TransportError, ArithmeticError) as error:
        text = f"{type(error).__name__}: {error}"
    else:
        return "no error", 0.0
    took = time.monotonic() - begin
    with pytest.raises((TransportError, ClosedError)):  # for good
        ep.dispatch_start(*tensors)
    return text, took


@pytest.mark.parametrize("setting", [Setting(4, 2, "shm"), Setting(2, 1, "libfabric")], ids=lambda setting: setting.id)
@pytest.mark.parametrize("what", ["a rank dies", "a rank closes", "the experts fail", "waves differ"])
def test_calls_under_way_when_a_rank_fails(setting, what):
    outcomes = run_ranks(fail_between, setting.num_ranks, setting, what)
    assert [outcome.error for outcome in outcomes] == [None] * setting.num_ranks
    texts = [outcome.result and outcome.result[0] for outcome in outcomes]
    assert all(outcome.result is None or outcome.result[1] < 10 for outcome in outcomes)
    culprit = setting.num_ranks - 1
    if what == "a rank dies":
        assert texts[culprit] is None
        assert all(text.startswith("PeerLostError") for text in texts[:-1]), texts
    elif what == "a rank closes":
        assert texts[culprit] == "closed"
        assert all(text.startswith("PeerLostError") and "closed the group" in text for text in texts[:-1]), texts
    elif what == "the experts fail":
        assert all("left the group after ArithmeticError" in text for text in texts[:-1]), texts
    else:
        assert all("ranks issued different calls" in text for text in texts), texts


AT_ONCE_S = 4.0


def raise_in_experts(ep: ExpertParallel, rank: int, *, where: str, fails: bool, waves: int) -> None:
    """A step whose experts raise in their second wave, in forward or in backward, on the ranks that are to fail."""
    x, idx, weights = inputs_of(rank, ep.num_ranks, 1)
    x.requires_grad_()
    called: list[int] = []

    def fail(gradient: torch.Tensor | None = None) -> None:
        called.append(1)
        if fails and len(called) == min(2, waves):
            time.sleep(0.1 * rank)  # time to hear of the others' errors
            raise ArithmeticError(f"an expert of rank {rank}")

    def experts(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        y = rows.tanh()
        y.register_hook(fail) if where == "backward" else fail()
        return y

    out = ep.moe(x, idx, weights, experts, waves=waves)
    out.sum().backward()
    ep.dispatch(*inputs_of(rank, ep.num_ranks, 2))  # who has not failed needs everybody


def describe(rank: int, error: Exception) -> str:
    return f"own {type(error).__name__}" if f"an expert of rank {rank}" in str(error) else f"{error!r}"


def errors_between(rank: int, group: dist.ProcessGroup, setting: Setting) -> dict[str, str]:
    """What this rank's user sees, by case."""
    seen = {}
    last = setting.num_ranks - 1
    for where, who, leave, waves in itertools.product(
        ("forward", "backward"), ("all", "last"), ("with", "close"), (1, 4)
    ):
        ep = setting.open(group)
        case = f"{where}, {who}, {leave}, {waves}"
        fails = who == "all" or rank == last
        try:
            try:
                if leave == "with":
                    with ep:
                        raise_in_experts(ep, rank, where=where, fails=fails, waves=waves)
                else:
                    raise_in_experts(ep, rank, where=where, fails=fails, waves=waves)
            finally:
                begin = time.monotonic()
                if leave == "close":
                    ep.close()
        except Exception as error:
            seen[case] = describe(rank, error)
        if fails and time.monotonic() - begin > AT_ONCE_S:
            seen[case] = f"left after {time.monotonic() - begin} s"
    return seen


@pytest.mark.parametrize("setting", [Setting(4, 2, "shm"), Setting(2, 1, "libfabric")], ids=lambda setting: setting.id)
def test_an_error_in_the_experts_is_ones_own_or_one_elsewhere(setting):
    for rank, seen in enumerate(spawn(errors_between, setting.num_ranks, setting)):
        assert len(seen) == 16
        for case, text in seen.items():
            if ", all, " in case or rank == setting.num_ranks - 1:
                assert text == "own ArithmeticError", f"rank {rank}, {case}"
            else:
                reason = "left the group after ArithmeticError" if "with" in case else "closed the group"
                assert reason in text, f"rank {rank}, {case}"
                assert f"rank {setting.num_ranks - 1} " in text, f"rank {rank}, {case}"


def go_on_after_errors(rank: int, group: dist.ProcessGroup, setting: Setting) -> float:
    """Seconds that closing took, with calls under way."""
    ep = setting.open(group, chunk_rows=2, slots=2)
    expected = gradients_of(ep, CASES[2], 1)
    for where in ("backward", "forward"):
        with pytest.raises(ArithmeticError, match=f"an expert of rank {rank}") as error:
            raise_in_experts(ep, rank, where=where, fails=True, waves=5)
        found = gradients_of(ep, CASES[2], 3)
        for name in ("out", "x", "topk_weights"):
            assert_bitwise(found[name], expected[name])
    received = ep.dispatch(*inputs_of(rank, ep.num_ranks, 3))
    ep.combine_start(received.x, received.handle)  # dropped at once
    ep.dispatch(*inputs_of(rank, ep.num_ranks, 3))
    ep.combine(received.x, received.handle)
    ep.stats()
    assert error.traceback, "which holds the frames of moe"
    assert not ep._native._kept, "what was dropped and is done keeps nothing"
    first, second = (ep.dispatch_start(*inputs_of(rank, ep.num_ranks, 4)) for _ in range(2))
    begin = time.monotonic()
    ep.close()
    took = time.monotonic() - begin
    for pending in (first, second):
        with pytest.raises(ClosedError):
            pending.finish()
    return took


@pytest.mark.parametrize("setting", [Setting(4, 2, "shm"), Setting(2, 1, "libfabric")], ids=lambda setting: setting.id)
def test_errors_of_all_ranks_leave_the_group_as_it_was(setting):
    assert max(spawn(go_on_after_errors, setting.num_ranks, setting)) < AT_ONCE_S


def leave_with_calls_under_way(rank: int, group: dist.ProcessGroup, setting: Setting) -> list[str]:
    """Rank 0 leaves after it has started two dispatches; the others enter the second one soon, or when it has left."""
    seen = []
    for soon in (True, False):
        with contextlib.suppress(ArithmeticError), setting.open(group, chunk_rows=2, slots=2) as ep:
            tensors = [inputs_of(rank, ep.num_ranks, seed, num_tokens=32) for seed in range(2)]
            expected = [ep.dispatch(*each) for each in tensors]
            first = ep.dispatch_start(*tensors[0])
            if rank == 0:
                pending = ep.dispatch_start(*tensors[1])
                first.finish()
                begin = time.monotonic()
                with ep:
                    raise ArithmeticError("between the halves")
            assert_bitwise(first.finish().x, expected[0].x)
            if soon:
                time.sleep(0.2)
            else:
                dist.barrier(group)
            begin = time.monotonic()
            try:
                assert_bitwise(ep.dispatch_start(*tensors[1]).finish().x, expected[1].x)
                seen.append("all rows")
            except TransportError as error:
                seen.append(str(error) if time.monotonic() - begin < AT_ONCE_S else "late")
        if rank == 0:
            seen.append("at once" if time.monotonic() - begin < 2 + AT_ONCE_S else "late")
            with pytest.raises(ClosedError):
                pending.finish()
            if not soon:
                dist.barrier(group)
    return seen


@pytest.mark.parametrize("setting", [Setting(4, 2, "shm"), Setting(2, 1, "libfabric")], ids=lambda setting: setting.id)
def test_a_rank_that_leaves_has_done_what_it_started_or_says_so(setting):
    first, *others = spawn(leave_with_calls_under_way, setting.num_ranks, setting)
    assert first == ["at once", "at once"]
    for soon, late in others:
        assert soon == "all rows"
        assert "rank 0 left the group after ArithmeticError: between the halves" in late


# --- the rule


def test_the_number_of_waves_follows_from_the_configuration():
    def waves(num_nodes: int, tokens: int, **changes: Any) -> int:
        config = moe_efa.ExpertParallelConfig(
            **{
                "num_experts": 256,
                "hidden_size": 7168,
                "top_k": 8,
                "max_tokens_per_rank": tokens,
                **changes,
            }
        )
        return overlap.default_waves(config, num_nodes=num_nodes, dtype=torch.bfloat16)

    assert waves(1, 4096) == 1
    assert waves(2, 4096) == 8
    assert waves(2, 1024) == 3
    assert waves(2, 1024, wire_dtype="fp8") == 1
    assert waves(2, 128) == 1
    assert waves(9, 128) == 3
    assert waves(9, 128, top_k=1) == 1


def test_wave_sizes_are_nearly_equal_and_may_be_zero():
    assert overlap.wave_sizes(5, 3) == [1, 2, 2]
    assert overlap.wave_sizes(2, 4) == [0, 1, 0, 1]
    assert overlap.wave_sizes(0, 2) == [0, 0]


@pytest.mark.parametrize("waves", [0, -1, True, 2.0, "2"])
def test_waves_that_are_no_positive_integer_are_refused(waves):
    with (
        moe_efa.ExpertParallel(None, num_experts=2, hidden_size=4, top_k=1, max_tokens_per_rank=4) as ep,
        pytest.raises(ValueError, match="waves must be a positive integer"),
    ):
        ep.moe(
            torch.ones(1, 4),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1),
            lambda rows, offsets: rows,
            waves=waves,
        )
