"""The benchmark of dispatch and combine: correctness first, then times, bytes and what they are measured against.

Runs on the ranks it is given (torchrun, srun) or starts its own on this host. It uses the public API only, but for the
cost of the engine. What is counted and how is in bench/README.md.
"""

from moe_efa.bench.command import main, run_command
from moe_efa.bench.options import BenchConfig, add_arguments
from moe_efa.presets import PRESETS

__all__ = ["PRESETS", "BenchConfig", "add_arguments", "main", "run_command"]
