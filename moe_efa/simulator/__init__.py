"""The protocol in a simulated world: real engines and CPU kernels over a seeded, nasty model of SRD, in virtual time.

No GPU, NIC, process or thread takes part. A failure is a profile and a seed, which anyone can replay::

    python -m moe_efa.simulator --profile srd_harsh --seeds 100
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_efa import _C

MAX_RANKS = 64  # real bytes and a full compare: beyond this a seed takes minutes
__all__ = ["PROFILES", "SimulationResult", "check", "main"]

PROFILES: tuple[str, ...] = tuple(_C.simulate_profiles())
_BAR_WIDTH = 30
_PRINTED_FAILURES = 3


@dataclass(frozen=True)
class SimulationResult:
    """Verdict on one seed.

    `message` says what broke, where, and what happened just before. `inbound_high_water` of `inbound_limit` immediates
    were delivered to a rank and not yet polled; `inflight_high_water` were under way to it.
    """

    ok: bool
    message: str
    profile: str
    seed: int
    num_ranks: int
    node_size: int
    events: int
    virtual_us: int
    epochs: int
    inflight_high_water: int
    inbound_high_water: int
    inbound_limit: int


def check(
    profile: str = "srd", seeds: Iterable[int] = range(100), *, num_ranks: int | None = None, progress: bool = True
) -> list[SimulationResult]:
    """Run every seed and return the verdicts, in order; nothing is raised for a seed that fails.

    Args:
        profile: how nasty the network is, one of `PROFILES`.
        seeds: each stands for a whole run: the group's shape, its calls, the schedule and every delay.
        num_ranks: ranks of every run, 2 to 64; drawn from the seed where None.
        progress: draw a bar on stderr where that is a terminal.

    Raises:
        ValueError: for an unknown profile, a negative seed, or a number of ranks outside [2, 64].
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; there are {', '.join(PROFILES)}")
    if num_ranks is not None and not 2 <= num_ranks <= MAX_RANKS:
        raise ValueError(f"num_ranks is {num_ranks}, from 2 to {MAX_RANKS} can be checked byte by byte")
    seeds = list(seeds)
    if any(not 0 <= seed < 1 << 64 for seed in seeds):
        raise ValueError("a seed is a number from 0 to 2**64 - 1")
    draw = progress and sys.stderr.isatty()
    results: list[SimulationResult] = []
    failures = 0
    for seed in seeds:
        result = SimulationResult(**_C.simulate_check(profile, seed, num_ranks=num_ranks or 0))
        results.append(result)
        failures += not result.ok
        if draw:
            _draw_bar(profile, len(results), len(seeds), failures)
    if draw and seeds:
        print(file=sys.stderr)
    return results


def replay_command(result: SimulationResult, num_ranks: int | None = None) -> str:
    """The command that runs exactly this seed again."""
    command = f"python -m moe_efa.simulator --profile {result.profile} --first-seed {result.seed} --seeds 1"
    return command if num_ranks is None else f"{command} --num-ranks {num_ranks}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when every seed of every profile was clean, else 1."""
    parser = argparse.ArgumentParser(
        prog="moe-efa simulate",
        description="Run the protocol over simulated SRD, every invariant checked after every event.",
    )
    parser.add_argument(
        "--profile", default="srd", choices=[*PROFILES, "all"], help="how nasty the network is (default: srd)"
    )
    parser.add_argument("--seeds", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--first-seed", type=int, default=0, help="where they start (default: 0)")
    parser.add_argument("--num-ranks", type=int, help="ranks of every run (default: from the seed)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {options.seeds}")
    summaries = []
    for profile in PROFILES if options.profile == "all" else [options.profile]:
        started = time.perf_counter()
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        try:
            results = check(profile, seeds, num_ranks=options.num_ranks, progress=not options.json)
        except ValueError as error:
            parser.error(str(error))
        summaries.append(_summary(profile, results, time.perf_counter() - started, options.num_ranks))
        if not options.json:
            _print_report(summaries[-1], results, options.num_ranks)
    if options.json:
        print(json.dumps({"profiles": summaries}, indent=2))
    return 1 if any(summary["failures"] for summary in summaries) else 0


def _summary(
    profile: str, results: Sequence[SimulationResult], seconds: float, num_ranks: int | None
) -> dict[str, Any]:
    return {
        "profile": profile,
        "seeds": len(results),
        "seconds": round(seconds, 3),
        "events": sum(result.events for result in results),
        "epochs": sum(result.epochs for result in results),
        "virtual_ms": round(sum(result.virtual_us for result in results) / 1000, 3),
        "failures": [
            asdict(result) | {"replay": replay_command(result, num_ranks)} for result in results if not result.ok
        ],
    }


def _print_report(summary: dict[str, Any], results: Sequence[SimulationResult], num_ranks: int | None) -> None:
    failed = [result for result in results if not result.ok]
    for result in failed[:_PRINTED_FAILURES]:
        print(f"seed {result.seed} FAILED: {result.message}\n  replay: {replay_command(result, num_ranks)}\n")
    if len(failed) > _PRINTED_FAILURES:
        print(f"also failed: seeds {', '.join(str(result.seed) for result in failed[_PRINTED_FAILURES:])}\n")
    rate = summary["seeds"] / summary["seconds"] if summary["seconds"] else 0.0
    print(
        f"{summary['profile']:<13} {summary['seeds']:>6} seeds  {len(failed):>4} failed  {summary['epochs']:>7} epochs "
        f" {summary['events']:>11} events  {summary['virtual_ms']:>12.1f} ms simulated  {rate:>7.1f} seeds/s"
    )


def _draw_bar(profile: str, done: int, total: int, failures: int) -> None:
    filled = _BAR_WIDTH * done // total
    bar = "#" * filled + "." * (_BAR_WIDTH - filled)
    tail = f", {failures} failed" if failures else ""
    print(f"\r{profile:<13} [{bar}] {done}/{total}{tail}", end="", file=sys.stderr, flush=True)
