"""Commands that are given a GPU and a time limit: the place of what needs several ranks or a test runner.

Each must pass by its exit status; what it says of single cases counts as it comes. `{python}` is replaced. Running out
of time is no verdict.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .package import ROOT
from .results import Check
from .setting import Setting

VERDICTS = {"same": True, "WRONG": False}  # the first words of lines of ranks.py


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, its working directory being the root."""

    name: str
    limit_s: float
    words: tuple[str, ...]


COMMANDS: tuple[Command, ...] = (
    Command(name="build of the package", limit_s=120.0, words=("{python}", "setup.py", "-q", "build_ext", "--inplace")),
    Command(name="ranks that share a GPU", limit_s=300.0, words=("{python}", "bench/gpu/ranks.py")),
)


def run(setting: Setting, commands: Sequence[Command] = COMMANDS) -> None:
    """One after the other."""
    if not commands:
        setting.out.note("no commands of several ranks are listed")
    for command in commands:
        limit = min(command.limit_s, setting.time_left_s())
        if setting.has_time_for(command.name, min(5.0, command.limit_s)):
            _run(setting, command, limit)


def _run(setting: Setting, command: Command, limit_s: float) -> None:
    words = [word.format(python=sys.executable) for word in command.words]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines: deque[str] = deque(maxlen=8)
    reader = threading.Thread(target=_read, args=(setting, command, process, lines), daemon=True)
    reader.start()
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        setting.out.note(f"{command.name}: not done after {limit_s:.0f} s; of the rest nothing is claimed")
        return
    reader.join(5.0)  # what it has left running may hold the pipe
    tail = " | ".join(list(lines)[-1:] if status == 0 else lines)
    setting.out.check(Check(name=command.name, ok=status == 0, detail=tail))


def _read(setting: Setting, command: Command, process: subprocess.Popen[str], lines: deque[str]) -> None:
    """A line that is a verdict is a comparison, as soon as it comes."""
    assert process.stdout is not None
    for line in map(str.strip, process.stdout):
        print(f"  {line}", flush=True)
        lines.append(line)
        verdict, _, rest = line.partition(" ")
        if verdict in VERDICTS:
            case = rest.partition(" s ")[2].strip()
            setting.out.check(Check(name=f"{command.name}: {case}", ok=VERDICTS[verdict], detail=line))
