"""What one machine with one GPU can tell of the kernels: are they right, and how fast are they?

    python bench/gpu_check.py --json gpu.json --plot gpu.png     # everything, in less than nine minutes
    python bench/gpu_check.py --only cuda-tests,cuda-grid        # some sections
    python bench/gpu_check.py --build                            # only compiles: needs nvcc, but no GPU
    python bench/gpu_check.py --dry-run                          # the whole flow on the CPU; its times mean nothing

Nothing has to be installed but torch, Triton, nvcc and g++. Sections run as processes with time limits; results are
written as they come, to build/gpu-check, and the JSON document every few seconds. bench/README.md says what is
counted. Exit status: 0 when all results agree, 1 when not, 2 where this machine cannot tell (no GPU, nvcc or g++, or no
time). What is too slow changes no exit status.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gpu import machine, package, sections
from gpu.budget import end_with_parent
from gpu.run import Options, build_all, check

ALONE_S = 600.0  # for a section that is started by hand


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(section.name for section in sections.SECTIONS)
    parser.add_argument("--build", action="store_true", help="build the programs and the shim, and stop")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted and emulated: no GPU is used")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAMES", help=f"some of: {names}")
    parser.add_argument("--budget", type=float, default=530.0, metavar="S", help="seconds in all (default 530)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the document goes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="where the picture goes")
    inner = parser.add_argument_group("one section, as the check itself starts them")
    inner.add_argument("--section", help=argparse.SUPPRESS)
    inner.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    inner.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {section.name for section in sections.SECTIONS}
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {names}")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    entry = Path(__file__).resolve()
    end_with_parent()
    deadline = time.monotonic() + ALONE_S if options.deadline is None else options.deadline
    try:
        if options.section:
            package.use_tree()
            if options.dry_run:
                from gpu import dry_run

                dry_run.use_interpreter()
            for name in options.section.split(","):
                sections.run_section(name, options.results, entry, dry_run=options.dry_run, deadline=deadline)
            return 0
        if options.build:
            capability = None
            if not options.dry_run:
                try:
                    capability = machine.find_gpu()["capability"]
                except machine.CannotTell as error:
                    print(f"{error}; compiling for Hopper", flush=True)
            build_all(dry_run=options.dry_run, capability=capability)
            return 0
        return check(
            Options(
                entry=entry,
                dry_run=options.dry_run,
                only=options.only,
                budget_s=options.budget,
                json_target=options.json,
                plot_target=options.plot,
            )
        )
    except machine.CannotTell as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
