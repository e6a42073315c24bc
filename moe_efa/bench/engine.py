"""What the protocol engine costs by itself: the C++ state machine fed by hand, without network, rows or threads."""

from __future__ import annotations

from typing import Any

from moe_efa import _C
from moe_efa._version import __version__

_CHUNKS = 200_000
_NODES = (2, 8, 64)
_REPEATS = 5


def measure_engine(chunks: int = _CHUNKS) -> dict[str, Any]:
    """Microseconds per chunk sent and chunk received, for several numbers of nodes: the median of five runs.

    "alone" has the engine's state in the caches; "between_copies" copies the bytes of a chunk (64 rows of 7168 bf16)
    before each, untimed, as kernels do in a real round.
    """
    points = []
    for nodes in _NODES:
        costs = {}
        for name, copying in (("alone", False), ("between_copies", True)):
            count = chunks // 100 if copying else chunks  # a copy takes far longer than what is measured
            runs = [_C.engine_cost(count, num_nodes=nodes, copying=copying) for _ in range(_REPEATS)]
            costs[f"{name}_us"] = sorted(run["us_per_chunk"] for run in runs)[_REPEATS // 2]
        points.append({"nodes": nodes, **costs, "events_per_chunk": runs[0]["events_per_chunk"]})
    return {"benchmark": "engine", "version": __version__, "chunks": chunks, "points": points}


def format_engine(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"moe_efa {result['version']}: the engine on one core, per chunk sent and chunk received, with its completion,",
        "arrival, release and credits (bar: at most 1 us)",
        f"  {'nodes':>6}{'alone':>12}{'between copies':>18}{'events':>9}",
    ]
    for point in result["points"]:
        alone, between, events = (point[name] for name in ("alone_us", "between_copies_us", "events_per_chunk"))
        lines.append(f"  {point['nodes']:>6}{alone:>9.3f} us{between:>15.3f} us{events:>9.2f}")
    return "\n".join(lines)
