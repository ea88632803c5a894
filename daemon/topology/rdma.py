# SPDX-License-Identifier: Apache-2.0
"""Which RDMA devices provider verbs can use; why not the others, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transferd.daemon.topology.model import SoftRoce

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Address, IPv6Address

    from transferd.daemon.config import VerbsConfig
    from transferd.daemon.topology.model import Gid, Port, RdmaDevice, Topology

ACTIVE = "ACTIVE"
ETHERNET = "Ethernet"
ROCE_V2 = "RoCE v2"
TOLD_DEVICES = 4  # a sentence that names more is not read
SOFT_ROCE = {
    SoftRoce.LOADED: (
        "soft-RoCE is loaded: `rdma link add rxe0 type rxe netdev eth0` makes a device of an "
        "interface"
    ),
    SoftRoce.A_MODULE: (
        "this kernel has soft-RoCE as a module: `modprobe rdma_rxe`, then `rdma link add rxe0 type "
        "rxe netdev eth0` makes a device of an interface"
    ),
    SoftRoce.ABSENT: "this kernel has no soft-RoCE either (module rdma_rxe)",
    SoftRoce.UNKNOWN: (
        "whether this kernel has soft-RoCE (module rdma_rxe), which makes a device of an "
        "interface, cannot be seen from here"
    ),
}


def is_active(device: RdmaDevice) -> bool:
    """Whether one of its ports is."""
    return any(port.state == ACTIVE for port in device.ports)


def is_made_for_verbs(device: RdmaDevice) -> bool:
    """Whether it is an adapter, and not one in software, which is slower than kernel sockets."""
    return device.pci is not None and device.node_type == "CA" and not device.is_efa


def fault(device: RdmaDevice, verbs: VerbsConfig) -> str:
    """Says why provider verbs cannot use a device; empty if it can."""
    if device.is_efa:
        return "EFA device: it has no reliable connections; provider libfabric drives it"
    if device.node_type != "CA":
        return f"node type {device.node_type or 'unknown'}: no InfiniBand or RoCE adapter"
    if not device.ports:
        return "no port"
    ports = [port for port in device.ports if verbs.port in (0, port.number)]
    if not ports:
        return f"no port {verbs.port}, which verbs.port names"
    active = [port for port in ports if port.state == ACTIVE]
    if not active:
        return _down(ports[0])
    return device.barred or _gid_fault(active[0], verbs)


def efa_fault(device: RdmaDevice) -> str:
    """Says why a device cannot be used where EFA devices are taken; empty if it can."""
    if not device.is_efa:
        return "no EFA device, and the provider takes those only"
    if not device.ports:
        return "no port"
    return "" if is_active(device) else _down(device.ports[0])


def _down(port: Port) -> str:
    return f"down (port {port.number} is {port.state or 'unknown'})"


def _gid_fault(port: Port, verbs: VerbsConfig) -> str:
    """Says why no address of a port will do; the provider chooses among those that will."""
    if port.gids is None:
        return ""
    if verbs.gid_index is not None:
        given = any(gid.index == verbs.gid_index for gid in port.gids)
        return "" if given else f"GID {verbs.gid_index}, which verbs.gid_index names, is empty"
    if port.link_layer != ETHERNET:
        return ""
    gids = [address(gid) for gid in port.gids if gid.kind == ROCE_V2]
    gids = [ip for ip in gids if not (ip.is_loopback or ip.is_multicast or ip.is_unspecified)]
    if not gids:
        return f"no usable GID: port {port.number} has none for RoCE v2"
    if verbs.link_local or not all(ip.is_link_local for ip in gids):
        return ""
    return (
        f"no usable GID: port {port.number} has only link-local ones ({gids[0]}); give "
        f"{port.netdev or 'its interface'} an IP address, or set verbs.link_local"
    )


def address(gid: Gid) -> IPv4Address | IPv6Address:
    """The IP address that a GID for RoCE v2 is."""
    return gid.value.ipv4_mapped or gid.value


def device_of(topology: Topology, name: str) -> RdmaDevice | None:
    """Finds the device that a rail's name means, as in "mlx5_0" or "mlx5_0:2" (its port)."""
    base, colon, port = name.partition(":")
    wanted = base if colon and port.isdecimal() else name
    return next((device for device in topology.devices if device.name == wanted), None)


def why_not_verbs(device: RdmaDevice, verbs: VerbsConfig, failed: str) -> str:
    """Says why `auto` does not take a device, where it takes interfaces.

    Args:
        device: Which.
        verbs: How verbs would be used.
        failed: Why the provider could not be opened; empty: it was not tried.
    """
    if device.node_type == "CA" and device.pci is None:
        return "RDMA in software: taken if rails names it, or with provider: verbs"
    return f"RDMA device that verbs cannot use: {fault(device, verbs) or failed}"


def fallback(topology: Topology, verbs: VerbsConfig, failed: str) -> str:
    """Says that kernel sockets are used although there are RDMA devices, and why.

    Args:
        topology: The host.
        verbs: How verbs would be used.
        failed: Why the provider could not be opened; empty: it was not tried.

    Returns:
        A sentence; empty where there is no active adapter.
    """
    devices = [d for d in topology.devices if is_made_for_verbs(d) and is_active(d)]
    if not devices:
        return ""
    if failed:
        why = f"verbs cannot be used: {failed}"
    else:
        why = _by_reason((device.name, fault(device, verbs)) for device in devices)
    return (
        "This host has RDMA devices, but provider auto falls back to kernel sockets (tcp), which "
        f"are slower: {why}. Peers that use verbs cannot be reached. Mend that, or set provider: "
        "tcp if it is meant."
    )


def why_none(topology: Topology, verbs: VerbsConfig) -> str:
    """Says why provider verbs has nothing to work on, and what to do."""
    if not topology.has_rdma:
        return (
            "provider verbs: the kernel has no RDMA devices (/sys/class/infiniband is missing): no "
            f"driver of one is loaded; {SOFT_ROCE[topology.soft_roce]}"
        )
    if not topology.devices:
        return (
            "provider verbs: there is no RDMA device (/sys/class/infiniband is empty): load the "
            f"driver of the NIC (such as mlx5_ib); {SOFT_ROCE[topology.soft_roce]}"
        )
    reasons = _by_reason((device.name, fault(device, verbs)) for device in topology.devices)
    return f"provider verbs: none of this host's RDMA devices can be used: {reasons}"


def _by_reason(reasons: Iterable[tuple[str, str]]) -> str:
    """Says what is wrong with each device, once for those of which it is the same."""
    devices: dict[str, list[str]] = {}
    for name, why in reasons:
        devices.setdefault(why, []).append(name)
    parts = []
    for why, names in devices.items():
        more = len(names) - TOLD_DEVICES
        listed = ", ".join(names[:TOLD_DEVICES]) + (f" and {more} more" if more > 0 else "")
        parts.append(f"{listed}: {why}")
    return "; ".join(parts)
