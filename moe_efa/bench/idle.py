"""What a group costs when nobody calls it: CPU time of ranks that sleep."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from moe_efa.bench.inputs import make_inputs
from moe_efa.bench.options import BenchConfig
from moe_efa.bench.timing import gather
from moe_efa.expert_parallel import ExpertParallel

_SETTLE_S = 1.0  # threads stay awake for a moment after a round
_SLEEP_S = 5.0


def measure_idle(config: BenchConfig, sleep_s: float = _SLEEP_S) -> Iterator[dict[str, Any]]:
    """CPU seconds of every rank while it holds a group, after one round, and sleeps. Collective over the default group.

    As one node (no fabric, so no driver thread) if a host has all ranks, then as the configuration says.
    """
    group = dist.group.WORLD
    assert group is not None
    small = dataclasses.replace(config, tokens=min(config.tokens, 64))
    found = [_measure(dataclasses.replace(small, transport="auto", node_size=config.ranks), group, sleep_s)]
    if config.node_size != config.ranks:
        found.append(_measure(small, group, sleep_s))
    yield {"benchmark": "idle", "ranks": config.ranks, "sleep_s": sleep_s, "groups": found}


def _measure(config: BenchConfig, group: dist.ProcessGroup, sleep_s: float) -> dict[str, Any]:
    arguments: dict[str, Any] = config.expert_parallel().as_dict()
    with ExpertParallel(group, **arguments) as ep:
        mine = make_inputs(config, ep.rank, node_size=ep.node_size)
        d = ep.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        ep.combine(d.x, d.handle)
        time.sleep(_SETTLE_S)
        dist.barrier(group)
        cpu, wall = time.process_time(), time.monotonic()
        time.sleep(sleep_s)
        used = (time.process_time() - cpu) / (time.monotonic() - wall)
        nodes = config.ranks // ep.node_size
        transport = str(ep.info()["transport"])
    percent = [100 * share for share in gather(group, used)]
    return {"nodes": nodes, "transport": transport if nodes > 1 else "none", "cpu_percent": percent}


def format_idle(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"CPU time of {result['ranks']} ranks that hold a group and sleep {result['sleep_s']:g} s, per process"]
    for group in result["groups"]:
        percent = group["cpu_percent"]
        label = f"{group['nodes']} node(s)" + (f", {group['transport']}" if group["nodes"] > 1 else "")
        mean = sum(percent) / len(percent)
        lines.append(f"  {label:<44}most {max(percent):6.3f} %   mean {mean:6.3f} % of a core   (bar: below 1 %)")
    return "\n".join(lines)
