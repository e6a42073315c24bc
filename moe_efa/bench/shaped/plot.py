"""Draws a run: goodput beside plain sockets, and times of a round, by rate. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib
from typing import Any

from moe_efa.bench.measure import TITLES

_COLOURS = {"moe_efa": "#0072b2", "torch_per_expert": "#d55e00", "torch_lean": "#e69f00", "mpi": "#009e73"}
_SOCKETS = "#666666"
_GOODPUT_BAR = 0.90


def draw(result: dict[str, Any], target: str) -> None:
    """Write the picture of a summary."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    rates = result["rates"]
    labels = [f"{rate['gbit_per_s']:g} Gbit/s" for rate in rates]
    shares = [
        (f"{who}, {phase}", [rate["goodput"][phase][key] for rate in rates], colour, hatch)
        for phase, hatch in (("dispatch", ""), ("combine", "//"))
        for who, key, colour in (
            ("moe_efa", "of_link", _COLOURS["moe_efa"]),
            ("plain sockets", "sockets_of_link", _SOCKETS),
        )
    ]
    _bars(left, labels, shares)
    left.axhline(_GOODPUT_BAR, color=_COLOURS["moe_efa"], linestyle=":", linewidth=1)
    left.set_ylabel("goodput / rate of the link")
    names = [name for name in _COLOURS if name in rates[0]["times"]]
    times = [
        (TITLES.get(name, name), [rate["times"][name]["both"]["p50_us"] / 1e3 for rate in rates], _COLOURS[name], "")
        for name in names
    ]
    _bars(right, labels, times)
    right.set_ylabel("dispatch + combine, ms (p50, slowest rank)")
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    c = result["conditions"]
    figure.suptitle(
        f"moe_efa {c['version']}: {c['nodes']} namespaces of {c['ranks_per_node']} ranks, T={c['tokens']}, "
        f"H={c['hidden']}, top-{c['topk']} of {c['experts']}, {c['cores']} cores",
        fontsize=10,
    )
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, labels: list[str], groups: list[tuple[str, list[float], str, str]]) -> None:
    """Groups of bars side by side: (label, a value for each rate, colour, hatch)."""
    width = 0.8 / len(groups)
    for i, (label, values, colour, hatch) in enumerate(groups):
        places = [at + (i - (len(groups) - 1) / 2) * width for at in range(len(labels))]
        bars = axis.bar(places, values, width, color=colour, hatch=hatch, edgecolor="white", label=label)
        axis.bar_label(bars, fmt="{:.3g}" if max(values) < 10 else "{:.0f}", fontsize=7)
    axis.set_xticks(range(len(labels)), labels)
    axis.grid(True, axis="y", alpha=0.3)
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)
