# SPDX-License-Identifier: Apache-2.0
"""Which RDMA devices are taken by verbs, why the others are not, and that a fallback is loud."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from transferd.daemon.config import VerbsConfig
from transferd.daemon.topology import NoRailError, choose, sysfs

from support import sysfs as machines

if TYPE_CHECKING:
    from pathlib import Path

    from transferd.daemon.topology import Choice

    from support.sysfs import SysfsTree

ELSEWHERE = "203.0.113.1"  # no host's own
V1, V2 = "IB/RoCE v1", "RoCE v2"
LINK_LOCAL = "fe80::5054:ff:fe12:3456"
MAPPED = "::ffff:10.0.0.7"


def rails(
    tree: SysfsTree,
    peer_address: str = ELSEWHERE,
    *,
    dev: Path | None = None,
    modules: Path | None = None,
    **options: Any,
) -> Choice:
    topology = sysfs.read(sysfs.Sysfs(tree.root), tree.addresses, dev, modules)
    return choose(topology, peer_address=peer_address, **options)


def unused(choice: Choice) -> dict[str, str]:
    return {verdict.nic.name: verdict.why for verdict in choice.unused}


def roce_host(root: Path, *gids: tuple[int, str, str]) -> SysfsTree:
    """One RoCE adapter and its interface; without GIDs: a table that has none."""
    tree = machines.SysfsTree(root)
    tree.loopback()
    nic = tree.pci("00 / 00:03.0", machines.MELLANOX, 0x1021, machines.ETHERNET)
    tree.rdma("mlx5_0", nic, 100, "Ethernet")
    tree.gids("mlx5_0", *gids, netdev="eth0")
    tree.interface("eth0", nic, "10.0.0.7", speed=100_000)
    return tree


# ---- what is taken ----


def test_adapters_are_taken_by_verbs(tmp_path: Path) -> None:
    tree = machines.hgx_h100(tmp_path)
    choice = rails(tree)
    assert (choice.provider, choice.fallback) == ("verbs", "")
    assert choice.names == tuple(f"mlx5_{i}" for i in range(8))
    assert unused(choice)["enp24s0np0"] == "network interface: the provider takes RDMA devices"


def test_its_interface_is_told(tmp_path: Path) -> None:
    choice = rails(roce_host(tmp_path, (1, MAPPED, V2)))
    assert choice.provider == "verbs"
    assert choice.rails[0].why == "ACTIVE, 100 Gbit/s, on eth0"


def test_named_devices_are_taken_by_verbs(tmp_path: Path) -> None:
    tree = machines.hgx_h100(tmp_path)
    tree.rdma("rxe0", None, 10, "Ethernet")
    assert rails(tree, configured=["mlx5_0"]).provider == "verbs"
    choice = rails(tree, configured=["mlx5_0", "rxe0"])
    assert (choice.provider, choice.names) == ("verbs", ("mlx5_0", "rxe0"))
    choice = rails(tree, configured=["mlx5_0:2"])
    assert (choice.provider, choice.names) == ("verbs", ("mlx5_0:2",))
    assert choice.rails[0].nic.speed_mbit == 400_000
    assert "mlx5_0" not in unused(choice)
    efa = machines.p5(tmp_path / "p5")
    assert rails(efa, configured=["rdmap79s0"]).provider == "libfabric"


def test_development_mode_stays_on_loopback(tmp_path: Path) -> None:
    choice = rails(machines.hgx_h100(tmp_path), "127.0.0.1")
    assert (choice.provider, choice.names, choice.fallback) == ("tcp", ("127.0.0.1",), "")


def test_verbs_that_is_asked_for_takes_devices_on_loopback_too(tmp_path: Path) -> None:
    choice = rails(machines.hgx_h100(tmp_path), "127.0.0.1", provider="verbs")
    assert choice.names == tuple(f"mlx5_{i}" for i in range(8))


def test_verbs_takes_neither_efa_nor_others(tmp_path: Path) -> None:
    tree = machines.p5(tmp_path)
    device = tree.pci("01 / 01:00.0", machines.INTEL, 0x37D3, machines.ETHERNET, 0)
    tree.rdma("irdma0", device, 100, "Ethernet", node_type="4: RNIC")
    tree.rdma("rxe0", None, 10, "Ethernet")
    choice = rails(tree, provider="verbs")
    assert choice.names == ("rxe0",), "soft-RoCE, where nothing else can be used"
    assert unused(choice)["irdma0"].startswith("node type RNIC")
    assert unused(choice)["rdmap79s0"].startswith("EFA device")


def test_software_is_taken_if_asked_for_only(tmp_path: Path) -> None:
    tree = machines.vm(tmp_path)
    tree.rdma("rxe0", None, 10, "Ethernet")
    tree.gids("rxe0", (1, MAPPED, V2), netdev="eth0")
    choice = rails(tree)
    assert (choice.provider, choice.fallback) == ("tcp", "")
    assert unused(choice)["rxe0"] == (
        "RDMA in software: taken if rails names it, or with provider: verbs"
    )
    assert rails(tree, provider="verbs").names == ("rxe0",)
    assert rails(tree, configured=["rxe0"]).provider == "verbs"


def test_software_gives_way_to_hardware(tmp_path: Path) -> None:
    tree = roce_host(tmp_path, (1, MAPPED, V2))
    tree.rdma("rxe0", None, 10, "Ethernet")
    choice = rails(tree, provider="verbs")
    assert choice.names == ("mlx5_0",)
    assert unused(choice)["rxe0"] == "virtual, and there is mlx5_0"


# ---- GIDs and ports ----


@pytest.mark.parametrize(
    ("gids", "verbs", "fault"),
    [
        ([(0, LINK_LOCAL, V1), (1, LINK_LOCAL, V2), (3, MAPPED, V2)], {}, ""),
        ([(1, LINK_LOCAL, V2), (5, "2001:db8::7", V2)], {}, ""),
        ([(1, LINK_LOCAL, V2)], {"link_local": True}, ""),
        ([(1, LINK_LOCAL, V2)], {"gid_index": 1}, ""),
        ([(0, MAPPED, V1)], {"gid_index": 0}, ""),
        (
            [(0, LINK_LOCAL, V1), (1, LINK_LOCAL, V2)],
            {},
            f"no usable GID: port 1 has only link-local ones ({LINK_LOCAL}); give eth0 an IP "
            "address, or set verbs.link_local",
        ),
        ([(0, MAPPED, V1)], {}, "no usable GID: port 1 has none for RoCE v2"),
        (
            [(0, "::1", V2), (1, "::ffff:127.0.0.1", V2)],
            {},
            "no usable GID: port 1 has none for RoCE v2",
        ),
        (
            [(1, "::ffff:169.254.3.1", V2)],
            {},
            "no usable GID: port 1 has only link-local ones (169.254.3.1); give eth0 an IP "
            "address, or set verbs.link_local",
        ),
        ([], {}, "no usable GID: port 1 has none for RoCE v2"),
        ([(1, MAPPED, V2)], {"gid_index": 4}, "GID 4, which verbs.gid_index names, is empty"),
        ([(1, MAPPED, V2)], {"port": 2}, "no port 2, which verbs.port names"),
    ],
)
def test_an_address_that_will_do(
    tmp_path: Path, gids: list[tuple[int, str, str]], verbs: dict[str, Any], fault: str
) -> None:
    tree = roce_host(tmp_path, *gids)
    config = VerbsConfig(**verbs)
    choice = rails(tree, verbs=config)
    if not fault:
        assert (choice.provider, choice.fallback) == ("verbs", "")
        return
    assert choice.provider == "tcp"
    assert unused(choice)["mlx5_0"] == f"RDMA device that verbs cannot use: {fault}"
    assert f"mlx5_0: {fault}" in choice.fallback
    with pytest.raises(NoRailError) as caught:
        rails(tree, provider="verbs", verbs=config)
    assert str(caught.value).endswith(
        f"none of this host's RDMA devices can be used: mlx5_0: {fault}"
    )


def test_infiniband_needs_no_gid_of_a_kind(tmp_path: Path) -> None:
    tree = machines.SysfsTree(tmp_path)
    nic = tree.pci("00 / 00:03.0", machines.MELLANOX, 0x1021, machines.INFINIBAND)
    tree.rdma("mlx5_0", nic, 400)
    tree.gids("mlx5_0", (0, LINK_LOCAL, V1))
    assert rails(tree).provider == "verbs"


def test_a_port_that_is_down_is_no_reason_to_warn(tmp_path: Path) -> None:
    tree = roce_host(tmp_path, (1, MAPPED, V2))
    machines.write(tmp_path / "class/infiniband/mlx5_0/ports/1", state="1: DOWN")
    choice = rails(tree)
    assert (choice.provider, choice.fallback) == ("tcp", "")
    assert unused(choice)["mlx5_0"] == ("RDMA device that verbs cannot use: down (port 1 is DOWN)")


# ---- what keeps this process from them ----


def test_files_of_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = roce_host(tmp_path / "sys", (1, MAPPED, V2))
    dev = tmp_path / "dev"

    def fault() -> str:
        return unused(rails(tree, dev=dev)).get("mlx5_0", "")

    assert "ib_uverbs is not loaded (modprobe ib_uverbs)" in fault()
    tree.uverbs()
    assert "it has no uverbs device" in fault()
    tree.uverbs("mlx5_0")
    node = dev / "infiniband/uverbs0"
    assert f"{node} is not there; a container has to be given it" in fault()
    node.parent.mkdir(parents=True)
    node.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"no permission to open {node} as user id {os.getuid()}" in fault()
    assert f"no permission to open {node}" in rails(tree, dev=dev).fallback
    monkeypatch.undo()
    assert fault() == ""
    assert rails(tree, dev=dev).provider == "verbs"


def test_a_provider_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    failed = "libibverbs.so.1: no such file; install it"
    choice = rails(machines.hgx_h100(tmp_path), "10.0.3.7", verbs_failed=failed)
    assert choice.provider == "tcp"
    assert "enp88s0np0" in choice.names
    assert "falls back to kernel sockets (tcp)" in choice.fallback
    assert failed in choice.fallback
    assert unused(choice)["mlx5_0"] == f"RDMA device that verbs cannot use: {failed}"


def test_the_same_reason_is_said_once(tmp_path: Path) -> None:
    tree = machines.hgx_h100(tmp_path / "sys")
    choice = rails(tree, dev=tmp_path / "dev")
    assert "mlx5_0, mlx5_1, mlx5_2, mlx5_3 and 4 more: the kernel module" in choice.fallback


# ---- nothing there ----


@pytest.mark.parametrize(
    ("loaded", "lists", "said"),
    [
        (True, {}, "soft-RoCE is loaded"),
        (False, {"modules.dep": "kernel/x/rdma_rxe.ko.xz: kernel/y.ko"}, "`modprobe rdma_rxe`"),
        (False, {"modules.dep": "", "modules.builtin": "kernel/x/rdma_rxe.ko"}, "is loaded"),
        (False, {"modules.dep": "kernel/y.ko:"}, "no soft-RoCE either"),
        (False, {}, "cannot be seen from here"),
    ],
)
def test_a_host_without_devices(
    tmp_path: Path, loaded: bool, lists: dict[str, str], said: str
) -> None:
    tree = machines.vm(tmp_path / "sys")
    modules = tmp_path / "modules"
    modules.mkdir()
    machines.write(modules, **lists)
    if loaded:
        (tree.root / "module/rdma_rxe").mkdir(parents=True)

    def refusal() -> str:
        with pytest.raises(NoRailError) as caught:
            rails(tree, provider="verbs", modules=modules)
        return str(caught.value)

    assert "/sys/class/infiniband is missing" in refusal()
    (tree.root / "class/infiniband").mkdir()
    assert "/sys/class/infiniband is empty" in refusal()
    assert said in refusal()
    assert rails(tree, modules=modules).fallback == ""


def test_no_device_that_verbs_can_use(tmp_path: Path) -> None:
    with pytest.raises(NoRailError) as caught:
        rails(machines.p5(tmp_path), provider="verbs")
    assert "rdmap113s0, rdmap114s0" in str(caught.value)
    assert "28 more: EFA device" in str(caught.value)
