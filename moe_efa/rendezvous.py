"""Brings the ranks of a group together: compares what must be equal (I15), exchanges addresses, starts native groups.

Every step ends in an exchange of errors, so a failure on one rank raises on every rank at construction and nobody waits
for a rank that has given up. Only the process group's store is used, and no reference to either is kept.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import pickle
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from moe_efa import _C, device, env, libfabric, topology
from moe_efa._version import __version__
from moe_efa.config import ExpertParallelConfig
from moe_efa.errors import ConfigError, PeerLostError, PeerTimeoutError, TransportError

_log = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 2.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05  # between two looks into the store
_LOOK_EVERY_S = 0.2  # at the health of the other ranks


@dataclass(frozen=True)
class Agreement:
    """What the ranks agreed on before a native group is built.

    ``shared_key`` is the job key of a native group that every rank already has for this configuration, else None.
    """

    rank: int
    num_ranks: int
    node_size: int
    transport: str
    num_hosts: int
    ranks_on_host: int
    rank_on_host: int
    job_key: str
    shared_key: str | None


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group; None stands for a group of this process alone. ConfigError if not in it."""
    if group is None:
        return 0
    rank = dist.get_rank(group)
    if rank < 0:
        raise ConfigError("this process is not a member of the group")
    return rank


def ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """Global ranks of the group in group order; empty for None. ConfigError if it is neither a group nor None."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ConfigError("this rank is not a member of the group")
        raise ConfigError(f"group must be a torch.distributed process group or None, not {group!r}")
    return () if group is None else tuple(dist.get_process_group_ranks(group))


class Rendezvous:
    """One construction: the ranks exchange values in named steps through the store of their process group.

    Unlike a collective of the group, a wait on the store is bounded, ends when a rank gives up or dies, and tells who
    is missing (I5).
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.rank = rank_in(group)
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        self.native: _C.Group | None = None  # asked for failures, once there is one
        self._timeout_s = timeout_s
        self._pids: dict[int, int] = {}  # of the other ranks of this host, by rank
        self._store = None if group is None else _store_of(group)
        if self._store is not None:
            # All ranks construct the same objects in the same order, so they count alike, also after a failure.
            attempt = self._store.add(f"moe_efa/attempts/{self.rank}", 1)
            self._prefix = f"moe_efa/{attempt}"

    def watch(self, pids: dict[int, int]) -> None:
        """From now on the death of these processes of this host, by rank, ends every wait."""
        self._pids = {rank: pid for rank, pid in pids.items() if rank != self.rank}

    def exchange(self, step: str, value: Any) -> list[Any]:
        """The values of all ranks in rank order. Collective.

        Raises:
            PeerTimeoutError: naming a rank that did not come within ``timeout_s``.
            PeerLostError: naming a rank that died.
            TransportError: naming a rank that gave up.
        """
        if self._store is None:
            return [value]
        try:
            return self._exchange(self._store, step, value)
        except dist.DistError as error:
            raise PeerLostError(f"the store of the process group is gone ({step}): {error}") from error

    def check(self) -> None:
        """Raise if another rank gave up or died."""
        if self.native is not None:
            self.native.check()
        dead = [rank for rank, pid in self._pids.items() if _is_dead(pid)]
        if self._store is not None and self._store.check([f"{self._prefix}/gave_up"]):
            rank, text = _unpack(self._store.get(f"{self._prefix}/gave_up"))
            if rank != self.rank:
                raise TransportError(f"rank {rank} gave up during construction: {text}", rank=rank)
        for rank in dead:  # and had not given up before
            raise PeerLostError(f"rank {rank} (process {self._pids[rank]}) died during construction", rank=rank)

    def give_up(self, error: BaseException) -> None:
        """Tell the others, who may be waiting, that this rank has left. Errors that every rank finds need none."""
        if self._store is not None and not isinstance(error, TransportError | ConfigError):
            with contextlib.suppress(Exception):
                text = f"{type(error).__name__}: {error}"
                self._store.set(f"{self._prefix}/gave_up", _pack((self.rank, text)))

    def _exchange(self, store: dist.Store, step: str, value: Any) -> list[Any]:
        prefix = f"{self._prefix}/{step}"
        keys = [f"{prefix}/{rank}" for rank in range(self.num_ranks)]
        store.set(keys[self.rank], _pack(value))
        if store.add(f"{prefix}/count", 1) == self.num_ranks:
            store.set(f"{prefix}/complete", "")
        # Polled, not awaited: stores differ in how they bound a wait, and some cannot be interrupted.
        deadline = time.monotonic() + self._timeout_s
        next_look = time.monotonic() + _LOOK_EVERY_S
        pause_s = _SHORTEST_PAUSE_S
        while not store.check([f"{prefix}/complete"]):
            now = time.monotonic()
            if now > next_look:
                self.check()
                next_look = now + _LOOK_EVERY_S
            if now > deadline:
                self._raise_timeout(step, [rank for rank, key in enumerate(keys) if not store.check([key])])
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return [_unpack(store.get(key)) for key in keys]

    def _raise_timeout(self, step: str, missing: list[int]) -> NoReturn:
        others = f" (nor did {len(missing) - 1} others)" if len(missing) > 1 else ""
        rank = missing[0] if missing else None
        raise PeerTimeoutError(
            f"rank {rank} did not reach the {step} of the group within {self._timeout_s:g} s{others}", rank=rank
        )


def agree(
    meeting: Rendezvous, config: ExpertParallelConfig | ConfigError, existing_key: str | None = None
) -> Agreement:
    """Compare configuration and versions on all ranks, and find the nodes. Collective.

    Args:
        meeting: of all ranks, newly made.
        config: this rank's configuration, or why it has none: then every rank raises.
        existing_key: job key of the native group that this rank could share.

    Raises:
        ConfigError: on every rank, naming the field and two ranks that differ, or the rank that failed.
    """
    rank = meeting.rank
    failed = isinstance(config, ConfigError)
    facts: dict[str, object] = {
        "protocol_version": _C.wire_layout()["protocol_version"],
        "package_version": __version__,
    }
    if isinstance(config, ExpertParallelConfig):
        facts |= config.as_dict()
    offer = {
        "error": str(config) if failed else None,
        "facts": facts,
        "host": _host_identity(),
        "process": (_pid_namespace(), os.getpid()),
        "job_key": secrets.token_hex(8),
        "existing_key": existing_key,
    }
    offers = meeting.exchange("configuration", offer)
    if isinstance(config, ConfigError):
        raise config
    for peer, other in enumerate(offers):
        if other["error"] is not None:
            raise ConfigError(f"rank {peer} of the group cannot be configured: {other['error']}")
    for peer, other in enumerate(offers):
        for name, value in offers[0]["facts"].items():
            if other["facts"].get(name) != value:
                raise ConfigError(
                    f"the ranks of the group differ in {name}: {value!r} on rank 0, "
                    f"{other['facts'].get(name)!r} on rank {peer}"
                )
    hosts = [other["host"] for other in offers]
    num_hosts = len(set(hosts))
    node_size = config.resolve_node_size(hosts)
    transport = config.resolve_transport(num_nodes=len(hosts) // node_size, num_hosts=num_hosts)
    processes = [other["process"] for other in offers]
    own_host = (hosts[rank], processes[rank][0])
    meeting.watch({peer: pid for peer, (space, pid) in enumerate(processes) if (hosts[peer], space) == own_host})
    keys = {other["existing_key"] for other in offers}
    return Agreement(
        rank=rank,
        num_ranks=len(hosts),
        node_size=node_size,
        transport=transport,
        num_hosts=num_hosts,
        ranks_on_host=hosts.count(hosts[rank]),
        rank_on_host=hosts[:rank].count(hosts[rank]),
        job_key=offers[0]["job_key"],
        shared_key=keys.pop() if len(keys) == 1 else None,
    )


def build(meeting: Rendezvous, config: ExpertParallelConfig, agreement: Agreement) -> _C.Group:
    """Construct, connect and start a native group. Collective.

    Raises:
        ConfigError, TransportError: on every rank. A rank that failed raises its own error, the others one that names
            it.
    """

    def construct() -> bytes:
        env.output_cache_bytes()  # a wrong setting is an error now, not in the middle of a round
        meeting.native = _C.Group(native_config(config, agreement))
        return meeting.native.address()

    try:
        addresses = _step(meeting, "construction", construct)
        native = meeting.native
        assert native is not None
        _step(meeting, "mapping", lambda: native.connect(addresses))
        _step(meeting, "connection", lambda: native.meet(meeting.check))
        _step(meeting, "start", native.start)
    except BaseException as error:
        meeting.give_up(error)
        if meeting.native is not None:
            _abort(meeting.native, error)
            discard(meeting.native)
        raise
    return native


def native_config(config: ExpertParallelConfig, agreement: Agreement) -> _C.GroupConfig:
    """The native form of a configuration."""
    return _C.GroupConfig(
        rank=agreement.rank,
        num_ranks=agreement.num_ranks,
        node_size=agreement.node_size,
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        top_k=config.top_k,
        max_tokens_per_rank=config.max_tokens_per_rank,
        wire_dtype=config.wire_dtype,
        combine_dtype=config.combine_dtype,
        grad_wire_dtype=config.grad_dispatch_dtype,
        grad_combine_dtype=config.grad_combine_dtype,
        fp8_scale=config.fp8_scale,
        transport=agreement.transport,
        provider=config.provider or "",
        **_nics(config, agreement),
        timeout_s=config.timeout_s,
        heartbeat_timeout_s=config.heartbeat_timeout_s,
        memory_budget_bytes=config.memory_budget_bytes,
        job_key=agreement.job_key,
        listen_host=_listen_host(agreement.num_hosts),
        **libfabric.search_path(),
        num_threads=env.num_threads(agreement.ranks_on_host) if config.device == "cpu" else 1,
        ranks_on_host=agreement.ranks_on_host,
        chunk_rows=config.chunk_rows,
        slots=config.slots,
        buffers=config.buffers,
        **device.native_options(config.device),
        **_faults(),
    )


def _nics(config: ExpertParallelConfig, agreement: Agreement) -> dict[str, Any]:
    nics = [] if agreement.transport != "libfabric" else _paired_nics(config.provider, agreement)
    if not nics:
        return {"num_nics": config.num_nics or 1}
    if config.num_nics is not None and config.num_nics > len(nics):
        raise ConfigError(
            f"num_nics={config.num_nics}, but {len(nics)} of this host's EFA NICs fall to each of its "
            f"{agreement.ranks_on_host} ranks ({', '.join(nics)}): see `moe-efa doctor`"
        )
    nics = nics[: config.num_nics]
    return {"num_nics": len(nics), "nic_names": nics}


def _paired_nics(provider: str | None, agreement: Agreement, root: Path = topology.SYSFS) -> list[str]:
    """Names of this rank's EFA NICs among those that libfabric can open; empty where another provider is used."""
    host = topology.read_topology(root)
    if not host.nics:
        return []
    search = libfabric.search_path()
    provider = provider or _C.libfabric_default_provider(**search)
    if not provider.startswith("efa"):
        return []
    host = topology.keep_nics(host, _C.libfabric_nics(provider, **search))
    pairing = topology.pair(host, agreement.ranks_on_host)
    if pairing.unused and agreement.rank_on_host == 0:
        names = ", ".join(nic.name for nic in pairing.unused)
        _log.warning("EFA NICs that no rank of this host uses, as they do not divide evenly: %s", names)
    return [nic.name for nic in pairing.shares[agreement.rank_on_host].nics]


def _faults() -> dict[str, Any]:
    reorder = env.reorder()
    if reorder is None:
        return {}
    return {
        "reorder": True,
        "reorder_seed": reorder.seed,
        "reorder_drop_node": reorder.drop_node,
        "reorder_drop_after": reorder.drop_after,
        "reorder_drop_nic": reorder.drop_nic,
    }


def _abort(native: _C.Group, error: BaseException) -> None:
    with contextlib.suppress(Exception):
        if isinstance(error, PeerLostError | PeerTimeoutError) and error.rank is not None:
            native.abort_for(str(error), rank=error.rank, lost=isinstance(error, PeerLostError))
        else:
            native.abort(f"{type(error).__name__} during construction: {error}")


def discard(native: _C.Group, reason: str = "") -> None:
    """Close a native group that is of no use any more, without its peers and without errors.

    Args:
        reason: the error that makes this rank leave, for those who turn out to need it.
    """
    with contextlib.suppress(Exception):
        native.close(collective=False, timeout_s=_CLOSE_TIMEOUT_S, reason=reason)


def _step(meeting: Rendezvous, name: str, action: Callable[[], Any]) -> list[Any]:
    """Run ``action`` and return its results on all ranks; raise on all ranks if it raised on one. Collective."""
    value, error = None, None
    try:
        value = action()
    except Exception as raised:
        error = raised
    is_config = isinstance(error, ConfigError)
    text = None if error is None else f"{type(error).__name__}: {error}"
    outcomes = meeting.exchange(name, (value, text, is_config))
    if error is not None:
        raise error
    for peer, (_, text, peer_is_config) in enumerate(outcomes):
        if text is not None:
            message = f"{name} failed on rank {peer} of the group: {text}"
            raise ConfigError(message) if peer_is_config else TransportError(message, rank=peer)
    return [outcome[0] for outcome in outcomes]


def _pack(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def _unpack(text: bytes) -> Any:
    return pickle.loads(base64.b64decode(text))


def _store_of(group: dist.ProcessGroup) -> dist.Store:
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return dist.distributed_c10d._get_process_group_store(group)  # torch < 2.9


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_dead(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except ProcessLookupError:
        return True
    except FileNotFoundError:
        return os.path.exists("/proc/self/stat")
    except OSError:
        return False


def _host_identity() -> str:
    """Equal for ranks that can share memory: the same kernel and the same /dev/shm."""
    override = env.host_id()
    if override is not None:
        return override
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        return f"{boot_id}/{os.stat('/dev/shm').st_dev}"
    except OSError:
        return socket.gethostname()


def _listen_host(num_hosts: int) -> str:
    """The IPv4 address at which the other hosts reach this one."""
    if num_hosts == 1:
        return "127.0.0.1"
    address = env.socket_address()
    if address is not None:
        return address
    # A connected UDP socket sends nothing; it tells which local address routes to the target. On the master itself
    # that may be a loopback address, so the address of the default route comes next (192.0.2.1 is never assigned).
    for target in (env.master_address(), "192.0.2.1"):
        if target is None:
            continue
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            address = probe.getsockname()[0]
            if not address.startswith("127."):
                return address
    raise ConfigError("no address found at which the other hosts reach this one; set MOE_EFA_SOCKET_ADDR")
