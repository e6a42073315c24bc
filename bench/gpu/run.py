"""The whole check: build, sections, and every few seconds the document: whoever ends it leaves what was done."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import build, machine, plot, report
from .budget import Budget, Job, Outcome
from .package import WORK
from .sections import SECTIONS, Section, of_run

BUILD_LIMIT_S = 200.0
REPORT_S = 6.0  # kept back for the table and the picture
SLACK_S = 8.0  # between the end of a section by itself and by force
WRITE_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    entry: Path
    dry_run: bool = False
    only: list[str] | None = None
    budget_s: float = 530.0
    json_target: Path | None = None
    plot_target: Path | None = None


def build_all(*, dry_run: bool, capability: list[int] | None = None) -> None:
    """Everything that is compiled.

    Raises:
        machine.CannotTell: a compiler is missing or refuses.
    """
    setup = machine.load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None and not dry_run:
        raise machine.CannotTell("no nvcc on PATH, in /usr/local/cuda or in NVIDIA's Python packages")
    start = time.monotonic()
    try:
        if dry_run:
            build.build_emulated(setup)
        else:
            build.build_for_gpu(setup, nvcc, build.architecture(capability))
    except (setup.BuildError, subprocess.CalledProcessError, OSError) as error:
        raise machine.CannotTell(f"cannot build: {error}") from error
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)


def check(options: Options) -> int:
    """Runs the sections; returns the exit status.

    Raises:
        machine.CannotTell: there is no GPU.
    """
    budget = Budget(options.budget_s - REPORT_S)
    facts: dict[str, Any] = {"dry_run": options.dry_run}
    if options.dry_run:
        facts |= {"device": "CPU (dry run)", "driver": "none"}
    else:
        facts |= machine.find_gpu()
    facts |= machine.software(machine.load_setup().find_nvcc())
    print(f"on {facts['device']}, {options.budget_s:.0f} s", flush=True)
    folder = WORK / f"results-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    target = options.json_target or folder / "gpu_check.json"
    outcomes: list[Outcome] = []
    sections = of_run(dry_run=options.dry_run, only=options.only)
    writing = threading.Lock()

    def write() -> None:
        """With what running sections have found so far."""
        with writing:
            now = list(outcomes)
            ended = {outcome.name for outcome in now}
            now += [Outcome(name=s.name, status="not ended", seconds=0.0) for s in sections if s.name not in ended]
            report.write(report.assemble(folder, now, facts), target)

    def done(found: list[Outcome]) -> None:
        outcomes.extend(found)
        for outcome in found:
            print(f"== {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.detail}", flush=True)
        write()

    with _every(WRITE_EVERY_S, write):
        _run_sections(sections, budget, folder, options, done)
    document = report.assemble(folder, outcomes, facts)
    status, verdict = report.exit_status(document, _must_be_done(options))
    document |= {"exit_status": status, "verdict": verdict}
    report.write(document, target)
    print(report.format_table(document), flush=True)
    _draw(document, options.plot_target or target.with_suffix(".png"))
    print(f"{verdict}; JSON: {target}", flush=True)
    return status


@contextlib.contextmanager
def _every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Calls it now and then, in a thread, and not after this."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            call()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _run_sections(
    sections: list[Section], budget: Budget, folder: Path, options: Options, done: Callable[[list[Outcome]], None]
) -> None:
    """The build runs beside the sections of step 0, which need none."""

    def run_step(step: list[Section], extra: list[Job]) -> list[Outcome]:
        batches = [step] if step and step[0].shares_process(dry_run=options.dry_run) else [[one] for one in step]
        jobs = [*extra, *(_job(batch, folder, options, budget) for batch in batches)]
        found = budget.run_together(jobs, log_of=lambda job: folder / f"{job.name.replace(',', '+')}.log")
        return [replace(outcome, name=name) for outcome in found for name in outcome.name.split(",")]

    needs_build = any(section.needs_build for section in sections)
    extra = [Job(name="build", command=_command(options, "--build"), limit_s=BUILD_LIMIT_S)] if needs_build else []
    first = [section for section in sections if section.step == 0]
    rest = sections[len(first) :]
    found = run_step(first, extra)
    done(found)
    if needs_build and found[0].status != "done":
        done([_unbuilt(section) for section in rest if section.needs_build])
        rest = [section for section in rest if not section.needs_build]
    for _, step in itertools.groupby(rest, key=lambda section: section.step):
        done(run_step(list(step), []))


def _unbuilt(section: Section) -> Outcome:
    return Outcome(name=section.name, status="left out", seconds=0.0, detail="the build failed")


def _command(options: Options, *words: str) -> list[str]:
    return [sys.executable, "-u", str(options.entry), *words, *(["--dry-run"] if options.dry_run else [])]


def _job(batch: list[Section], folder: Path, options: Options, budget: Budget) -> Job:
    """Sections of one process."""
    limit = max(1.0, min(sum(section.limit_s for section in batch), budget.left_s()))
    name = ",".join(section.name for section in batch)
    # A section stops by itself a little earlier, between two cases.
    deadline = time.monotonic() + max(1.0, limit - SLACK_S)
    words = ["--section", name, "--results", str(folder), "--deadline", f"{deadline:.1f}"]
    return Job(name=name, command=_command(options, *words), limit_s=limit)


def _must_be_done(options: Options) -> list[str]:
    """Sections without which nothing can be said, of those that were asked for."""
    wanted = {section.name for section in of_run(dry_run=options.dry_run, only=options.only)}
    return [section.name for section in SECTIONS if section.correctness and section.name in wanted]


def _draw(document: dict[str, Any], target: Path) -> None:
    if not plot.available():
        print("no picture: matplotlib is not here", flush=True)
        return
    try:
        plot.draw(document, target)
    except Exception as error:  # a picture must not cost the results
        print(f"no picture: {type(error).__name__}: {error}", flush=True)
        return
    print(f"picture: {target}", flush=True)
