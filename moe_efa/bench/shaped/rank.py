"""One rank: what torchrun starts in a node's namespace. Correctness first, then every contender in turn, per rate."""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_efa import env
from moe_efa._version import __version__
from moe_efa.bench.check import check_baselines, check_full, check_small, sums_agree
from moe_efa.bench.copy_floor import CopyFloor, count_rows, row_widths
from moe_efa.bench.exchange import Exchange, MoeEfaExchange
from moe_efa.bench.inputs import Inputs, make_inputs
from moe_efa.bench.lean import LeanExchange, torch_all_to_all
from moe_efa.bench.local import join_ranks
from moe_efa.bench.measure import TITLES, Host, check_mpi
from moe_efa.bench.mpi_job import MpiJob, MpiNetwork
from moe_efa.bench.options import BenchConfig
from moe_efa.bench.progress import Progress
from moe_efa.bench.shaped.network import LINK, congestion_control, sent_bytes, set_rate
from moe_efa.bench.shaped.options import ShapedConfig
from moe_efa.bench.shaped.overlap import Overlap, has_waves
from moe_efa.bench.shaped.sockets import PlainSockets
from moe_efa.bench.timing import Timer, gather, phases_of, timed_round
from moe_efa.bench.torch_per_expert import TorchPerExpert
from moe_efa.errors import ConfigError
from moe_efa.expert_parallel import ExpertParallel

_ROUNDS_PER_TIMED_ROUND = 3  # of timing.timed_round: one untimed, one whole, one phase by phase


class _Measurement:
    """Everything that the ranks hold while the rates change. Collective."""

    def __init__(self, plan: dict[str, Any]) -> None:
        group = dist.group.WORLD
        assert group is not None
        self.config = ShapedConfig.from_dict(plan["config"])
        self.bench = self.config.bench()
        self.group, self.rank = group, dist.get_rank()
        self.node = self.rank // self.config.ranks_per_node
        self.ends: Sequence[tuple[str, str]] = [tuple(end) for end in plan["shaped_ends"]]
        self.addresses: Sequence[str] = plan["addresses"]
        rounds = (self.config.warmup + self.config.iters) * len(self.config.rates) * (4 if has_waves() else 1)
        self.progress = Progress(rounds, visible=self.rank == 0)
        self.timer = Timer(group, self.progress)
        self.mine: Inputs = make_inputs(self.bench, self.rank, node_size=self.config.ranks_per_node)
        ranks, experts = self.bench.ranks, self.bench.experts
        self.baselines: dict[str, Exchange] = {}
        if self.bench.baseline:
            self.baselines["torch_per_expert"] = TorchPerExpert(ranks, experts)
            self.baselines["torch_lean"] = LeanExchange(ranks, experts, torch_all_to_all, reuse_results=True)
        if self.bench.mpi:
            self.progress.stage("starting the MPI ranks")
        network = MpiNetwork(self.addresses, plan["namespaces"], self.config.ranks_per_node, LINK)
        self.host = Host(group, self.bench, mpi_network=network)
        self.mpi_facts = self.host.mpi_facts or {"available": False, "reason": "not asked for"}

    def run(self) -> Iterator[dict[str, Any]]:
        """Check, then measure rate after rate."""
        config, bench = self.config, self.bench
        torch.set_num_threads(self.host.threads)
        self.set_rate(max(config.rates))
        self.progress.stage("checking a small shape")
        small, node_size = check_small(bench, self.group)
        fp8_bench = config.bench(wire_dtype="fp8")
        with (
            ExpertParallel(self.group, **_arguments(bench)) as ep,
            ExpertParallel(self.group, **_arguments(fp8_bench)) as fp8,
        ):
            self.progress.stage("checking the measured shape")
            errors = {
                "bf16": check_full(bench, self.group, ep, self.mine),
                "fp8": check_full(fp8_bench, self.group, fp8, self.mine),
            }
            named = {TITLES[name]: exchange for name, exchange in self.baselines.items()}
            agreed = list(named)
            digest, sums = check_baselines(bench, self.group, ep, self.mine, named)
            if self.mpi_facts["available"]:
                agree = functools.partial(sums_agree, bench, self.mine, sums)
                check_mpi(bench, self.group, self.host, node_size, digest, agree)
                agreed.append(TITLES["mpi"])
            del sums
            copies = self._copies()
            sockets = PlainSockets(self.group, address=self.addresses[self.node], node_size=node_size)
            info = ep.info()
            for rate in config.rates:
                self.set_rate(rate)
                self.progress.stage(f"{rate:g} Gbit/s: every contender in turn")
                measured = self._at(ep, fp8, sockets, copies)
                if has_waves():
                    self.progress.stage(f"{rate:g} Gbit/s: overlap")
                    ways = Overlap(ep, self.mine, self.timer, waves=config.waves)
                    measured["overlap"] = ways.measure(warmup=config.warmup, iters=config.iters)
                else:
                    measured["overlap"] = {"available": False, "reason": "ep.moe has no waves in this version"}
                yield {
                    "gbit_per_s": rate,
                    **measured,
                    "checks": {"small": small, "full_error_of_bound": errors, "baselines_agree": agreed},
                    "mpi": self.mpi_facts,
                    "host": _host_facts(info),
                }
            sockets.close()
        self.progress.close()

    def set_rate(self, gbit_per_s: float) -> None:
        """Collective. Rank 0 may: it runs as root, and the namespaces have names."""
        problem = ""
        if self.rank == 0:
            try:
                set_rate(self.ends, gbit_per_s)
            except ConfigError as error:
                problem = str(error)
        problem = gather(self.group, problem)[0]
        if problem:
            raise ConfigError(problem)

    def _copies(self) -> CopyFloor:
        """The copies of this rank's part of a round. Collective."""
        selections = gather(self.group, self.mine[1])
        node_size, experts = self.config.ranks_per_node, self.bench.experts
        rows = count_rows(selections, rank=self.rank, node_size=node_size, num_experts=experts)
        return CopyFloor(rows, row_widths(self.bench))

    def _at(self, ep: ExpertParallel, fp8: ExpertParallel, sockets: PlainSockets, copies: CopyFloor) -> dict[str, Any]:
        """One rate: times and bytes of everything but the overlap."""
        ours, timer, meter = MoeEfaExchange(ep), self.timer, _LinkMeter(self)
        per_peer = self._bytes_per_peer(ep)
        before, fp8_before = ep.stats(), fp8.stats()

        def in_turn() -> None:
            with meter.of("moe_efa", _ROUNDS_PER_TIMED_ROUND):
                timed_round(ours, self.mine, timer.steps_of("moe_efa"))
            with meter.of("fp8", 2):
                for step in (None, "fp8 dispatch"):
                    _dispatch_only(fp8, self.mine, timer, step)
            with meter.of("sockets", 1):
                for phase in ("dispatch", "combine"):
                    with timer.step(f"sockets {phase}"):
                        sockets.exchange(per_peer[phase])
            for phase, copy in (("dispatch", copies.dispatch), ("combine", copies.combine)):
                with timer.step(f"copies {phase}"):
                    copy()
            for name, exchange in self.baselines.items():
                with meter.of(name, _ROUNDS_PER_TIMED_ROUND):
                    timed_round(exchange, self.mine, timer.steps_of(name))
            if self.mpi_facts["available"]:
                with meter.of("mpi", _ROUNDS_PER_TIMED_ROUND):
                    for phase, seconds in self.host.ask_mpi(self.group, MpiJob.round).items():
                        timer.record(f"mpi {phase}", seconds)

        timings = timer.repeat(in_turn, warmup=self.config.warmup, iters=self.config.iters)
        wire = self._wire(before, ep.stats(), ("dispatch", "combine"))
        fp8_wire = self._wire(fp8_before, fp8.stats(), ("dispatch",))
        contenders = {name: phases_of(timings, name) for name in ("moe_efa", *self.baselines)}
        if self.mpi_facts["available"]:
            contenders["mpi"] = phases_of(timings, "mpi")
        contenders["fp8"] = {"dispatch": timings["fp8 dispatch"]}
        for name in ("sockets", "copies"):
            contenders[name] = {phase: timings[f"{name} {phase}"] for phase in ("dispatch", "combine")}
        return {
            "times": {
                name: {phase: timing.as_us() for phase, timing in phases.items()} for name, phases in contenders.items()
            },
            "wire": wire,
            "fp8_wire": fp8_wire,
            "sockets_bytes": {
                phase: self._busiest([len(sockets.peers) * count for count in counts])
                for phase, counts in per_peer.items()
            },
            "floor_rows": self._floor_rows(),
            "link_bytes_per_round": meter.result(),
        }

    def _bytes_per_peer(self, ep: ExpertParallel) -> dict[str, list[int]]:
        """By phase and rank, the bytes that a round of moe_efa sends to each rail peer (the mean, where there are
        several): what the plain sockets send. One round."""
        before = ep.stats()
        d = ep.dispatch(*self.mine)
        ep.combine(d.x, d.handle)
        after, peers = ep.stats(), self.config.nodes - 1
        return {
            phase: gather(self.group, (after[phase]["wire_bytes"] - before[phase]["wire_bytes"]) // peers)
            for phase in ("dispatch", "combine")
        }

    def _wire(self, before: dict[str, Any], after: dict[str, Any], phases: Sequence[str]) -> dict[str, Any]:
        """Bytes of one call that left the busiest node, and of all nodes: sent, and the floor of this routing."""
        found: dict[str, Any] = {}
        for phase in phases:
            calls = after[phase]["calls"] - before[phase]["calls"]
            found[phase] = {"calls": calls}
            for key, name in (("wire_bytes", "bytes"), ("wire_floor_bytes", "floor_bytes")):
                per_rank = gather(self.group, (after[phase][key] - before[phase][key]) / calls)
                found[phase] |= {name: self._busiest(per_rank), f"all_{name}": sum(per_rank)}
        return found

    def _busiest(self, per_rank: Sequence[float]) -> float:
        """The sum of the node that has most."""
        size = self.config.ranks_per_node
        return max(sum(per_rank[first : first + size]) for first in range(0, len(per_rank), size))

    def _floor_rows(self) -> dict[str, int]:
        """Rows that cross a link in one direction, all nodes together, by how a token is counted."""
        config = self.config
        owner = self.mine.topk_idx // (config.experts // self.bench.ranks)
        remote = owner // config.ranks_per_node != self.node
        ranks, nodes = (
            torch.zeros(len(owner), count, dtype=torch.bool).scatter_(1, place, True)
            for count, place in ((self.bench.ranks, owner), (config.nodes, owner // config.ranks_per_node))
        )
        ranks[:, self.node * config.ranks_per_node : (self.node + 1) * config.ranks_per_node] = False
        nodes[:, self.node] = False
        counts = {"per_expert": int(remote.sum()), "per_rank": int(ranks.sum()), "per_node": int(nodes.sum())}
        everyone = gather(self.group, counts)
        return {name: sum(one[name] for one in everyone) for name in counts}


class _LinkMeter:
    """Bytes on the busiest link, from the interface's own counter, headers of all layers included."""

    def __init__(self, measurement: _Measurement) -> None:
        self._m = measurement
        self._bytes: dict[str, float] = {}
        self._rounds: dict[str, int] = {}

    def of(self, name: str, rounds: int) -> _Metered:
        return _Metered(self, name, rounds)

    def read(self) -> int:
        """Collective. What any rank sent before is counted, and nothing of what it sends after."""
        dist.barrier(self._m.group)
        count = sent_bytes() if self._m.rank % self._m.config.ranks_per_node == 0 else 0
        dist.barrier(self._m.group)  # another rank of the node would be sending while this one reads
        return count

    def add(self, name: str, count: int, rounds: int) -> None:
        self._bytes[name] = self._bytes.get(name, 0) + count
        self._rounds[name] = self._rounds.get(name, 0) + rounds

    def result(self) -> dict[str, float]:
        """Per round, by contender. Collective."""
        everyone = gather(self._m.group, {name: count / self._rounds[name] for name, count in self._bytes.items()})
        return {name: max(one[name] for one in everyone) for name in self._bytes}


class _Metered:
    def __init__(self, meter: _LinkMeter, name: str, rounds: int) -> None:
        self._meter, self._name, self._rounds = meter, name, rounds

    def __enter__(self) -> None:
        self._before = self._meter.read()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._meter.add(self._name, self._meter.read() - self._before, self._rounds)


def _dispatch_only(ep: ExpertParallel, inputs: Inputs, timer: Timer, step: str | None) -> None:
    if step is None:
        d = ep.dispatch(*inputs)
    else:
        with timer.step(step):
            d = ep.dispatch(*inputs)
    del d


def _arguments(bench: BenchConfig) -> dict[str, Any]:
    return bench.expert_parallel().as_dict()


def _host_facts(info: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": __version__,
        "transport": str(info["transport"]),
        "chunk_rows": info["chunk_rows"],
        "slots": info["slots"],
        "registered_bytes": info["registered_bytes"],
        "threads_per_rank": info["num_threads"],
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "tcp": congestion_control(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def _job(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    measurement = _Measurement(plan)
    try:
        yield from measurement.run()
    finally:
        measurement.host.close()


def main() -> int:
    """Measure what the file says; rank 0 appends a line of JSON per rate to `results` beside it."""
    plan_file = Path(sys.argv[1])
    launch = env.launch()
    if launch is None:
        raise ConfigError("this runs under torchrun: start bench/shaped_link.py")

    def keep(result: dict[str, Any]) -> None:
        with open(plan_file.parent / "results", "a") as results:
            results.write(json.dumps(result) + "\n")

    plan = json.loads(plan_file.read_text())
    return join_ranks(launch.rank, launch.num_ranks, launch.init_method, _job, plan, keep)


if __name__ == "__main__":
    sys.exit(main())
