"""The command: builds the network, starts torchrun in every node, reports what rank 0 left."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_efa.bench import plot as bench_plot
from moe_efa.bench.command import check_transport
from moe_efa.bench.local import INTERRUPTED, print_error
from moe_efa.bench.memory import check_memory
from moe_efa.bench.report import report
from moe_efa.bench.shaped import plot
from moe_efa.bench.shaped.network import LINK, Network
from moe_efa.bench.shaped.options import ShapedConfig, add_arguments, config_from
from moe_efa.bench.shaped.report import format_tables, summary
from moe_efa.errors import ConfigError

_PORT = 29500  # inside a namespace of our own nobody else has it
_END_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after a failure that was printed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="shaped_link", description="Dispatch and combine between network namespaces whose links have a rate."
    )
    add_arguments(parser)
    options = parser.parse_args(argv)
    try:
        for target in (options.json, options.plot):
            if target not in (None, "-") and not Path(target).absolute().parent.is_dir():
                raise ConfigError(f"there is no folder {Path(target).absolute().parent}")
        if options.plot:
            bench_plot.check_available(options.plot)
        config = config_from(options)
        bench = config.bench()
        check_transport(bench)
        check_memory(bench, ranks_on_host=bench.ranks, node_size=config.ranks_per_node)
        with Network(config.nodes, gbit_per_s=max(config.rates), mtu=config.mtu, tcp=config.tcp) as network:
            status = _run_nodes(network, config)
            results = network.folder / "results"
            found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    except ConfigError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if found:
        result = summary(config, found)
        report(format_tables(result), result, options.json)
        if options.plot:
            plot.draw(result, options.plot)
    return status


def _run_nodes(network: Network, config: ShapedConfig) -> int:
    """torchrun in every node, until all end or one fails; 1 if one failed."""
    plan = network.folder / "plan.json"
    facts: dict[str, Any] = {
        "config": config.as_dict(),
        "shaped_ends": network.shaped_ends,
        "namespaces": network.namespaces,
        "addresses": network.addresses,
    }
    plan.write_text(json.dumps(facts))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for node in range(config.nodes):
            with open(network.folder / f"output{node}", "wb") as output:
                streams: dict[str, Any] = {"stdout": output} | ({} if node == 0 else {"stderr": output})
                command = _torchrun(network, config, node, plan)
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, **streams))
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
        # The others notice a failure by themselves, and say more than their signals would.
        deadline = time.monotonic() + _END_S
        for process in processes:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            try:
                process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    failed = [node for node, process in enumerate(processes) if process.returncode]
    for node in failed:
        text = (network.folder / f"output{node}").read_text(errors="replace").strip()
        if node > 0 and text:
            print(f"node {node}:\n{text[-2000:]}", file=sys.stderr)
    return 1 if failed else 0


def _torchrun(network: Network, config: ShapedConfig, node: int, plan: Path) -> list[str]:
    """What starts the ranks of a node. All nodes share this host's cores, so they are told their part of them."""
    address = network.addresses[node]
    threads = max(1, len(os.sched_getaffinity(0)) // config.bench().ranks)
    settings = {
        "MOE_EFA_HOST_ID": network.namespaces[node],
        "MOE_EFA_SOCKET_ADDR": address,
        "MOE_EFA_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "GLOO_SOCKET_IFNAME": LINK,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # it would warn of addresses without a name
        "TMPDIR": network.folder,  # what a killed run leaves goes with the namespaces
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(config.nodes), "--node-rank", str(node)]
    launcher += ["--nproc-per-node", str(config.ranks_per_node), "--local-addr", address]
    launcher += ["--master-addr", network.addresses[0], "--master-port", str(_PORT)]
    launcher += ["--module", "moe_efa.bench.shaped.rank", str(plan)]
    return network.command(node, "env", *(f"{name}={value}" for name, value in settings.items()), *launcher)
