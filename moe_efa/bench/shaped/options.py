"""What can be asked of the benchmark over shaped links."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from moe_efa.bench.options import BenchConfig
from moe_efa.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ShapedConfig:
    """What is measured, and where.

    Attributes:
        nodes: namespaces.
        ranks_per_node: processes in each.
        rates: of the links, Gbit/s; measured one after another by the same processes.
        mtu: of the links, bytes.
        tcp: congestion control in the namespaces, of those that may be used there; None is cubic or reno.
        tokens, hidden, topk, experts, iters, warmup, seed: as in :class:`moe_efa.bench.BenchConfig`.
        waves: of ``ep.moe`` where overlap is measured.
        baseline: measure torch.distributed too.
        mpi: measure MPI_Alltoallv too; only with the others.
    """

    nodes: int = 2
    ranks_per_node: int = 4
    rates: tuple[float, ...] = (1.0, 5.0, 10.0)
    mtu: int = 1500
    tcp: str | None = None
    tokens: int = 1024
    hidden: int = 4096
    topk: int = 8
    experts: int = 64
    iters: int = 5
    warmup: int = 1
    seed: int = 0
    waves: int = 8
    baseline: bool = True
    mpi: bool = True

    def __post_init__(self) -> None:
        if self.nodes not in (2, 4):
            raise ConfigError(f"--nodes must be 2 or 4, not {self.nodes}")
        if self.waves < 1:
            raise ConfigError(f"--waves must be at least 1, not {self.waves}")
        if not 576 <= self.mtu <= 65535:
            raise ConfigError(f"--mtu must lie in 576 ... 65535, not {self.mtu}")
        if not self.rates or not all(0.01 <= rate <= 100 for rate in self.rates):
            raise ConfigError("--rates must lie in 0.01 ... 100 Gbit/s")
        self.bench()

    def bench(self, **changes: Any) -> BenchConfig:
        """The same for the pieces of the benchmark of dispatch and combine; rows travel as bf16 unless changed."""
        values: dict[str, Any] = {
            "ranks": self.nodes * self.ranks_per_node,
            "node_size": self.ranks_per_node,
            "transport": "libfabric",
            "provider": "tcp",
            "wire_dtype": "bf16",
            "combine_dtype": "bf16",
            "baseline": self.baseline,
            "mpi": self.mpi and self.baseline,
        }
        for name in ("tokens", "hidden", "topk", "experts", "iters", "warmup", "seed"):
            values[name] = getattr(self, name)
        return BenchConfig(**(values | changes))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; :meth:`from_dict` reverses it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ShapedConfig:
        return ShapedConfig(**(values | {"rates": tuple(values["rates"])}))


QUICK = {"ranks_per_node": 2, "rates": (1.0,), "tokens": 64, "hidden": 256, "experts": 8, "iters": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    default = ShapedConfig()
    link = parser.add_argument_group("network")
    link.add_argument("--nodes", type=int, choices=(2, 4), help=f"namespaces (default {default.nodes})")
    link.add_argument(
        "--ranks-per-node", type=int, metavar="N", help=f"processes in each (default {default.ranks_per_node})"
    )
    shown = ",".join(f"{rate:g}" for rate in default.rates)
    link.add_argument("--rates", type=_rates, metavar="G,G", help=f"of the links, Gbit/s (default {shown})")
    link.add_argument("--mtu", type=int, metavar="N", help=f"of the links, bytes (default {default.mtu})")
    link.add_argument(
        "--tcp", metavar="NAME", help="congestion control of TCP (default cubic, or reno where it may not be)"
    )
    shape = parser.add_argument_group("shape")
    for name, meaning in (
        ("tokens", "tokens per rank, T"),
        ("hidden", "elements per token, H"),
        ("topk", "experts per token, K"),
        ("experts", "experts of all ranks, E"),
    ):
        shape.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default {getattr(default, name)})")
    timing = parser.add_argument_group("measurement")
    for name, meaning in (
        ("iters", "timed rounds"),
        ("warmup", "untimed rounds"),
        ("seed", "of tokens and routing"),
        ("waves", "of ep.moe where overlap is measured"),
    ):
        timing.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default {getattr(default, name)})")
    timing.add_argument(
        "--no-baseline", dest="baseline", action="store_false", default=None, help="moe_efa and plain sockets alone"
    )
    timing.add_argument("--no-mpi", dest="mpi", action="store_false", default=None, help="leave MPI_Alltoallv out")
    timing.add_argument("--quick", action="store_true", help="a small shape at 1 Gbit/s, to see that everything works")
    timing.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON too; -: to stdout")
    timing.add_argument("--plot", metavar="FILE.png", help="draw goodput and times (needs matplotlib)")


def config_from(options: argparse.Namespace) -> ShapedConfig:
    """What is given, else what --quick says, else the default. ConfigError for what cannot work."""
    names = [field.name for field in dataclasses.fields(ShapedConfig)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    quick: dict[str, Any] = QUICK if options.quick else {}
    return ShapedConfig(**(quick | given))


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,5,10") from None
