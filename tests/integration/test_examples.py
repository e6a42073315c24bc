"""The examples run as their docstrings say, and print what they should."""

import subprocess
import sys

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]


def test_dispatch_combine_prints_what_arrived_where(repo_root, tmp_path):
    done = subprocess.run(
        [*TORCHRUN, str(repo_root / "examples" / "01_dispatch_combine.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    # Second choice of rank 0's token 1, chosen by both tokens of rank 1, first choice of rank 2's token 0.
    assert lines[2] == ("rank 2: expert 2 received tokens [1.0, 10.0, 11.0, 20.0] with weights [0.5, 0.25, 0.5, 0.75]")
    # 0.75 * 10 * 2 + 0.25 * 10 * 3 and 0.5 * 11 * 3 + 0.5 * 11 * 4
    assert lines[5] == "rank 1: tokens [10.0, 11.0] chose [[1, 2], [2, 3]] and became [22.5, 38.5]"
    # d out / d w = 8 columns * x * factor, d out / d x = sum of w * factor
    assert lines[9] == ("rank 1: gradients of x [2.25, 3.5], of the weights [[160.0, 240.0], [264.0, 352.0]]")
