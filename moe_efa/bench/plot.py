"""Draws results: times against tokens, and what they are times of moe_efa. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from moe_efa.bench.sweep import BARS, ratio
from moe_efa.bench.timing import PHASES
from moe_efa.errors import ConfigError

_FORMATS = (".png", ".svg", ".pdf")
# (name, label, colour, marker): colours that are told apart in print and by the colour-blind.
_PARTIES = (
    ("moe_efa", "moe_efa", "#0072b2", "o"),
    ("torch_per_expert", "torch per-expert", "#d55e00", "s"),
    ("torch_lean", "torch lean", "#e69f00", "^"),
    ("mpi", "MPI_Alltoallv", "#009e73", "D"),
    ("copy_floor", "copy floor", "#666666", "v"),
)


def check_available(target: str) -> None:
    """Raise ConfigError if nothing could be drawn into this file."""
    if Path(target).suffix not in _FORMATS:
        raise ConfigError(f"--plot {target}: the name must end in one of {', '.join(_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'moe_efa[plot]'")


def draw(found: list[dict[str, Any]], target: str) -> None:
    """Write the picture of one or more results."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure = _draw_lines(pyplot, found) if len(found) > 1 else _draw_bars(pyplot, found[0])
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _times(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds at p50 by party and phase; the faster of a baseline's runs."""
    times = {"moe_efa": {phase: result["moe_efa"][phase]["p50_us"] / 1e3 for phase in PHASES}}
    for name, baseline in result["baselines"].items():
        times[name] = {phase: baseline[when][phase]["p50_us"] / 1e3 for phase, when in baseline["best"].items()}
    if result["copy_floor"]:
        times["copy_floor"] = {"both": result["copy_floor"]["p50_us"] / 1e3}
    return times


def _draw_lines(pyplot: Any, found: list[dict[str, Any]]) -> Any:
    """A column for each (ranks, H): times above, ratios below."""
    columns = sorted({(result["conditions"]["ranks"], result["conditions"]["hidden"]) for result in found})
    figure, axes = pyplot.subplots(
        2, len(columns), figsize=(1.5 + 3.6 * len(columns), 7.2), sharey="row", squeeze=False, layout="constrained"
    )
    for column, (ranks, hidden) in enumerate(columns):
        upper, lower = axes[0][column], axes[1][column]
        here = [r for r in found if (r["conditions"]["ranks"], r["conditions"]["hidden"]) == (ranks, hidden)]
        here.sort(key=lambda result: result["conditions"]["tokens"])
        tokens = [result["conditions"]["tokens"] for result in here]
        for name, label, colour, marker in _PARTIES:
            points = [_times(result).get(name, {}).get("both") for result in here]
            if any(point is not None for point in points):
                upper.plot(tokens, points, marker=marker, color=colour, label=label, markersize=5)
            ratios = [ratio(result, name) for result in here]
            if any(value is not None for value in ratios):
                lower.plot(tokens, ratios, marker=marker, color=colour, markersize=5)
        for bar in (bar for bar in BARS if bar.least is not None):
            colour = next(party[2] for party in _PARTIES if party[0] == bar.name)
            if any(ratio(result, bar.name) is not None for result in here):
                lower.axhline(bar.least, color=colour, linestyle=":", linewidth=1)
                if column == len(columns) - 1:
                    place = (1.01, bar.least)
                    lower.annotate(
                        f"bar {bar.least:g}", place, xycoords=("axes fraction", "data"), color=colour, va="center"
                    )
        lower.axhline(1.0, color="#0072b2", linewidth=1)
        upper.set_title(f"{ranks} ranks, H={hidden}")
        lower.set_xlabel("tokens per rank")
        for axis in (upper, lower):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(tokens, [str(count) for count in tokens], minor=False)
            axis.grid(True, which="major", alpha=0.3)
        lower.set_yscale("log", base=2)
        for axis in (upper, lower):
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0][0].set_ylabel("dispatch + combine, ms (p50)")
    axes[1][0].set_ylabel("time / time of moe_efa")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(_title(found[0]), fontsize=10)
    return figure


def _draw_bars(pyplot: Any, result: dict[str, Any]) -> Any:
    """One shape: times by phase, and ratios."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    times = _times(result)
    parties = [party for party in _PARTIES if party[0] in times]
    width = 0.8 / len(parties)
    for i, (name, label, colour, _) in enumerate(parties):
        places = [PHASES.index(phase) + (i - (len(parties) - 1) / 2) * width for phase in times[name]]
        bars = left.bar(places, times[name].values(), width, color=colour, label=label)
        left.bar_label(bars, fmt="%.3g", fontsize=7)
        for phase, value in times[name].items() if name != "moe_efa" else ():
            place = PHASES.index(phase) + (i - (len(parties) - 1) / 2) * width
            right.bar_label(
                right.bar(place, value / times["moe_efa"][phase], width, color=colour), fmt="%.2f", fontsize=7
            )
    right.axhline(1.0, color="#0072b2", linewidth=1)
    for axis, text in ((left, "ms (p50, slowest rank)"), (right, "time / time of moe_efa")):
        axis.set_xticks(range(len(PHASES)), PHASES)
        axis.set_yscale("log")
        axis.set_ylabel(text)
        axis.grid(True, axis="y", alpha=0.3)
        axis.margins(y=0.12)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    c = result["conditions"]
    figure.suptitle(f"{c['ranks']} ranks, T={c['tokens']}, H={c['hidden']}: {_title(result)}", fontsize=10)
    return figure


def _title(result: dict[str, Any]) -> str:
    c = result["conditions"]
    return (
        f"moe_efa {c['version']}: top-{c['topk']} of {c['experts']} experts, {c['dtype']}, routing {c['routing']}, "
        f"{c['cores']} cores"
    )
