"""The benchmark over shaped links as root runs it: its bytes, its JSON, and that nothing of it stays behind."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_efa import _C, libfabric
from moe_efa.bench.routing import RoutingConfig, select
from moe_efa.bench.shaped.network import Network, missing, namespaces, sweep
from moe_efa.bench.shaped.options import QUICK

HAS_LIBFABRIC = _C.build_info(**libfabric.search_path())["libfabric_found"]
PROBLEM = missing() if sys.platform == "linux" else "network namespaces are Linux's"
pytestmark = [
    pytest.mark.alone,  # TCP repeats what a busy host is late to acknowledge, and its bytes are counted
    pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM or "there is a network"),
]
needs_libfabric = pytest.mark.skipif(not HAS_LIBFABRIC, reason="no libfabric on this host")

HOLD = """
import subprocess, sys
from moe_efa.bench.shaped.network import Network
network = Network(4, gbit_per_s=1.0)
program = subprocess.Popen(network.command(3, "sleep", "600"))
print(network._guard.pid, program.pid, network.folder, *network.namespaces, flush=True)
sys.stdin.read()
"""


def own(pid):
    """The namespaces of a run."""
    return [name for name in namespaces() if name.split("_")[2] == str(pid)]


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


@needs_libfabric
def test_quick_run_counts_the_bytes_of_its_routing_and_leaves_nothing(repo_root, tmp_path):
    target = tmp_path / "result.json"
    command = [
        sys.executable,
        str(repo_root / "bench" / "shaped_link.py"),
        "--quick",
        "--no-mpi",
        "--json",
        str(target),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert not own(process.pid)
    assert "1 Gbit/s: every contender in turn" in stderr
    assert "of sockets" in stdout and "bars" in stdout

    result = json.loads(target.read_text())
    conditions = result["conditions"]
    assert {name: conditions[name] for name in ("ranks", "nodes", "ranks_per_node")} == {
        "ranks": 4,
        "nodes": 2,
        "ranks_per_node": 2,
    }
    assert conditions["transport"].startswith("libfabric tcp")
    assert conditions["transport"].endswith("on shaped0")
    assert max(result["checks"]["full_error_of_bound"].values()) <= 1

    (rate,) = result["rates"]
    assert rate["gbit_per_s"] == 1.0
    tokens, hidden, topk, experts = QUICK["tokens"], QUICK["hidden"], conditions["topk"], QUICK["experts"]
    rows = {"per_expert": 0, "per_rank": 0, "per_node": 0}
    of_node = [0, 0]
    for rank in range(4):
        selection = select(RoutingConfig(), rank, tokens=tokens, topk=topk, experts=experts, num_nodes=2, seed=0)
        for chosen in selection.tolist():
            remote = [expert * 4 // experts for expert in chosen if expert * 2 // experts != rank // 2]
            rows["per_expert"] += len(remote)
            rows["per_rank"] += len(set(remote))
            rows["per_node"] += bool(remote)
            of_node[rank // 2] += bool(remote)
    assert rate["floor_rows"] == rows

    for phase in ("dispatch", "combine"):
        wire = rate["wire"][phase]
        assert wire["floor_bytes"] == max(of_node) * hidden * 2
        assert wire["all_floor_bytes"] == rows["per_node"] * hidden * 2
        assert wire["floor_bytes"] <= wire["bytes"] < 1.5 * wire["floor_bytes"]
        # Every rank has one rail peer, so the plain sockets carry the very bytes.
        assert rate["sockets_bytes"][phase] == pytest.approx(wire["bytes"], rel=0.02)
        seconds = 1e-6 * rate["times"]["moe_efa"][phase]["p50_us"]
        assert rate["goodput"][phase]["of_link"] == pytest.approx(8e-9 * wire["bytes"] / seconds)
    fp8 = rate["fp8_wire"]["dispatch"]["floor_bytes"]
    assert fp8 == max(of_node) * (hidden + 4 * math.ceil(hidden / 128))
    # The interfaces counted at least that, so these bytes did cross the link.
    sent = sum(rate["wire"][phase]["bytes"] for phase in ("dispatch", "combine"))
    link = rate["link_bytes_per_round"]
    assert sent < link["moe_efa"] < 2 * sent
    assert link["sockets"] > 0.98 * sent
    per_expert = 2 * rows["per_expert"] // 2 * hidden * 2
    assert 0.9 * per_expert < link["torch_per_expert"] < 1.5 * per_expert
    assert rate["ratios"]["torch_per_expert"]["row_bytes"] == pytest.approx(rows["per_expert"] / rows["per_node"])
    overlap = rate["overlap"]
    assert overlap["available"] or "waves" in overlap["reason"]
    if overlap["available"]:
        assert overlap["wait"]["together_us"] >= 0.99 * overlap["wait"]["compute_us"]
    assert {bar["least"] for bar in result["bars"]} == {0.9, 1.8, 0.8, 3.4}


@needs_libfabric
def test_kill_removes_namespaces_and_what_runs_in_them(repo_root, tmp_path):
    command = [sys.executable, str(repo_root / "bench" / "shaped_link.py"), "--quick", "--no-mpi", "--iters", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    inside = []

    def node_is_used():
        for name in own(process.pid):
            done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            inside[:] = done.stdout.split()
            if inside:
                return True
        return False

    try:
        wait_for(node_is_used)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not own(process.pid))
    wait_for(lambda: not any(map(is_alive, inside)))


def test_next_run_sweeps_what_a_dead_guard_left(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    guard, program, folder, *names = holder.stdout.readline().split()
    try:
        sweep()  # not of a run whose process lives
        assert len(own(holder.pid)) == 5
        os.kill(int(guard), signal.SIGKILL)
    finally:
        holder.kill()
        holder.wait()
    assert len(own(holder.pid)) == 5
    assert is_alive(int(program))
    assert set(names) < set(sweep())
    assert not own(holder.pid)
    wait_for(lambda: not is_alive(int(program)))
    Path(folder).rmdir()


def test_four_nodes_are_joined_and_shaped_both_ways(tmp_path):
    with Network(4, gbit_per_s=1.0) as network:
        assert network.folder.is_dir()
        assert len(network.shaped_ends) == 8
        for name, interface in network.shaped_ends:
            shown = subprocess.run(
                ["tc", "-n", name, "qdisc", "show", "dev", interface], capture_output=True, text=True, check=True
            )
            assert "tbf" in shown.stdout and "rate 1Gbit" in shown.stdout
        server = network.command(
            3,
            *(sys.executable, "-c"),
            "import socket; s = socket.create_server(('', 5000)); print('up', flush=True); print(s.accept()[1][0])",
        )
        client = network.command(
            0, sys.executable, "-c", f"import socket; socket.create_connection(('{network.addresses[3]}', 5000))"
        )
        with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as listening:
            assert listening.stdout.readline() == "up\n"
            subprocess.run(client, check=True, timeout=30)
            assert listening.stdout.readline().strip() == network.addresses[0]
        folder = network.folder
    assert not own(os.getpid())
    assert not folder.exists()
