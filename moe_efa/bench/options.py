"""What can be asked of the benchmark: its configuration, the presets, the options of the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from moe_efa.bench.routing import ROUTINGS, RoutingConfig
from moe_efa.config import ExpertParallelConfig
from moe_efa.errors import ConfigError
from moe_efa.presets import PRESETS, describe_presets

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WIRE_DTYPES = ("auto", "bf16", "fp32", "fp8")
SWEEP = ((2048, (256, 512, 1024, 2048, 4096)), (7168, (256, 512, 1024, 2048)))  # hidden, tokens
SWEEP_RANKS = (2, 4)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes:
        ranks: processes to start; ignored under torchrun and srun, which decide.
        node_size: ranks per node; None finds it from the hosts under torchrun and srun, and makes two nodes alone.
        transport, provider: as in :class:`moe_efa.ExpertParallelConfig`.
        wire_dtype, combine_dtype, fp8_scale: the same; the baselines send ``dtype`` whatever these say.
        tokens: per rank, T.
        hidden: elements per token, H.
        topk: selections per token, K.
        experts: of the whole group, E.
        dtype: "bf16" or "fp32".
        device: "cpu" or "cuda": where tensors are. On GPUs there are no baselines: they are measured on the CPU.
        routing: which experts the tokens select; moe_efa and every baseline get the same.
        iters, warmup: timed and untimed rounds.
        seed: of tokens and routing, 0 to 2 ** 32 - 1.
        baseline: measure torch.distributed (gloo) and the memory-copy floor too.
        mpi: measure the MPI_Alltoallv version too, in ranks of its own that mpirun starts on this host.
        mpi_args: more arguments for mpirun.
    """

    ranks: int = 4
    node_size: int | None = None
    transport: str = "auto"
    provider: str | None = None
    wire_dtype: str = "auto"
    combine_dtype: str = "auto"
    fp8_scale: str = "fp32"
    tokens: int = 1024
    hidden: int = 2048
    topk: int = 8
    experts: int = 32
    dtype: str = "bf16"
    device: str = "cpu"
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    iters: int = 10
    warmup: int = 2
    seed: int = 0
    baseline: bool = True
    mpi: bool = False
    mpi_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens", "hidden", "topk", "experts", "iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.warmup < 0:
            raise ConfigError(f"--warmup must not be negative: {self.warmup}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must be from 0 to {2**32 - 1}, not {self.seed}")
        if self.mpi and not self.baseline:
            raise ConfigError("--mpi is a baseline and checked against the others: not together with --no-baseline")
        if self.device != "cpu" and self.baseline:
            raise ConfigError(f"the baselines are on the CPU: --device {self.device} needs --no-baseline")
        self.expert_parallel().check_num_ranks(self.ranks)
        if self.node_size is not None:
            self.routing.check(topk=self.topk, experts=self.experts, num_nodes=self.ranks // self.node_size)

    def expert_parallel(self, **changes: Any) -> ExpertParallelConfig:
        """The configuration of the measured group."""
        values: dict[str, Any] = {
            "num_experts": self.experts,
            "hidden_size": self.hidden,
            "top_k": self.topk,
            "max_tokens_per_rank": self.tokens,
            "wire_dtype": self.wire_dtype,
            "combine_dtype": self.combine_dtype,
            "fp8_scale": self.fp8_scale,
            "node_size": self.node_size,
            "transport": self.transport,
            "provider": self.provider,
            "device": self.device,
        }
        return ExpertParallelConfig(**(values | changes))

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in ``dtype``."""
        return self.hidden * DTYPES[self.dtype].itemsize


def two_nodes(ranks: int) -> int:
    """Ranks per node of a benchmark on its own: two nodes if the ranks divide so, else a node for each."""
    return ranks // 2 if ranks % 2 == 0 else 1


def config_from(options: argparse.Namespace, *, ranks: int, node_size: int | None, **changes: Any) -> BenchConfig:
    """The configuration that parsed options ask for: what is given, else what the preset says, else the default.

    Raises:
        ConfigError: for what cannot work.
    """
    given = {one.name: getattr(options, one.name, None) for one in fields(BenchConfig)}
    values = PRESETS.get(options.preset, {}) | {name: value for name, value in given.items() if value is not None}
    routing = {
        "zipf_exponent": options.zipf_exponent,
        "lognormal_sigma": options.lognormal_sigma,
        "topk_nodes": options.topk_nodes,
    }
    values |= {
        "ranks": ranks,
        "node_size": node_size,
        "routing": RoutingConfig(options.routing, **{k: v for k, v in routing.items() if v is not None}),
        "baseline": not (options.no_baseline or options.device == "cuda"),
        "mpi_args": tuple(options.mpi_args.split()),
    }
    return BenchConfig(**(values | changes))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser."""
    default = BenchConfig()
    what = parser.add_argument_group("what is measured (one configuration, unless one of these is given)")
    mode = what.add_mutually_exclusive_group()
    mode.add_argument("--sweep", action="store_true", help="tokens x hidden x ranks: the table of the bars")
    mode.add_argument("--engine", action="store_true", help="the protocol engine alone: microseconds per chunk")
    mode.add_argument("--idle", action="store_true", help="CPU time of ranks that hold a group and do nothing")
    what.add_argument("--sweep-tokens", type=_integers, metavar="N,N", help=f"T (default {_grid_text()})")
    what.add_argument("--sweep-hidden", type=_integers, metavar="N,N", help="H (default 2048,7168)")
    what.add_argument(
        "--sweep-ranks",
        type=_integers,
        metavar="N,N",
        help=f"ranks (default {_list(SWEEP_RANKS)}); 4,8,16 shows what more ranks than cores cost",
    )
    job = parser.add_argument_group("ranks")
    job.add_argument("--ranks", type=int, help=f"ranks to start on this host (default {default.ranks})")
    job.add_argument("--node-size", type=int, help="ranks per node (default: two nodes alone, else by host)")
    job.add_argument("--transport", default="auto", choices=("auto", "libfabric", "shm"), help="what joins nodes")
    job.add_argument(
        "--device", choices=("cpu", "cuda"), help="where tensors are; cuda: a GPU for each rank, and no baselines"
    )
    job.add_argument("--provider", help="libfabric provider, such as efa or tcp (default: the best present)")
    shape = parser.add_argument_group("shape")
    shape.add_argument("--preset", choices=tuple(PRESETS), help=f"{describe_presets()}; single options override it")
    for name, meaning in (
        ("tokens", "tokens per rank, T"),
        ("hidden", "elements per token, H"),
        ("topk", "experts per token, K"),
        ("experts", "experts of all ranks, E"),
    ):
        shape.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default {getattr(default, name)})")
    shape.add_argument("--dtype", choices=tuple(DTYPES), help=f"of the tokens (default {default.dtype})")
    shape.add_argument("--wire-dtype", choices=WIRE_DTYPES, help="what dispatch sends (default: dtype)")
    shape.add_argument("--combine-dtype", choices=WIRE_DTYPES, help="what combine sends (default: dtype)")
    shape.add_argument("--fp8-scale", choices=("fp32", "ue8m0"), help="scales of fp8 blocks (default fp32)")
    routing = parser.add_argument_group("routing")
    routing.add_argument("--routing", default="uniform", choices=tuple(ROUTINGS), help="(default uniform)")
    for name, convert, meaning in (
        ("zipf-exponent", float, "zipf: the n-th expert is drawn in proportion to n ** -EXPONENT"),
        ("lognormal-sigma", float, "lognormal: an expert's share is exp(SIGMA x a normal draw)"),
        ("topk-nodes", int, "node-limited: nodes per token (default: half of them)"),
    ):
        value = getattr(default.routing, name.replace("-", "_"))
        shown = "" if value is None else f" (default {value:g})"
        kind: Callable[[str], float | int] = convert
        routing.add_argument(f"--{name}", type=kind, metavar="N", help=meaning + shown)
    timing = parser.add_argument_group("measurement")
    timing.add_argument("--iters", type=int, metavar="N", help=f"(default {default.iters}; --sweep: 5, large shapes 3)")
    timing.add_argument("--warmup", type=int, metavar="N", help=f"(default {default.warmup}; --sweep: 1)")
    timing.add_argument("--seed", type=int, metavar="N", help=f"(default {default.seed})")
    timing.add_argument("--no-baseline", action="store_true", help="skip torch.distributed and the copy floor")
    timing.add_argument("--mpi", action="store_true", default=None, help="the MPI_Alltoallv version too, by mpirun")
    timing.add_argument("--mpi-args", default="", metavar="ARGS", help="more arguments for mpirun, in one string")
    timing.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON too; without FILE or with -: to stdout",
    )
    timing.add_argument("--plot", metavar="FILE.png", help="draw the times and ratios (needs matplotlib)")


def _integers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 256,1024") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers must be at least 1")
    return values


def _list(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _grid_text() -> str:
    return " and ".join(f"{_list(tokens)} at H={hidden}" for hidden, tokens in SWEEP)
