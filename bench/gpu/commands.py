"""Commands that are given a GPU and a time limit: the place of what needs several ranks or a test runner.

Each must pass by its exit status; what it says of single cases counts as it comes. `{python}` is replaced. Running out
of time is no verdict. One that did not pass ends the list: the others need what it makes.
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
    for index, command in enumerate(commands):
        if not setting.has_time_for(command.name, min(5.0, command.limit_s)) or not _Run(setting, command).passed():
            for other in commands[index + 1 :]:
                setting.out.note(f"left out, for what comes before did not pass: {other.name}")
            return


class _Run:
    """One command under way."""

    def __init__(self, setting: Setting, command: Command) -> None:
        self._setting, self._command = setting, command
        words = [word.format(python=sys.executable) for word in command.words]
        self._process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self._tail: deque[str] = deque(maxlen=8)
        self._ended = threading.Event()

    def passed(self) -> bool:
        """Waits for it and records what it was."""
        limit = min(self._command.limit_s, self._setting.time_left_s())
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        name, status = self._command.name, None
        try:
            status = self._process.wait(limit)
            reader.join(5.0)  # what it has left running may hold the pipe
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._ended.set()
        if status is None:
            self._setting.out.note(f"{name}: not done after {limit:.0f} s; of the rest nothing is claimed")
            return False
        detail = " | ".join(list(self._tail)[-1:] if status == 0 else self._tail)
        self._setting.out.check(Check(name=name, ok=status == 0, detail=detail))
        return status == 0

    def _read(self) -> None:
        """A line that is a verdict is a comparison, as soon as it comes; what it says behind two spaces is why."""
        assert self._process.stdout is not None
        for line in map(str.rstrip, self._process.stdout):
            if self._ended.is_set():
                return
            print(f"  {line}", flush=True)
            self._tail.append(line.strip())
            verdict, _, rest = line.partition(" ")
            if verdict in VERDICTS:
                case, _, why = rest.partition(" s ")[2].strip().partition("  ")
                name = f"{self._command.name}: {case}"
                self._setting.out.check(Check(name=name, ok=VERDICTS[verdict], detail=why))
