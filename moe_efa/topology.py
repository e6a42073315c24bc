"""Which NICs a rank uses on an EFA host: PCI and NUMA places from sysfs, NICs shared out among the ranks of the host.

Nothing here is measured or asked of a driver; the root of sysfs is a parameter, so that recorded trees can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

SYSFS = Path("/sys")
_AMAZON, _NVIDIA = "0x1d0f", "0x10de"  # PCI vendors
_GPU_CLASSES = ("0x0302", "0x0300")  # 3D controller, VGA controller
_PCI_PART = re.compile(r"pci[0-9a-f]{4}:[0-9a-f]{2}|[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


@dataclass(frozen=True)
class Place:
    """Where a device is. ``path`` is the way from its PCI root to the device; ``numa_node`` is -1 where unknown."""

    name: str
    path: tuple[str, ...]
    numa_node: int

    @property
    def pci_address(self) -> str:
        """Of the device itself, "" where it has none."""
        return self.path[-1] if self.path else ""


@dataclass(frozen=True)
class HostTopology:
    """The EFA NICs and NVIDIA GPUs of a host, each in the order of their PCI addresses, and its NUMA nodes."""

    nics: tuple[Place, ...]
    gpus: tuple[Place, ...]
    numa_nodes: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """What one rank of a host gets: NICs in the order of their PCI addresses, and the GPU they are paired with."""

    nics: tuple[Place, ...]
    gpu: Place | None


@dataclass(frozen=True)
class Pairing:
    """The shares of all ranks of a host, in rank order, and the NICs that no rank uses."""

    shares: tuple[Share, ...]
    unused: tuple[Place, ...]


def read_topology(root: Path = SYSFS) -> HostTopology:
    """What ``root`` (sysfs) says of EFA NICs, NVIDIA GPUs and NUMA nodes; empty where there is none of them."""
    nics = []
    for entry in sorted((root / "class" / "infiniband").glob("*")):
        device = (entry / "device").resolve()
        if _is_efa(device):
            nics.append(_place(entry.name, device))
    gpus = []
    for entry in sorted((root / "bus" / "pci" / "devices").glob("*")):
        device = entry.resolve()
        if _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_GPU_CLASSES):
            gpus.append(_place(entry.name, device))
    nodes = [entry.name.removeprefix("node") for entry in (root / "devices" / "system" / "node").glob("node*")]
    return HostTopology(
        nics=tuple(sorted(nics, key=_order)),
        gpus=tuple(sorted(gpus, key=_order)),
        numa_nodes=tuple(sorted(int(node) for node in nodes if node.isdecimal())),
    )


def keep_nics(host: HostTopology, domains: Iterable[str]) -> HostTopology:
    """The host without the NICs that libfabric's domains, such as "rdmap0s6-rdm", do not include."""
    named = {domain for full in domains for domain in (full, full.rpartition("-")[0])}
    return replace(host, nics=tuple(nic for nic in host.nics if nic.name in named))


def pair(host: HostTopology, num_ranks: int) -> Pairing:
    """Share the NICs of a host out among its ranks.

    Rank i of the host sits at GPU i (at GPU ``i * GPUs // ranks`` where ranks are more than GPUs), or, on a host
    without GPUs, in the NUMA node ``i * nodes // ranks``. Every rank gets equally many NICs: those with the longest
    common PCI path, which are behind the same switch; then those of its NUMA node; then in PCI order. What is left of
    an uneven division is unused. With fewer NICs than ranks every rank gets one, which others use too.

    The same kind of host gives the same shares, so that NIC k of one rank faces NIC k of its rail peers.
    """
    if not host.nics or num_ranks < 1:
        return Pairing(tuple(Share((), gpu) for gpu in _seats(host, num_ranks)[0]), host.nics)
    gpus, places = _seats(host, num_ranks)
    per_rank = max(1, len(host.nics) // num_ranks)
    ranks_per_nic = max(1, -(-num_ranks // len(host.nics)))
    taken: list[list[int]] = [[] for _ in range(num_ranks)]
    users = [0] * len(host.nics)
    wishes = sorted(
        (-_common(place, nic), _apart(place, nic), rank, index)
        for rank, place in enumerate(places)
        for index, nic in enumerate(host.nics)
    )
    for _, _, rank, index in wishes:
        if len(taken[rank]) < per_rank and users[index] < ranks_per_nic:
            taken[rank].append(index)
            users[index] += 1
    shares = tuple(
        Share(tuple(host.nics[index] for index in sorted(indices)), gpu)
        for gpu, indices in zip(gpus, taken, strict=True)
    )
    return Pairing(shares, tuple(nic for nic, count in zip(host.nics, users, strict=True) if count == 0))


def format_pairing(pairing: Pairing) -> list[str]:
    """One line per rank of the host, and one for NICs that are left."""
    lines = []
    for rank, share in enumerate(pairing.shares):
        nics = ", ".join(f"{nic.name} ({nic.pci_address}, NUMA {_numa(nic)})" for nic in share.nics)
        seat = f"GPU {share.gpu.pci_address}, NUMA {_numa(share.gpu)}" if share.gpu else "no GPU"
        lines.append(f"rank {rank} of the host ({seat}): {nics or 'no NIC'}")
    if pairing.unused:
        lines.append(f"unused: {', '.join(nic.name for nic in pairing.unused)}")
    return lines


def _seats(host: HostTopology, num_ranks: int) -> tuple[list[Place | None], list[Place]]:
    """The GPU of every rank, if there are any, and the place that NICs are compared with."""
    gpus: list[Place | None] = []
    places = []
    for rank in range(num_ranks):
        if host.gpus:
            gpu = host.gpus[rank if num_ranks <= len(host.gpus) else rank * len(host.gpus) // num_ranks]
            gpus.append(gpu)
            places.append(gpu)
        else:
            nodes = host.numa_nodes or (-1,)
            gpus.append(None)
            places.append(Place("", (), nodes[rank * len(nodes) // num_ranks]))
    return gpus, places


def _common(first: Place, second: Place) -> int:
    """Bridges that both are behind, the root included."""
    count = 0
    for one, other in zip(first.path[:-1], second.path[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count


def _apart(first: Place, second: Place) -> bool:
    return first.numa_node < 0 or first.numa_node != second.numa_node


def _numa(place: Place) -> str:
    return str(place.numa_node) if place.numa_node >= 0 else "unknown"


def _order(place: Place) -> tuple[str, str]:
    return place.pci_address, place.name


def _is_efa(device: Path) -> bool:
    driver = device / "driver"
    return driver.resolve().name == "efa" if driver.exists() else _read(device / "vendor") == _AMAZON


def _place(name: str, device: Path) -> Place:
    numa = _read(device / "numa_node")
    path = tuple(part for part in device.parts if _PCI_PART.fullmatch(part))
    return Place(name, path, int(numa) if re.fullmatch(r"-?\d+", numa) else -1)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
