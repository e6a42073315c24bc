"""The measurement of one configuration, and of several one after another. Collective over the default group."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_efa import env
from moe_efa._version import __version__
from moe_efa.bench.check import check_baselines, check_full, check_small, raise_together, sums_agree
from moe_efa.bench.copy_floor import CopyFloor, RowCounts, count_rows, row_widths
from moe_efa.bench.exchange import Exchange, MoeEfaExchange
from moe_efa.bench.inputs import make_inputs
from moe_efa.bench.lean import LeanExchange, torch_all_to_all
from moe_efa.bench.memory import check_memory
from moe_efa.bench.mpi_job import MpiError, MpiJob, MpiNetwork
from moe_efa.bench.options import BenchConfig
from moe_efa.bench.progress import Progress
from moe_efa.bench.routing import Imbalance
from moe_efa.bench.timing import PHASES, Timer, Timing, gather, phases_of, timed_round
from moe_efa.bench.torch_per_expert import TorchPerExpert
from moe_efa.errors import ConfigError
from moe_efa.expert_parallel import ExpertParallel

TITLES = {"torch_per_expert": "torch per-expert", "torch_lean": "torch lean", "mpi": "MPI_Alltoallv"}


class Host:
    """What this rank's host is, and the MPI ranks on it (rank 0 holds them; ``mpi_facts`` is the same everywhere).

    ``mpi_network`` is for nodes that are network namespaces of one host.
    """

    def __init__(self, group: dist.ProcessGroup, config: BenchConfig, *, mpi_network: MpiNetwork | None = None) -> None:
        self.names = gather(group, platform.node())
        self.ranks_here = self.names.count(platform.node())
        self.threads = env.num_threads(self.ranks_here)
        if config.device == "cuda":
            if not torch.cuda.is_available():
                raise ConfigError("--device cuda, but torch finds no GPU here")
            torch.cuda.set_device(self.names[: dist.get_rank()].count(platform.node()) % torch.cuda.device_count())
        self.mpi: MpiJob | None = None
        self.mpi_facts: dict[str, Any] | None = None
        if not config.mpi:
            return
        facts: dict[str, Any] = {}
        if dist.get_rank() == 0:
            try:
                if len(set(self.names)) > 1:
                    raise MpiError("the MPI version runs on one host only")
                self.mpi = MpiJob(config, threads=self.threads, network=mpi_network)
                facts = {"available": True, **self.mpi.facts, "mpirun": " ".join(self.mpi.settings)}
                facts["tcp"] = mpi_network is not None
            except MpiError as error:
                facts = {"available": False, "reason": str(error)}
        self.mpi_facts = gather(group, facts)[0]

    def ask_mpi(self, group: dist.ProcessGroup, question: Callable[[MpiJob], Any]) -> Any:
        """What the MPI ranks answer to rank 0. Collective: the others wait, and get the answer or the MpiError too."""
        answer: Any = None
        if self.mpi is not None:
            try:
                answer = question(self.mpi)
            except MpiError as error:
                answer = error
        answer = gather(group, answer)[0]
        if isinstance(answer, MpiError):
            raise answer
        return answer

    def close(self) -> None:
        if self.mpi is not None:
            self.mpi.close()


def measure_all(configs: Sequence[BenchConfig]) -> Iterator[dict[str, Any]]:
    """Check, then time, one configuration after another; every rank gets the results.

    Args:
        configs: of equal ranks, and of equal mpi and mpi_args.

    Raises:
        CheckError, ConfigError, TransportError: on every rank.
    """
    group = dist.group.WORLD
    assert group is not None
    host = Host(group, configs[0])
    try:
        for i, config in enumerate(configs):
            where = f"T={config.tokens} H={config.hidden}"
            what = "" if len(configs) == 1 else f"[{config.ranks} ranks, {i + 1}/{len(configs)}: {where}]"
            yield _measure(config, group, host, what)
    finally:
        host.close()


def _measure(config: BenchConfig, group: dist.ProcessGroup, host: Host, what: str) -> dict[str, Any]:
    rank = dist.get_rank()
    torch.set_num_threads(host.threads)
    progress = Progress((config.warmup + config.iters) * (2 if config.baseline else 1), visible=rank == 0, what=what)
    timer = Timer(group, progress, config.device)

    progress.stage("checking a small shape")
    small, node_size = check_small(config, group)
    _check_fits(config, group, host, node_size)
    mine = make_inputs(config, rank, node_size=node_size)
    selections = gather(group, mine.topk_idx)

    baselines: dict[str, Exchange] = {}
    if config.baseline:
        baselines["torch_per_expert"] = TorchPerExpert(config.ranks, config.experts)
        baselines["torch_lean"] = LeanExchange(config.ranks, config.experts, torch_all_to_all, reuse_results=True)

    def baseline_rounds() -> None:
        for name, exchange in baselines.items():
            timed_round(exchange, mine, timer.steps_of(name))

    runs: dict[str, dict[str, dict[str, Timing]]] = {name: {} for name in baselines}
    if baselines:
        progress.stage("torch.distributed, before moe_efa has any thread")
        alone = timer.repeat(baseline_rounds, warmup=config.warmup, iters=config.iters)
        for name in baselines:
            runs[name]["before"] = phases_of(alone, name)

    with_mpi = host.mpi_facts is not None and bool(host.mpi_facts["available"])
    arguments: dict[str, Any] = config.expert_parallel().as_dict()
    with ExpertParallel(group, **arguments) as ep:
        progress.stage("checking the measured shape")
        error_of_bound = check_full(config, group, ep, mine)
        if baselines:
            named = {TITLES[name]: exchange for name, exchange in baselines.items()}
            digest, sums = check_baselines(config, group, ep, mine, named)
            if with_mpi:
                check_mpi(config, group, host, node_size, digest, lambda mpi: sums_agree(config, mine, sums, mpi))
            del sums
        ours, mine_there = MoeEfaExchange(ep), mine.to(ep.device)
        rows = count_rows(selections, rank=rank, node_size=node_size, num_experts=config.experts)
        copies = CopyFloor(rows, row_widths(config)) if config.baseline else None

        def whole_round() -> None:
            # In turn, so that whatever else the host does meets all of them alike.
            timed_round(ours, mine_there, timer.steps_of("moe_efa"))
            baseline_rounds()
            if with_mpi:
                for phase, seconds in host.ask_mpi(group, MpiJob.round).items():
                    timer.record(f"mpi {phase}", seconds)
            if copies is not None:
                copies.copy()
                with timer.step("copy"):
                    copies.copy()

        in_turn = ["moe_efa", *(TITLES[name] for name in [*baselines, *(["mpi"] if with_mpi else [])])]
        progress.stage("moe_efa" if copies is None else f"{', '.join(in_turn)} and the copy floor in turn")
        before = ep.stats()
        timings = timer.repeat(whole_round, warmup=config.warmup, iters=config.iters)
        after = ep.stats()
        info = ep.info()
    for name in baselines:
        runs[name]["in_turn"] = phases_of(timings, name)
    if with_mpi:
        runs["mpi"] = {"in_turn": phases_of(timings, "mpi")}
    progress.close()

    our_timings, floor = phases_of(timings, "moe_efa"), timings.get("copy")
    wire = _wire(group, before, after)
    all_rows = gather(group, rows)
    # The faster of a baseline's runs, phase by phase.
    best = {
        name: {phase: min(runs_of, key=lambda when: runs_of[when][phase].p50_s) for phase in PHASES}
        for name, runs_of in runs.items()
    }
    imbalance = Imbalance.of(selections, experts=config.experts)
    return {
        "benchmark": "dispatch_combine",
        "conditions": {
            "version": __version__,
            "ranks": config.ranks,
            "nodes": config.ranks // node_size,
            "node_size": node_size,
            "hosts": len(set(host.names)),
            "transport": str(info["transport"]),
            "tokens": config.tokens,
            "hidden": config.hidden,
            "topk": config.topk,
            "experts": config.experts,
            "dtype": config.dtype,
            "device": info["device"] or "cpu",
            "wire_dtype": config.wire_dtype,
            "combine_dtype": config.combine_dtype,
            "fp8_scale": config.fp8_scale,
            "routing": config.routing.text(config.ranks // node_size),
            "imbalance_ranks": imbalance.ranks,
            "imbalance_experts": imbalance.experts,
            "iterations": config.iters,
            "warmup": config.warmup,
            "seed": config.seed,
            "chunk_rows": info["chunk_rows"],
            "slots": info["slots"],
            "registered_bytes": info["registered_bytes"],
            "cores": len(os.sched_getaffinity(0)),
            "threads_per_rank": info["num_threads"],
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "checks": {
            "small": small,
            "full_error_of_bound": error_of_bound,
            "baselines_agree": [TITLES[name] for name in runs],
        },
        "moe_efa": {phase: timing.as_us() for phase, timing in our_timings.items()},
        "rates": _rates(our_timings, all_rows, wire, config.row_bytes),
        "wire": wire,
        "baselines": {
            name: {
                "title": TITLES[name],
                "best": best[name],
                **{when: {phase: timing.as_us() for phase, timing in run.items()} for when, run in runs_of.items()},
            }
            for name, runs_of in runs.items()
        },
        "mpi": host.mpi_facts,
        "copy_floor": None
        if floor is None
        else {
            **floor.as_us(),
            "bytes_per_rank": max(row.bytes_of(row_widths(config)) for row in all_rows),
            "rows": {name: max(row._asdict()[name] for row in all_rows) for name in RowCounts._fields},
        },
        "ratios": {
            **{name: _ratios(runs[name], best[name], our_timings) for name in runs},
            "copy_floor": floor.p50_s / our_timings["both"].p50_s if floor else None,
        },
    }


def _ratios(runs: dict[str, dict[str, Timing]], best: dict[str, str], ours: dict[str, Timing]) -> dict[str, float]:
    """A baseline's time over ours, by phase."""
    return {phase: runs[when][phase].p50_s / ours[phase].p50_s for phase, when in best.items()}


def _check_fits(config: BenchConfig, group: dist.ProcessGroup, host: Host, node_size: int) -> None:
    """Raise ConfigError on every rank if this routing or this shape cannot work on any of them. Collective."""
    problem = ""
    try:
        config.routing.check(topk=config.topk, experts=config.experts, num_nodes=config.ranks // node_size)
        check_memory(config, ranks_on_host=host.ranks_here, node_size=node_size)
    except ConfigError as error:
        problem = str(error)
    for text in gather(group, problem):
        if text:
            raise ConfigError(text)


def check_mpi(
    config: BenchConfig, group: dist.ProcessGroup, host: Host, node_size: int, digest: str, agree: Callable[..., bool]
) -> None:
    """The MPI version must bring the rows of the other baselines, and sums that agree. Collective."""
    folder = gather(group, tempfile.mkdtemp(prefix="moe_efa_sums_") if host.mpi is not None else None)[0]
    try:
        digests = host.ask_mpi(group, lambda mpi: mpi.prepare(config, node_size=node_size, folder=Path(folder)))
        problems = []
        if digests[dist.get_rank()] != digest:
            problems.append("MPI_Alltoallv brought other rows")
        elif not agree(torch.load(Path(folder) / f"sums{dist.get_rank()}.pt", weights_only=True)):
            problems.append("MPI_Alltoallv and moe_efa combined to different sums")
        raise_together(group, problems, "baselines")
    finally:
        if host.mpi is not None:
            for path in Path(folder).iterdir():
                path.unlink()
            Path(folder).rmdir()


def _wire(group: dist.ProcessGroup, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Bytes per round of all ranks together, by phase."""
    wire: dict[str, Any] = {}
    for name in ("dispatch", "combine"):
        calls = after[name]["calls"] - before[name]["calls"]
        bytes_and_floor = [(after[name][key] - before[name][key]) / calls for key in ("wire_bytes", "wire_floor_bytes")]
        sent, floor = (sum(column) for column in zip(*gather(group, bytes_and_floor), strict=True))
        wire[name] = {"bytes": sent, "floor_bytes": floor, "ratio": sent / floor if floor else None}
    sent, floor = (sum(wire[name][key] for name in ("dispatch", "combine")) for key in ("bytes", "floor_bytes"))
    rounds = after["rounds"] - before["rounds"]
    writes = sum(gather(group, (after["writes"] - before["writes"]) / rounds))
    return {"bytes": sent, "floor_bytes": floor, "ratio": sent / floor if floor else None, "writes": writes, **wire}


def _rates(
    ours: dict[str, Timing], all_rows: Sequence[RowCounts], wire: dict[str, Any], row_bytes: int
) -> dict[str, Any]:
    """GB/s per rank (mean over ranks) at the median time."""
    num_ranks = len(all_rows)
    logical = sum(rows.pulled for rows in all_rows) * row_bytes / num_ranks
    rates = {}
    for name, timing in ours.items():
        phases = ("dispatch", "combine") if name == "both" else (name,)
        wire_bytes = sum(wire[phase]["bytes"] for phase in phases) / num_ranks
        rates[name] = {
            "logical_gb_per_s": len(phases) * logical / timing.p50_s / 1e9,
            "wire_gb_per_s": wire_bytes / timing.p50_s / 1e9,
        }
    return rates
