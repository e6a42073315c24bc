"""The result of one configuration for people; JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moe_efa.bench.timing import PHASES


def report(text: str, result: dict[str, Any], json_target: str | None) -> None:
    """Print the text, and write JSON where it was asked for: "-" is stdout, and the text then goes to stderr."""
    print(text, file=sys.stderr if json_target == "-" else sys.stdout, flush=True)
    if json_target is None:
        return
    document = json.dumps(result, indent=2)
    if json_target == "-":
        print(document, flush=True)
    else:
        Path(json_target).write_text(document + "\n")


def format_table(result: dict[str, Any]) -> str:
    """The result for people."""
    c, checks, baselines, floor = (result[key] for key in ("conditions", "checks", "baselines", "copy_floor"))
    facts = [
        ("ranks", f"{c['ranks']} in {c['nodes']} nodes of {c['node_size']}, on {c['hosts']} host(s)"),
        ("between nodes", c["transport"] if c["nodes"] > 1 else "nothing (one node)"),
        ("shape", f"T={c['tokens']} per rank, H={c['hidden']}, K={c['topk']}, E={c['experts']}, {c['dtype']}"),
        ("on the wire", f"dispatch {c['wire_dtype']}, combine {c['combine_dtype']}"),
        ("routing", c["routing"]),
        ("", f"most rows / mean: {c['imbalance_ranks']:.2f} of a rank, {c['imbalance_experts']:.2f} of an expert"),
        ("rings", f"{c['slots']} slots of {c['chunk_rows']} rows, {c['registered_bytes'] / 2**20:.0f} MiB per rank"),
        ("device", c["device"]),
        ("host", f"{c['cores']} cores ({c['machine']}), {c['threads_per_rank']} kernel thread(s) per rank"),
        ("torch", f"{c['torch']}, {c['torch_threads']} thread(s) per rank"),
        *mpi_facts(result["mpi"]),
        ("iterations", f"{c['iterations']} after {c['warmup']} for warming up, seed {c['seed']}"),
        ("checked", checks["small"]),
        ("", f"measured shape against fp32: largest error {checks['full_error_of_bound']:.2f} of the rounding bound"),
    ]
    if checks["baselines_agree"]:
        facts.append(("", f"{', '.join(checks['baselines_agree'])}: equal rows, equal sums within rounding"))
    lines = [f"moe_efa {c['version']}: dispatch and combine"]
    lines += [f"  {name:<14}{text}" for name, text in facts]
    lines += [
        "counted         time of the slowest rank per iteration, barrier before each untimed; no expert compute",
        "                GB/s per rank at p50: rows = rows received x H x element; wire = bytes sent to other nodes",
        "",
        f"  {'':<36}{'p50':>11}{'p95':>11}{'max':>11}{'rows GB/s':>11}{'wire GB/s':>11}",
    ]
    for phase in PHASES:
        rates = result["rates"][phase]
        tail = f"{rates['logical_gb_per_s']:>11.2f}{rates['wire_gb_per_s']:>11.2f}"
        lines.append(_row(f"moe_efa {phase}", result["moe_efa"][phase]) + tail)
    for baseline in baselines.values():
        for when, meaning in (("before", "alone"), ("in_turn", "in turn")):
            for phase in PHASES:
                if when in baseline:
                    lines.append(_row(f"{baseline['title']} {phase} ({meaning})", baseline[when][phase]))
    if floor:
        lines.append(_row(f"copy floor ({floor['bytes_per_rank'] / 1e6:.0f} MB per rank)", floor))
    lines += ["", *_wire_lines(result["wire"])]
    if baselines:
        lines += ["", *_ratio_lines(result)]
    return "\n".join(lines)


def mpi_facts(mpi: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Label and text of what the MPI version ran with, or why it did not; empty if nobody asked for it."""
    if mpi is None:
        return []
    if not mpi["available"]:
        return [("MPI", f"not available: {mpi['reason']}")]
    copies = "single copy (CMA)" if mpi["single_copy"] else "two copies (no CMA here)"
    between = ", TCP between nodes" if mpi.get("tcp") else ""
    return [("MPI", f"{mpi['library']}, shared memory{between}, {copies}"), ("", f"mpirun {mpi['mpirun']}")]


def _wire_lines(wire: dict[str, Any]) -> list[str]:
    lines = [f"  {'bytes per round, all ranks':<36}{'sent':>11}{'floor':>11}{'ratio':>11}"]
    for phase in PHASES:
        numbers = wire if phase == "both" else wire[phase]
        ratio = "-" if numbers["ratio"] is None else f"{numbers['ratio']:.4f}"
        label = f"wire {phase}"
        sent, least = numbers["bytes"] / 1e6, numbers["floor_bytes"] / 1e6
        lines.append(f"  {label:<36}{sent:>8.2f} MB{least:>8.2f} MB{ratio:>11}")
    return lines


def _ratio_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"  {'ratios of p50':<36}{'dispatch':>11}{'combine':>11}{'both':>11}"]
    for name, baseline in result["baselines"].items():
        label = f"{baseline['title']} / moe_efa"
        cells = "".join(f"{result['ratios'][name][phase]:>11.2f}" for phase in PHASES)
        lines.append(f"  {label:<36}{cells}" + ("   (the faster of two runs)" if "before" in baseline else ""))
    if result["ratios"]["copy_floor"] is not None:
        lines.append(f"  {'copy floor / moe_efa':<36}{'':>22}{result['ratios']['copy_floor']:>11.2f}")
    return lines


def _row(label: str, timing: dict[str, float]) -> str:
    cells = "".join(f"{duration(timing[key]):>11}" for key in ("p50_us", "p95_us", "max_us"))
    return f"  {label:<36}{cells}"


def duration(microseconds: float) -> str:
    """With a unit.

    >>> duration(12.34), duration(12345.6)
    ('12.3 us', '12.35 ms')
    """
    return f"{microseconds:.1f} us" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"
