"""The configuration of an expert-parallel group, checked before anything is sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_efa.errors import ConfigError

MAX_TOP_K = 64
_DTYPES = ("auto", "bf16", "fp32", "fp8")
FP8_SCALES = ("fp32", "ue8m0")
_TRANSPORTS = ("auto", "shm", "libfabric")
_DEVICES = ("cpu", "cuda")
_BUFFERS = ("auto", "host", "device")


_MOST = {  # far beyond any use, within what the native layer's integers hold
    "num_experts": 1 << 24,
    "hidden_size": 1 << 24,
    "max_tokens_per_rank": 1 << 26,
    "memory_budget_bytes": 1 << 56,
    "node_size": 1 << 20,
    "chunk_rows": 1 << 16,
    "slots": 1 << 13,
    "num_nics": 32,
}


@dataclass(frozen=True, kw_only=True)
class ExpertParallelConfig:
    """What all ranks of a group must agree on.

    Attributes:
        num_experts: experts of the whole group, E; rank r of R owns ``[r * E / R, (r + 1) * E / R)``.
        hidden_size: elements per token, H.
        top_k: selections per token, K; at most 64 and at most ``num_experts``.
        max_tokens_per_rank: most tokens in one dispatch of one rank.
        wire_dtype: what dispatch sends: "auto" (x's dtype), "bf16", "fp32" or "fp8" (e4m3 in blocks of 1x128, see
            :func:`moe_efa.quantization.quantize_1x128`). It holds for rows that stay on their rank too.
        combine_dtype: what combine sends, and what it rounds the sum of a node to: "auto" (y's dtype), "bf16", "fp32"
            or "fp8". Ranks of a node publish their sums to each other in this dtype, in bf16 where it is "fp8".
        grad_wire_dtype: what gradients travel in: "auto", "bf16", "fp32" or "fp8". A gradient of combine is a dispatch:
            it travels in ``grad_wire_dtype``; "auto" stands for ``wire_dtype``, or for the gradient's own dtype where
            that is "fp8". A gradient of dispatch is a combine: it travels in ``combine_dtype``, or in
            ``grad_wire_dtype`` where that is "fp8"; "auto" then stands for the gradient's own dtype. So no gradient is
            rounded to FP8 unless this says "fp8". A dispatch with a handle outside of backward is not of gradients.
        fp8_scale: scales of FP8 blocks: "fp32", or "ue8m0" for powers of two.
        node_size: ranks per node; None finds it from the hosts.
        transport: what joins nodes: "auto", "shm" (several nodes on one host) or "libfabric". Inside a node it is
            always shared memory.
        num_nics: rails per rank, each a NIC of its own. None takes what is there: of EFA NICs those paired with the
            rank's GPU or NUMA node (:mod:`moe_efa.topology`), elsewhere one. Without EFA, the rails are endpoints on
            one interface, or in shared memory, which stand for NICs.
        provider: libfabric provider ("efa", "tcp", ...); None takes the best present.
        timeout_s: seconds to wait for a live peer that has not entered a call.
        heartbeat_timeout_s: seconds of silence after which a peer counts as lost.
        memory_budget_bytes: most registered memory per rank.
        device: where tensors are, and kernels run: "cpu" or "cuda".
        buffers: where rings are: "host" is pinned memory, which any NIC and provider reach; "device" is memory of the
            GPU, which the ranks of the node and the NICs have to reach (CUDA IPC, dma-buf); "auto" takes "device"
            where they can.
        chunk_rows: most rows in one chunk; 0 takes the largest that fits. For tests and tuning.
        slots: slots per ring; 0 takes the most that fit. For tests and tuning.

    Raises:
        ConfigError: for a value that cannot work, or that this version does not offer.
    """

    num_experts: int
    hidden_size: int
    top_k: int
    max_tokens_per_rank: int
    wire_dtype: str = "auto"
    combine_dtype: str = "auto"
    grad_wire_dtype: str = "auto"
    fp8_scale: str = "fp32"
    node_size: int | None = None
    transport: str = "auto"
    provider: str | None = None
    num_nics: int | None = None
    timeout_s: float = 600.0
    heartbeat_timeout_s: float = 20.0
    memory_budget_bytes: int = 1 << 30
    device: str = "cpu"
    buffers: str = "auto"
    chunk_rows: int = 0
    slots: int = 0

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "top_k", "max_tokens_per_rank", "memory_budget_bytes"):
            _check_integer(name, getattr(self, name), minimum=1)
        for name in ("chunk_rows", "slots"):
            _check_integer(name, getattr(self, name), minimum=0)
        for name in ("node_size", "num_nics"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), minimum=1)
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                raise ConfigError(f"{name}={getattr(self, name)} is more than {most}")
        for name in ("timeout_s", "heartbeat_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive, finite number of seconds, not {value!r}")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        if self.top_k > MAX_TOP_K:
            raise ConfigError(f"top_k={self.top_k} is more than the {MAX_TOP_K} that a row can describe")
        for name in ("wire_dtype", "combine_dtype", "grad_wire_dtype"):
            _check_word(name, getattr(self, name), _DTYPES)
        _check_word("fp8_scale", self.fp8_scale, FP8_SCALES)
        _check_word("transport", self.transport, _TRANSPORTS)
        _check_word("device", self.device, _DEVICES)
        _check_word("buffers", self.buffers, _BUFFERS)
        if self.provider is not None and (not isinstance(self.provider, str) or not self.provider):
            raise ConfigError(f"provider must be the name of a libfabric provider or None, not {self.provider!r}")

    @property
    def grad_dispatch_dtype(self) -> str:
        """What dispatches of gradients send, a word as ``wire_dtype``: the rule of ``grad_wire_dtype``."""
        if self.grad_wire_dtype != "auto" or self.wire_dtype == "fp8":
            return self.grad_wire_dtype
        return self.wire_dtype

    @property
    def grad_combine_dtype(self) -> str:
        """What combines of gradients send, a word as ``combine_dtype``: the rule of ``grad_wire_dtype``."""
        return self.grad_wire_dtype if self.combine_dtype == "fp8" else self.combine_dtype

    def check_num_ranks(self, num_ranks: int) -> None:
        """Raise ConfigError unless the experts, and the nodes if given, divide evenly among ``num_ranks``."""
        if self.num_experts % num_ranks:
            raise ConfigError(f"num_experts={self.num_experts} is not a multiple of the group's {num_ranks} ranks")
        if self.node_size is not None and num_ranks % self.node_size:
            raise ConfigError(f"node_size={self.node_size} does not divide the group's {num_ranks} ranks")

    def resolve_node_size(self, hosts: Sequence[str]) -> int:
        """Ranks per node, from the host of every rank of the group in rank order.

        A node is a run of consecutive ranks on one host, and all nodes have equal size.

        Raises:
            ConfigError: if the hosts do not allow it; the text says which ``node_size`` they do allow.
        """
        self.check_num_ranks(len(hosts))
        runs = _run_lengths(hosts)
        possible = math.gcd(*runs)
        advice = f"node_size={possible} would do"
        if self.node_size is not None:
            if possible % self.node_size:
                raise ConfigError(f"node_size={self.node_size} would put ranks of different hosts in a node; {advice}")
            return self.node_size
        if len(runs) != len(set(hosts)):
            raise ConfigError(
                f"the ranks of a host are not consecutive in the group (ranks per run of equal hosts: {runs}); "
                f"order the group by host, or pass node_size: {advice}"
            )
        if len(set(runs)) > 1:
            raise ConfigError(f"hosts hold unequal numbers of ranks of the group ({runs}); pass node_size: {advice}")
        return runs[0]

    def resolve_transport(self, *, num_nodes: int, num_hosts: int) -> str:
        """What joins the nodes: "none" for a single one, "shm" or "libfabric". ConfigError for "shm" across hosts."""
        if self.transport == "shm" and num_hosts > 1:
            raise ConfigError(f"transport='shm' cannot join {num_hosts} hosts; use 'auto' or 'libfabric'")
        if num_nodes == 1:
            return "none"
        return "libfabric" if self.transport == "auto" else self.transport

    def as_dict(self) -> dict[str, object]:
        """Field names and values."""
        return dataclasses.asdict(self)


def _run_lengths(hosts: Sequence[str]) -> list[int]:
    runs: list[int] = []
    for rank, host in enumerate(hosts):
        if rank and host == hosts[rank - 1]:
            runs[-1] += 1
        else:
            runs.append(1)
    return runs


def _check_integer(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, not {value!r}")
    if value < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, not {value}")


def _check_word(name: str, value: object, words: Sequence[str]) -> None:
    if value not in words:
        raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(words)}")
