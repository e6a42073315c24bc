"""Ranks whose kernels run on a device: a GPU, or, where a library is named, one that host threads play."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_efa.testing.spawn import spawn


class DeviceRanks:
    """Runs functions on ranks with a device. ``library`` plays it; None where there is a GPU."""

    def __init__(self, library: Path | None) -> None:
        self.library = library

    def spawn(self, fn: Callable[..., Any], num_ranks: int, *args: Any, **options: Any) -> list[Any]:
        """As :func:`moe_efa.testing.spawn.spawn`."""
        return spawn(_on_library, num_ranks, self.library, fn, *args, **options)


def _on_library(rank: int, group: dist.ProcessGroup, library: Path | None, fn: Callable[..., Any], *args: Any) -> Any:
    """In a rank, whose environment is that of the server which started it."""
    if library is not None:
        os.environ["MOE_EFA_DEVICE_LIBRARY"] = str(library)
    return fn(rank, group, *args)
