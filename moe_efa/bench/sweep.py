"""Many shapes on several numbers of ranks: the table that the bars are read from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_efa._version import __version__
from moe_efa.bench.options import SWEEP, SWEEP_RANKS, BenchConfig
from moe_efa.bench.report import duration, mpi_facts
from moe_efa.errors import ConfigError

_ITERS, _WARMUP = 5, 1
# Above this many elements per rank a round takes so long that a median of three tells as much per minute.
_FEW_ITERS, _FEW_ABOVE = 3, 1 << 22
# Core-seconds of one iteration per received bf16 element (rank, token, selection): every party in all of its rounds.
# From single shapes on two cores; for an estimate of the duration and nothing else.
_COST = {"moe_efa": 5e-9, "baselines": 9e-8, "mpi": 7e-9}
_CHECK_ITERS = 1  # what the checks of a shape take, in iterations
_SHAPE_S, _START_S = 3.0, 10.0  # groups and small checks of a shape; processes of a number of ranks
_SHORT = {"torch_per_expert": "per-expert", "torch_lean": "lean", "mpi": "MPI", "copy_floor": "floor"}
_REFERENCE_RANKS = 4  # what more ranks are compared with, per byte


class Bar(NamedTuple):
    """A ratio, and the least that it is meant to be at every point of the grid; None for one without a bar."""

    name: str
    title: str
    least: float | None


BARS = (
    Bar("torch_per_expert", "torch per-expert / moe_efa", 8.0),
    Bar("torch_lean", "torch lean / moe_efa", None),
    Bar("mpi", "MPI_Alltoallv / moe_efa", 1.5),
    Bar("copy_floor", "copy floor / moe_efa", 0.5),
)


def grid(options: argparse.Namespace, launched: int | None) -> list[tuple[int, list[dict[str, Any]]]]:
    """Per number of ranks, what differs from the options' configuration at each point.

    Args:
        launched: ranks of a launcher, None if there is none.

    Raises:
        ConfigError: for options that a sweep overrides.
    """
    for name in ("tokens", "hidden"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} is one shape: with --sweep, give --sweep-{name}")
    ranks = options.sweep_ranks or (SWEEP_RANKS if options.ranks is None else (options.ranks,))
    if launched is not None:
        if options.sweep_ranks not in (None, (launched,)):
            raise ConfigError(f"--sweep-ranks: the launcher started {launched} ranks")
        ranks = (launched,)
    given = dict.fromkeys(options.sweep_hidden or (), options.sweep_tokens)
    shapes = [(hidden, options.sweep_tokens or tokens) for hidden, tokens in SWEEP]
    if given:
        shapes = [(hidden, tokens or dict(SWEEP).get(hidden, SWEEP[0][1])) for hidden, tokens in given.items()]
    points: list[dict[str, Any]] = [
        {
            "hidden": hidden,
            "tokens": tokens,
            "iters": iterations(hidden, tokens) if options.iters is None else options.iters,
            "warmup": _WARMUP if options.warmup is None else options.warmup,
        }
        for hidden, of_hidden in shapes
        for tokens in of_hidden
    ]
    return [(num_ranks, points) for num_ranks in ranks]


def iterations(hidden: int, tokens: int) -> int:
    """Timed rounds of a shape where the options do not say: five, three where a rank has more than 4 Mi elements.

    >>> iterations(2048, 2048), iterations(2048, 4096)
    (5, 3)
    """
    return _FEW_ITERS if hidden * tokens > _FEW_ABOVE else _ITERS


def estimate_s(groups: Sequence[Sequence[BenchConfig]], *, cores: int) -> float:
    """Seconds that a sweep takes, about, on cores that do nothing else; a list of shapes per number of ranks."""
    seconds = 0.0
    for configs in groups:
        seconds += _START_S
        for config in configs:
            cost = _COST["moe_efa"] + config.baseline * _COST["baselines"] + config.mpi * _COST["mpi"]
            elements = config.ranks * config.tokens * config.topk * config.row_bytes / 2
            rounds = config.warmup + config.iters + _CHECK_ITERS
            seconds += _SHAPE_S + cost * elements * rounds / min(cores, config.ranks)
    return seconds


def lowest(found: list[dict[str, Any]], bar: Bar) -> tuple[float, dict[str, Any]] | None:
    """The least ratio of all points, and the conditions there; None if it was measured nowhere."""
    values = [(ratio(result, bar.name), result["conditions"]) for result in found]
    known = [(value, conditions) for value, conditions in values if value is not None]
    return min(known, key=lambda pair: pair[0]) if known else None


def ratio(result: dict[str, Any], name: str) -> float | None:
    """Dispatch and combine together: the baseline's time over moe_efa's."""
    value = result["ratios"].get(name)
    return value["both"] if isinstance(value, dict) else value


def per_byte(result: dict[str, Any], found: list[dict[str, Any]]) -> float | None:
    """Time over the bytes of all ranks, relative to the same shape on four ranks; None without those."""
    for other in found:
        a, b = result["conditions"], other["conditions"]
        if b["ranks"] == _REFERENCE_RANKS and all(a[name] == b[name] for name in ("hidden", "tokens")):
            times = [one["moe_efa"]["both"]["p50_us"] / one["conditions"]["ranks"] for one in (result, other)]
            return float(times[0] / times[1])
    return None


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything as JSON: all points, the lowest ratio for each bar, and what more ranks than cores cost per byte."""
    bars = {}
    for bar in BARS:
        least = lowest(found, bar)
        if least is not None:
            where = {name: least[1][name] for name in ("ranks", "hidden", "tokens")}
            bars[bar.name] = {"bar": bar.least, "lowest": least[0], "at": where}
    keys = ("ranks", "hidden", "tokens")
    return {
        "benchmark": "dispatch_combine_sweep",
        "points": found,
        "bars": bars,
        "per_byte_over_4_ranks": [
            {**{key: result["conditions"][key] for key in keys}, "ratio": per_byte(result, found)} for result in found
        ],
    }


def format_sweep(found: list[dict[str, Any]]) -> str:
    """The table for people."""
    c = found[0]["conditions"]
    columns = [name for name in ("torch_per_expert", "torch_lean", "mpi") if any(name in r["baselines"] for r in found)]
    with_floor = any(result["copy_floor"] for result in found)
    rounds = " or ".join(str(n) for n in sorted({result["conditions"]["iterations"] for result in found}))
    lines = [
        f"moe_efa {__version__}: dispatch and combine together, p50 of {rounds} rounds, slowest rank",
        f"  K={c['topk']}, E={c['experts']}, {c['dtype']}, routing {c['routing']}, seed {c['seed']}",
        f"  {c['cores']} cores; between nodes: {c['transport']}",
    ]
    for facts in dict.fromkeys(tuple(mpi_facts(result["mpi"])) for result in found):
        lines += [f"  {' '.join(fact).strip()}" for fact in facts]
    titles = ["moe_efa", *(_SHORT[name] for name in [*columns, *(["copy_floor"] if with_floor else [])])]
    bars = [bar for bar in BARS if bar.name in columns or (bar.name == "copy_floor" and with_floor)]
    head = f"{'ranks':>6}{'nodes':>6}{'H':>6}{'T':>6}" + "".join(f"{title:>11}" for title in titles)
    lines += ["", head + "  |" + "".join(f"{_SHORT[bar.name]:>11}" for bar in bars) + "  |  wire  per byte"]
    for result in found:
        lines.append(_line(result, found, columns, bars, with_floor))
    if bars:
        lines += ["", "  lowest ratio of the grid, beside its bar"]
    for bar in bars:
        least = lowest(found, bar)
        if least is not None:
            where = "{ranks} ranks, H={hidden}, T={tokens}".format(**least[1])
            verdict = "no bar"
            if bar.least is not None:
                verdict = f"bar {bar.least:g}: " + ("reached" if least[0] >= bar.least else "below")
            lines.append(f"  {bar.title:<30}{least[0]:>7.2f}   {verdict} ({where})")
    lines.append("  per-expert, lean: torch.distributed; floor: copies alone; behind the first |: time over moe_efa's")
    lines.append("  per byte: time over the bytes of all ranks, relative to the same shape on 4 ranks")
    return "\n".join(lines)


def _line(
    result: dict[str, Any], found: list[dict[str, Any]], columns: list[str], bars: list[Bar], with_floor: bool
) -> str:
    c = result["conditions"]
    times = [result["moe_efa"]["both"]["p50_us"]]
    for name in columns:
        baseline = result["baselines"].get(name)
        times.append(baseline[baseline["best"]["both"]]["both"]["p50_us"] if baseline else None)
    if with_floor:
        times.append(result["copy_floor"]["p50_us"])
    cells = "".join(f"{'-' if time is None else duration(time):>11}" for time in times)
    values = [ratio(result, bar.name) for bar in bars]
    ratios = "".join(f"{'-' if value is None else format(value, '.2f'):>11}" for value in values)
    wire, byte = result["wire"]["ratio"], per_byte(result, found)
    tail = f"{'-' if wire is None else format(wire, '.3f'):>6}{'-' if byte is None else format(byte, '.2f'):>10}"
    return f"{c['ranks']:>6}{c['nodes']:>6}{c['hidden']:>6}{c['tokens']:>6}{cells}  |{ratios}  |{tail}"
