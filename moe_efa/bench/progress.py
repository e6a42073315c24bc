"""Progress of a run on stderr."""

from __future__ import annotations

import sys


class Progress:
    """A bar on a terminal's stderr, a line per stage in a log; silent on ranks other than 0."""

    def __init__(self, total: int, *, visible: bool, what: str = "") -> None:
        self._total, self._done, self._visible = total, 0, visible
        self._terminal = visible and sys.stderr.isatty()
        self._what = f"{what} " if what else ""
        self._stage = ""

    def stage(self, name: str) -> None:
        """Say what follows."""
        self._stage = name
        self._show(force=True)

    def advance(self) -> None:
        """One round is done."""
        self._done += 1
        self._show(force=False)

    def close(self) -> None:
        """Leave the terminal's line empty."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self, *, force: bool) -> None:
        if not self._visible:
            return
        percent = 100 * self._done // max(1, self._total)
        if self._terminal:
            bar = "#" * (percent // 5)
            text = f"\r\x1b[K{self._what}[{bar:<20}] {percent:3d} % {self._stage}"
            print(text, end="", file=sys.stderr, flush=True)
        elif force:
            print(f"{self._what}{percent:3d} % {self._stage}", file=sys.stderr, flush=True)
