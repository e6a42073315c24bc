"""Ranks whose kernels run on a device: a GPU, or, where a library is named, one that host threads play."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_efa.testing.spawn import spawn


class DeviceRanks:
    """Runs functions on ranks with a device. ``library`` plays it; None where there is a GPU."""

    def __init__(self, library: Path | None) -> None:
        self.environment = {} if library is None else {"MOE_EFA_DEVICE_LIBRARY": str(library)}

    def spawn(self, fn: Callable[..., Any], num_ranks: int, *args: Any, **options: Any) -> list[Any]:
        """As :func:`moe_efa.testing.spawn.spawn`."""
        return spawn(fn, num_ranks, *args, environment=self.environment, **options)
