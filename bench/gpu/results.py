"""What a section finds, one JSON line each, written at once: who is killed leaves what was done."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EAGER, COMPILED = "torch eager", "torch.compile"
UNFUSED_PAIR = "torch eager, unfused pair"  # of operators that a fused kernel replaces


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a value is held against."""

    what: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


@dataclass(kw_only=True)
class Check:
    """One comparison of results."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(kw_only=True)
class Peer:
    """Somebody else's time for the same work; ``us`` is None where ``note`` says why there is none."""

    us: float | None = None
    note: str = ""


@dataclass(kw_only=True)
class Timed:
    """One timed case. Bytes are those that the floor counts; rates and fractions follow from them.

    Attributes:
        flops: of matrix products, instead of bytes.
        ceiling: GB/s or TFLOP/s, measured in the same run.
        of_floor: does this one count for the bar on fractions?
    """

    name: str
    kernel: str
    conditions: dict[str, Any]
    us: float
    us_p20: float
    us_p80: float
    runs: int
    bytes: int | None = None
    flops: int | None = None
    ceiling: float | None = None
    bars: list[Bar] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        """GB/s of the counted bytes, or TFLOP/s."""
        if self.flops is not None:
            return self.flops / self.us / 1e6
        return None if self.bytes is None else self.bytes / self.us / 1e3

    @property
    def fraction(self) -> float | None:
        """Of the ceiling."""
        return None if self.rate is None or not self.ceiling else self.rate / self.ceiling

    def as_dict(self) -> dict[str, Any]:
        """With what follows from it."""
        document = asdict(self)
        document |= {"unit": "TFLOP/s" if self.flops is not None else "GB/s", "rate": self.rate}
        document["fraction"] = self.fraction
        counted = self.bytes if self.flops is None else self.flops
        per_us = 1e3 if self.flops is None else 1e6
        document["floor_us"] = counted / self.ceiling / per_us if counted and self.ceiling else None
        document["bars"] = [{**asdict(bar), "passed": bar.passed} for bar in self.bars]
        return document


class Writer:
    """Appends to the file of a section, and says so on stdout."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def check(self, check: Check) -> None:
        """A comparison is done."""
        self._append({"kind": "check", **asdict(check)})
        if not check.ok:
            self._say(f"  WRONG {check.name}: {check.detail}")

    def timed(self, timed: Timed) -> None:
        """A case is timed."""
        self._append({"kind": "timed", **timed.as_dict()})
        rate = "" if timed.rate is None else f", {timed.rate:.0f} {'TFLOP/s' if timed.flops is not None else 'GB/s'}"
        self._say(f"  {timed.name}: {timed.us:.1f} us{rate}")

    def peer(self, kernel: str, shape: str, name: str, peer: Peer) -> None:
        """Somebody else's time for the case `kernel`/`shape`."""
        self._append({"kind": "peer", "case": f"{kernel}/{shape}", "name": name, **asdict(peer)})
        self._say(f"  {kernel}/{shape}, {name}: {peer.note or f'{peer.us:.1f} us'}")

    def note(self, text: str) -> None:
        """Something that a reader should know: what was left out, and why."""
        self._append({"kind": "note", "text": text})
        self._say(f"  {text}")

    def facts(self, **values: Any) -> None:
        """Numbers that belong to no case: ceilings, properties of the device."""
        self._append({"kind": "facts", "values": values})

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _say(self, text: str) -> None:
        print(text, file=sys.stdout, flush=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; a last one that was cut off is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
