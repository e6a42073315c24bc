"""The native extension. Pointers are integers; the caller keeps the memory alive for the length of the call."""

from collections.abc import Callable
from typing import Any

class GroupConfig:
    warn_after_s: float

    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        node_size: int,
        num_experts: int,
        hidden_size: int,
        top_k: int,
        max_tokens_per_rank: int,
        wire_dtype: str = "auto",
        combine_dtype: str = "auto",
        grad_wire_dtype: str = "auto",
        grad_combine_dtype: str = "auto",
        fp8_scale: str = "fp32",
        transport: str = "none",
        provider: str = "",
        num_nics: int = 1,
        nic_names: list[str] = ...,
        timeout_s: float = 600.0,
        heartbeat_timeout_s: float = 20.0,
        memory_budget_bytes: int = 1 << 30,
        job_key: str = "",
        listen_host: str = "127.0.0.1",
        libfabric: str = "",
        libfabric_hints: list[str] = ...,
        num_threads: int = 1,
        ranks_on_host: int = 0,
        chunk_rows: int = 0,
        slots: int = 0,
        device_library: str = "",
        device_index: int = 0,
        gdrcopy: str = "",
        buffers: str = "auto",
        reorder: bool = False,
        reorder_seed: int = 0,
        reorder_drop_node: int = -1,
        reorder_drop_after: int = 0,
        reorder_drop_nic: int = -1,
    ) -> None: ...

class Plan:
    """Routing facts of one dispatch; what a handle keeps. It may be given attributes."""

    memory: tuple[Any, ...]  # on a device: what holds its arrays
    tables: Any  # of a dispatch in a graph: native_group.PlanTables

    @property
    def plan_id(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def device_overflow_ptr(self) -> int | None:
        """On a device, in static mode: where a block of `memory` begins, with the word that overflow is on the CPU."""
    @property
    def rows(self) -> int: ...
    @property
    def offsets(self) -> list[int]: ...
    @property
    def tokens_per_expert(self) -> list[int]: ...
    @property
    def overflow(self) -> OverflowFlag | None:
        """In static mode only."""
    @property
    def nbytes(self) -> int: ...

class OverflowFlag:
    """One int64 with the buffer protocol: 0, or the capacity that was needed. The calls of its plan raise it."""

class DispatchArgs:
    def __init__(
        self,
        *,
        x_ptr: int,
        dtype: str,
        num_tokens: int,
        topk_idx_ptr: int = 0,
        topk_weights_ptr: int = 0,
        expert_alignment: int = 1,
        capacity: int | None = None,
        plan: Plan | None = None,
        gradient: bool = False,
        fp8_output: bool = False,
        stream: int = 0,
        alone: bool = True,
        send_memory_ptr: int = 0,
    ) -> None: ...

class CombineArgs:
    def __init__(
        self,
        *,
        y_ptr: int,
        dtype: str,
        plan: Plan,
        out_ptr: int,
        weights_ptr: int = 0,
        weight_grads_ptr: int = 0,
        topk_weight_grads_ptr: int = 0,
        gradient: bool = False,
        stream: int = 0,
        alone: bool = True,
    ) -> None: ...

class DispatchBuffers:
    """What a started dispatch gave, in memory of its own."""

    @property
    def plan(self) -> Plan: ...
    @property
    def x(self) -> HostBuffer: ...
    @property
    def weights(self) -> HostBuffer | None: ...
    @property
    def scales(self) -> HostBuffer | None: ...

class Group:
    """One rank of an expert-parallel group. Every method releases the GIL; calls must not overlap."""

    def __init__(self, config: GroupConfig) -> None: ...
    def address(self) -> bytes: ...
    def connect(self, addresses: list[bytes]) -> None: ...
    def meet(self, poll: Callable[[], object]) -> None: ...
    def check(self) -> None: ...
    def start(self) -> None: ...
    def dispatch_begin(self, args: DispatchArgs) -> Plan: ...
    def dispatch_finish(self, out_ptr: int, weights_ptr: int, scales_ptr: int = 0) -> None: ...
    def combine(self, args: CombineArgs) -> None: ...
    def own_stream(self) -> int:
        """On a device: where the kernels of dispatches go that are not alone."""
    def device_send_bytes(self, num_tokens: int) -> int:
        """Of device memory for a fresh dispatch, which has to live as long as the plan."""
    def set_allocate(self, allocate: Callable[[int, Plan, int], tuple[int, int, int, int]]) -> None:
        """On a device: ``allocate(ticket, plan, plan_bytes)`` gives the addresses of memory for the rows of a dispatch,
        their weights, their scales and the plan, 0 for what it does not have. Called once per dispatch, when its sizes
        are known, by any thread, also while another one waits in a call here.
        """
    def dispatch_start(self, args: DispatchArgs, pool: HostPool | None) -> int:
        """A ticket for finish(). What the arguments point to stays until then."""
    def combine_start(self, args: CombineArgs) -> int: ...
    def finish(self, ticket: int, stream: int = 0) -> DispatchBuffers:
        """Wait for a started call; on a device ``stream`` goes on behind it. A combine gives no buffers."""
    def synchronize(self, stream: int = 0) -> None:
        """On a device: until what finished calls have queued, and graphs replay on the stream, is done."""
    def catch_up(self, stream: int) -> None:
        """Before a call that is no replay is started, where there are graphs: wait until the stream has come to it."""
    def capturing(self, stream: int) -> bool: ...
    def device_plan_bytes(self, capacity: int) -> int: ...
    def record_dispatch(
        self,
        args: DispatchArgs,
        *,
        out_ptr: int,
        weights_ptr: int = 0,
        scales_ptr: int = 0,
        plan_memory_ptr: int = 0,
        counts_ptr: int = 0,
        offsets_ptr: int = 0,
    ) -> Plan:
        """Into the graph that the stream of the arguments is being captured in; without tables it is a replay."""
    def record_combine(self, args: CombineArgs) -> None: ...
    def ended(self, ticket: int) -> bool:
        """Whether finish() would not wait."""
    def forget(self, ticket: int) -> bool:
        """Instead of finish(): true once the call touches no memory of the caller's any more."""
    def abort(self, message: str) -> None: ...
    def abort_for(self, message: str, *, rank: int, lost: bool) -> None: ...
    def close(self, *, collective: bool, timeout_s: float, reason: str = "") -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def info(self) -> dict[str, Any]: ...

class HostBuffer:
    """Writable memory with the buffer protocol; it goes back to its pool with the last reference."""

class HostPool:
    def __init__(self, *, max_idle_bytes: int) -> None: ...
    def take(self, bytes: int) -> HostBuffer: ...
    def trim(self, max_idle_bytes: int) -> None: ...
    @property
    def idle_bytes(self) -> int: ...

def refuse_callbacks(timeout_s: float) -> None:
    """At the end of the process: no thread of ours enters the interpreter any more. Waits for one that is in it."""

def device_facts(library: str, index: int) -> dict[str, Any]: ...
def gdrcopy_info(library: str = "") -> dict[str, Any]: ...
def build_info(libfabric: str = "", libfabric_hints: list[str] = ...) -> dict[str, Any]: ...
def libfabric_default_provider(libfabric: str = "", libfabric_hints: list[str] = ...) -> str: ...
def libfabric_providers(libfabric: str = "", libfabric_hints: list[str] = ...) -> list[str]: ...
def libfabric_nics(provider: str, libfabric: str = "", libfabric_hints: list[str] = ...) -> list[str]: ...
def plan_memory(config: GroupConfig) -> dict[str, Any]: ...
def engine_cost(chunks: int, *, num_nodes: int = 2, copying: bool = False) -> dict[str, float]: ...
def wire_layout() -> dict[str, Any]: ...
def simulate_profiles() -> list[str]: ...
def simulate_check(profile: str, seed: int, *, num_ranks: int = 0, trace_lines: int = 40) -> dict[str, Any]: ...
