"""Which sections there are, in what order they run and how long each may take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the check, run in a process of its own.

    Attributes:
        run: "module:function" below this package; arguments after a colon, as text.
        step: sections of one step that is not timed run side by side; others one after the other.
        timed: has the GPU to itself.
        correctness: without it nothing can be said.
        needs_build: of the shim or of the test programs.
        in_dry_run: can be run without a GPU.
    """

    name: str
    run: str
    step: int
    limit_s: float
    timed: bool = False
    correctness: bool = False
    needs_build: bool = True
    in_dry_run: bool = True

    def shares_process(self, *, dry_run: bool) -> bool:
        """Do the sections of its step run in one process? Where nothing is timed, for speed."""
        return dry_run and self.step == FIRST_TIMED_STEP


FIRST_TIMED_STEP = 2
SECTIONS = (
    *(
        Section(
            name=f"triton-{hidden}",
            run=f"correctness:run_triton:{hidden}",
            step=0,
            limit_s=150,
            correctness=True,
            needs_build=False,
        )
        for hidden in (7168, 4096, 2048)
    ),
    Section(name="cuda-grid", run="correctness:run_cuda_grid", step=1, limit_s=90, correctness=True),
    Section(name="ceilings", run="ceilings:run", step=2, limit_s=40, timed=True, needs_build=False),
    Section(name="cuda-speed", run="cuda_speed:run", step=3, limit_s=90, timed=True),
    Section(name="triton-speed", run="triton_speed:run", step=4, limit_s=110, timed=True, needs_build=False),
    Section(name="grouped-gemm", run="grouped_gemm:run", step=5, limit_s=70, timed=True, needs_build=False),
    Section(name="layer-share", run="layer_share:run", step=6, limit_s=60, timed=True),
    # The programs use managed memory, whose faults could hang a device: after most of what is timed.
    Section(name="cuda-tests", run="correctness:run_programs", step=7, limit_s=90, correctness=True, in_dry_run=False),
    Section(name="peers", run="peers:run", step=8, limit_s=150, timed=True, needs_build=False),
    Section(name="commands", run="commands:run", step=9, limit_s=420, needs_build=False, in_dry_run=False),
    Section(name="sanitizer", run="sanitizer:run", step=10, limit_s=90, in_dry_run=False),
)
SMALL = Section(name="small", run="correctness:run_small", step=0, limit_s=600)  # what the sanitizer runs
DRY_HIDDEN = 256


def by_name(name: str) -> Section:
    """KeyError for a name that is none."""
    return {section.name: section for section in (*SECTIONS, SMALL)}[name]


def of_run(*, dry_run: bool, only: list[str] | None) -> list[Section]:
    """Those that run. A dry run needs one size of the same thing."""
    found = [section for section in SECTIONS if only is None or section.name in only]
    if dry_run:
        found = [s for s in found if s.in_dry_run and s.name not in ("triton-4096", "triton-2048")]
        found = [replace(s, step=min(s.step, FIRST_TIMED_STEP)) for s in found]
    return found


def run_section(name: str, folder: Path, entry: Path, *, dry_run: bool, deadline: float) -> None:
    """In the process of the section, which ends at `deadline` of time.monotonic()."""
    from .setting import make_setting  # torch: not for the process that starts the others

    section = by_name(name)
    setting = make_setting(name, folder, dry_run=dry_run, deadline=deadline, timed=section.timed)
    module_name, function_name, *arguments = section.run.split(":")
    module = importlib.import_module(f".{module_name}", __package__)
    function: Callable[..., None] = getattr(module, function_name)
    if function_name == "run_triton":
        function(setting, DRY_HIDDEN if dry_run else int(arguments[0]))
    elif module_name == "sanitizer":
        function(setting, module.small_command(entry, folder))
    else:
        function(setting)
