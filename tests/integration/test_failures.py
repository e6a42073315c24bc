"""What every rank sees when one of four is killed, stopped, idle, interrupted, wrong, or leaves (I5, I6, I14, I17)."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_efa
from moe_efa import ExpertParallel, rendezvous
from moe_efa.testing.outcomes import Outcome, run_ranks

pytestmark = pytest.mark.waits

NUM_RANKS, NUM_EXPERTS, HIDDEN_SIZE, TOP_K = 4, 8, 64, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "node4": {"node_size": 4},
    "node2-shm": {"node_size": 2, "transport": "shm"},
    "node2-tcp": {"node_size": 2, "transport": "libfabric", "provider": "tcp"},
}
# The rails of these deliver as badly as SRD may.
REORDERED: dict[str, dict[str, Any]] = {
    "node2-shm-reordered": LAYOUTS["node2-shm"],
    "node2-tcp-reordered": LAYOUTS["node2-tcp"],
}
TIMEOUT_S, HEARTBEAT_TIMEOUT_S = 3.0, 1.0
# A machine that has more to do than these tests is slower, not wrong.
LOAD = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
AT_ONCE_S = 1.0 * LOAD
SLACK_S = 3.0 * LOAD

Facts = dict[str, Any]


# --- what the ranks run


def make(group: dist.ProcessGroup, layout: str, *, reorder: str = "7", **changes: Any) -> ExpertParallel:
    config = {
        "num_experts": NUM_EXPERTS,
        "hidden_size": HIDDEN_SIZE,
        "top_k": TOP_K,
        "max_tokens_per_rank": 512,
        "timeout_s": 20.0,
        "heartbeat_timeout_s": 10.0,
        "memory_budget_bytes": 32 << 20,
    }
    if layout in LAYOUTS:
        return ExpertParallel(group, **(config | LAYOUTS[layout] | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_EFA_REORDER", reorder)
        ep = ExpertParallel(group, **(config | REORDERED[layout] | changes))
    assert ep.info()["transport"].startswith("reordered"), "it must not be tested for nothing"
    return ep


def inputs(seed: int, num_tokens: int = 48, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype)
    idx = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
    return x, idx, torch.rand(num_tokens, TOP_K, generator=generator)


def check_round(ep: ExpertParallel, rank: int, num_tokens: int = 48) -> None:
    """A whole round whose result is known: every row comes back doubled, and weighted."""
    x, idx, weights = inputs(rank, num_tokens)
    received = ep.dispatch(x, idx, weights)
    out = ep.combine(received.x * 2, received.handle)
    torch.testing.assert_close(out.float(), x.float() * 2 * weights.sum(1, keepdim=True), rtol=0.02, atol=0.05)


def facts_of(error: BaseException) -> Facts:
    names = ("rank", "phase", "epoch", "chunk")
    fields = {name: getattr(error, name, None) for name in names}
    return {"type": type(error).__name__, "text": str(error), "at": time.monotonic(), **fields}


def attempt(call: Callable[[], object]) -> Facts | None:
    """What ``call`` raised, and when; None if it returned."""
    try:
        call()
    except (Exception, KeyboardInterrupt) as error:
        return facts_of(error)
    return None


def act(deed: str, mark: Path) -> None:
    mark.write_text(str(time.monotonic()))
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)  # idle


class Unfinished:
    """Stands in for the native group of a rank that does its deed between the two halves of a dispatch."""

    def __init__(self, native: Any, deed: Callable[[], None]) -> None:
        self._native, self._deed = native, deed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def dispatch_finish(self, *_: Any) -> None:
        self._deed()


def call_until_failure(
    ep: ExpertParallel, rank: int, point: str, deed: Callable[[], None] | None, num_tokens: int
) -> None:
    """Rounds until an error; ``deed``, on the culprit only, happens at ``point`` of the second."""
    check_round(ep, rank)
    x, idx, weights = inputs(rank, num_tokens)
    if point == "backward":
        x.requires_grad_(True)
    for turn in itertools.count():
        if deed and turn == 0:
            if point == "dispatch":
                deed()
            elif point == "begun":
                ep._native._native = Unfinished(ep._native._native, deed)
            elif point == "anywhere":
                threading.Timer(0.1, deed).start()
        received = ep.dispatch(x, idx, weights)
        if deed and point == "combine":
            deed()
        out = ep.combine(received.x, received.handle)
        if point == "backward":
            if deed:
                deed()
            out.float().sum().backward()


def lose(rank: int, group: dist.ProcessGroup, layout: str, deed: str, point: str, culprit: int, mark: str,
         changes: dict[str, Any]) -> Facts:  # fmt: skip
    """The culprit does its deed at a point of its program; the others report all that they see."""
    own_deed = (lambda: act(deed, Path(mark))) if rank == culprit else None
    step = rendezvous._step
    if own_deed and point.startswith("construction-"):

        def act_before(meeting: Any, name: str, action: Any) -> Any:
            if name == point.removeprefix("construction-"):
                own_deed()
            return step(meeting, name, action)

        rendezvous._step = act_before
    seen: Facts = {}
    ep: ExpertParallel | None = None

    def body() -> None:
        nonlocal ep
        ep = make(group, layout, **changes)
        seen["job_key"] = ep._native.job_key
        if point == "close":
            check_round(ep, rank)
            if own_deed:
                own_deed()
            ep.close()
        elif point == "between calls":
            check_round(ep, rank)
            if own_deed:
                own_deed()
            time.sleep(0.5)
            check_round(ep, rank)
        else:
            call_until_failure(ep, rank, point, own_deed, 512 if point == "anywhere" else 48)

    seen["error"] = attempt(body)
    if ep is not None and not ep._closed:
        begin = time.monotonic()
        seen["again"] = attempt(lambda: ep.dispatch(*inputs(rank)))
        seen["again_s"] = time.monotonic() - begin
        begin = time.monotonic()
        seen["close_error"] = attempt(ep.close)
        seen["close_s"] = time.monotonic() - begin
    return seen


# --- and what the test makes of it


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file in which the culprit notes the time of its deed."""
    return tmp_path / "mark"


def run_and_judge(
    layout: str,
    deed: str,
    point: str,
    culprit: int,
    mark: Path,
    types: tuple[str, ...],
    within_s: float,
    **changes: Any,
) -> list[Facts]:
    lingering = () if deed == "kill" else (culprit,)
    changes = {"timeout_s": TIMEOUT_S, "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S} | changes
    arguments = (layout, deed, point, culprit, str(mark), changes)
    outcomes = run_ranks(lose, NUM_RANKS, *arguments, lingering=lingering, timeout=60)
    done_at = float(mark.read_text())
    survivors = [(rank, outcome) for rank, outcome in enumerate(outcomes) if rank != culprit]
    errors = []
    for rank, outcome in survivors:
        check_clean_exit(outcome)
        seen = outcome.result
        error = seen["error"]
        assert error is not None, f"rank {rank} saw nothing"
        assert error["type"] in types, f"rank {rank}: {error}"
        assert error["rank"] == culprit, f"rank {rank} blames another: {error}"
        assert error["at"] - done_at < within_s, f"rank {rank}, {error['at'] - done_at:.1f} s later: {error}"
        if "again" in seen:
            assert (seen["again"]["type"], seen["again"]["rank"]) == (error["type"], culprit), seen["again"]
            assert seen["again_s"] < AT_ONCE_S
            assert seen["close_error"] is None
            assert seen["close_s"] < SLACK_S
        if "job_key" in seen:
            check_nothing_in_shm(seen["job_key"])
        errors.append(error)
    return errors


def check_clean_exit(outcome: Outcome) -> None:
    assert outcome.error is None, outcome.error
    assert outcome.exit_code == 0
    assert outcome.exited_at is not None and outcome.returned_at is not None
    assert outcome.exited_at - outcome.returned_at < SLACK_S


def check_nothing_in_shm(job_key: str) -> None:
    assert [name for name in os.listdir("/dev/shm") if job_key in name] == []


def results(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        check_clean_exit(outcome)
    return [outcome.result for outcome in outcomes]


def cases(*points: str, every: bool, layouts: dict[str, dict[str, Any]] = LAYOUTS) -> Iterator[Any]:
    """Points and layouts with the culprits in turn: every pair, or every point with the layouts in turn."""
    in_turn = zip(itertools.cycle(layouts), points, strict=False)
    pairs = itertools.product(layouts, points) if every else in_turn
    for i, (layout, point) in enumerate(pairs):
        culprit = (3, 1, 0, 2)[i % 4]
        yield pytest.param(layout, point, culprit, id=f"{layout}-{point.replace(' ', '_')}-rank{culprit}")


IN_CALLS = ("dispatch", "begun", "anywhere", "combine", "backward")
SMALL_RINGS = {"chunk_rows": 8, "slots": 2}  # so that no call is done before its peers are in it


@pytest.mark.parametrize(
    "layout, point, culprit",
    [
        *cases(*IN_CALLS, every=True),
        *cases("between calls", "close", "close", every=False),
        *cases(*IN_CALLS, "close", every=True, layouts=REORDERED),
    ],
)
def test_killed_rank_is_named_at_once(layout: str, point: str, culprit: int, mark: Path) -> None:
    within_s = AT_ONCE_S + (0.5 if point == "between calls" else 0)  # there they sleep before they look
    changes = SMALL_RINGS if point == "anywhere" else {}
    errors = run_and_judge(layout, "kill", point, culprit, mark, ("PeerLostError",), within_s, **changes)
    if point in IN_CALLS:
        assert all(error["phase"] and error["epoch"] is not None for error in errors), errors


CONSTRUCTION = tuple(f"construction-{step}" for step in ("construction", "mapping", "connection", "start"))


@pytest.mark.parametrize("layout, point, culprit", list(cases(*CONSTRUCTION, every=False)))
def test_killed_rank_is_named_during_construction(layout: str, point: str, culprit: int, mark: Path) -> None:
    run_and_judge(layout, "kill", point, culprit, mark, ("PeerLostError",), AT_ONCE_S)


@pytest.mark.parametrize(
    "layout, point, culprit",
    [
        *cases("dispatch", "anywhere", "close", "construction-connection", "combine", every=False),
        *cases("anywhere", "dispatch", every=False, layouts=REORDERED),
    ],
)
def test_stopped_rank_is_lost_when_it_is_silent(layout: str, point: str, culprit: int, mark: Path) -> None:
    changes = SMALL_RINGS if point == "anywhere" else {}
    types = ("PeerTimeoutError", "PeerLostError") if point in CONSTRUCTION else ("PeerLostError",)
    within_s = TIMEOUT_S + SLACK_S if point in CONSTRUCTION else HEARTBEAT_TIMEOUT_S + AT_ONCE_S
    run_and_judge(layout, "stop", point, culprit, mark, types, within_s, **changes)


@pytest.mark.parametrize("layout, point, culprit", list(cases("anywhere", "anywhere", "anywhere", every=False))[1:])
def test_stopped_rank_is_to_blame_for_a_timeout_before_it_is_lost(
    layout: str, point: str, culprit: int, mark: Path
) -> None:
    # The others wait for each other too; the one at the end of every chain is the silent one.
    changes = {**SMALL_RINGS, "heartbeat_timeout_s": 20.0, "timeout_s": 2.8}
    types = ("PeerTimeoutError",)
    errors = run_and_judge(layout, "stop", point, culprit, mark, types, 2.8 + SLACK_S, **changes)
    assert all(error["phase"] and error["epoch"] is not None for error in errors), errors


@pytest.mark.parametrize(
    "layout, point, culprit",
    list(cases("dispatch", "combine", "backward", "close", "construction-mapping", every=False)),
)
def test_idle_rank_is_named_when_the_time_is_up(layout: str, point: str, culprit: int, mark: Path) -> None:
    errors = run_and_judge(
        layout, "idle", point, culprit, mark, ("PeerTimeoutError",), 2 * LOAD + SLACK_S, timeout_s=2 * LOAD
    )
    if point in IN_CALLS:
        assert all(error["phase"] and error["epoch"] is not None for error in errors), errors


def test_idle_rank_in_the_middle_of_a_dispatch_is_named_with_the_chunk(mark: Path) -> None:
    changes = {**SMALL_RINGS, "timeout_s": 2.0 * LOAD}
    errors = run_and_judge("node4", "idle", "begun", 2, mark, ("PeerTimeoutError",), 2 * LOAD + SLACK_S, **changes)
    assert all(error["phase"] == "dispatch" and error["chunk"] is not None for error in errors), errors


# --- different calls (I14)


def issue_different(rank: int, group: dist.ProcessGroup, layout: str, what: str) -> Facts | None:
    ep = make(group, layout)
    odd = rank == 2
    x, idx, weights = inputs(rank)

    def different() -> None:  # an early rank's last call may fail a late one's second
        first, second = (ep.dispatch(x, idx, weights).handle for _ in range(2))
        rows = first.rows
        if what == "dispatch-combine":
            ep.dispatch(x, idx, weights) if odd else ep.combine(torch.zeros(rows, HIDDEN_SIZE), first)
        elif what == "combine-dispatch":
            ep.combine(torch.zeros(rows, HIDDEN_SIZE), first) if odd else ep.dispatch(x, idx, weights)
        elif what == "replay-fresh":
            ep.dispatch(x, handle=first) if odd else ep.dispatch(x, idx, weights)
        elif what == "plans-replayed":
            ep.dispatch(x, handle=first if odd else second)
        elif what == "plans-combined":
            ep.combine(torch.zeros(rows, HIDDEN_SIZE), first if odd else second)
        elif what == "dtypes-dispatched":
            ep.dispatch(x.float() if odd else x, idx, weights)
        elif what == "dtypes-combined":
            ep.combine(torch.zeros(rows, HIDDEN_SIZE, dtype=torch.float32 if odd else torch.bfloat16), first)
        elif what == "gradients":
            ep.dispatch(x.requires_grad_(), idx, weights.requires_grad_(odd)).x.sum().backward()

    begin = time.monotonic()
    error = attempt(different)
    assert error is not None, "a wrong number"
    error["seconds"] = error["at"] - begin
    return error


DIFFERENCES = {
    "dispatch-combine": ("is in dispatch epoch 2", "is in combine epoch 0"),
    "combine-dispatch": ("is in combine epoch 0", "is in dispatch epoch 2"),
    "replay-fresh": ("replaying plan 0", "of plan 2"),
    "plans-replayed": ("replaying plan 0", "replaying plan 1"),
    "plans-combined": ("of plan 0", "of plan 1"),
    "dtypes-dispatched": ("in fp32", "in bf16"),
    "dtypes-combined": ("in fp32", "in bf16"),
    "gradients": ("with weight gradients in", "of plan 2 in"),
}


@pytest.mark.parametrize(
    "what, layout",
    [
        *zip(DIFFERENCES, itertools.cycle(LAYOUTS), strict=False),
        ("dispatch-combine", "node2-tcp-reordered"),
        ("plans-replayed", "node2-shm-reordered"),
    ],
)
def test_different_calls_are_an_error_that_names_both(what: str, layout: str) -> None:
    for error in results(run_ranks(issue_different, NUM_RANKS, layout, what, timeout=30)):
        assert error["type"] == "TransportError", error
        assert "different calls" in error["text"]
        assert all(part in error["text"] for part in DIFFERENCES[what]), error
        assert error["seconds"] < AT_ONCE_S


# --- refused calls (I17), interrupts, exceptions


def refuse(rank: int, group: dist.ProcessGroup, layout: str, corrected: bool) -> Facts | None:
    ep = make(group, layout, timeout_s=20.0 if corrected else 2.0)
    check_round(ep, rank)
    if rank == 1:
        x, idx, weights = inputs(rank)
        with pytest.raises(ValueError, match="expert ids"):
            ep.dispatch(x, idx + NUM_EXPERTS, weights)
        time.sleep(0.7 if corrected else 100)
    error = attempt(lambda: check_round(ep, rank))
    ep.close()
    return error


def test_refused_call_can_be_corrected() -> None:
    assert results(run_ranks(refuse, NUM_RANKS, "node2-tcp", True)) == [None] * NUM_RANKS


def test_refused_call_that_is_not_corrected_is_a_timeout() -> None:
    outcomes = run_ranks(refuse, NUM_RANKS, "node2-shm", False, lingering=(1,))
    for outcome in outcomes[:1] + outcomes[2:]:
        check_clean_exit(outcome)
        assert (outcome.result["type"], outcome.result["rank"]) == ("PeerTimeoutError", 1)


def await_file(path: str) -> None:
    """Return half a second after somebody has made the file."""
    while not Path(path).exists():
        time.sleep(0.01)
    time.sleep(0.5)


def interrupt(rank: int, group: dist.ProcessGroup, layout: str, point: str, mark: str) -> Facts:
    interrupted, late = rank == 1, rank == 0
    ep: ExpertParallel | None = None
    seen: Facts = {}

    def send() -> None:
        seen["sent"] = time.monotonic()
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGINT)

    def body() -> None:
        nonlocal ep
        if point == "construction":
            if interrupted:
                threading.Timer(0.3, send).start()
            if late:
                await_file(mark)
        ep = make(group, layout)
        check_round(ep, rank)
        if point == "outside":
            if interrupted:
                with pytest.raises(KeyboardInterrupt):
                    send()
                    time.sleep(1)
        elif interrupted:
            threading.Timer(0.3, send).start()
        elif late:
            await_file(mark)
        if point == "close":
            ep.close()
        check_round(ep, rank)

    seen["error"] = attempt(body)
    if ep is not None:
        begin = time.monotonic()
        seen["again"] = attempt(lambda: check_round(ep, rank))
        seen["close_error"] = attempt(ep.close)
        seen["rest_s"] = time.monotonic() - begin
    return seen


@pytest.mark.parametrize(
    "layout, point",
    [
        ("node2-tcp", "call"),
        ("node4", "call"),
        ("node2-tcp", "construction"),
        ("node2-shm", "close"),
        ("node2-tcp-reordered", "call"),
    ],
)
def test_interrupt_ends_a_wait_here_and_is_an_error_elsewhere(layout: str, point: str, mark: Path) -> None:
    seen = results(run_ranks(interrupt, NUM_RANKS, layout, point, str(mark)))
    assert seen[1]["error"]["type"] == "KeyboardInterrupt"
    assert seen[1]["error"]["at"] - seen[1]["sent"] < 0.5 * LOAD
    for rank in (0, 2, 3):
        error = seen[rank]["error"]
        if point == "close":  # the goodbye had been said: nothing was owed any more
            continue
        assert (error["type"], error["rank"]) == ("TransportError", 1), error
        assert error["at"] - seen[1]["sent"] < 1.0 + AT_ONCE_S
    for facts in seen:
        if "again" in facts and point != "close":
            assert facts["again"]["type"] == "TransportError"
            assert facts["close_error"] is None
            assert facts["rest_s"] < AT_ONCE_S


def test_interrupt_outside_of_calls_is_the_interpreters(mark: Path) -> None:
    for facts in results(run_ranks(interrupt, NUM_RANKS, "node2-tcp", "outside", str(mark))):
        assert facts["error"] is None and facts["again"] is None and facts["close_error"] is None


def raise_inside(rank: int, group: dist.ProcessGroup, layout: str) -> Facts | None:
    def body() -> None:
        with make(group, layout) as ep:
            for turn in range(1000):
                check_round(ep, rank)
                if rank == 2 and turn == 3:
                    raise ZeroDivisionError("in user code")

    return attempt(body)


@pytest.mark.parametrize("layout", [*LAYOUTS, "node2-shm-reordered"])
def test_exception_in_user_code_is_an_error_elsewhere(layout: str) -> None:
    errors = results(run_ranks(raise_inside, NUM_RANKS, layout))
    assert errors[2]["type"] == "ZeroDivisionError"
    for error in errors[:2] + errors[3:]:
        assert (error["type"], error["rank"]) == ("TransportError", 2), error
        assert "ZeroDivisionError: in user code" in error["text"]
        assert error["at"] - errors[2]["at"] < AT_ONCE_S


# --- leaving


def leave(rank: int, group: dist.ProcessGroup, layout: str, how: str) -> Facts | None:
    ep = make(group, layout)
    check_round(ep, rank)
    if rank == 3:
        if how == "close":
            with contextlib.suppress(moe_efa.TransportError):
                ep.close()
        return None

    def body() -> None:
        for _ in range(1000):
            check_round(ep, rank)

    return attempt(body)


@pytest.mark.parametrize("how", ["close", "exit"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "node2-tcp-reordered"])
def test_rank_that_leaves_is_named_by_those_who_call(layout: str, how: str) -> None:
    errors = results(run_ranks(leave, NUM_RANKS, layout, how))
    for error in errors[:3]:
        assert (error["type"], error["rank"]) == ("PeerLostError", 3), error
        assert "closed the group (or its process ended" in error["text"]


def leave_early(rank: int, group: dist.ProcessGroup, layout: str, how: str) -> Facts | None:
    """Rank 3 has nothing to wait for in the last combine and is gone before rank 0 enters it."""
    ep = make(group, layout)
    x, idx, weights = inputs(rank, 0 if rank == 3 else 48)
    received = ep.dispatch(x, idx, weights)
    if rank == 0:
        time.sleep(1.0)
    out = ep.combine(received.x * 2, received.handle)
    torch.testing.assert_close(out.float(), x.float() * 2 * weights.sum(1, keepdim=True), rtol=0.02, atol=0.05)
    if rank == 3 and how == "exit":
        return None
    return attempt(ep.close)


@pytest.mark.parametrize("how", ["close", "exit"])
@pytest.mark.parametrize("layout", ["node2-shm", "node2-tcp", *REORDERED])
def test_rank_that_leaves_owing_nothing_is_no_failure(layout: str, how: str) -> None:
    assert results(run_ranks(leave_early, NUM_RANKS, layout, how)) == [None] * NUM_RANKS


def close_apart(rank: int, group: dist.ProcessGroup, layout: str) -> tuple[Facts | None, str]:
    ep = make(group, layout)
    check_round(ep, rank)
    time.sleep(0.4 * ((rank + 2) % NUM_RANKS))
    return attempt(ep.close), ep._native.job_key


@pytest.mark.parametrize("layout", [*LAYOUTS, *REORDERED])
def test_ranks_may_close_at_different_times(layout: str) -> None:
    for error, job_key in results(run_ranks(close_apart, NUM_RANKS, layout)):
        assert error is None
        check_nothing_in_shm(job_key)


# --- a node out of reach


def drop(rank: int, group: dist.ProcessGroup, layout: str, reorder: str) -> Facts:
    seen: Facts = {}
    ep: ExpertParallel | None = None

    def body() -> None:
        nonlocal ep
        ep = make(group, layout, reorder=reorder)
        for _ in range(1000):
            check_round(ep, rank)

    seen["error"] = attempt(body)
    if ep is not None:
        seen["again"] = attempt(lambda: check_round(ep, rank))
        seen["close_error"] = attempt(ep.close)
    return seen


@pytest.mark.parametrize("layout", REORDERED)
@pytest.mark.parametrize("writes, status", [(0, 15), (40, 13)], ids=["from the start", "later"])
def test_node_that_cannot_be_reached_is_an_error_with_the_providers_words(
    layout: str, writes: int, status: int
) -> None:
    for seen in results(run_ranks(drop, NUM_RANKS, layout, f"5,drop=1@{writes}", timeout=30)):
        error = seen["error"]
        assert error["type"] == "TransportError", error
        assert error["rank"] in (2, 3), error  # the ranks of node 1
        assert f"(status {status})" in error["text"], error
        assert ("again" in seen) == (writes > 0)
        if writes > 0:
            assert seen["again"]["type"] == "TransportError"
            assert seen["close_error"] is None


def reorder_on_one(rank: int, group: dist.ProcessGroup) -> Facts | None:
    return attempt(lambda: make(group, "node2-shm-reordered" if rank == 1 else "node2-shm"))


def test_rank_that_reorders_alone_is_refused() -> None:
    for error in results(run_ranks(reorder_on_one, NUM_RANKS)):
        assert error["type"] == "ConfigError", error


# --- slow ranks


def be_slow(rank: int, group: dist.ProcessGroup, folder: str) -> None:
    native_config = rendezvous.native_config

    def warn_early(*args: Any) -> Any:
        config = native_config(*args)
        config.warn_after_s = 1.2
        return config

    rendezvous.native_config = warn_early
    with open(f"{folder}/stderr{rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    with make(group, "node2-tcp") as ep:
        for _ in range(2):
            if rank == 1:
                time.sleep(2.2)
            check_round(ep, rank)


def test_slow_rank_is_no_error_but_a_warning(tmp_path: Path) -> None:
    results(run_ranks(be_slow, NUM_RANKS, str(tmp_path)))
    for rank in range(NUM_RANKS):
        lines = (tmp_path / f"stderr{rank}").read_text().splitlines()
        if rank == 1:
            assert lines == []
        else:
            text = "waiting for 1 s in dispatch epoch 0 on rank 1 to enter the call"
            assert lines[0] == f"moe_efa warning [rank {rank}]: {text}"
            assert all("waiting for 1 s in" in line for line in lines)
            assert len(lines) < 2 * 2 + 1  # one for a call


# --- configurations


def configure(rank: int, group: dist.ProcessGroup, changes: dict[int, dict[str, Any]], layout: str) -> Facts | None:
    changes_here = dict(changes.get(rank, changes.get(-1, {})))
    if "host" in changes_here:
        os.environ["MOE_EFA_HOST_ID"] = changes_here.pop("host")
    error = attempt(lambda: make(group, layout, **changes_here))
    os.environ.pop("MOE_EFA_HOST_ID", None)
    make(group, layout).close()  # nothing is left of the failed one
    return error


@pytest.mark.parametrize(
    "changes, text",
    [
        ({2: {"hidden_size": 128}}, "differ in hidden_size: 64 on rank 0, 128 on rank 2"),
        ({3: {"top_k": 1}}, "differ in top_k: 2 on rank 0, 1 on rank 3"),
        ({1: {"timeout_s": 4.0}}, "differ in timeout_s: 20.0 on rank 0, 4.0 on rank 1"),
        ({0: {"heartbeat_timeout_s": 2.0}}, "differ in heartbeat_timeout_s: 2.0 on rank 0, 10.0 on rank 1"),
        ({1: {"transport": "auto"}}, "differ in transport: 'shm' on rank 0, 'auto' on rank 1"),
        ({-1: {"num_experts": 6}}, "num_experts=6 is not a multiple of the group's 4 ranks"),
        ({-1: {"node_size": 3}}, "node_size=3 does not divide the group's 4 ranks"),
        (
            {0: {"host": "a", "node_size": None}, -1: {"host": "b", "node_size": None}},
            "hosts hold unequal numbers of ranks of the group ([1, 3]); pass node_size: node_size=1 would do",
        ),
        ({-1: {"memory_budget_bytes": 4096}}, "memory_budget_bytes=4096 is too small"),
        ({-1: {"memory_budget_bytes": 1 << 50, "max_tokens_per_rank": 1 << 24, "hidden_size": 1 << 16}}, "/dev/shm"),
    ],
    ids=[
        "hidden_size",
        "top_k",
        "timeout_s",
        "heartbeat_timeout_s",
        "transport",
        "experts",
        "node_size",
        "hosts",
        "budget",
        "shared_memory",
    ],
)
def test_configuration_that_cannot_work_is_one_error_on_every_rank(changes: dict[int, Any], text: str) -> None:
    errors = results(run_ranks(configure, NUM_RANKS, changes, "node2-shm"))
    for error in errors:
        assert error["type"] == "ConfigError", error
        assert text in error["text"]
    if "differ in" in text or "hosts" in text:
        assert len({error["text"] for error in errors}) == 1


def fail_on_one(rank: int, group: dist.ProcessGroup) -> Facts | None:
    if rank == 2:
        os.environ["MOE_EFA_NUM_THREADS"] = "many"
    return attempt(lambda: make(group, "node4"))


def test_rank_that_cannot_be_constructed_is_named_by_the_others() -> None:
    errors = results(run_ranks(fail_on_one, NUM_RANKS))
    for rank, error in enumerate(errors):
        assert error["type"] == "ConfigError"
        assert "MOE_EFA_NUM_THREADS='many'" in error["text"]
        assert rank == 2 or "construction failed on rank 2" in error["text"]


# --- several groups in one process


def use_several(rank: int, group: dist.ProcessGroup, layout: str) -> Facts | None:
    pair = dist.new_group([0, 1])
    world, wide = make(group, layout), make(group, layout, hidden_size=128)
    error = None
    if rank < 2:
        sub = make(pair, "node4", node_size=2)
        check_round(sub, rank)

        def body() -> None:
            with sub:
                if rank == 1:
                    raise ZeroDivisionError
                check_round(sub, rank)

        error = attempt(body)
    check_round(world, rank)
    again = make(group, layout)  # shares the native group, which is well
    assert again._native is world._native
    check_round(again, rank)
    for ep in (again, wide, world):
        ep.close()
    return error


@pytest.mark.parametrize("layout", ["node2-shm", "node2-tcp"])
def test_failure_of_one_group_leaves_the_others_alone(layout: str) -> None:
    errors = results(run_ranks(use_several, NUM_RANKS, layout))
    assert (errors[0]["type"], errors[0]["rank"]) == ("TransportError", 1)
    assert errors[1]["type"] == "ZeroDivisionError"
    assert errors[2:] == [None, None]
