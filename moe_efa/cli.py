"""The command `moe-efa`: reads arguments and calls the module that does the work."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from moe_efa import bench, doctor, plan
from moe_efa._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, 1 after a failure that was printed, 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["simulate"]:
        return _simulate(arguments[1:])  # has options of its own
    parser = argparse.ArgumentParser(prog="moe-efa", description="Mixture-of-Experts dispatch and combine over EFA.")
    parser.add_argument("--version", action="version", version=f"moe_efa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, meaning in (
        ("bench", bench, "time dispatch and combine on this host, or under torchrun or srun"),
        ("doctor", doctor, "what is built, what this host offers, and what to do about what is missing"),
        ("plan", plan, "memory and queue sizes of a configuration, before anything is allocated"),
    ):
        command = commands.add_parser(name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.run_command)
    commands.add_parser("simulate", help="run the protocol in a seeded simulation of the network")
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _simulate(arguments: Sequence[str]) -> int:
    try:
        simulator = importlib.import_module("moe_efa.simulator")
        run = simulator.main
    except (ImportError, AttributeError) as error:
        print(f"error: this build has no simulator ({error})", file=sys.stderr)
        return 1
    return int(run(arguments) or 0)
