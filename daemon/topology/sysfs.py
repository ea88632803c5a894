# SPDX-License-Identifier: Apache-2.0
"""Reading a host's topology from sysfs.

Everything there may vanish between two reads (hot unplug, a driver that is reloaded, a container
that ends), and some attributes answer with an error by design (`speed` of an interface that is
down). So no read raises: an attribute that cannot be read is empty, a thing that has gone is named
and left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from transferd.daemon.topology.model import (
    GPU_CLASSES,
    NVIDIA,
    UNKNOWN_NODE,
    Interface,
    Pci,
    Port,
    RdmaDevice,
    Topology,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PCI_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
IFF_UP = 0x1
ARPHRD_LOOPBACK = 772
VIRTUAL = "/devices/virtual/"


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


def read(sysfs: Sysfs, addresses: Mapping[str, Sequence[str]]) -> Topology:
    """Reads a host's topology.

    Args:
        sysfs: Where from.
        addresses: IPv4 addresses by interface; sysfs does not have them.

    Returns:
        What was found; empty rather than an error where a part of the tree is missing.
    """
    vanished: list[str] = []
    devices, interfaces = [], []
    for name in sysfs.names("class/infiniband"):
        device = _device(sysfs, name)
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


def _device(sysfs: Sysfs, name: str) -> RdmaDevice:
    folder = f"class/infiniband/{name}"
    numbers = [number for number in sysfs.names(f"{folder}/ports") if number.isdecimal()]
    return RdmaDevice(
        name=name,
        node_type=_after_colon(sysfs.text(f"{folder}/node_type")),
        ports=tuple(_port(sysfs, folder, number) for number in sorted(numbers, key=int)),
        pci=_pci(sysfs, f"{folder}/device"),
    )


def _port(sysfs: Sysfs, folder: str, number: str) -> Port:
    port = f"{folder}/ports/{number}"
    return Port(
        number=int(number),
        state=_after_colon(sysfs.text(f"{port}/state")),
        link_layer=sysfs.text(f"{port}/link_layer"),
        rate_mbit=_rate(sysfs.text(f"{port}/rate")),
    )


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
