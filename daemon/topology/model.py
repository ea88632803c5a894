# SPDX-License-Identifier: Apache-2.0
"""What a host has: NUMA nodes, GPUs, RDMA devices, network interfaces. Values only, no reading."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ipaddress

AMAZON = 0x1D0F
NVIDIA = 0x10DE
GPU_CLASSES = (0x0300, 0x0302)  # VGA and 3D controller; NVSwitches are bridges (0x0680)
UNKNOWN_NODE = -1  # as numa_node says it


@dataclass(frozen=True, slots=True)
class Pci:
    """A PCI device and the way to it.

    Attributes:
        address: As in "0000:ca:00.0".
        class_code: Base class and subclass, as in 0x0302.
        numa_node: UNKNOWN_NODE where the firmware does not say.
        host_bridge: As in "pci0000:bb".
        bridges: Addresses of the bridges from the root port down to the device's own.
    """

    address: str
    vendor: int
    device: int
    class_code: int
    numa_node: int
    host_bridge: str
    bridges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gid:
    """An entry of a port's GID table that is in use.

    Attributes:
        kind: "RoCE v2" or "IB/RoCE v1".
        netdev: Interface whose address it is; empty where the kernel does not say.
    """

    index: int
    value: ipaddress.IPv6Address
    kind: str
    netdev: str


@dataclass(frozen=True, slots=True)
class Port:
    """A port of an RDMA device.

    Attributes:
        state: As in "ACTIVE".
        link_layer: "InfiniBand", "Ethernet"; "Unknown" on EFA.
        rate_mbit: 0 where the kernel does not say.
        gids: None where the table cannot be read.
    """

    number: int
    state: str
    link_layer: str
    rate_mbit: int
    gids: tuple[Gid, ...] | None = None

    @property
    def netdev(self) -> str:
        """The interface that it is; empty if unknown, or none."""
        return next((gid.netdev for gid in self.gids or () if gid.netdev), "")


@dataclass(frozen=True, slots=True)
class RdmaDevice:
    """A device of /sys/class/infiniband.

    Attributes:
        node_type: As in "CA"; "unspecified" on EFA.
        pci: None for software devices.
        barred: Why this process cannot open it; empty if it can.
    """

    name: str
    node_type: str
    ports: tuple[Port, ...]
    pci: Pci | None
    barred: str = ""

    @property
    def is_efa(self) -> bool:
        """Whether it is an Elastic Fabric Adapter."""
        return self.pci is not None and self.pci.vendor == AMAZON


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface.

    Attributes:
        state: operstate: "up", "down", "unknown" (drivers that do not say), …
        is_up: Whether it is switched on and not known to be down.
        speed_mbit: 0 where the driver does not say.
        kind: "loopback", "bridge", "bond", "vlan", …; "" for a NIC.
        is_virtual: Whether no hardware of its own is behind it.
        lowers: Interfaces that it stands on.
        is_usb: Whether it hangs on USB.
        pci: The NIC's own.
        addresses: IPv4.
    """

    name: str
    state: str
    is_up: bool
    speed_mbit: int
    kind: str
    is_virtual: bool
    lowers: tuple[str, ...]
    is_usb: bool
    pci: Pci | None
    addresses: tuple[str, ...]


class SoftRoce(enum.Enum):
    """Whether the running kernel has RDMA in software, rdma_rxe."""

    LOADED = "loaded"
    A_MODULE = "a module that is not loaded"
    ABSENT = "absent"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Topology:
    """A host.

    Attributes:
        numa_nodes: Empty where the kernel was built without.
        gpus: By PCI address.
        vanished: Names of interfaces and devices that went away while they were read.
        has_rdma: Whether the kernel's part for RDMA devices is loaded.
    """

    numa_nodes: tuple[int, ...] = ()
    gpus: tuple[Pci, ...] = ()
    devices: tuple[RdmaDevice, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    vanished: tuple[str, ...] = ()
    has_rdma: bool = False
    soft_roce: SoftRoce = SoftRoce.UNKNOWN
