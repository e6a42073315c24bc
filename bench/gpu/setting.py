"""What a section runs with: device, timer, time left, where its results go, and what earlier sections measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import results
from .timing import CudaTimer, FakeTimer, Timer


@dataclass(kw_only=True)
class Setting:
    """Of one section's process.

    Attributes:
        dry_run: everything on the CPU with tiny shapes; times mean nothing.
        folder: of all sections' results.
    """

    dry_run: bool
    folder: Path
    out: results.Writer
    timer: Timer
    deadline: float

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cpu" if self.dry_run else "cuda"

    @property
    def stream(self) -> int:
        """The current cudaStream_t."""
        return 0 if self.dry_run else torch.cuda.current_stream().cuda_stream

    @property
    def num_sms(self) -> int:
        """Of the device; of a dry run 2."""
        return 2 if self.dry_run else torch.cuda.get_device_properties(0).multi_processor_count

    def time_left_s(self) -> float:
        """Until the section is cut."""
        return self.deadline - time.monotonic()

    def has_time_for(self, what: str, seconds: float) -> bool:
        """False, and a note of what is left out, where less than `seconds` are left."""
        if self.time_left_s() >= seconds:
            return True
        self.out.note(f"left out for want of time: {what}")
        return False

    def synchronize(self) -> None:
        """Waits for the device."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def release_memory(self) -> None:
        """What is cached of freed tensors goes back."""
        if not self.dry_run:
            torch.cuda.empty_cache()

    def ceilings(self) -> dict[str, float]:
        """copy_gb_per_s and matmul_tflop_per_s, as the section `ceilings` measured them; empty without it."""
        found: dict[str, float] = {}
        for record in results.read(self.folder / "ceilings.jsonl"):
            if record["kind"] == "facts":
                found |= record["values"]
        return found


def make_setting(section: str, folder: Path, *, dry_run: bool, deadline: float, timed: bool) -> Setting:
    """For the process of a section. deadline: of time.monotonic(), which all processes of a machine share."""
    timer: Timer = FakeTimer() if dry_run or not timed else CudaTimer()
    return Setting(
        dry_run=dry_run,
        folder=folder,
        out=results.Writer(folder / f"{section}.jsonl"),
        timer=timer,
        deadline=deadline,
    )


def shape_conditions(shape: Any, **more: Any) -> dict[str, Any]:
    """What stands beside a time."""
    conditions = {
        "model": shape.model,
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "experts": shape.experts,
        "topk": shape.topk,
    }
    return {**conditions, **more}
