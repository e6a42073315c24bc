"""Nodes as network namespaces, joined by veth links behind token buckets, and their removal whatever becomes of us.

A child waits on a pipe and removes everything once the pipe ends: after `close`, after an exception, after kill -9. If
that child dies too, the next run finds the names of a process that is gone (see `sweep`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from moe_efa.errors import ConfigError

LINK = "shaped0"  # the interface of a node
_NAME = re.compile(r"moe_efa_(\d+)_(\d+)_(node\d+|hub)")  # process, its start time
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"  # where iproute2 is, whatever PATH says
_COMMAND_S = 30.0
_REMOVAL_S = 30.0
_MOST_QUEUED_MS = 50
_SETTINGS = "/proc/sys/net/ipv4"  # of the namespace that looks

# Removes the namespaces with what runs in them, and the folder. What was being added just when the pipe broke appears
# a little later, so it looks twice then.
_GUARD = """
folder=$1; shift
remove() {
  for name in "$@"; do
    for pid in $(ip netns pids "$name"); do kill -9 "$pid"; done
    ip netns del "$name"
  done
}
if read -r line; then remove "$@"; else remove "$@"; sleep 0.5; remove "$@"; fi
rm -rf -- "$folder"
"""


class Network:
    """Two or more nodes with one link each. Use as a context manager, in one process.

    Two nodes share a veth pair, which is shaped at both ends; more are joined by a bridge in a namespace of its own,
    and each link is shaped at the node (what leaves it) and at the bridge (what reaches it).

    Args:
        num_nodes: at least 2.
        gbit_per_s: rate of every link in each direction; :func:`set_rate` changes it.
        mtu: of the links, bytes.
        tcp: congestion control inside, of those that namespaces may use; ``None`` = cubic where it is one of them,
            otherwise reno: both fill a link and pace nothing.

    Raises:
        ConfigError: naming what the host lacks, or the command that failed.
    """

    def __init__(self, num_nodes: int, *, gbit_per_s: float, mtu: int = 1500, tcp: str | None = None) -> None:
        problem = missing()
        if problem:
            raise ConfigError(problem)
        if tcp is None:
            tcp = "cubic" if "cubic" in _congestion_controls() else "reno"
        elif tcp not in (known := _congestion_controls()):
            raise ConfigError(
                f"namespaces here have no TCP congestion control {tcp!r}, but {', '.join(known)} "
                "(sysctl net.ipv4.tcp_allowed_congestion_control)"
            )
        sweep()
        prefix = f"moe_efa_{os.getpid()}_{_start_time(os.getpid())}"
        self.namespaces = [f"{prefix}_node{i}" for i in range(num_nodes)]
        self.addresses = [f"10.213.0.{i + 1}" for i in range(num_nodes)]  # seen inside the namespaces only
        self.folder = Path(tempfile.mkdtemp(prefix="moe_efa_shaped_"))  # goes with the namespaces
        self._hub = f"{prefix}_hub" if num_nodes > 2 else None
        names = [*self.namespaces, *([self._hub] if self._hub else [])]
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "moe_efa_guard", str(self.folder), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": _SYSTEM_PATH},
            start_new_session=True,  # Ctrl-C is not for it
        )
        try:
            for name in names:
                _run("ip", "netns", "add", name)
            self._join(mtu)
            for node in range(num_nodes):
                _run(*self.command(node, "sh", "-c", f"echo {tcp} > {_SETTINGS}/tcp_congestion_control"))
            set_rate(self.shaped_ends, gbit_per_s)
        except BaseException:
            self.close()
            raise

    @property
    def shaped_ends(self) -> list[tuple[str, str]]:
        """(namespace, interface) of every token bucket."""
        ends = [(name, LINK) for name in self.namespaces]
        if self._hub:
            ends += [(self._hub, f"port{i}") for i in range(len(self.namespaces))]
        return ends

    def command(self, node: int, *arguments: str) -> list[str]:
        """A command line that runs ``arguments`` in a node."""
        return [_program("ip"), "netns", "exec", self.namespaces[node], *arguments]

    def close(self) -> None:
        """Remove everything; ends what still runs in the namespaces. Repeated calls do nothing."""
        if self._guard.stdin is None or self._guard.stdin.closed:
            return
        try:
            self._guard.stdin.write(b"remove\n")
            self._guard.stdin.close()
            self._guard.wait(timeout=_REMOVAL_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass  # the next run sweeps

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _join(self, mtu: int) -> None:
        if self._hub is None:
            first, second = self.namespaces
            _run(*f"ip link add {LINK} netns {first} type veth peer name {LINK} netns {second}".split())
        else:
            _run("ip", "-n", self._hub, "link", "add", "bridge0", "type", "bridge")
            _run(*f"ip -n {self._hub} link set bridge0 mtu {mtu} up".split())
            for i, name in enumerate(self.namespaces):
                _run(*f"ip link add {LINK} netns {name} type veth peer name port{i} netns {self._hub}".split())
                _run(*f"ip -n {self._hub} link set port{i} mtu {mtu} master bridge0 up".split())
        for name, address in zip(self.namespaces, self.addresses, strict=True):
            _run(*f"ip -n {name} addr add {address}/24 dev {LINK}".split())
            _run(*f"ip -n {name} link set lo up".split())
            _run(*f"ip -n {name} link set {LINK} mtu {mtu} up".split())


def set_rate(ends: Sequence[tuple[str, str]], gbit_per_s: float) -> None:
    """Shape these (namespace, interface) to a rate. A bucket holds half a millisecond, at least 128 KiB."""
    bits = round(gbit_per_s * 1e9)
    burst = max(128 << 10, bits // 8 // 2000)
    for name, interface in ends:
        rate = f"rate {bits}bit burst {burst} latency {_MOST_QUEUED_MS}ms"
        _run(*f"tc -n {name} qdisc replace dev {interface} root tbf {rate}".split())


def missing() -> str:
    """What keeps this host from building a network, as a sentence; empty if nothing does. Tries it out."""
    if os.geteuid() != 0:
        return "network namespaces need root: run it as root, or with sudo"
    for program in ("ip", "tc"):
        if shutil.which(program, path=_SYSTEM_PATH) is None:
            return f"the program {program} is missing (Debian: apt-get install iproute2)"
    trial = f"moe_efa_{os.getpid()}_{_start_time(os.getpid())}_node99"
    try:
        _run("ip", "netns", "add", trial)
    except ConfigError as error:
        return f"network namespaces cannot be made here, perhaps by a container's rule: {error}"
    try:
        try:
            _run(*f"ip link add {LINK} netns {trial} type veth peer name {LINK}b netns {trial}".split())
        except ConfigError as error:
            return f"veth links cannot be made here (kernel module veth): {error}"
        try:
            set_rate([(trial, LINK)], 1.0)
        except ConfigError as error:
            return f"links cannot be shaped here (kernel module sch_tbf): {error}"
    finally:
        _run("ip", "netns", "del", trial)
    return ""


def sweep() -> list[str]:
    """Remove the namespaces of runs whose process is gone, with what runs in them. Returns their names."""
    removed = []
    for name in namespaces():
        found = _NAME.fullmatch(name)
        if found and _start_time(int(found[1])) != found[2]:
            for pid in _run("ip", "netns", "pids", name).split():
                subprocess.run(["kill", "-9", pid], stderr=subprocess.DEVNULL, check=False)
            _run("ip", "netns", "del", name)
            removed.append(name)
    return removed


def namespaces() -> list[str]:
    """The names of all network namespaces of this benchmark, of whatever run."""
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if _NAME.match(line)]


def sent_bytes() -> int:
    """Bytes that left this node's link, frames included; call it inside a node."""
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


def congestion_control() -> str:
    """The kernel's choice for TCP, which decides how a shaped link is filled."""
    try:
        return Path(f"{_SETTINGS}/tcp_congestion_control").read_text().strip()
    except OSError:
        return "unknown"


def _congestion_controls() -> list[str]:
    """Those that the kernel lets namespaces use; the others are for the host alone."""
    return Path(f"{_SETTINGS}/tcp_allowed_congestion_control").read_text().split()


def _start_time(pid: int) -> str:
    """When a process started, in ticks since boot: tells a process from a later one of equal id. Empty if gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _program(name: str) -> str:
    return shutil.which(name, path=_SYSTEM_PATH) or name


def _run(*command: str) -> str:
    """Its output; ConfigError with what it said if it fails."""
    try:
        done = subprocess.run(
            [_program(command[0]), *command[1:]], capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"`{' '.join(command)}`: {error}") from None
    if done.returncode != 0:
        raise ConfigError(f"`{' '.join(command)}`: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
