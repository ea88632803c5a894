# SPDX-License-Identifier: Apache-2.0
"""NICs as a provider sees them, and what is wrong with those that cannot be used at all."""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transferd.daemon.topology.model import UNKNOWN_NODE
from transferd.daemon.topology.rdma import ACTIVE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transferd.daemon.topology.model import Interface, Pci, RdmaDevice, Topology

REAL_HARDWARE = frozenset({"bond", "bridge", "vlan", "team"})  # virtual, but may stand on NICs


class Taken(enum.Enum):
    """What a provider takes as a rail."""

    INTERFACES = "network interfaces"
    EFA = "EFA devices"
    VERBS = "RDMA devices"


@dataclass(frozen=True, slots=True)
class Nic:
    """A network interface or an RDMA device.

    Attributes:
        name: As the provider takes it.
        state: As the kernel says it: "up", "ACTIVE", …
        speed_mbit: 0 if unknown.
        fabric: Link layer of RDMA devices: NICs of two fabrics do not reach each other.
        fault: Why it cannot be used; empty if it can.
        is_virtual: Whether no hardware is behind it, not even below others.
        addresses: IPv4, of interfaces.
        lowers: Interfaces that it stands on.
        pci: None where there is no PCI device.
        netdev: The interface that an RDMA device is to the kernel's network; empty if unknown.
    """

    name: str
    state: str
    speed_mbit: int
    fabric: str = ""
    fault: str = ""
    is_virtual: bool = False
    addresses: tuple[str, ...] = ()
    lowers: tuple[str, ...] = ()
    pci: Pci | None = None
    netdev: str = ""

    @property
    def numa_node(self) -> int:
        """UNKNOWN_NODE if unknown."""
        return self.pci.numa_node if self.pci is not None else UNKNOWN_NODE

    @property
    def pci_address(self) -> str:
        """Empty where there is none."""
        return self.pci.address if self.pci is not None else ""

    @property
    def order(self) -> tuple[str, str]:
        """NICs are told apart and numbered by PCI address, like GPUs."""
        return (self.pci_address or "~", self.name)


def nics(topology: Topology, taken: Taken, faults: Mapping[str, str]) -> list[Nic]:
    """Lists all NICs of a host.

    Args:
        topology: The host.
        taken: What the provider takes; interfaces get that as their fault if it is not they.
        faults: Why devices cannot be used, by name.

    Returns:
        Usable or not, in the order of their PCI addresses.
    """
    by_name = {interface.name: interface for interface in topology.interfaces}
    found = [_of_interface(interface, by_name, taken) for interface in topology.interfaces]
    found += [_of_device(device, faults.get(device.name, "")) for device in topology.devices]
    found += [
        Nic(name=name, state="", speed_mbit=0, fault="vanished while it was read")
        for name in topology.vanished
    ]
    return sorted(found, key=lambda nic: nic.order)


def speed_text(mbit: int) -> str:
    """Says a speed in the unit that fits."""
    if not mbit:
        return "unknown speed"
    return f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit} Mbit/s"


def _of_interface(interface: Interface, by_name: dict[str, Interface], taken: Taken) -> Nic:
    below = _below(interface, by_name)
    hardware = next((each for each in (interface, *below) if not each.is_virtual), None)
    return Nic(
        name=interface.name,
        state=interface.state,
        speed_mbit=interface.speed_mbit,
        fault=_interface_fault(interface, taken),
        is_virtual=hardware is None
        or (hardware is not interface and interface.kind not in REAL_HARDWARE),
        addresses=interface.addresses,
        lowers=tuple(each.name for each in below),
        pci=hardware.pci if hardware is not None else None,
    )


def _below(interface: Interface, by_name: dict[str, Interface]) -> list[Interface]:
    """Follows a VLAN on a bond on two NICs down to all of them."""
    found: dict[str, Interface] = {}
    left = list(interface.lowers)
    while left:
        name = left.pop(0)
        if name in by_name and name not in found:
            found[name] = by_name[name]
            left += by_name[name].lowers
    return list(found.values())


def _interface_fault(interface: Interface, taken: Taken) -> str:
    if interface.kind == "loopback":
        return "loopback: leads to this host only"
    if taken is not Taken.INTERFACES:
        return f"network interface: the provider takes {taken.value}"
    if not interface.is_up:
        return f"down (operstate {interface.state or 'unknown'})"
    if not interface.addresses:
        return "no IPv4 address"
    if all(ipaddress.ip_address(address).is_link_local for address in interface.addresses):
        return f"only a link-local address ({interface.addresses[0]})"
    if interface.is_usb:
        return "management NIC: on USB, as the board's controller is"
    return ""


def _of_device(device: RdmaDevice, fault: str) -> Nic:
    active = [port for port in device.ports if port.state == ACTIVE]
    best = max(active or device.ports, key=lambda port: port.rate_mbit, default=None)
    return Nic(
        name=device.name,
        state=best.state if best is not None else "",
        speed_mbit=best.rate_mbit if best is not None else 0,
        fabric=best.link_layer if best is not None else "",
        fault=fault,
        is_virtual=device.pci is None,
        pci=device.pci,
        netdev=best.netdev if best is not None else "",
    )
