"""The command: from options to a report and an exit status."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_efa import _C, env, libfabric
from moe_efa.bench import plot, sweep
from moe_efa.bench.engine import format_engine, measure_engine
from moe_efa.bench.idle import format_idle, measure_idle
from moe_efa.bench.local import Job, join_ranks, print_error, run_on_ranks
from moe_efa.bench.measure import measure_all
from moe_efa.bench.memory import check_memory
from moe_efa.bench.options import BenchConfig, add_arguments, config_from, two_nodes
from moe_efa.bench.report import format_table, report
from moe_efa.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark as a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="bench_dispatch_combine", description="Dispatch and combine between ranks.")
    add_arguments(parser)
    return run_command(parser.parse_args(argv))


def run_command(options: argparse.Namespace) -> int:
    """Run with parsed options: 0, 1 after a failure that was printed, 130 after Ctrl-C."""
    try:
        _check_files(options)
        if options.engine:
            cost = measure_engine()
            report(format_engine(cost), cost, options.json)
            return 0
        runner = _Runner(options)
        if options.sweep:
            return runner.sweep()
        config = runner.config()
        if options.idle:
            return runner.run(measure_idle, config, show=format_idle)
        return runner.run(measure_all, [config], show=format_table)
    except ConfigError as error:
        print_error(error)
        return 1


class _Runner:
    """Runs jobs on the ranks of a launcher, or on ranks of its own, and reports on the process that has the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._launch = env.launch()
        if self._launch and options.ranks not in (None, self._launch.num_ranks):
            raise ConfigError(f"--ranks {options.ranks}, but the launcher started {self._launch.num_ranks}")

    def config(self, ranks: int | None = None, **changes: Any) -> BenchConfig:
        """The configuration of the options, with changes; checked against this host."""
        if self._launch:
            return config_from(
                self._options, ranks=self._launch.num_ranks, node_size=self._options.node_size, **changes
            )
        if ranks is None:
            ranks = BenchConfig.ranks if self._options.ranks is None else self._options.ranks
        node_size = two_nodes(ranks) if self._options.node_size is None else self._options.node_size
        config = config_from(self._options, ranks=ranks, node_size=node_size, **changes)
        check_transport(config)
        check_memory(config, ranks_on_host=ranks, node_size=node_size)
        return config

    def run(self, job: Job, argument: Any, *, show: Callable[[dict[str, Any]], str]) -> int:
        """A job that has one result, and its report."""
        ranks = self._launch.num_ranks if self._launch else self._options.ranks or BenchConfig.ranks
        status, found = self._collect(job, argument, ranks)
        if found:
            self._report(show(found[0]), found[0], found)
        return status

    def sweep(self) -> int:
        """Every shape on every number of ranks; what was measured is reported even if a later one fails."""
        launched = self._launch.num_ranks if self._launch else None
        groups = [
            [self.config(ranks, **changes) for changes in shapes]
            for ranks, shapes in sweep.grid(self._options, launched)
        ]
        self._say_how_long(groups)
        status, found = 0, []
        for configs in groups:
            status, results = self._collect(measure_all, configs, configs[0].ranks)
            found += results
            if status:
                break
        if found:
            self._report(sweep.format_sweep(found), sweep.summary(found), found)
        return status

    def _collect(self, job: Job, argument: Any, ranks: int) -> tuple[int, list[dict[str, Any]]]:
        if self._launch is None:
            return run_on_ranks(job, argument, ranks=ranks)
        found: list[dict[str, Any]] = []
        return join_ranks(self._launch.rank, ranks, self._launch.init_method, job, argument, found.append), found

    def _say_how_long(self, groups: list[list[BenchConfig]]) -> None:
        if self._launch is None or self._launch.rank == 0:
            cores = len(os.sched_getaffinity(0))
            minutes = math.ceil(sweep.estimate_s(groups, cores=cores) / 60)
            shapes = sum(map(len, groups))
            print(
                f"{shapes} shapes: about {minutes} min on {cores} core(s) that do nothing else",
                file=sys.stderr,
                flush=True,
            )

    def _report(self, text: str, result: dict[str, Any], found: list[dict[str, Any]]) -> None:
        report(text, result, self._options.json)
        if self._options.plot:
            plot.draw(found, self._options.plot)


def check_transport(config: BenchConfig) -> None:
    """Raise ConfigError, saying what to install, if the nodes on this host could not be joined."""
    if config.node_size is None or config.node_size >= config.ranks or config.transport == "shm":
        return
    info = _C.build_info(**libfabric.search_path())
    if info["libfabric_found"]:
        return
    if not info["libfabric_built"]:
        cure = "build moe_efa with the libfabric headers (Debian: apt-get install libfabric-dev)"
    else:
        cure = "install it (Debian: apt-get install libfabric1; EFA hosts: the AWS EFA installer; pip install mpich)"
    raise ConfigError(
        f"{config.ranks} ranks in nodes of {config.node_size} need libfabric between the nodes, and there is none "
        f"({info['libfabric_error'] or 'not found'}): {cure}, or use --transport shm"
    )


def _check_files(options: argparse.Namespace) -> None:
    """Raise ConfigError if what is to be written at the end could not be."""
    for option, target in (("json", options.json), ("plot", options.plot)):
        if target not in (None, "-"):
            _check_file(option, Path(target).absolute())
    if options.plot is not None:
        if options.engine or options.idle:
            raise ConfigError("--plot draws times of dispatch and combine: not together with --engine or --idle")
        plot.check_available(options.plot)
    for name in ("sweep_tokens", "sweep_hidden", "sweep_ranks"):
        if getattr(options, name) and not options.sweep:
            raise ConfigError(f"--{name.replace('_', '-')} needs --sweep")


def _check_file(option: str, path: Path) -> None:
    """Raise ConfigError if this file could not be written; it is left as it is."""
    if not path.parent.is_dir():
        raise ConfigError(f"--{option}: there is no folder {path.parent}")
    try:
        if path.is_file() or path.is_dir():
            path.open("ab").close()
        elif not path.exists():
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"--{option}: {path} cannot be written: {error.strerror}") from None
