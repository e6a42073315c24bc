"""One native group per (ranks, configuration), shared by whoever asks for it (I16), and closed with the process."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import threading
import time
import weakref

import torch
import torch.distributed as dist

from moe_efa import _C, device, host_memory, rendezvous
from moe_efa.config import ExpertParallelConfig
from moe_efa.errors import ClosedError, ConfigError
from moe_efa.native_group import NativeGroup

_EXIT_TIMEOUT_S = 2.0
_CONFIG_ERROR_TIMEOUT_S = 60.0  # a rank without a configuration waits so long for the others to hear of it

_Key = tuple[int, tuple[int, ...], ExpertParallelConfig, torch.device]
_registry: dict[_Key, NativeGroup] = {}
_live: set[NativeGroup] = set()
_registry_lock = threading.Lock()  # held for a moment only
_building: dict[tuple[int, ...], threading.Lock] = {}  # by ranks: one construction of a group at a time
_hooked_pid: int | None = None
_by_name: weakref.WeakValueDictionary[str, NativeGroup] = weakref.WeakValueDictionary()


def find(name: str) -> NativeGroup:
    """The native group of this name; also a closed one, which raises why at every call, while something keeps it."""
    found = _by_name.get(name)
    if found is None:
        raise ClosedError("the native group was closed")
    return found


def acquire(group: dist.ProcessGroup | None, config: ExpertParallelConfig | ConfigError) -> NativeGroup:
    """The native group of these ranks and this configuration: an existing one if every rank has it. Collective.

    Args:
        config: the configuration, or why this rank has none; then every rank raises.
    """
    key = (
        None
        if isinstance(config, ConfigError)
        else (os.getpid(), rendezvous.ranks_of(group), config, device.of_tensors(config.device))
    )
    with _registry_lock:
        building = _building.setdefault(rendezvous.ranks_of(group), threading.Lock())
    with building:
        with _registry_lock:
            existing = None if key is None else _registry.get(key)
        if existing is not None and not existing.usable:
            existing = None
        meeting = rendezvous.Rendezvous(group, _timeout_s(config))
        try:
            agreement = rendezvous.agree(meeting, config, None if existing is None else existing.job_key)
        except BaseException as error:
            meeting.give_up(error)
            raise
        assert key is not None  # agree has raised
        assert isinstance(config, ExpertParallelConfig)
        if existing is None or agreement.shared_key is None:
            native = rendezvous.build(meeting, config, agreement)
            existing = NativeGroup(native, config, agreement, on_close=_forget)
            with _registry_lock:
                _registry[key] = existing
                _by_name[existing.name] = existing
                _live.add(existing)
                _hook_exit()
        existing.retain()
        return existing


def _timeout_s(config: ExpertParallelConfig | ConfigError) -> float:
    return _CONFIG_ERROR_TIMEOUT_S if isinstance(config, ConfigError) else config.timeout_s


def _forget(native_group: NativeGroup) -> None:
    with _registry_lock:
        _live.discard(native_group)
        for key in [key for key, value in _registry.items() if value is native_group]:
            del _registry[key]
    if not _live:
        host_memory.release_idle()


def _hook_exit() -> None:
    """Close at the end of this process. Children of multiprocessing run its finalizers and not those of atexit."""
    global _hooked_pid
    if _hooked_pid != os.getpid():
        _hooked_pid = os.getpid()
        atexit.register(_C.refuse_callbacks, _EXIT_TIMEOUT_S)  # after the next one: of groups that could not be closed
        atexit.register(_close_all, _hooked_pid)
        multiprocessing.util.Finalize(None, _close_all, args=(_hooked_pid,), exitpriority=100)


def _close_all(pid: int) -> None:
    if os.getpid() != pid:
        return
    deadline = time.monotonic() + _EXIT_TIMEOUT_S
    ending = list(_live)
    for native_group in ending:
        native_group.refuse_calls()
    for native_group in ending:
        native_group.close_at_exit(max(0.1, deadline - time.monotonic()))
