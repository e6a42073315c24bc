"""Commands that are given a GPU and a time limit: the place of what needs several ranks or a test runner.

Each must pass by its exit status. `{python}` and `{root}` are replaced.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .package import ROOT
from .results import Check
from .setting import Setting


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, its working directory being the root."""

    name: str
    limit_s: float
    words: tuple[str, ...]


COMMANDS: tuple[Command, ...] = (
    Command(name="build of the package", limit_s=120.0, words=("{python}", "setup.py", "-q", "build_ext", "--inplace")),
    Command(name="ranks that share a GPU", limit_s=120.0, words=("{python}", "bench/gpu/ranks.py")),
)


def run(setting: Setting, commands: Sequence[Command] = COMMANDS) -> None:
    """One after the other."""
    if not commands:
        setting.out.note("no commands of several ranks are listed")
    for command in commands:
        limit = min(command.limit_s, setting.time_left_s())
        if not setting.has_time_for(command.name, min(5.0, command.limit_s)):
            continue
        words = [word.format(python=sys.executable, root=ROOT) for word in command.words]
        try:
            result = subprocess.run(
                words, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False, timeout=limit
            )
        except subprocess.TimeoutExpired:
            setting.out.check(Check(name=command.name, ok=False, detail=f"not done after {limit:.0f} s"))
            continue
        lines = (result.stdout + result.stderr).strip().splitlines()
        tail = " | ".join(lines[-1:] if result.returncode == 0 else lines[-8:])
        setting.out.check(Check(name=command.name, ok=result.returncode == 0, detail=tail))
