"""From the sections' files to one document, a table for people, and an exit status."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import results
from .budget import Outcome
from .results import UNFUSED_PAIR, Bar

PAIR_SPEEDUP = 3.0
OK, WRONG, CANNOT_TELL = 0, 1, 2


def assemble(folder: Path, outcomes: Sequence[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    """All that is known so far."""
    document: dict[str, Any] = {**facts, "sections": [asdict(outcome) for outcome in outcomes]}
    document |= {"measured": {}, "checks": [], "cases": [], "notes": []}
    cases: dict[str, dict[str, Any]] = {}
    others: dict[str, dict[str, dict[str, Any]]] = {}
    for outcome in outcomes:
        for record in results.read(folder / f"{outcome.name}.jsonl"):
            kind = record.pop("kind")
            if kind == "facts":
                document["measured"] |= record["values"]
            elif kind == "note":
                document["notes"].append(f"{outcome.name}: {record['text']}")
            elif kind == "check":
                document["checks"].append({"section": outcome.name, **record})
            elif kind == "timed":
                cases[record["name"]] = {"section": outcome.name, **record}
            elif kind == "peer":
                others.setdefault(record.pop("case"), {})[record.pop("name")] = record
    for name, case in cases.items():
        case["peers"] = {peer: _against(case, found) for peer, found in others.get(name, {}).items()}
        case["bars"] += [{**asdict(bar), "passed": bar.passed} for bar in _peer_bars(case)]
    document["cases"] = list(cases.values())
    return document


def _against(case: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    return {**peer, "peer_over_ours": None if peer["us"] is None else peer["us"] / case["us"]}


def _peer_bars(case: dict[str, Any]) -> Iterable[Bar]:
    """Faster than everybody; three times as fast as the pair of operators that a fused kernel replaces."""
    for name, peer in case["peers"].items():
        if peer["peer_over_ours"] is not None:
            least = PAIR_SPEEDUP if name == UNFUSED_PAIR else 1.0
            yield Bar(what=f"{name} / ours", value=peer["peer_over_ours"], least=least)


def exit_status(document: dict[str, Any], correctness: Sequence[str]) -> tuple[int, str]:
    """0 where all that counts agrees; what was missed in speed changes nothing.

    Args:
        correctness: names of the sections without which nothing can be said.
    """
    wrong = [check["name"] for check in document["checks"] if not check["ok"]]
    # A build that fails says nothing of the kernels: what needs it is left out.
    failed = [s["name"] for s in document["sections"] if s["status"] == "failed" and s["name"] != "build"]
    undone = [
        s["name"] for s in document["sections"] if s["name"] in correctness and s["status"] in ("cut", "left out")
    ]
    missing = [name for name in correctness if name not in {section["name"] for section in document["sections"]}]
    if wrong or failed:
        return WRONG, "; ".join(
            [f"wrong: {name}" for name in wrong[:10]] + [f"section failed: {name}" for name in failed]
        )
    if undone or missing or not document["checks"]:
        return CANNOT_TELL, f"not all was compared: {', '.join(undone + missing) or 'nothing was'}"
    return OK, f"all {len(document['checks'])} comparisons agree"


def write(document: dict[str, Any], target: Path) -> None:
    """Whole or not at all: whoever ends this leaves the document before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(target)


def format_table(document: dict[str, Any]) -> str:
    """What stands at the end of the output."""
    lines = ["", *_facts(document), "", *_times(document), "", *_peer_lines(document), "", *_bar_lines(document), ""]
    bad = [check for check in document["checks"] if not check["ok"]]
    lines.append(f"comparisons: {len(document['checks']) - len(bad)} of {len(document['checks'])} agree")
    lines += [f"  WRONG {check['name']}: {check['detail']}" for check in bad]
    for section in document["sections"]:
        if section["status"] != "done":
            lines.append(f"  section {section['name']}: {section['status']}, {section['detail']}")
    lines += [f"  {note}" for note in document["notes"] if "left out" in note or "claimed" in note or "not on" in note]
    return "\n".join(lines)


def _facts(document: dict[str, Any]) -> list[str]:
    measured = document["measured"]
    versions = ", ".join(f"{name} {document.get(name)}" for name in ("torch", "triton", "nvcc", "python"))
    lines = [f"{document.get('device', 'no device')}, driver {document.get('driver')}, {versions}"]
    if document.get("dry_run"):
        lines.append("DRY RUN: kernels on the CPU, tiny shapes; every time below is made up")
    if "copy_gb_per_s" in measured:
        lines.append(
            f"ceilings of this run: copy {measured['copy_gb_per_s']:.0f} GB/s (read + written), bf16 matmul "
            f"{measured['matmul_tflop_per_s']:.0f} TFLOP/s; smallest kernel {measured['smallest_kernel_us']:.1f} us"
        )
    if "flag_round_trip_us" in measured:
        lines.append(f"flag GPU -> CPU -> GPU: {measured['flag_round_trip_us']:.2f} us")
    lines.append("us: median, L2 flushed before each run; GB/s of the bytes that the floor counts; of: of that ceiling")
    return lines


def _times(document: dict[str, Any]) -> list[str]:
    width = max([len(case["name"]) for case in document["cases"]] + [20])
    lines = [f"{'case':<{width}}{'us':>11}{'p20':>11}{'p80':>11}{'MB':>10}{'rate':>16}{'of':>7}"]
    for case in document["cases"]:
        megabytes = "" if case["bytes"] is None else f"{case['bytes'] / 1e6:.1f}"
        rate = "" if case["rate"] is None else f"{case['rate']:.0f} {case['unit']}"
        fraction = "" if case["fraction"] is None else f"{case['fraction']:.2f}"
        lines.append(
            f"{case['name']:<{width}}{case['us']:>11.1f}{case['us_p20']:>11.1f}{case['us_p80']:>11.1f}"
            f"{megabytes:>10}{rate:>16}{fraction:>7}"
        )
        if case["section"] == "layer-share":
            n = case["numbers"]
            lines.append(
                f"    work {n['compute_us'] / 1e3:.2f} ms, wire {n['wire_us'] / 1e3:.2f} ms, together "
                f"{case['us'] / 1e3:.2f} ms, overlap {n['overlap_efficiency']:.2f}, "
                f"peak {n['peak_bytes'] / 2**30:.2f} GiB"
            )
    return lines


def _peer_lines(document: dict[str, Any]) -> list[str]:
    width = max([len(case["name"]) for case in document["cases"]] + [20])
    lines = [f"{'others':<{width}}  {'who':<42}{'us':>11}{'/ ours':>8}"]
    for case in document["cases"]:
        for name, peer in case["peers"].items():
            if peer["us"] is None:
                lines.append(f"{case['name']:<{width}}  {name:<42}{peer['note'][:60]}")
            else:
                lines.append(f"{case['name']:<{width}}  {name:<42}{peer['us']:>11.1f}{peer['peer_over_ours']:>8.2f}")
    return lines


def _bar_lines(document: dict[str, Any]) -> list[str]:
    bars = [(case["name"], bar) for case in document["cases"] for bar in case["bars"]]
    if not bars:
        return ["bars: none was measured"]
    passed = sum(bar["passed"] for _, bar in bars)
    lines = [f"bars: {passed} of {len(bars)} passed; missed:"]
    for name, bar in bars:
        if not bar["passed"]:
            wanted = f">= {bar['least']:g}" if bar["least"] is not None else f"<= {bar['most']:g}"
            lines.append(f"  MISS {name}: {bar['what']} {bar['value']:.2f}, wanted {wanted}")
    for name, bar in bars:
        if bar["passed"]:
            lines.append(f"  pass {name}: {bar['what']} {bar['value']:.2f}")
    return lines
