# SPDX-License-Identifier: Apache-2.0
"""What a host has: NUMA nodes, GPUs, RDMA devices, network interfaces. Values only, no reading."""

from __future__ import annotations

from dataclasses import dataclass

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
class Port:
    """A port of an RDMA device.

    Attributes:
        state: As in "ACTIVE".
        link_layer: "InfiniBand", "Ethernet"; "Unknown" on EFA.
        rate_mbit: 0 where the kernel does not say.
    """

    number: int
    state: str
    link_layer: str
    rate_mbit: int


@dataclass(frozen=True, slots=True)
class RdmaDevice:
    """A device of /sys/class/infiniband.

    Attributes:
        node_type: As in "CA"; "unspecified" on EFA.
        pci: None for software devices.
    """

    name: str
    node_type: str
    ports: tuple[Port, ...]
    pci: Pci | None

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


@dataclass(frozen=True, slots=True)
class Topology:
    """A host.

    Attributes:
        numa_nodes: Empty where the kernel was built without.
        gpus: By PCI address.
        vanished: Names of interfaces and devices that went away while they were read.
    """

    numa_nodes: tuple[int, ...] = ()
    gpus: tuple[Pci, ...] = ()
    devices: tuple[RdmaDevice, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    vanished: tuple[str, ...] = ()
