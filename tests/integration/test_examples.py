"""The examples run as their docstrings say, and print what they should."""

import json
import os
import subprocess
import sys

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]


def run(command, folder):
    # One rank would take every core, and its threads would wait for each other where the tests run side by side.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_dispatch_combine_prints_what_arrived_where(repo_root, tmp_path):
    lines = run([*TORCHRUN, str(repo_root / "examples" / "01_dispatch_combine.py")], tmp_path)
    assert len(lines) == 12
    # Second choice of rank 0's token 1, chosen by both tokens of rank 1, first choice of rank 2's token 0.
    assert lines[2] == ("rank 2: expert 2 received tokens [1.0, 10.0, 11.0, 20.0] with weights [0.5, 0.25, 0.5, 0.75]")
    # 0.75 * 10 * 2 + 0.25 * 10 * 3 and 0.5 * 11 * 3 + 0.5 * 11 * 4
    assert lines[5] == "rank 1: tokens [10.0, 11.0] chose [[1, 2], [2, 3]] and became [22.5, 38.5]"
    # d out / d w = 8 columns * x * factor, d out / d x = sum of w * factor
    assert lines[9] == ("rank 1: gradients of x [2.25, 3.5], of the weights [[160.0, 240.0], [264.0, 352.0]]")


def test_moe_layer_equals_the_dense_layer(repo_root, tmp_path):
    lines = run([*TORCHRUN, str(repo_root / "examples" / "02_moe_layer.py")], tmp_path)
    rows = [json.loads(line.split("got ")[1].removesuffix(" rows")) for line in lines[:4]]
    assert sum(map(sum, rows)) == 4 * 6 * 2  # ranks, tokens, top-k
    assert [line.split()[0] for line in lines[4:]] == [
        "result",
        "x.grad",
        "router.weight.grad",
        "experts.gate_up_proj.grad",
        "experts.down_proj.grad",
    ]
    assert all("equals the dense layer's" in line for line in lines[4:])


def test_language_model_compares_itself_with_one_rank(repo_root, tmp_path):
    script = str(repo_root / "examples" / "03_train_language_model.py")
    outputs = ["--json", "results.json", "--plot", "curve.png"]
    lines = run([*TORCHRUN, script, "--steps", "2", "--compare-one-rank", "--node-size", "2", *outputs], tmp_path)
    assert any(line.startswith("parallel: loss 5.") for line in lines)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["report"]["pinned_max_relative_difference"] < 1e-5
    assert [len(results["runs"][name]["losses"]) for name in ("one_rank", "pinned", "parallel")] == [2, 2, 2]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_language_model_runs_on_one_rank_with_any_text(repo_root, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "all.txt").write_text("the same line again and again\n" * 300)
    script = str(repo_root / "examples" / "03_train_language_model.py")
    lines = run([sys.executable, script, "--steps", "2", "--data", "notes"], tmp_path)
    assert lines[0] == "1 ranks, 0.0 MB of text in 1 files"
    assert lines[1].startswith("loss: loss 5.")
