"""How processes end: silently and soon in whatever state they are, and nothing stays in /dev/shm."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_efa import rendezvous
from moe_efa.testing import outcomes as outcomes_module
from moe_efa.testing.outcomes import run_ranks

NUM_RANKS = 4
SHM = Path("/dev/shm")
LAYOUTS = {
    "node4": "node_size=4",
    "node2-shm": "node_size=2, transport='shm'",
    "node2-tcp": "node_size=2, transport='libfabric', provider='tcp'",
}

# A real interpreter per rank, which ends as a user's does: atexit, module teardown, destructors.
PROLOGUE = """
import os, signal, sys, threading, time
import torch, torch.distributed as dist
import moe_efa
torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
ep = moe_efa.ExpertParallel(dist.group.WORLD, num_experts=8, hidden_size=64, top_k=2, max_tokens_per_rank=64,
                            timeout_s=20, heartbeat_timeout_s=10, memory_budget_bytes=16 << 20, {layout})
x, idx, weights = torch.randn(32, 64), torch.randint(0, 8, (32, 2)), torch.rand(32, 2)
def round():
    d = ep.dispatch(x, idx, weights)
    return ep.combine(d.x, d.handle)
round()
print("key", ep._native.job_key, flush=True)
dist.destroy_process_group()  # a gloo group that is alive at the end aborts the process, with or without us
"""


class Ended:
    """How the process of one rank ended."""

    def __init__(self, process: subprocess.Popen[str], seconds: float, out: str, err: str) -> None:
        self.code, self.seconds, self.out, self.err = process.returncode, seconds, out, err


def run_scripts(tmp_path: Path, layout: str, body: str, *, kill_after_s: float | None = None) -> list[Ended]:
    """Run prologue and body as four scripts; with ``kill_after_s``, kill them all so long after the prologue."""
    script = tmp_path / "script.py"
    script.write_text(PROLOGUE.format(layout=LAYOUTS[layout]) + body)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, _package_folders()))},
        )
        for rank in range(NUM_RANKS)
    ]
    ended = []
    try:
        for process in processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("key"), process.communicate()[1]
        begin = time.monotonic()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            for process in processes:
                process.kill()
        for process in processes:
            out, err = process.communicate(timeout=60)
            ended.append(Ended(process, time.monotonic() - begin, line + out, err))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended


def _package_folders() -> list[str]:
    import moe_efa

    return [str(Path(moe_efa.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]


def check_shm(ended: list[Ended]) -> None:
    match = re.match(r"key (\w+)", ended[0].out)
    assert match is not None
    assert [name for name in os.listdir(SHM) if match[1] in name] == []


@pytest.mark.parametrize("layout", ["node4", "node2-tcp"])
def test_end_without_close_is_silent_and_soon(tmp_path: Path, layout: str) -> None:
    # One rank after another: those that are still there are in no call, so it is nothing to them.
    ended = run_scripts(tmp_path, layout, "time.sleep(0.3 * rank)\n")
    for process in ended:
        assert (process.code, process.err) == (0, ""), process.err
        assert process.seconds < 10
    check_shm(ended)


def test_end_during_a_call_of_another_thread(tmp_path: Path) -> None:
    body = """
if rank == 1:
    threading.Thread(target=ep.dispatch, args=(x, idx, weights), daemon=True).start()  # the others never come
    time.sleep(0.5)
"""
    ended = run_scripts(tmp_path, "node2-shm", body)
    assert all(process.seconds < 15 for process in ended)
    assert [process.code for process in ended] == [0, 0, 0, 0], ended[1].err
    check_shm(ended)


def test_unhandled_exception_ends_every_rank(tmp_path: Path) -> None:
    body = """
with ep:
    for turn in range(10**6):
        round()
        if rank == 2 and turn == 5:
            raise ZeroDivisionError("in user code")
"""
    ended = run_scripts(tmp_path, "node2-tcp", body)
    for rank, process in enumerate(ended):
        assert process.code == 1
        assert "ZeroDivisionError: in user code" in process.err
        assert rank == 2 or "TransportError" in process.err
        assert process.seconds < 15
    check_shm(ended)


@pytest.mark.parametrize("layout, kill_after_s", [("node2-shm", 0.05), ("node2-tcp", 0.3)])
def test_nothing_stays_when_all_ranks_are_killed(tmp_path: Path, layout: str, kill_after_s: float) -> None:
    ended = run_scripts(tmp_path, layout, "while True:\n    round()\n", kill_after_s=kill_after_s)
    assert all(process.code == -signal.SIGKILL for process in ended)
    check_shm(ended)


# --- /dev/shm


def die_in_construction(rank: int, group: object, folder: str) -> None:
    """Every rank is killed when it has its memory, before the others have mapped it."""
    import moe_efa

    native_config = rendezvous.native_config

    def note_key(config: object, agreement: rendezvous.Agreement) -> object:
        Path(folder, "key").write_text(agreement.job_key)
        return native_config(config, agreement)  # type: ignore[arg-type]

    step = rendezvous._step

    def die_before(meeting: object, name: str, action: object) -> object:
        if name == "mapping":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(meeting, name, action)  # type: ignore[arg-type]

    rendezvous.native_config, rendezvous._step = note_key, die_before  # type: ignore[assignment]
    moe_efa.ExpertParallel(
        group,  # type: ignore[arg-type]
        num_experts=8,
        hidden_size=64,
        top_k=2,
        max_tokens_per_rank=64,
        node_size=2,
        transport="shm",
    )


def construct_and_close(rank: int, group: object, layout: str = "node_size=4") -> None:
    import moe_efa

    config = eval(f"dict({layout})")
    ep = moe_efa.ExpertParallel(
        group,  # type: ignore[arg-type]
        num_experts=8,
        hidden_size=64,
        top_k=2,
        max_tokens_per_rank=64,
        memory_budget_bytes=16 << 20,
        **config,
    )
    ep.close()


def test_leftover_of_a_crash_during_construction_goes_with_the_next_start(tmp_path: Path) -> None:
    for outcome in run_ranks(die_in_construction, NUM_RANKS, str(tmp_path)):
        assert outcome.exit_code == -signal.SIGKILL
    key = (tmp_path / "key").read_text()
    # Another process that starts on this host meanwhile may have swept some of them already.
    for outcome in run_ranks(construct_and_close, NUM_RANKS):
        assert outcome.error is None
    assert [name for name in os.listdir(SHM) if key in name] == []


class ShmWatch:
    """The names that are created in /dev/shm (inotify)."""

    _CREATE = 0x100

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(SHM), self._CREATE) < 0:
            pytest.skip("no inotify here")

    def names(self) -> Iterator[str]:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fd, 1 << 16):
                while data:
                    length = struct.unpack_from("iIII", data)[3]
                    yield data[16 : 16 + length].rstrip(b"\0").decode()
                    data = data[16 + length :]


def use_tcp(rank: int, group: object) -> int:
    construct_and_close(rank, group, LAYOUTS["node2-tcp"])
    return os.getpid()


def test_libfabric_makes_no_files_of_its_own_in_shm() -> None:
    # Its shared-memory provider names them <pid>:<uid>:<number> and leaves them behind when it is killed.
    watch = ShmWatch()
    pids = [outcome.result for outcome in run_ranks(use_tcp, NUM_RANKS)]
    names = list(watch.names())
    os.close(watch.fd)
    assert sum(name.startswith("moe_efa-") for name in names) >= NUM_RANKS
    assert [name for name in names if name.split(":")[0] in {str(pid) for pid in pids}] == []


SMALL_SHM = """
import sys
sys.path[:0] = {path!r}
from moe_efa.testing.outcomes import run_ranks
import moe_efa

def fail(rank, group):
    try:
        moe_efa.ExpertParallel(group, num_experts=8, hidden_size=1024, top_k=2, max_tokens_per_rank=4096, node_size=2,
                               transport="shm")
    except moe_efa.ConfigError as error:
        return str(error)

if __name__ == "__main__":
    for outcome in run_ranks(fail, 4):
        print(outcome.result or outcome.error)
"""


def test_small_shm_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    """In a mount namespace of its own, with 8 MiB."""
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("no mount namespaces here")
    script = tmp_path / "small.py"
    folder = str(Path(outcomes_module.__file__).resolve().parents[2])
    script.write_text(SMALL_SHM.format(path=[folder]))
    env = {**os.environ, "PYTHONPATH": folder}
    command = f"{mount} && exec {sys.executable} {script}"
    process = subprocess.run([unshare, "-m", "sh", "-c", command], capture_output=True, text=True, timeout=60, env=env)
    lines = process.stdout.splitlines()
    assert len(lines) == NUM_RANKS, process.stderr
    for line in lines:
        assert "bytes but" in line and "free in /dev/shm" in line and "lower memory_budget_bytes" in line
