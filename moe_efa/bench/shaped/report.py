"""What the times and bytes of a run say: goodput, ratios and bars; for JSON and for people."""

from __future__ import annotations

from typing import Any, NamedTuple

from moe_efa.bench.measure import TITLES
from moe_efa.bench.report import duration, mpi_facts
from moe_efa.bench.shaped.options import ShapedConfig
from moe_efa.bench.timing import PHASES

_WAYS = ("dispatch", "combine")
_ROWS = {"torch_per_expert": "per_expert", "torch_lean": "per_rank", "mpi": "per_rank", "moe_efa": "per_node"}
_BAR_RATE = 1.0  # Gbit/s at which most bars hold
_LEAST_WAVES = 6


class Verdict(NamedTuple):
    """A bar, and the value that is to reach it; None where it was not measured under the bar's conditions."""

    title: str
    gbit_per_s: float
    least: float
    value: float | None
    why_not: str = ""


def summary(config: ShapedConfig, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything as JSON. ``found``: what the ranks left, one for each rate."""
    rates = [_derived(result, config) for result in found]
    first = found[0]
    return {
        "benchmark": "shaped_link",
        "conditions": {**config.as_dict(), "ranks": config.nodes * config.ranks_per_node, **first["host"]},
        "checks": first["checks"],
        "mpi": first["mpi"],
        "rates": rates,
        "bars": [verdict._asdict() for rate in rates for verdict in _verdicts(config, rate)],
    }


def _derived(result: dict[str, Any], config: ShapedConfig) -> dict[str, Any]:
    rate = result["gbit_per_s"]
    times = {
        name: {phase: timing["p50_us"] for phase, timing in phases.items()} for name, phases in result["times"].items()
    }
    goodput: dict[str, Any] = {}
    for phase in _WAYS:
        wire = result["wire"][phase]
        ours = times["moe_efa"][phase]
        goodput[phase] = {
            "of_link": _gbit_per_s(wire["bytes"], ours) / rate,
            "floor_of_link": _gbit_per_s(wire["floor_bytes"], ours) / rate,
            "sockets_of_link": _gbit_per_s(result["sockets_bytes"][phase], times["sockets"][phase]) / rate,
            "of_sockets": times["sockets"][phase] / ours,
            "of_sockets_and_copies": (times["sockets"][phase] + times["copies"][phase]) / ours,
        }
    fp8 = result["fp8_wire"]["dispatch"]
    goodput["fp8_dispatch"] = {
        "of_link": _gbit_per_s(fp8["bytes"], times["fp8"]["dispatch"]) / rate,
        "floor_of_link": _gbit_per_s(fp8["floor_bytes"], times["fp8"]["dispatch"]) / rate,
    }
    row_bytes = config.bench().row_bytes
    per_round = {name: 2 * row_bytes * result["floor_rows"][rows] for name, rows in _ROWS.items() if name in times}
    others = [name for name in times if name in TITLES]
    ratios = {
        name: {
            **{phase: times[name][phase] / times["moe_efa"][phase] for phase in PHASES},
            "row_bytes": _ratio(per_round[name], per_round["moe_efa"]),
            "link_bytes": _ratio(result["link_bytes_per_round"][name], result["link_bytes_per_round"]["moe_efa"]),
        }
        for name in others
    }
    return {
        **{key: value for key, value in result.items() if key not in ("checks", "mpi", "host")},
        "goodput": goodput,
        "row_bytes_per_round": per_round,
        "ratios": ratios,
        "fp8_speedup": times["moe_efa"]["dispatch"] / times["fp8"]["dispatch"],
    }


def _gbit_per_s(count: float, microseconds: float) -> float:
    return 8e-3 * count / microseconds


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _verdicts(config: ShapedConfig, rate: dict[str, Any]) -> list[Verdict]:
    """The bars that hold at this rate."""
    gbit, goodput = rate["gbit_per_s"], rate["goodput"]
    if gbit != _BAR_RATE:
        return [
            Verdict(f"{title} / moe_efa's, {phase}", gbit, 1.0, goodput[phase][key])
            for key, title in (("of_sockets", "plain sockets' time"), ("of_sockets_and_copies", "sockets' + copies'"))
            for phase in _WAYS
        ]
    bars = [Verdict(f"goodput of the link, {phase}", gbit, 0.90, goodput[phase]["of_link"]) for phase in _WAYS]
    bars.append(Verdict("bf16 dispatch / FP8 dispatch", gbit, 1.8, rate["fp8_speedup"]))
    title, overlap = f"overlap of {config.waves} waves, timed wait", rate["overlap"]
    if not overlap["available"]:
        bars.append(Verdict(title, gbit, 0.8, None, overlap["reason"]))
    elif config.waves < _LEAST_WAVES:
        bars.append(Verdict(title, gbit, 0.8, None, f"the bar is for at least {_LEAST_WAVES} waves"))
    else:
        bars.append(Verdict(title, gbit, 0.8, overlap["wait"]["overlap"]))
    title, bar_shape = "torch per-expert / moe_efa, both", (2, 4, 8)
    if not config.baseline:
        bars.append(Verdict(title, gbit, 3.4, None, "without --no-baseline it would be"))
    elif (config.nodes, config.ranks_per_node, config.topk) == bar_shape:
        bars.append(Verdict(title, gbit, 3.4, rate["ratios"]["torch_per_expert"]["both"]))
    else:
        bars.append(Verdict(title, gbit, 3.4, None, "the bar is for 2 nodes of 4 ranks, K=8"))
    return bars


def format_tables(result: dict[str, Any]) -> str:
    """For people."""
    c, checks = result["conditions"], result["checks"]
    errors = ", ".join(f"{name} {value:.2f}" for name, value in checks["full_error_of_bound"].items())
    middle = "a veth pair" if c["nodes"] == 2 else "veth pairs to a bridge"
    facts = [
        ("ranks", f"{c['ranks']} in {c['nodes']} namespaces of {c['ranks_per_node']}, {c['transport']}"),
        ("links", f"{middle}, tbf at both ends, MTU {c['mtu']}, TCP {c['tcp']}"),
        ("shape", f"T={c['tokens']} per rank, H={c['hidden']}, K={c['topk']}, E={c['experts']}, bf16, uniform routing"),
        ("rings", f"{c['slots']} slots of {c['chunk_rows']} rows, {c['registered_bytes'] / 2**20:.0f} MiB per rank"),
        (
            "host",
            f"{c['cores']} cores ({c['machine']}, {c['kernel']}), {c['threads_per_rank']} kernel thread(s) per rank",
        ),
        ("torch", f"{c['torch']}, {c['torch_threads']} thread(s) per rank"),
        *mpi_facts(result["mpi"]),
        ("iterations", f"{c['iters']} after {c['warmup']} for warming up, seed {c['seed']}"),
        ("checked", checks["small"]),
        ("", f"measured shape against fp32: largest error over the rounding bound {errors}"),
    ]
    if checks["baselines_agree"]:
        facts.append(("", f"{', '.join(checks['baselines_agree'])}: equal rows, equal sums within rounding"))
    lines = [f"moe_efa {c['version']}: dispatch and combine over shaped links"]
    lines += [f"  {name:<14}{text}" for name, text in facts]
    lines += [
        "counted         p50 of the slowest rank; no expert compute but in the lines on overlap",
        "                of link = bytes that the busiest node wrote / time / rate: one direction, while both are busy",
        "                plain sockets: the same bytes over one TCP connection per pair of rail peers",
        "                copies alone: the rows that a phase stores or reads in memory, all ranks at once, no network",
    ]
    for rate in result["rates"]:
        lines += ["", *_rate_lines(rate)]
    lines += ["", "  bars"]
    for bar in result["bars"]:
        lines.append(f"  {bar['title']:<44}{bar['gbit_per_s']:>4g} Gbit/s  {_judged(bar)}")
    return "\n".join(lines)


def _judged(bar: dict[str, Any]) -> str:
    if bar["value"] is None:
        return f"bar {bar['least']:g}: not measured ({bar['why_not']})"
    return f"{bar['value']:>6.2f}  bar {bar['least']:g}: " + ("reached" if bar["value"] >= bar["least"] else "below")


def _rate_lines(rate: dict[str, Any]) -> list[str]:
    times, goodput = rate["times"], rate["goodput"]
    lines = [
        f"  {rate['gbit_per_s']:g} Gbit/s{'':<20}{'p50':>11}{'max':>11}{'bytes':>11}{'of link':>9}{'of sockets':>12}"
    ]

    def line(label: str, timing: dict[str, float], count: float | None = None, *shares: float | None) -> None:
        cells = "".join(f"{duration(timing[key]):>11}" for key in ("p50_us", "max_us"))
        cells += f"{'' if count is None else f'{count / 1e6:.2f} MB':>11}"
        for width, share in zip((9, 12), shares, strict=False):
            cells += f"{'' if share is None else f'{share:.3f}':>{width}}"
        lines.append(f"  {label:<28}{cells}".rstrip())

    for phase in _WAYS:
        found = goodput[phase]
        count = rate["wire"][phase]["bytes"]
        line(f"moe_efa {phase}", times["moe_efa"][phase], count, found["of_link"], found["of_sockets"])
    line("moe_efa both", times["moe_efa"]["both"])
    fp8 = goodput["fp8_dispatch"]["of_link"]
    line("moe_efa FP8 dispatch", times["fp8"]["dispatch"], rate["fp8_wire"]["dispatch"]["bytes"], fp8)
    for phase in _WAYS:
        share = goodput[phase]["sockets_of_link"]
        line(f"plain sockets, {phase}", times["sockets"][phase], rate["sockets_bytes"][phase], share)
    for phase in _WAYS:
        line(f"copies alone, {phase}", times["copies"][phase])
    for name in rate["ratios"]:
        for phase in PHASES:
            line(f"{TITLES[name]} {phase}", times[name][phase])
    if rate["ratios"]:
        lines.append(
            f"  {'over moe_efa':<28}{'dispatch':>11}{'combine':>11}{'both':>11}{'row bytes':>11}{'link bytes':>12}"
        )
    for name, ratios in rate["ratios"].items():
        cells = "".join(f"{ratios[phase]:>11.2f}" for phase in PHASES)
        for key, width in (("row_bytes", 11), ("link_bytes", 12)):
            cells += f"{'-' if ratios[key] is None else format(ratios[key], '.2f'):>{width}}"
        lines.append(f"  {TITLES[name]:<28}{cells}")
    lines.append(f"  bf16 dispatch / FP8 dispatch{rate['fp8_speedup']:>11.2f}")
    overlap = rate["overlap"]
    if not overlap["available"]:
        lines.append(f"  overlap: not available ({overlap['reason']})")
        return lines
    head = "".join(f"{title:>11}" for title in ("comm", "compute", "together", "overlap"))
    waves = f"ep.moe in {overlap['waves']} waves"
    lines.append(f"  {waves:<28}{head}")
    experts = f"SwiGLU, inner size {overlap['experts']['inner']}"
    for label, found in (("timed wait", overlap["wait"]), (experts, overlap["experts"])):
        cells = "".join(f"{duration(found[key]):>11}" for key in ("comm_us", "compute_us", "together_us"))
        lines.append(f"  {label:<28}{cells}{found['overlap']:>11.2f}")
    return lines
