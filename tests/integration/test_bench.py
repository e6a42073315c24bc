"""The benchmark as a user runs it. Bytes are asserted, times are not."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_efa import _C, bench, libfabric

TINY = shlex.split("--tokens 16 --hidden 64 --topk 4 --experts 8 --iters 2 --warmup 1")
COMMAND = [sys.executable, "-c", "import sys; from moe_efa.cli import main; sys.exit(main())", "bench"]
HAS_LIBFABRIC = _C.build_info(**libfabric.search_path())["libfabric_found"]
TRANSPORT = ["--transport", "libfabric" if HAS_LIBFABRIC else "shm"]


def run(command, *arguments, cwd, timeout=180):
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def check_result(result, *, ranks, node_size):
    conditions = result["conditions"]
    assert (conditions["ranks"], conditions["node_size"]) == (ranks, node_size)
    assert set(conditions) >= {"transport", "tokens", "hidden", "topk", "experts", "dtype", "iterations", "cores"}
    assert set(result["moe_efa"]) == {"dispatch", "combine", "both"}
    for timing in result["moe_efa"].values():
        assert 0 < timing["p50_us"] <= timing["p95_us"] <= timing["max_us"]
    assert result["checks"]["full_error_of_bound"] <= 1
    wire = result["wire"]
    assert wire["bytes"] >= wire["floor_bytes"]


@pytest.mark.parametrize("transport", ["shm", "libfabric"])
def test_alone_it_starts_four_ranks_and_prints_a_table(tmp_path, transport):
    if transport == "libfabric" and not HAS_LIBFABRIC:
        pytest.skip("no libfabric on this host")
    target = tmp_path / "result.json"
    done = run(COMMAND, *TINY, "--transport", transport, "--json", str(target), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("4 in 2 nodes of 2", "moe_efa both", "torch both", "copy floor", "torch.distributed / moe_efa"):
        assert word in done.stdout
    result = json.loads(target.read_text())
    check_result(result, ranks=4, node_size=2)
    assert set(result["torch"]) == {"best", "before", "after"}
    assert result["ratios"]["torch_over_moe_efa"] > 0
    assert result["ratios"]["moe_efa_over_copy_floor"] > 0
    expected = "shared memory" if transport == "shm" else "libfabric"
    assert result["conditions"]["transport"].startswith(expected)


def test_json_alone_goes_to_stdout_and_the_table_to_stderr(tmp_path):
    done = run(COMMAND, *TINY, "--ranks", "2", "--node-size", "2", "--no-baseline", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    check_result(result, ranks=2, node_size=2)
    assert result["torch"] is None
    assert result["wire"]["ratio"] is None
    assert "moe_efa both" in done.stderr


@pytest.mark.parametrize("node_size", [None, 1], ids=["node-from-hosts", "node1"])
def test_under_torchrun_it_uses_the_ranks_it_is_given(tmp_path, repo_root, node_size):
    script = repo_root / "bench" / "bench_dispatch_combine.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    target = tmp_path / "result.json"
    nodes = [] if node_size is None else ["--node-size", str(node_size), *TRANSPORT]
    done = run(torchrun, *TINY, *nodes, "--no-baseline", "--json", str(target), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_result(json.loads(target.read_text()), ranks=2, node_size=node_size or 2)


def test_bytes_on_the_wire_are_close_to_the_floor(tmp_path):
    shape = shlex.split("--ranks 4 --node-size 2 --tokens 1024 --hidden 4096 --topk 8 --experts 32 --dtype bf16")
    done = run(COMMAND, *shape, *TRANSPORT, *shlex.split("--iters 1 --warmup 0 --no-baseline --json -"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wire = json.loads(done.stdout)["wire"]
    assert 1 <= wire["ratio"] <= 1.03
    assert 1 <= wire["dispatch"]["ratio"] <= 1.03


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--experts", "7"], "not a multiple"),
        (["--topk", "9"], "top_k=9"),
        (["--iters", "0"], "--iters"),
        (["--node-size", "3"], "node_size=3"),
        (["--transport", "libfabric", "--provider", "nonesuch"], "nonesuch"),
    ],
    ids=["experts", "topk", "iters", "node-size", "provider"],
)
def test_a_wrong_argument_is_one_readable_line(tmp_path, arguments, word):
    if "libfabric" in arguments and not HAS_LIBFABRIC:
        pytest.skip("no libfabric on this host")
    done = run(COMMAND, *TINY, "--transport", "shm", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupt_ends_all_ranks(tmp_path):
    command = [*COMMAND, *shlex.split("--transport shm --tokens 256 --hidden 256 --iters 100000 --no-baseline")]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "% moe_efa" in line:
                break
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in stderr
    finally:
        deadline = time.monotonic() + 10
        while (left := _members(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)  # multiprocessing's own helpers follow their parent
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not left


def _members(session):
    """Processes of a session that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_rows_of_the_copy_floor_are_those_that_the_definition_says(node_size):
    num_ranks, num_experts = 4, 8
    selections = [
        bench.make_inputs(rank, tokens=9, hidden=4, topk=3, experts=num_experts, dtype="fp32", seed=7).topk_idx
        for rank in range(num_ranks)
    ]
    for rank in range(num_ranks):
        rows = bench.count_rows(selections, rank=rank, node_size=node_size, num_experts=num_experts)
        packed = pulled = published = forwarded = 0
        for source, selection in enumerate(selections):
            for experts in selection.tolist():
                owners = [expert * num_ranks // num_experts for expert in experts]
                nodes = {owner // node_size for owner in owners}
                packed += len(nodes) if source == rank else 0
                pulled += owners.count(rank)
                published += rank in owners
                forwarded += source % node_size == rank % node_size and rank // node_size in nodes
        assert rows == (packed, pulled, published, forwarded, 9)


def test_timing_is_of_the_iterations():
    timing = bench.Timing.of(torch.tensor([4.0, 1.0, 3.0, 2.0, 5.0]))
    assert (timing.p50_s, timing.max_s) == (3.0, 5.0)
    assert timing.p50_s <= timing.p95_s <= timing.max_s
