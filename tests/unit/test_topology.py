# SPDX-License-Identifier: Apache-2.0
"""Reading hosts and choosing their rails, on constructed trees of real machine types."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferd.daemon.topology import addresses, choose, groups, sysfs
from transferd.daemon.topology.distance import Distance, distance
from transferd.daemon.topology.model import Pci
from transferd.daemon.topology.nic import Nic, speed_text

from support import sysfs as machines

if TYPE_CHECKING:
    from pathlib import Path

    from transferd.daemon.topology import Choice
    from transferd.daemon.topology.model import Topology

    from support.sysfs import SysfsTree

ELSEWHERE = "203.0.113.1"  # no host's own


def topology(tree: SysfsTree) -> Topology:
    return sysfs.read(sysfs.Sysfs(tree.root), tree.addresses)


def rails(tree: SysfsTree, peer_address: str = ELSEWHERE, **options: Any) -> Choice:
    return choose(topology(tree), peer_address=peer_address, **options)


def unused(choice: Choice) -> dict[str, str]:
    return {verdict.nic.name: verdict.why for verdict in choice.unused}


def why(choice: Choice) -> dict[str, str]:
    return {verdict.nic.name: verdict.why for verdict in choice.rails}


def of_gpus(choice: Choice) -> dict[str, tuple[str, ...]]:
    return {group.gpu: group.nics for group in choice.groups if group.gpu}


# ---- what drives them ----


def test_interfaces_are_driven_by_kernel_sockets(tmp_path: Path) -> None:
    tree = machines.hgx_h100(tmp_path)
    assert rails(machines.vm(tmp_path / "vm")).provider == "tcp"
    assert rails(tree, "127.0.0.1").provider == "tcp"
    assert rails(tree, configured=["lo"]).provider == "tcp"
    assert rails(tree, provider="tcp").provider == "tcp"
    assert rails(tree, provider="libfabric").provider == "libfabric"


def test_what_asks_for_it_is_driven_by_libfabric(tmp_path: Path) -> None:
    tree = machines.hgx_h100(tmp_path)
    assert rails(tree, fabric="tcp;ofi_rxm").provider == "libfabric"
    assert rails(tree, library="/opt/libfabric.so.1").provider == "libfabric"
    assert rails(tree, configured=["mlx5_0"], fabric="verbs;ofi_rxm").provider == "libfabric"
    assert rails(tree, configured=["mlx5_0", "enp24s0np0"]).provider == "libfabric"


# ---- whole machines ----


def test_hgx_each_gpu_has_the_nic_of_its_switch(tmp_path: Path) -> None:
    tree = machines.hgx_h100(tmp_path)
    choice = rails(tree, provider="verbs")
    assert choice.names == tuple(f"mlx5_{i}" for i in range(8))
    near = of_gpus(choice)
    assert near["0000:19:00.0"] == ("mlx5_0",)
    assert near["0000:db:00.0"] == ("mlx5_7",)
    assert Counter(name for names in near.values() for name in names) == dict.fromkeys(
        choice.names, 1
    )
    assert {group.distance for group in choice.groups if group.gpu} == {Distance.PIX}
    nodes = {group.numa_node: group.nics for group in choice.groups if not group.gpu}
    assert nodes == {0: choice.names[:4], 1: choice.names[4:]}
    assert "nearest to GPU 0000:19:00.0 (PIX: same PCIe switch)" in why(choice)["mlx5_0"]
    assert "400 Gbit/s" in why(choice)["mlx5_0"]
    assert "takes RDMA devices" in unused(choice)["eno1"]
    assert len(topology(tree).gpus) == 8, "NVSwitches are no GPUs"


def test_hgx_on_sockets(tmp_path: Path) -> None:
    choice = rails(machines.hgx_h100(tmp_path), "10.0.3.7", provider="tcp")
    assert not choice.fallback, "it was asked for"
    assert choice.names == tuple(f"enp{bus}s0np0" for bus in (24, 56, 72, 88, 154, 186, 202, 218))
    assert "has peer_address 10.0.3.7" in why(choice)["enp88s0np0"]
    told = unused(choice)
    assert "slower than the others: 10 Gbit/s, theirs is 400 Gbit/s" in told["eno1"]
    assert "on USB" in told["enxbe3af2b6059f"]
    assert "virtual" in told["docker0"]
    assert "loopback" in told["lo"]
    assert "RDMA device" in told["mlx5_0"]


def test_the_interface_of_peer_address_always_belongs(tmp_path: Path) -> None:
    choice = rails(machines.hgx_h100(tmp_path), "192.168.7.7", provider="tcp")
    assert len(choice.names) == 9
    told = why(choice)["eno1"]
    assert "has peer_address" in told
    assert "although slower" in told
    assert "eno1" not in unused(choice)
    assert "at most 8 of them for one peer" in choice.why


@pytest.mark.parametrize(
    ("machine", "count", "each", "first", "last"),
    [
        (
            machines.p5,
            32,
            4,
            ("0000:53:00.0", "rdmap79s0", "rdmap82s0"),
            ("0000:ca:00.0", "rdmap198s0", "rdmap201s0"),
        ),
        (
            machines.p5en,
            16,
            2,
            ("0000:59:00.0", "rdmap85s0", "rdmap86s0"),
            ("0000:a5:00.0", "rdmap162s0", "rdmap163s0"),
        ),
    ],
)
def test_efa_is_shared_fairly(
    tmp_path: Path,
    machine: Any,
    count: int,
    each: int,
    first: tuple[str, str, str],
    last: tuple[str, str, str],
) -> None:
    choice = rails(machine(tmp_path), "10.1.2.3")
    assert choice.provider == "libfabric"
    assert len(choice.names) == count
    near = of_gpus(choice)
    assert [len(names) for names in near.values()] == [each] * 8
    assert len({name for names in near.values() for name in names}) == count
    for gpu, lowest, highest in (first, last):
        assert (near[gpu][0], near[gpu][-1]) == (lowest, highest)
    assert {group.distance for group in choice.groups if group.gpu} == {Distance.PIX}
    assert unused(choice)["ens32"] == "network interface: the provider takes EFA devices"
    assert "at most 8 of them for one peer" in choice.why


def test_efa_hosts_on_tcp_if_told_so(tmp_path: Path) -> None:
    choice = rails(machines.p5(tmp_path), "10.1.2.3", fabric="tcp")
    assert choice.names == ("ens32",)
    assert choice.provider == "libfabric"
    assert "takes network interfaces" in unused(choice)["rdmap79s0"]
    sockets = rails(machines.p5(tmp_path / "again"), "10.1.2.3", provider="tcp")
    assert (sockets.names, sockets.provider) == (("ens32",), "tcp")


@pytest.mark.parametrize(
    ("spare", "said"),
    [
        ("InfiniBand", "management or storage NIC: every GPU has a nearer one"),
        ("Ethernet", "its fabric is Ethernet, most have InfiniBand"),
    ],
)
def test_dgx_leaves_its_two_other_nics(tmp_path: Path, spare: str, said: str) -> None:
    choice = rails(machines.dgx_h100(tmp_path, spare), provider="verbs")
    assert len(choice.names) == 8
    told = unused(choice)
    assert (told["mlx5_1"], told["mlx5_6"]) == (said, said)
    near = of_gpus(choice)
    assert near["0000:1b:00.0"] == ("mlx5_0",)
    assert {group.distance for group in choice.groups if group.gpu} == {Distance.PXB}


def test_a_gpu_whose_nic_is_down_shares_fairly(tmp_path: Path) -> None:
    tree = machines.hgx_h100(tmp_path)
    machines.write(tmp_path / "class/infiniband/mlx5_1/ports/1", state="1: DOWN")
    choice = rails(tree, provider="verbs")
    assert unused(choice)["mlx5_1"] == "down (port 1 is DOWN)"
    (group,) = (group for group in choice.groups if group.gpu == "0000:39:00.0")
    assert (group.nics, group.distance) == (("mlx5_0",), Distance.NODE)
    assert "fewest other GPUs" in group.why


def test_a_gpu_whose_nic_is_down_takes_what_nobody_has(tmp_path: Path) -> None:
    tree = machines.dgx_h100(tmp_path)
    machines.write(tmp_path / "class/infiniband/mlx5_0/ports/1", state="1: DOWN")
    choice = rails(tree, provider="verbs")
    assert of_gpus(choice)["0000:1b:00.0"] == ("mlx5_1",)
    assert "mlx5_1" in choice.names


def test_nics_of_the_other_socket_are_left(tmp_path: Path) -> None:
    tree = machines.plain_host(tmp_path)
    tree.pci("30 / 30:04.0 / 32:00.0", machines.NVIDIA, 0x2330, machines.GPU, 0)
    choice = rails(tree)
    assert choice.names == ("ens0f0",)
    assert unused(choice)["ens3f0"] == "belongs to other NUMA node: 1, the GPUs to 0"
    assert "every GPU has a nearer one" in unused(choice)["ens1f0"]


@pytest.mark.parametrize("pci", [True, False])
def test_a_guest_is_one_group(tmp_path: Path, pci: bool) -> None:
    choice = rails(machines.vm(tmp_path, pci=pci), "192.0.2.2")
    assert choice.names == ("eth0", "eth1")
    (group,) = choice.groups
    assert (group.gpu, group.numa_node, group.nics) == ("", -1, choice.names)
    assert ("virtual" in why(choice)["eth1"]) is not pci
    assert "at most" not in choice.why


def test_a_host_of_many_kinds(tmp_path: Path) -> None:
    tree = machines.plain_host(tmp_path)
    choice = rails(tree)
    assert choice.names == ("ens0f0", "ens1f0", "ens3f0")
    told = unused(choice)
    assert told.pop("lo").startswith("loopback")
    assert told.pop("ens2f0") == "down (operstate down)"
    assert told.pop("eno2") == "no IPv4 address"
    assert told.pop("vethab12") == "no IPv4 address"
    assert told.pop("docker0").startswith("virtual, and there is")
    assert told.pop("eno1.7") == "on the same wire as eno1"
    assert "25 Gbit/s" in told.pop("eno1")
    assert told == {}
    nodes = {group.numa_node: group.nics for group in choice.groups}
    assert nodes == {0: ("ens0f0", "ens1f0"), 1: ("ens3f0",)}


def test_one_wire_is_one_rail(tmp_path: Path) -> None:
    choice = rails(machines.plain_host(tmp_path), "10.7.0.1")
    assert "eno1.7" in choice.names
    assert unused(choice)["eno1"] == "eno1.7, which has peer_address, stands on it"


def test_many_slow_ones_beat_a_fast_one(tmp_path: Path) -> None:
    tree = machines.SysfsTree(tmp_path)
    for i, speed in enumerate((100_000, 40_000, 40_000, 40_000)):
        device = tree.pci(f"00 / 00:0{1 + i}.0", machines.INTEL, 0x1563, machines.ETHERNET)
        tree.interface(f"eth{i}", device, f"10.0.{i}.1", speed=speed)
    assert rails(tree).names == ("eth0", "eth1", "eth2", "eth3")


def test_the_address_that_peers_know_is_taken_of_several(tmp_path: Path) -> None:
    tree = machines.vm(tmp_path)
    tree.addresses["eth1"].append("198.51.100.9")
    choice = rails(tree, "198.51.100.9")
    assert choice.names == ("eth0", "198.51.100.9")
    assert choice.rails[1].nic.pci_address == "0000:00:04.0"
    assert choice.groups[0].nics == choice.names


def test_bond_stands_for_its_nics(tmp_path: Path) -> None:
    tree = machines.plain_host(tmp_path)
    for name in ("ens0f0", "ens1f0"):
        del tree.addresses[name]
    tree.interface(
        "bond0", None, "10.8.0.1", kind="bond", speed=200_000, lowers=("ens0f0", "ens1f0")
    )
    choice = rails(tree)
    assert choice.names == ("bond0",)
    assert choice.rails[0].nic.pci_address == "0000:31:00.0"


# ---- what does not depend on the machine ----


def test_loopback_stays_as_it_was(tmp_path: Path) -> None:
    choice = rails(machines.p5(tmp_path), "127.0.0.1")
    assert choice.names == ("127.0.0.1",)
    assert "loopback" in why(choice)["127.0.0.1"]
    assert len(choice.unused) == 33
    assert "lo" not in unused(choice)


def test_named_rails_are_taken_as_they_are(tmp_path: Path) -> None:
    choice = rails(machines.vm(tmp_path), configured=["eth1", "192.0.2.2", "nosuch0"])
    assert choice.names == ("eth1", "192.0.2.2", "nosuch0")
    assert choice.rails[1].nic.pci_address == "0000:00:03.0"
    assert unused(choice) == {"lo": "not named by rails in the configuration"}


def test_a_host_with_nothing_keeps_the_address(tmp_path: Path) -> None:
    choice = rails(machines.SysfsTree(tmp_path))
    assert choice.names == (ELSEWHERE,)
    assert "none of this host's network interfaces" in choice.why
    assert rails(machines.SysfsTree(tmp_path / "gone")).unused == ()


def test_no_more_rails_than_the_data_plane_has(tmp_path: Path) -> None:
    tree = machines.SysfsTree(tmp_path)
    for i in range(40):
        tree.interface(f"veth{i:02}", None, f"10.0.0.{1 + i}")
    choice = rails(tree, "10.0.0.40")
    assert len(choice.names) == 32
    assert "veth39" in choice.names, "the interface of peer_address always belongs"
    assert set(unused(choice).values()) == {"more than 32 rails"}


def test_only_link_local(tmp_path: Path) -> None:
    tree = machines.vm(tmp_path)
    tree.addresses["eth1"] = ["169.254.3.1"]
    assert unused(rails(tree))["eth1"] == "only a link-local address (169.254.3.1)"


class Shrinking(sysfs.Sysfs):
    """A tree that an interface leaves at the n-th read."""

    def __init__(self, tree: SysfsTree, name: str, after: int) -> None:
        super().__init__(tree.root)
        self._tree, self._name, self._left = tree, name, after

    def _count(self) -> None:
        if self._left == 0:
            self._tree.remove(self._name)
        self._left -= 1

    def text(self, path: str) -> str:
        self._count()
        return super().text(path)

    def names(self, path: str) -> list[str]:
        self._count()
        return super().names(path)

    def real(self, path: str) -> str:
        self._count()
        return super().real(path)

    @property
    def is_over(self) -> bool:
        """Whether the tree outlived all reads."""
        return self._left >= 0


def test_an_interface_may_vanish_at_any_time(tmp_path: Path) -> None:
    seen, after = set(), 0
    while True:
        tree = machines.vm(tmp_path / str(after))
        shrinking = Shrinking(tree, "eth1", after)
        choice = choose(sysfs.read(shrinking, tree.addresses), peer_address="192.0.2.2")
        assert choice.names[0] == "eth0"
        if shrinking.is_over:
            break
        seen.add(unused(choice).get("eth1", "in use" if "eth1" in choice.names else "never seen"))
        after += 1
    assert seen == {"vanished while it was read", "in use", "never seen"}


# ---- distances and shares ----


def pci(address: str, way: str, numa: int = -1) -> Pci:
    host, *bridges = way.split()
    return Pci(address, 0, 0, 0, numa, host, tuple(bridges))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (("a 1", 0), ("a 1", 0), Distance.PIX),  # below one root port
        (("a 1 2 3", 0), ("a 1 2 4", 0), Distance.PIX),  # ports of one switch
        (("a 1 2 3", 0), ("a 1 2 4 5 6", 0), Distance.PXB),  # a switch below a switch
        (("a 1", 0), ("a 2", 0), Distance.PHB),
        (("a", 0), ("a", 0), Distance.PHB),
        (("a 1", 0), ("b 1", 0), Distance.NODE),
        (("a 1", -1), ("b 1", -1), Distance.NODE),
        (("a 1", 0), ("b 1", 1), Distance.SYS),
        (("a 1", 0), ("b 1", -1), Distance.SYS),
    ],
)
def test_distance(one: tuple[str, int], other: tuple[str, int], expected: Distance) -> None:
    near, far = pci("x", *one), pci("y", *other)
    assert distance(near, far) is expected
    assert distance(far, near) is expected


places = st.tuples(st.sampled_from(["a 1 2", "a 1 3", "a 4", "b 1 2", "b 5"]), st.just(0))


@given(st.lists(places, min_size=1, max_size=9), st.lists(places, min_size=1, max_size=17))
def test_shares_are_near_and_fair(
    gpu_places: list[tuple[str, int]], nic_places: list[tuple[str, int]]
) -> None:
    gpus = [pci(f"g{i}", *place) for i, place in enumerate(gpu_places)]
    nics = [
        Nic(f"n{i:02}", "up", 0, pci=pci(f"n{i:02}", *place)) for i, place in enumerate(nic_places)
    ]
    by_name = {nic.name: nic for nic in nics}
    found = groups.of_gpus(gpus, nics)
    assert [group.gpu for group in found] == [gpu.address for gpu in gpus]
    for gpu, group in zip(gpus, found, strict=True):
        least = min(distance(gpu, nic.pci) for nic in nics if nic.pci)
        assert group.nics
        for name in group.nics:
            nearest = by_name[name].pci
            assert nearest is not None
            assert distance(gpu, nearest) == least == group.distance
    for place in set(gpu_places):  # GPUs of one place have equal parts
        sizes = [
            len(group.nics)
            for group, there in zip(found, gpu_places, strict=True)
            if there == place
        ]
        assert max(sizes) - min(sizes) <= 1


def test_speeds_are_said_in_their_unit() -> None:
    assert [speed_text(mbit) for mbit in (0, 100, 2500, 400_000)] == [
        "unknown speed",
        "100 Mbit/s",
        "2.5 Gbit/s",
        "400 Gbit/s",
    ]


def test_addresses_of_this_host() -> None:
    assert "127.0.0.1" in addresses.ipv4()["lo"]
