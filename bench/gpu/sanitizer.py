"""compute-sanitizer over small shapes: accesses out of bounds by all kernels (every tensor an allocation of its own),
and races in the shared memory of the CUDA ones. Where the tool is not there, that is said and nothing is claimed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .build import TESTS
from .package import ROOT, WORK
from .results import Check
from .setting import Setting

ERRORS = 99  # the exit status asked for
# Cases without faults on purpose, whose waits are long enough for a slowed-down kernel.
CASES = ("of-the-cpu", "no-selections", "second-launch")


def find_tool() -> Path | None:
    """On PATH, or in the usual toolkit."""
    found = shutil.which("compute-sanitizer")
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return Path(found) if found else usual if usual.exists() else None


def run(setting: Setting, small: list[str]) -> None:
    """`small`: the command that runs the small section."""
    tool = find_tool()
    if tool is None:
        setting.out.note("compute-sanitizer is not on this machine: memory accesses and races were not looked at")
        return
    for test in TESTS:
        _look(setting, tool, "racecheck", test.stem, [str(WORK / test.stem), *CASES], dict(os.environ))
    slow = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SHIM_TIMEOUT_S": "20"}
    _look(setting, tool, "memcheck", "small shapes", small, slow)


def _look(setting: Setting, tool: Path, what: str, name: str, command: list[str], environment: dict[str, str]) -> None:
    limit = setting.time_left_s()
    label = f"{what} {name}"
    if not setting.has_time_for(label, 10):
        return
    # torch probes for what a driver has by calls that may fail.
    options = ["--tool", what, "--error-exitcode", str(ERRORS), "--print-limit", "5", "--report-api-errors", "no"]
    try:
        result = subprocess.run(
            [str(tool), *options, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        setting.out.note(f"{label}: not done after {limit:.0f} s; nothing is claimed")
        return
    verdict, detail = judge(result.returncode, result.stdout + result.stderr)
    if verdict is None:
        setting.out.note(f"{label}: {detail}; nothing is claimed")
    else:
        setting.out.check(Check(name=label, ok=verdict, detail=detail))


def judge(status: int, output: str) -> tuple[bool | None, str]:
    """(clean, what was found) from the exit status and the summary; None where the tool itself did not work.

    >>> judge(0, "========= ERROR SUMMARY: 0 errors")
    (True, '0 errors')
    """
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    hazards = re.findall(r"RACECHECK SUMMARY: .*\((\d+) error", output)  # warnings are for eyes
    counts = [int(count) for count in errors + hazards]
    lines = [line.lstrip("= ") for line in output.splitlines() if line.startswith("=====")]
    if any("not supported" in line.lower() for line in lines) or not counts:
        return None, f"exit status {status}: {' | '.join(lines[:3] or output.splitlines()[-3:])}"
    warnings = [line for line in lines if re.search(r"RACECHECK SUMMARY: .*[1-9]\d* warning", line)]
    if status == ERRORS and sum(counts) == 0 and warnings:
        return None, warnings[0]
    if sum(counts) > 0 or status == ERRORS:
        return False, f"{sum(counts)} errors: {' | '.join(lines[1:6])}"
    if status != 0:
        return None, f"exit status {status} without errors of the tool: {' | '.join(output.splitlines()[-3:])}"
    return True, warnings[0] if warnings else "0 errors"


def small_command(entry: Path, folder: Path) -> list[str]:
    """The small section in a process of its own; its results do not count twice."""
    return [sys.executable, str(entry), "--section", "small", "--results", str(folder)]
