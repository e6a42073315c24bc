"""The benchmark as a user runs it. Bytes are asserted, times are not."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_efa import _C, libfabric
from moe_efa.bench.mpi_job import MpiError, find_mpirun
from moe_efa.bench.timing import Timing

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


def check_baselines(result, names):
    assert list(result["baselines"]) == names
    assert result["checks"]["baselines_agree"] == [result["baselines"][name]["title"] for name in names]
    assert result["copy_floor"]["p50_us"] > 0
    assert result["ratios"]["copy_floor"] > 0
    for name in names:
        for phase, when in result["baselines"][name]["best"].items():
            ratio = result["baselines"][name][when][phase]["p50_us"] / result["moe_efa"][phase]["p50_us"]
            assert result["ratios"][name][phase] == pytest.approx(ratio)


@pytest.mark.parametrize("transport", ["shm", "libfabric"])
def test_alone_it_starts_four_ranks_and_prints_a_table(tmp_path, transport):
    if transport == "libfabric" and not HAS_LIBFABRIC:
        pytest.skip("no libfabric on this host")
    target = tmp_path / "result.json"
    done = run(COMMAND, *TINY, "--transport", transport, "--json", str(target), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("4 in 2 nodes of 2", "moe_efa both", "torch per-expert both", "torch lean / moe_efa", "copy floor"):
        assert word in done.stdout
    result = json.loads(target.read_text())
    check_result(result, ranks=4, node_size=2)
    check_baselines(result, ["torch_per_expert", "torch_lean"])
    assert set(result["baselines"]["torch_lean"]) == {"title", "best", "before", "in_turn"}
    assert result["mpi"] is None
    expected = "shared memory" if transport == "shm" else "libfabric"
    assert result["conditions"]["transport"].startswith(expected)


def test_json_alone_goes_to_stdout_and_the_table_to_stderr(tmp_path):
    done = run(COMMAND, *TINY, "--ranks", "2", "--node-size", "2", "--no-baseline", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    check_result(result, ranks=2, node_size=2)
    assert result["baselines"] == {}
    assert result["copy_floor"] is None
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


def test_sweep_gives_a_row_per_shape_the_bars_and_a_picture(tmp_path):
    target, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    grid = shlex.split("--sweep --sweep-ranks 2,4 --sweep-tokens 8,16 --sweep-hidden 64 --topk 4 --experts 8")
    measured = shlex.split("--iters 1 --warmup 0 --transport shm --routing zipf --zipf-exponent 1.5")
    done = run(COMMAND, *grid, *measured, "--json", str(target), "--plot", str(picture), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("torch per-expert / moe_efa", "bar 8: ", "bar 0.5: ", "zipf, exponent 1.5"):
        assert word in done.stdout
    assert "[4 ranks, 2/2: T=16 H=64]" in done.stderr
    assert "4 shapes: about 1 min on " in done.stderr
    found = json.loads(target.read_text())
    shapes = [(point["conditions"]["ranks"], point["conditions"]["tokens"]) for point in found["points"]]
    assert shapes == [(2, 8), (2, 16), (4, 8), (4, 16)]
    for point in found["points"]:
        check_result(point, ranks=point["conditions"]["ranks"], node_size=point["conditions"]["ranks"] // 2)
        check_baselines(point, ["torch_per_expert", "torch_lean"])
    for name, bar in found["bars"].items():
        ratios = [point["ratios"][name] for point in found["points"]]
        assert bar["lowest"] == min(ratio if name == "copy_floor" else ratio["both"] for ratio in ratios)
    assert [one["ratio"] for one in found["per_byte_over_4_ranks"]][2:] == [1.0, 1.0]
    image = pytest.importorskip("matplotlib.image").imread(picture)
    assert image.shape[0] > 400
    assert image.std() > 0.05  # not an empty page


def _without_mpi():
    try:
        find_mpirun()
    except MpiError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(_without_mpi()), reason=_without_mpi() or "there is MPI")
def test_mpi_brings_equal_rows_and_is_measured_beside_the_others(tmp_path):
    target, picture = tmp_path / "result.json", tmp_path / "result.png"
    routing = shlex.split("--transport shm --routing lognormal --mpi")
    done = run(COMMAND, *TINY, *routing, "--json", str(target), "--plot", str(picture), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MPI_Alltoallv / moe_efa" in done.stdout
    result = json.loads(target.read_text())
    check_result(result, ranks=4, node_size=2)
    check_baselines(result, ["torch_per_expert", "torch_lean", "mpi"])
    assert result["mpi"]["library"].startswith("Open MPI")
    assert "btl self,sm" in result["mpi"]["mpirun"]
    assert picture.stat().st_size > 10_000


def test_without_mpi_the_reason_is_printed_and_the_rest_is_measured(tmp_path):
    # An mpirun option that does not exist: mpirun is there, and does not start.
    arguments = ["--ranks", "2", "--transport", "shm", "--mpi", "--mpi-args=--no-such-option"]
    done = run(COMMAND, *TINY, *arguments, "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not available: " in done.stderr
    result = json.loads(done.stdout)
    assert result["mpi"]["available"] is False
    check_baselines(result, ["torch_per_expert", "torch_lean"])


def test_idle_ranks_are_measured_with_and_without_a_fabric(tmp_path):
    done = run(COMMAND, "--idle", "--ranks", "2", *TRANSPORT, "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)["groups"]
    assert [group["nodes"] for group in groups] == [1, 2]
    assert all(len(group["cpu_percent"]) == 2 and min(group["cpu_percent"]) >= 0 for group in groups)


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
        # What Python itself cannot raise, as in the callback of a weak reference, it prints and ignores.
        ignored = re.compile(r"^Exception ignored in.*?^KeyboardInterrupt[: ]*$", re.DOTALL | re.MULTILINE)
        assert "Traceback" not in ignored.sub("", stderr)
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


def test_timing_is_of_the_iterations():
    timing = Timing.of(torch.tensor([4.0, 1.0, 3.0, 2.0, 5.0]))
    assert (timing.p50_s, timing.max_s) == (3.0, 5.0)
    assert timing.p50_s <= timing.p95_s <= timing.max_s
