"""`moe-efa plan`: what a configuration registers and how deep its queues are, before anything is allocated."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from moe_efa import _C
from moe_efa.config import ExpertParallelConfig
from moe_efa.errors import ConfigError
from moe_efa.presets import PRESETS, describe_presets


@dataclass(frozen=True)
class Plan:
    """A configuration with the sizes it leads to.

    ``registered_bytes`` is registered memory per rank, all of it fixed at construction; rings have ``slots`` chunks of
    ``chunk_rows`` rows. ``parts`` are its parts and add up to it. ``completion_queue_events`` bounds what may be in
    flight towards a NIC of a rank, ``writes_per_nic`` what a rank has in flight on one. None of it depends on the
    number of NICs, each of which registers the same memory. Where rings are in GPU memory (``buffers="device"``),
    ``device_words_bytes`` of it come on top, for flags that kernels poll; no NIC registers them.
    """

    num_ranks: int
    node_size: int
    config: ExpertParallelConfig
    registered_bytes: int
    slots: int
    publish_slots: int
    chunk_rows: int
    completion_queue_events: int
    writes_per_nic: int
    dispatch_slot_bytes: int
    combine_slot_bytes: int
    parts: dict[str, int]
    device_words_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ranks": self.num_ranks,
            "nodes": self.num_ranks // self.node_size,
            "node_size": self.node_size,
            "hidden": self.config.hidden_size,
            "topk": self.config.top_k,
            "experts": self.config.num_experts,
            "max_tokens": self.config.max_tokens_per_rank,
            "wire_dtype": self.config.wire_dtype,
            "combine_dtype": self.config.combine_dtype,
            "grad_wire_dtype": self.config.grad_wire_dtype,
            "memory_budget_bytes": self.config.memory_budget_bytes,
            "registered_bytes": self.registered_bytes,
            "slots": self.slots,
            "publish_slots": self.publish_slots,
            "chunk_rows": self.chunk_rows,
            "completion_queue_events": self.completion_queue_events,
            "writes_per_nic": self.writes_per_nic,
            "dispatch_slot_bytes": self.dispatch_slot_bytes,
            "combine_slot_bytes": self.combine_slot_bytes,
            "parts": self.parts,
            "device_words_bytes": self.device_words_bytes,
        }


def plan_memory(num_ranks: int, config: ExpertParallelConfig) -> Plan:
    """The sizes that ``ExpertParallel`` would choose. ``config.node_size`` None stands for one node.

    Raises:
        ConfigError: if the configuration cannot work; if the budget is too small, the text names the least.
    """
    config.check_num_ranks(num_ranks)
    node_size = config.node_size or num_ranks
    sizes = _C.plan_memory(
        _C.GroupConfig(
            rank=0,
            num_ranks=num_ranks,
            node_size=node_size,
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            top_k=config.top_k,
            max_tokens_per_rank=config.max_tokens_per_rank,
            wire_dtype=config.wire_dtype,
            combine_dtype=config.combine_dtype,
            grad_wire_dtype=config.grad_dispatch_dtype,
            grad_combine_dtype=config.grad_combine_dtype,
            memory_budget_bytes=config.memory_budget_bytes,
            chunk_rows=config.chunk_rows,
            slots=config.slots,
        )
    )
    return Plan(num_ranks=num_ranks, node_size=node_size, config=config, **sizes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moe-efa plan` to a parser."""
    parser.add_argument("--preset", choices=tuple(PRESETS), default="prefill", help=f"{describe_presets()}")
    parser.add_argument("--ranks", type=int, default=16, metavar="N", help="ranks of the group (default 16)")
    for name, meaning in (
        ("hidden", "elements per token, H"),
        ("topk", "experts per token, K"),
        ("experts", "experts of the group, E"),
        ("max-tokens", "most tokens in one dispatch of one rank"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default: the preset's)")
    parser.add_argument("--node-size", type=int, metavar="N", help="ranks per node (default 8, or all ranks if fewer)")
    parser.add_argument("--memory-budget", type=parse_bytes, default=1 << 30, metavar="BYTES", help="such as 512MiB")
    for name in ("wire-dtype", "combine-dtype", "grad-wire-dtype"):
        words = ("auto", "bf16", "fp32", "fp8")
        parser.add_argument(f"--{name}", default="auto", choices=words, help="auto: room for fp32")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


def parse_bytes(text: str) -> int:
    """Bytes from a number with an optional unit.

    >>> parse_bytes("64MiB"), parse_bytes("1G"), parse_bytes("1.5 KB"), parse_bytes("4096")
    (67108864, 1073741824, 1500, 4096)
    """
    stripped = text.strip()
    number = stripped.rstrip("KMGTiBkmgtb ")
    unit = stripped[len(number) :].strip().lower()
    powers = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
    decimal = unit.endswith("b") and not unit.endswith("ib") and len(unit) == 2
    letter = unit.removesuffix("b").removesuffix("i")
    if letter not in powers:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 512MiB")
    try:
        value = float(number) * (1000 if decimal else 1024) ** powers[letter]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 512MiB") from None
    return int(value)


def run_command(options: argparse.Namespace) -> int:
    """Print the plan: 0, or 1 with the reason if the configuration cannot work."""
    try:
        preset = PRESETS[options.preset]
        given = {
            "hidden": options.hidden,
            "topk": options.topk,
            "experts": options.experts,
            "tokens": options.max_tokens,
        }
        shape = preset | {name: value for name, value in given.items() if value is not None}
        changed = [name for name in preset if shape[name] != preset[name]]
        config = ExpertParallelConfig(
            num_experts=shape["experts"],
            hidden_size=shape["hidden"],
            top_k=shape["topk"],
            max_tokens_per_rank=shape["tokens"],
            node_size=options.node_size or min(8, max(1, options.ranks)),
            wire_dtype=options.wire_dtype,
            combine_dtype=options.combine_dtype,
            grad_wire_dtype=options.grad_wire_dtype,
            memory_budget_bytes=options.memory_budget,
        )
        if options.ranks < 1:
            raise ConfigError(f"--ranks must be at least 1, not {options.ranks}")
        plan = plan_memory(options.ranks, config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    source = f"preset {options.preset}" + (f" with other {', '.join(changed)}" if changed else "")
    print(json.dumps({"shape": source, **plan.as_dict()}, indent=2) if options.json else format_table(plan, source))
    return 0


def format_table(plan: Plan, source: str) -> str:
    """The plan for people. ``source``: where the shape is from."""
    config, num_nodes = plan.config, plan.num_ranks // plan.node_size
    rows = [
        ("ranks", f"{plan.num_ranks} in {num_nodes} nodes of {plan.node_size}"),
        ("shape is of", source),
        ("shape", f"H={config.hidden_size}, K={config.top_k}, E={config.num_experts}"),
        ("tokens per dispatch", f"at most {config.max_tokens_per_rank} per rank"),
        ("wire, combine dtype", f"{config.wire_dtype}, {config.combine_dtype} (auto: room for fp32)"),
        ("of their gradients", f"{config.grad_dispatch_dtype}, {config.grad_combine_dtype}"),
        ("memory budget", _mebibytes(config.memory_budget_bytes)),
        ("registered per rank", _mebibytes(plan.registered_bytes)),
        *((f"  {name.replace('_', ' ')}", _mebibytes(part)) for name, part in plan.parts.items()),
        ("with rings on a GPU", f"{_mebibytes(plan.device_words_bytes)} more there, for flags"),
        ("registered per node", _mebibytes(plan.registered_bytes * plan.node_size)),
        ("chunk rows", str(plan.chunk_rows)),
        ("slots per ring", str(plan.slots)),
        ("publish slots", str(plan.publish_slots)),
        ("slot bytes", f"dispatch {plan.dispatch_slot_bytes}, combine {plan.combine_slot_bytes}"),
        ("completion queue", f"at most {plan.completion_queue_events} events towards each NIC of a rank"),
        ("writes", f"at most {plan.writes_per_nic} of a rank in flight on each of its NICs"),
    ]
    return "\n".join(f"{name:<22}{text}" for name, text in rows)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
