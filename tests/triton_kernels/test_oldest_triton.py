"""A selection of these tests with the oldest Triton that is supported, in a process and a folder of its own.

All of them run with it by `make TRITON=triton==3.6.0 test` on a fresh .venv.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

OLDEST = "3.6.0"
# Every kernel once in the interpreter, against its twin, and once through the compiler.
SELECTION = (
    "docstring or odd-hidden-size or short or single_rank or (compiles and (h7168-bf16-fp32 or plan_rows "
    "or dequantize_1x128-bf16 or permute-bf16 or permute_quantize-bf16-fp32 or backward-bf16 or swiglu-bf16 or router "
    "or gemm_fp8-bf16 or 128x128-4096x7168-bf16))"
)


@pytest.fixture(scope="module")
def oldest_triton(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Triton 3.6.0, kept in build/."""
    folder = repo_root / "build" / f"triton-{OLDEST}"
    if not folder.exists():
        new = tmp_path_factory.mktemp("triton") / "packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--target", str(new), f"triton=={OLDEST}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if result.returncode != 0:
            pytest.skip(f"pip cannot install triton=={OLDEST} here: {result.stderr.strip().splitlines()[-1:]}")
        folder.parent.mkdir(exist_ok=True)
        shutil.move(new, folder)
    return folder


@pytest.mark.skipif(triton.__version__ == OLDEST, reason="all tests run with it")
def test_kernels_with_the_oldest_triton(oldest_triton: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(oldest_triton)}
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-m", "pytest", folder, "-p", "no:cacheprovider", "-W", "ignore", "-k", SELECTION]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"Triton {OLDEST}" in result.stdout  # in the header, which conftest.py writes
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 40, result.stdout
