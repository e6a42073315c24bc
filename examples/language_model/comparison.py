"""One rank against several, and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from language_model.text import Text
from language_model.training import Run, TrainConfig, all_sum, train

FIRST_STEPS = 20  # as many losses are compared one by one


def compare(config: TrainConfig, text: Text, group: dist.ProcessGroup, *, free: bool = True) -> dict[str, Any]:
    """One rank against all: rank 0 trains alone, then all train with its routing pinned, then with their own.

    Returns:
        on every rank: the runs ``one_rank``, ``pinned`` and (if ``free``) ``parallel``, and a ``report``.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    alone: list[Any] = [None]
    if rank == 0:
        alone = [train(config, text, None, label="one rank")]
    dist.broadcast_object_list(alone, group=group)
    one_rank: Run = alone[0]
    routes = [step.chunk(num_ranks, dim=1)[rank] for step in one_rank.routes]
    first = min(FIRST_STEPS, config.steps)
    pinned = train(config, text, group, routes=routes, stop_after=first, label=f"{num_ranks} ranks, routing pinned")
    report: dict[str, Any] = {
        "first_losses": first,
        "pinned_max_relative_difference": relative(pinned.losses[:first], one_rank.losses[:first]),
        "pinned_max_relative_difference_of_gradient_norms": relative(
            pinned.grad_norms[:first], one_rank.grad_norms[:first]
        ),
    }
    runs = {"one_rank": one_rank, "pinned": pinned}
    if free:
        parallel = runs["parallel"] = train(config, text, group, label=f"{num_ranks} ranks")
        flips = torch.tensor(
            [[count_flips(a, b), len(a.flatten())] for a, b in zip(parallel.routes, routes, strict=True)]
        )
        flips = all_sum(flips, group)
        report |= {
            "free_final_relative_difference": relative(parallel.losses[-1:], one_rank.losses[-1:]),
            "free_held_out_relative_difference": relative([parallel.held_out_loss], [one_rank.held_out_loss]),
            "routing_flips": int(flips[:, 0].sum()),
            "routing_flips_of_first_losses": int(flips[:first, 0].sum()),
            "selections": int(flips[:, 1].sum()),
        }
    return {**runs, "report": report}


def relative(values: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


def count_flips(mine: Tensor, other: Tensor) -> int:
    """Selections [..., K] of mine that are not in other's, whatever their order."""
    return int((mine[..., :, None] != other[..., None, :]).all(-1).sum())


def require_matplotlib() -> Any:
    """pyplot, or an end with the cure; asked for before the training rather than after it."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'moe_efa[examples]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot(runs: dict[str, Run], path: Path, title: str) -> None:
    """The losses of the runs over the steps, as a picture."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, run), style in zip(runs.items(), ("-", "--", ":"), strict=False):
        axes.plot(range(1, len(run.losses) + 1), run.losses, style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
