"""Draws the fraction of its ceiling that each kernel reaches. Needs matplotlib."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

BAR = 0.9
_COLOURS = ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#666666")  # told apart in print too


def available() -> bool:
    """Is matplotlib here?"""
    return importlib.util.find_spec("matplotlib") is not None


def draw(document: dict[str, Any], target: Path) -> None:
    """A group of bars for each kernel, one bar for each shape; matrix products in a panel of their own."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    cases = [case for case in document["cases"] if case["fraction"] is not None]
    panels = [
        ("of the copy ceiling", [case for case in cases if case["flops"] is None]),
        ("of the bf16 matmul ceiling", [case for case in cases if case["flops"] is not None]),
    ]
    panels = [(title, found) for title, found in panels if found]
    heights = [max(2.0, 0.16 * len(found) + 1.0) for _, found in panels] or [2.0]
    figure, axes = pyplot.subplots(
        max(1, len(panels)),
        1,
        figsize=(9.5, sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, found) in zip(axes[:, 0], panels, strict=False):
        _panel(axis, title, found)
    device = document.get("device", "")
    text = f"{device}, torch {document.get('torch')}, triton {document.get('triton')}, {document.get('date')}"
    figure.suptitle(("DRY RUN, times are made up: " if document.get("dry_run") else "") + text, fontsize=9)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _panel(axis: Any, title: str, cases: list[dict[str, Any]]) -> None:
    kernels = list(dict.fromkeys(case["kernel"] for case in cases))
    shapes = list(dict.fromkeys(case["name"].partition("/")[2] for case in cases))
    place, ticks = 0.0, []
    for kernel in kernels:
        of_kernel = [case for case in cases if case["kernel"] == kernel]
        ticks.append(place + (len(of_kernel) - 1) / 2)
        for case in of_kernel:
            shape = case["name"].partition("/")[2]
            colour = _COLOURS[shapes.index(shape) % len(_COLOURS)]
            label = shape if not any(text.get_label() == shape for text in axis.containers) else None
            bars = axis.barh(place, case["fraction"], 0.85, color=colour, label=label)
            axis.bar_label(bars, fmt="%.2f", fontsize=6)
            place += 1
        place += 0.8
    axis.axvline(BAR, color="#666666", linestyle=":", linewidth=1)
    axis.set_yticks(ticks, kernels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, max(1.05, 1.1 * max(case["fraction"] for case in cases)))
    axis.set_xlabel(f"fraction {title}")
    axis.legend(fontsize=6, loc="lower right", frameon=False)
    axis.grid(True, axis="x", alpha=0.3)
