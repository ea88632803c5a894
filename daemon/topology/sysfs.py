# SPDX-License-Identifier: Apache-2.0
"""Reading a host's topology from sysfs.

Everything there may vanish between two reads (hot unplug, a driver that is reloaded, a container
that ends), and some attributes answer with an error by design (`speed` of an interface that is
down). So no read raises: an attribute that cannot be read is empty, a thing that has gone is named
and left out.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from transferd.daemon.topology.model import (
    GPU_CLASSES,
    NVIDIA,
    UNKNOWN_NODE,
    Gid,
    Interface,
    Pci,
    Port,
    RdmaDevice,
    SoftRoce,
    Topology,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PCI_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
IFF_UP = 0x1
ARPHRD_LOOPBACK = 772
VIRTUAL = "/devices/virtual/"
UVERBS = "class/infiniband_verbs"
RXE = "/rdma_rxe.ko"


class Sysfs:
    """A sysfs tree, of this host or constructed."""

    def __init__(self, root: Path | str = "/sys") -> None:
        self._root = Path(root)

    def text(self, path: str) -> str:
        """Reads an attribute; empty if it cannot be read."""
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def names(self, path: str) -> list[str]:
        """Lists a folder in order; empty if it cannot be read."""
        try:
            return sorted(os.listdir(self._root / path))
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        """Tells whether a path leads somewhere."""
        return (self._root / path).exists()

    def real(self, path: str) -> str:
        """Follows all links: where a device is in the tree of devices; empty if it is not there."""
        try:
            return os.path.realpath(self._root / path, strict=True)
        except OSError:
            return ""


def read(
    sysfs: Sysfs,
    addresses: Mapping[str, Sequence[str]],
    dev: Path | None = None,
    modules: Path | None = None,
) -> Topology:
    """Reads a host's topology.

    Args:
        sysfs: Where from.
        addresses: IPv4 addresses by interface; sysfs does not have them.
        dev: /dev, to find out which devices may be opened; None: all.
        modules: The running kernel's folder of modules; None: unknown.

    Returns:
        What was found; empty rather than an error where a part of the tree is missing.
    """
    vanished: list[str] = []
    devices, interfaces = [], []
    nodes = _device_nodes(sysfs)
    for name in sysfs.names("class/infiniband"):
        barred = _barred(sysfs, dev, nodes.get(name, "")) if dev is not None else ""
        device = _device(sysfs, name, barred)
        # Looked for afterwards: of a thing that went away meanwhile, only a part was read.
        if sysfs.exists(f"class/infiniband/{name}"):
            devices.append(device)
        else:
            vanished.append(name)
    for name in sysfs.names("class/net"):
        if name == "bonding_masters":  # a file
            continue
        interface = _interface(sysfs, name, tuple(addresses.get(name, ())))
        if sysfs.exists(f"class/net/{name}"):
            interfaces.append(interface)
        else:
            vanished.append(name)
    return Topology(
        numa_nodes=_numa_nodes(sysfs),
        gpus=_gpus(sysfs),
        devices=tuple(devices),
        interfaces=tuple(interfaces),
        vanished=tuple(vanished),
        has_rdma=sysfs.exists("class/infiniband"),
        soft_roce=_soft_roce(sysfs, modules),
    )


def _numa_nodes(sysfs: Sysfs) -> tuple[int, ...]:
    names = sysfs.names("devices/system/node")
    return tuple(sorted(int(name[4:]) for name in names if re.fullmatch(r"node\d+", name)))


def _gpus(sysfs: Sysfs) -> tuple[Pci, ...]:
    found = []
    for address in sysfs.names("bus/pci/devices"):
        folder = f"bus/pci/devices/{address}"
        if _number(sysfs.text(f"{folder}/vendor"), 16) != NVIDIA:
            continue
        pci = _pci(sysfs, folder)
        if pci is not None and pci.class_code in GPU_CLASSES:
            found.append(pci)
    return tuple(found)


def _pci(sysfs: Sysfs, path: str) -> Pci | None:
    """Describes the PCI device that a path leads to or into; None if there is none."""
    parts = sysfs.real(path).split("/")
    way: list[int] = []
    host_bridge = ""
    for i, part in enumerate(parts):
        if HOST_BRIDGE.fullmatch(part):
            host_bridge, way = part, []
        elif PCI_ADDRESS.fullmatch(part):
            way.append(i)
    if not way or not host_bridge:
        return None
    folder = "/".join(parts[: way[-1] + 1])
    return Pci(
        address=parts[way[-1]],
        vendor=_number(sysfs.text(f"{folder}/vendor"), 16),
        device=_number(sysfs.text(f"{folder}/device"), 16),
        class_code=_number(sysfs.text(f"{folder}/class"), 16) >> 8,
        numa_node=_number(sysfs.text(f"{folder}/numa_node"), 10, UNKNOWN_NODE),
        host_bridge=host_bridge,
        bridges=tuple(parts[i] for i in way[:-1]),
    )


def _device_nodes(sysfs: Sysfs) -> dict[str, str]:
    """Finds the file below /dev/infiniband of each device."""
    nodes = (node for node in sysfs.names(UVERBS) if node.startswith("uverbs"))
    return {sysfs.text(f"{UVERBS}/{node}/ibdev"): node for node in nodes}


def _barred(sysfs: Sysfs, dev: Path, node: str) -> str:
    """Says why a device cannot be opened by this process; empty if it can."""
    if not sysfs.exists(UVERBS):
        return "the kernel module ib_uverbs is not loaded (modprobe ib_uverbs)"
    if not node:
        return "its driver serves the kernel only: it has no uverbs device"
    path = dev / "infiniband" / node
    if not path.exists():
        return f"{path} is not there; a container has to be given it"
    if not os.access(path, os.R_OK | os.W_OK):
        return f"no permission to open {path} as user id {os.getuid()}"
    return ""


def _soft_roce(sysfs: Sysfs, modules: Path | None) -> SoftRoce:
    if sysfs.exists("module/rdma_rxe"):
        return SoftRoce.LOADED
    lists = {}
    for name in ("modules.builtin", "modules.dep"):
        with contextlib.suppress(OSError, ValueError):
            lists[name] = (modules / name).read_text() if modules is not None else ""
    if RXE in lists.get("modules.builtin", ""):
        return SoftRoce.LOADED
    if RXE in lists.get("modules.dep", ""):
        return SoftRoce.A_MODULE
    return SoftRoce.ABSENT if lists.get("modules.dep") else SoftRoce.UNKNOWN


def _device(sysfs: Sysfs, name: str, barred: str) -> RdmaDevice:
    folder = f"class/infiniband/{name}"
    numbers = [number for number in sysfs.names(f"{folder}/ports") if number.isdecimal()]
    return RdmaDevice(
        name=name,
        node_type=_after_colon(sysfs.text(f"{folder}/node_type")),
        ports=tuple(_port(sysfs, folder, number) for number in sorted(numbers, key=int)),
        pci=_pci(sysfs, f"{folder}/device"),
        barred=barred,
    )


def _port(sysfs: Sysfs, folder: str, number: str) -> Port:
    port = f"{folder}/ports/{number}"
    return Port(
        number=int(number),
        state=_after_colon(sysfs.text(f"{port}/state")),
        link_layer=sysfs.text(f"{port}/link_layer"),
        rate_mbit=_rate(sysfs.text(f"{port}/rate")),
        gids=_gids(sysfs, port),
    )


def _gids(sysfs: Sysfs, port: str) -> tuple[Gid, ...] | None:
    if not sysfs.exists(f"{port}/gids"):
        return None
    found = []
    for index in sorted(map(int, filter(str.isdecimal, sysfs.names(f"{port}/gids")))):
        try:
            value = ipaddress.IPv6Address(sysfs.text(f"{port}/gids/{index}"))
        except ValueError:
            continue
        if int(value):
            kind, netdev = (
                sysfs.text(f"{port}/gid_attrs/{name}/{index}") for name in ("types", "ndevs")
            )
            found.append(Gid(index, value, kind, netdev))
    return tuple(found)


def _interface(sysfs: Sysfs, name: str, addresses: tuple[str, ...]) -> Interface:
    folder = f"class/net/{name}"
    real = sysfs.real(folder)
    state = sysfs.text(f"{folder}/operstate")
    flags = _number(sysfs.text(f"{folder}/flags"), 16)
    carrier = sysfs.text(f"{folder}/carrier")
    return Interface(
        name=name,
        state=state,
        is_up=bool(flags & IFF_UP) and state in ("up", "unknown") and carrier != "0",
        speed_mbit=max(0, _number(sysfs.text(f"{folder}/speed"), 10)),
        kind=_kind(sysfs, folder),
        is_virtual=VIRTUAL in real,
        lowers=tuple(
            entry.removeprefix("lower_")
            for entry in sysfs.names(folder)
            if entry.startswith("lower_")
        ),
        is_usb=any(re.fullmatch(r"usb\d+", part) for part in real.split("/")),
        pci=_pci(sysfs, f"{folder}/device"),
        addresses=addresses,
    )


def _kind(sysfs: Sysfs, folder: str) -> str:
    if _number(sysfs.text(f"{folder}/type"), 10) == ARPHRD_LOOPBACK:
        return "loopback"
    found = re.search(r"^DEVTYPE=(\w+)$", sysfs.text(f"{folder}/uevent"), re.MULTILINE)
    if found:
        return found[1]
    for mark, kind in (("bridge", "bridge"), ("bonding", "bond"), ("tun_flags", "tun")):
        if sysfs.exists(f"{folder}/{mark}"):
            return kind
    return ""


def _number(text: str, base: int, default: int = 0) -> int:
    try:
        return int(text, base)
    except ValueError:
        return default


def _after_colon(text: str) -> str:
    """Takes "ACTIVE" of "4: ACTIVE"."""
    return text.rpartition(":")[2].strip()


def _rate(text: str) -> int:
    """Takes 400000 of "400 Gb/sec (4X NDR)"."""
    found = re.match(r"([0-9.]+) Gb/sec", text)
    return round(float(found[1]) * 1000) if found else 0
