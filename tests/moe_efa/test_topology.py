"""NICs of EFA hosts paired with GPUs, on sysfs trees that stand for AWS instance types.

Only the structure comes from public documentation: numbers of GPUs, EFA interfaces and NUMA nodes, and that NICs and
GPUs which belong together are behind one PCI switch. PCI addresses and device names are made up here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_efa import ConfigError, ExpertParallelConfig, doctor, rendezvous, topology
from moe_efa.topology import pair, read_topology

AMAZON, NVIDIA = "0x1d0f", "0x10de"


@dataclass(frozen=True)
class Host:
    """``switches`` PCI switches, spread evenly over ``numa_nodes``, each with so many GPUs and NICs behind it."""

    switches: int
    gpus: int
    nics: int
    numa_nodes: int = 2

    @property
    def num_gpus(self) -> int:
        return self.switches * self.gpus

    @property
    def num_nics(self) -> int:
        return self.switches * self.nics


HOSTS = {
    "p4d.24xlarge": Host(switches=4, gpus=2, nics=1),
    "p5.48xlarge": Host(switches=8, gpus=1, nics=4),
    "p5en.48xlarge": Host(switches=8, gpus=1, nics=2),
    "p6-b200.48xlarge": Host(switches=8, gpus=1, nics=1),
}


class Sysfs:
    """Builds a tree below ``root`` as the kernel shows it."""

    def __init__(self, root: Path, numa_nodes: int = 1) -> None:
        self.root = root
        for folder in ("class/infiniband", "bus/pci/devices", "bus/pci/drivers/efa", "bus/pci/drivers/mlx5_core"):
            (root / folder).mkdir(parents=True)
        for node in range(numa_nodes):
            (root / f"devices/system/node/node{node}").mkdir(parents=True)
        (root / "devices/system/node/possible").write_text("0\n")

    def device(self, *path: str, vendor: str, kind: str, numa: int) -> Path:
        folder = self.root.joinpath("devices", *path)
        folder.mkdir(parents=True)
        for name, text in (("vendor", vendor), ("class", kind), ("numa_node", str(numa))):
            (folder / name).write_text(text + "\n")
        (self.root / "bus/pci/devices" / path[-1]).symlink_to(folder)
        return folder

    def gpu(self, *path: str, numa: int, kind: str = "0x030200") -> None:
        self.device(*path, vendor=NVIDIA, kind=kind, numa=numa)

    def nic(self, name: str, *path: str, numa: int, driver: str = "efa", vendor: str = AMAZON) -> None:
        folder = self.device(*path, vendor=vendor, kind="0x020000", numa=numa)
        if driver:
            (folder / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)
        (folder / "infiniband" / name).mkdir(parents=True)
        (folder / "infiniband" / name / "device").symlink_to(folder)
        (self.root / "class/infiniband" / name).symlink_to(folder / "infiniband" / name)


def build(root: Path, host: Host) -> Path:
    tree = Sysfs(root, host.numa_nodes)
    for switch in range(host.switches):
        numa = switch * host.numa_nodes // host.switches
        bus = 0x10 * (switch + 1)
        above = (f"pci0000:{bus:02x}", f"0000:{bus:02x}:00.0")
        below = itertools.count()  # NICs have the lower addresses, so that order alone would pair them wrongly
        for nic in range(host.nics):
            port, address = f"0000:{bus + 1:02x}:{next(below):02x}.0", f"0000:{bus + 2 + nic:02x}:00.0"
            tree.nic(f"rdmap{bus + 2 + nic}s0", *above, port, address, numa=numa)
        for gpu in range(host.gpus):
            port, address = f"0000:{bus + 1:02x}:{next(below):02x}.0", f"0000:{bus + 2 + host.nics + gpu:02x}:00.0"
            tree.gpu(*above, port, address, numa=numa)
    return root


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, topology.HostTopology]:
    return {name: read_topology(build(tmp_path_factory.mktemp("sysfs"), host)) for name, host in HOSTS.items()}


def switch_of(place: topology.Place) -> str:
    return place.path[0]


@pytest.mark.parametrize("name", HOSTS)
def test_recorded_hosts_are_read(name: str, hosts: dict[str, topology.HostTopology]) -> None:
    host = hosts[name]
    assert len(host.nics) == HOSTS[name].num_nics
    assert len(host.gpus) == HOSTS[name].num_gpus
    assert host.numa_nodes == (0, 1)
    assert [nic.pci_address for nic in host.nics] == sorted(nic.pci_address for nic in host.nics)
    assert {nic.numa_node for nic in host.nics} == {0, 1}


@pytest.mark.parametrize("name", ["p5.48xlarge", "p5en.48xlarge", "p6-b200.48xlarge"])
def test_a_rank_per_gpu_gets_the_nics_behind_its_switch(name: str, hosts: dict[str, topology.HostTopology]) -> None:
    host = hosts[name]
    pairing = pair(host, 8)
    assert pairing.unused == ()
    assert sorted(nic.name for share in pairing.shares for nic in share.nics) == sorted(nic.name for nic in host.nics)
    for rank, share in enumerate(pairing.shares):
        assert share.gpu == host.gpus[rank]
        assert len(share.nics) == HOSTS[name].nics
        assert {switch_of(nic) for nic in share.nics} == {switch_of(host.gpus[rank])}
        assert [nic.pci_address for nic in share.nics] == sorted(nic.pci_address for nic in share.nics)


def test_two_gpus_of_a_p4d_share_the_nic_behind_their_switch(hosts: dict[str, topology.HostTopology]) -> None:
    host = hosts["p4d.24xlarge"]
    pairing = pair(host, 8)
    assert pairing.unused == ()
    assert [[nic.name for nic in share.nics] for share in pairing.shares] == [
        [host.nics[rank // 2].name] for rank in range(8)
    ]
    for share in pairing.shares:
        assert share.gpu is not None
        assert switch_of(share.nics[0]) == switch_of(share.gpu)


def test_fewer_ranks_than_gpus_divide_all_nics_and_keep_their_own(hosts: dict[str, topology.HostTopology]) -> None:
    host = hosts["p5.48xlarge"]
    pairing = pair(host, 4)
    for rank, share in enumerate(pairing.shares):
        assert len(share.nics) == 8
        own = [nic for nic in host.nics if switch_of(nic) == switch_of(host.gpus[rank])]
        assert set(own) <= set(share.nics)
    assert pairing.unused == ()


def test_what_does_not_divide_is_left_and_said(hosts: dict[str, topology.HostTopology]) -> None:
    host = hosts["p6-b200.48xlarge"]
    pairing = pair(host, 3)
    assert [len(share.nics) for share in pairing.shares] == [2, 2, 2]
    assert len(pairing.unused) == 2
    assert "unused: " + ", ".join(nic.name for nic in pairing.unused) in topology.format_pairing(pairing)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 16, 40])
@pytest.mark.parametrize("name", HOSTS)
def test_shares_are_equal_and_nobody_goes_without(
    name: str, num_ranks: int, hosts: dict[str, topology.HostTopology]
) -> None:
    host = hosts[name]
    pairing = pair(host, num_ranks)
    sizes = {len(share.nics) for share in pairing.shares}
    assert sizes == {max(1, len(host.nics) // num_ranks)}
    used = [nic for share in pairing.shares for nic in share.nics]
    assert len(used) == len(set(used)) or num_ranks > len(host.nics)
    assert set(used) | set(pairing.unused) == set(host.nics)


def test_equal_hosts_give_equal_shares_whatever_the_order_of_names(tmp_path: Path) -> None:
    host = HOSTS["p5en.48xlarge"]
    first = pair(read_topology(build(tmp_path / "a", host)), 8)
    again = pair(read_topology(build(tmp_path / "b", host)), 8)
    assert first == again
    renamed = tmp_path / "b" / "class" / "infiniband"
    for index, entry in enumerate(sorted(renamed.iterdir(), reverse=True)):  # names go the other way than addresses
        entry.rename(renamed / f"efa_{index:02}")
    other = pair(read_topology(tmp_path / "b"), 8)
    addresses = [[[nic.pci_address for nic in share.nics] for share in one.shares] for one in (first, other)]
    assert addresses[0] == addresses[1]


def test_where_pci_shows_no_switches_numa_decides_then_order(tmp_path: Path) -> None:
    tree = Sysfs(tmp_path, 2)
    for index in range(4):
        tree.gpu("pci0000:00", f"0000:00:1{index}.0", numa=index // 2, kind="0x030000")
        tree.nic(f"efa_{index}", "pci0000:00", f"0000:00:0{index}.0", numa=1 - index // 2)
    host = read_topology(tmp_path)
    shares = pair(host, 4).shares
    assert [[nic.name for nic in share.nics] for share in shares] == [["efa_2"], ["efa_3"], ["efa_0"], ["efa_1"]]


def test_without_gpus_ranks_sit_in_numa_nodes(tmp_path: Path) -> None:
    tree = Sysfs(tmp_path, 2)
    for index in range(2):
        tree.nic(f"efa_{index}", f"pci0000:{index}0", f"0000:{index}0:01.0", numa=1 - index)
    pairing = pair(read_topology(tmp_path), 2)
    assert [[nic.name for nic in share.nics] for share in pairing.shares] == [["efa_1"], ["efa_0"]]
    assert [share.gpu for share in pairing.shares] == [None, None]


def test_a_machine_without_nics_gives_empty_shares(tmp_path: Path) -> None:
    assert read_topology(tmp_path / "absent") == topology.HostTopology((), (), ())
    Sysfs(tmp_path).gpu("pci0000:00", "0000:00:1e.0", numa=-1)
    host = read_topology(tmp_path)
    assert host.nics == ()
    assert len(host.gpus) == 1
    assert [share.nics for share in pair(host, 2).shares] == [(), ()]


def test_nics_of_others_and_other_devices_are_left_out(tmp_path: Path) -> None:
    tree = Sysfs(tmp_path)
    tree.nic("mlx5_0", "pci0000:00", "0000:00:01.0", numa=0, driver="mlx5_core", vendor="0x15b3")
    tree.nic("rdmap2s0", "pci0000:00", "0000:00:02.0", numa=0)
    tree.nic("rdmap3s0", "pci0000:00", "0000:00:03.0", numa=-1, driver="")  # no driver bound: the vendor decides
    tree.device("pci0000:00", "0000:00:04.0", vendor=NVIDIA, kind="0x068000", numa=0)  # a bridge, no GPU
    (tmp_path / "class" / "infiniband" / "siw0").mkdir()  # software, no device
    host = read_topology(tmp_path)
    assert [nic.name for nic in host.nics] == ["rdmap2s0", "rdmap3s0"]
    assert host.gpus == ()


def test_nics_that_libfabric_cannot_open_are_left_out(hosts: dict[str, topology.HostTopology]) -> None:
    host = hosts["p6-b200.48xlarge"]
    domains = [f"{nic.name}-rdm" for nic in host.nics[:4]]
    assert topology.keep_nics(host, domains).nics == host.nics[:4]


def test_doctor_prints_the_pairing_where_there_are_nics(tmp_path: Path) -> None:
    facts = doctor.examine(sysfs=build(tmp_path / "efa", HOSTS["p5en.48xlarge"]))
    text = doctor.format_table(facts)
    assert len(facts["efa_devices"]) == 16
    assert len(facts["efa_pairing"]) == 8
    assert all(line in text for line in facts["efa_pairing"])
    assert "rank 7 of the host (GPU 0000:84:00.0, NUMA 1): rdmap130s0 (0000:82:00.0, NUMA 1), rdmap131s0" in text
    assert doctor.examine(sysfs=tmp_path / "none")["efa_pairing"] == []


# What becomes of it in a native configuration


def agreement(rank: int, num_ranks: int = 8, transport: str = "libfabric") -> rendezvous.Agreement:
    return rendezvous.Agreement(
        rank=rank,
        num_ranks=2 * num_ranks,
        node_size=num_ranks,
        transport=transport,
        num_hosts=2,
        ranks_on_host=num_ranks,
        rank_on_host=rank % num_ranks,
        job_key="key",
        shared_key=None,
    )


@pytest.fixture
def p5(hosts: dict[str, topology.HostTopology], monkeypatch: pytest.MonkeyPatch) -> topology.HostTopology:
    """This host is a p5 whose libfabric opens all NICs."""
    host = hosts["p5.48xlarge"]
    monkeypatch.setattr(rendezvous.topology, "read_topology", lambda root: host)
    monkeypatch.setattr(rendezvous._C, "libfabric_default_provider", lambda **_: "efa-direct")
    monkeypatch.setattr(rendezvous._C, "libfabric_nics", lambda *_, **__: [f"{nic.name}-rdm" for nic in host.nics])
    return host


def config(**changes: object) -> ExpertParallelConfig:
    return ExpertParallelConfig(num_experts=16, hidden_size=64, top_k=2, max_tokens_per_rank=8, **changes)


def test_a_rank_opens_the_nics_paired_with_it(p5: topology.HostTopology) -> None:
    found = rendezvous._nics(config(), agreement(11))
    assert found == {"num_nics": 4, "nic_names": [nic.name for nic in p5.nics[12:16]]}
    assert rendezvous._nics(config(num_nics=2), agreement(3)) == {
        "num_nics": 2,
        "nic_names": [nic.name for nic in p5.nics[12:14]],
    }
    with pytest.raises(ConfigError, match=r"num_nics=5, but 4 of this host's EFA NICs fall to each of its 8 ranks"):
        rendezvous._nics(config(num_nics=5), agreement(3))


def test_other_providers_and_transports_leave_efa_alone(p5: topology.HostTopology) -> None:
    assert rendezvous._nics(config(provider="tcp"), agreement(0)) == {"num_nics": 1}
    assert rendezvous._nics(config(provider="tcp", num_nics=3), agreement(0)) == {"num_nics": 3}
    assert rendezvous._nics(config(), agreement(0, transport="shm")) == {"num_nics": 1}


@pytest.mark.usefixtures("p5")
def test_unused_nics_are_said_once_per_host(caplog: pytest.LogCaptureFixture) -> None:
    for rank in range(3):
        assert rendezvous._nics(config(), agreement(rank, 3))["num_nics"] == 10
    assert len(caplog.records) == 1
    assert "do not divide evenly" in caplog.text


@pytest.mark.parametrize("value", [0, 33, True, 1.5, "2"])
def test_bad_num_nics_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="num_nics"):
        config(num_nics=value)
