# SPDX-License-Identifier: Apache-2.0
"""Constructed sysfs trees of machine types that the tests do not run on.

Bus numbers, bridges and names are those of real machines as far as they are public: the p5's are
what its `lspci -tv` shows, the DGX H100's are told by its GPUs' and NICs' well-known addresses, the
p5en's by its EFA devices'.
"""

from __future__ import annotations

import ipaddress
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

AMAZON, NVIDIA, MELLANOX, BROADCOM, INTEL, VIRTIO = 0x1D0F, 0x10DE, 0x15B3, 0x1000, 0x8086, 0x1AF4
BRIDGE, ETHERNET, INFINIBAND, GPU, NVME = 0x0604, 0x0200, 0x0207, 0x0302, 0x0108
NVSWITCH = 0x0680
IFF_UP = 0x1


class SysfsTree:
    """A sysfs root that is being built.

    Attributes:
        root: What stands for /sys.
        addresses: IPv4 addresses by interface, which sysfs does not have.
    """

    def __init__(self, root: Path) -> None:
        """Makes an empty tree.

        Args:
            root: An empty folder.
        """
        self.root = root
        self.addresses: dict[str, list[str]] = {}
        (root / "devices/virtual/net").mkdir(parents=True)
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "class/net").mkdir(parents=True)

    def numa(self, count: int) -> None:
        """Adds NUMA nodes."""
        for node in range(count):
            (self.root / f"devices/system/node/node{node}").mkdir(parents=True)
        write(self.root / "devices/system/node", online=f"0-{count - 1}")

    def pci(
        self, way: str, vendor: int, device: int, kind: int, numa: int = -1, function: str = ""
    ) -> Path:
        """Adds a PCI device and the bridges above it.

        Args:
            way: Host bridge, bridges and device, as in "bb / bb:00.0 / bc:00.0 / c6:00.0".
            vendor: Its vendor.
            device: Its device number.
            kind: Base class and subclass.
            numa: NUMA node of all of them.
            function: A folder below it, as virtio has.

        Returns:
            Its folder.
        """
        host, *rest = way.split(" / ")
        folder = self.root / f"devices/pci0000:{host}"
        for i, part in enumerate(rest):
            folder /= f"0000:{part}"
            last = i == len(rest) - 1
            if folder.exists():
                continue
            folder.mkdir(parents=True)
            write(
                folder,
                vendor=f"{vendor if last else BROADCOM:#06x}",
                device=f"{device if last else 0xC030:#06x}",
                numa_node=str(numa),
            )
            (folder / "class").write_text(f"{kind if last else BRIDGE:#06x}00\n")
            (self.root / f"bus/pci/devices/{folder.name}").symlink_to(folder)
        if function:
            folder /= function
            folder.mkdir()
        return folder

    def interface(
        self,
        name: str,
        device: Path | None,
        *addresses: str,
        state: str = "up",
        speed: int | None = None,
        kind: str = "",
        lowers: tuple[str, ...] = (),
        arp_type: int = 1,
    ) -> Path:
        """Adds a network interface.

        Args:
            name: Its name.
            device: Folder of its device; None for a virtual one.
            addresses: IPv4.
            state: operstate.
            speed: In Mbit/s; None where reading it is an error.
            kind: DEVTYPE.
            lowers: Interfaces that it stands on.
            arp_type: Hardware type.

        Returns:
            Its folder.
        """
        parent = device / "net" if device is not None else self.root / "devices/virtual/net"
        folder = parent / name
        folder.mkdir(parents=True)
        up = state in ("up", "unknown")
        write(
            folder,
            operstate=state,
            flags=f"{0x1002 | (IFF_UP if up else 0):#x}",
            type=str(arp_type),
            uevent=(f"DEVTYPE={kind}\n" if kind else "") + f"INTERFACE={name}",
        )
        if up:
            write(folder, carrier="1")
        if speed is not None:
            write(folder, speed=str(speed))
        if device is not None:
            (folder / "device").symlink_to(device)
        if kind == "bridge":
            (folder / "bridge").mkdir()
        for lower in lowers:
            (folder / f"lower_{lower}").symlink_to(self.root / f"class/net/{lower}")
        (self.root / f"class/net/{name}").symlink_to(folder)
        if addresses:
            self.addresses[name] = list(addresses)
        return folder

    def loopback(self) -> None:
        """Adds lo."""
        self.interface("lo", None, "127.0.0.1", state="unknown", arp_type=772)

    def rdma(
        self,
        name: str,
        device: Path | None,
        gbit: int,
        layer: str = "InfiniBand",
        state: str = "4: ACTIVE",
        node_type: str = "1: CA",
    ) -> None:
        """Adds an RDMA device with one port; device None: in software."""
        parent = device if device is not None else self.root / "devices/virtual"
        folder = parent / "infiniband" / name
        (folder / "ports/1").mkdir(parents=True)
        write(folder, node_type=node_type)
        write(folder / "ports/1", state=state, link_layer=layer, rate=f"{gbit} Gb/sec (4X NDR)")
        if device is not None:
            (folder / "device").symlink_to(device)
        (self.root / "class/infiniband").mkdir(exist_ok=True)
        (self.root / f"class/infiniband/{name}").symlink_to(folder)

    def gids(self, name: str, *gids: tuple[int, str, str], netdev: str = "") -> None:
        """Fills the GID table of a device's port 1, of 8 entries.

        Args:
            name: The device.
            gids: Index, address and type of each entry in use.
            netdev: Interface that they belong to.
        """
        port = self.root / f"class/infiniband/{name}/ports/1"
        for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
            (port / folder).mkdir(parents=True)
        for index in range(8):
            (port / f"gids/{index}").write_text(ipaddress.IPv6Address(0).exploded + "\n")
        for index, address, kind in gids:
            (port / f"gids/{index}").write_text(ipaddress.IPv6Address(address).exploded + "\n")
            (port / f"gid_attrs/types/{index}").write_text(kind + "\n")
            if netdev:
                (port / f"gid_attrs/ndevs/{index}").write_text(netdev + "\n")

    def uverbs(self, *names: str) -> None:
        """Loads ib_uverbs, which gives these devices uverbs0 and on."""
        (self.root / "class/infiniband_verbs").mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(names):
            folder = self.root / f"class/infiniband_verbs/uverbs{i}"
            folder.mkdir()
            write(folder, ibdev=name)

    def efa(self, way: str, device: int, numa: int, gbit: int) -> str:
        """Adds an EFA device; returns its name, which udev makes of its bus."""
        folder = self.pci(way, AMAZON, device, ETHERNET, numa)
        name = f"rdmap{int(folder.name[5:7], 16)}s0"
        self.rdma(name, folder, gbit, "Unknown", node_type="7: unspecified")
        return name

    def remove(self, name: str) -> None:
        """Takes an interface away, as the kernel does: the link in class/net goes last."""
        link = self.root / f"class/net/{name}"
        shutil.rmtree(link.resolve(), ignore_errors=True)
        link.unlink(missing_ok=True)


def write(folder: Path, **attributes: str) -> None:
    """Writes attributes."""
    for name, text in attributes.items():
        (folder / name).write_text(text + "\n")


def hgx_h100(root: Path) -> SysfsTree:
    """8 H100, each behind a switch of its own with a ConnectX-7 (RoCE, 400 Gbit/s); 2 sockets.

    The board's 10 Gbit/s ports, a USB link to its controller and docker are there, too.
    """
    tree = SysfsTree(root)
    tree.numa(2)
    tree.loopback()
    for i, up in enumerate((0x16, 0x36, 0x46, 0x56, 0x98, 0xB8, 0xC8, 0xD8)):
        switch = f"{up - 1:02x} / {up - 1:02x}:01.0 / {up:02x}:00.0"
        numa = i // 4
        nic = tree.pci(
            f"{switch} / {up + 1:02x}:00.0 / {up + 2:02x}:00.0", MELLANOX, 0x1021, ETHERNET, numa
        )
        tree.pci(f"{switch} / {up + 1:02x}:01.0 / {up + 3:02x}:00.0", NVIDIA, 0x2330, GPU, numa)
        tree.rdma(f"mlx5_{i}", nic, 400, "Ethernet")
        tree.interface(f"enp{up + 2}s0np0", nic, f"10.0.{i}.7", speed=400_000)
    for i in range(4):
        tree.pci(f"00 / 00:1d.0 / 0{5 + i}:00.0", NVIDIA, 0x22A3, NVSWITCH, 0)
    board = tree.pci("00 / 00:1c.0 / 01:00.0", INTEL, 0x1563, ETHERNET, 0)
    tree.interface("eno1", board, "192.168.7.7", speed=10_000)
    usb = tree.pci("00 / 00:14.0", INTEL, 0x1BCD, 0x0C03, 0)
    tree.interface("enxbe3af2b6059f", usb / "usb1/1-11/1-11:1.0", "10.99.0.2", state="unknown")
    tree.interface("docker0", None, "172.17.0.1", kind="bridge", speed=10_000)
    return tree


def dgx_h100(root: Path, spare: str = "InfiniBand") -> SysfsTree:
    """A DGX H100: 8 ConnectX-7 two bridges away from their GPUs, and 2 more NICs for the rest.

    Args:
        root: An empty folder.
        spare: Link layer of those two; on Ethernet they have 100 Gbit/s.
    """
    tree = SysfsTree(root)
    tree.numa(2)
    tree.loopback()
    places = [
        (bus, bus + 3, numa)
        for buses, numa in (((0x18, 0x40, 0x4F, 0x5E), 0), ((0x9A, 0xC0, 0xCE, 0xDC), 1))
        for bus in buses
    ]
    cards = []
    for nic, gpu, numa in places:
        switch = f"{nic - 3:02x} / {nic - 3:02x}:01.0 / {nic - 2:02x}:00.0"
        cards.append((f"{switch} / {nic - 1:02x}:00.0 / {nic:02x}:00.0", numa, "InfiniBand"))
        cascade = f"{nic - 1:02x}:02.0 / {nic + 1:02x}:00.0 / {nic + 2:02x}:00.0"
        tree.pci(f"{switch} / {cascade} / {gpu:02x}:00.0", NVIDIA, 0x2330, GPU, numa)
    cards += [("26 / 26:01.0 / 29:00.0", 0, spare), ("a7 / a7:01.0 / aa:00.0", 1, spare)]
    for i, (way, numa, layer) in enumerate(sorted(cards, key=lambda card: card[0][-7:])):
        folder = tree.pci(way, MELLANOX, 0x1021, INFINIBAND, numa)
        tree.rdma(f"mlx5_{i}", folder, 400 if layer == "InfiniBand" else 100, layer)
    return tree


def p5(root: Path) -> SysfsTree:
    """AWS p5.48xlarge: 8 switches with 4 EFA devices of 100 Gbit/s and an H100 each."""
    tree = SysfsTree(root)
    tree.numa(2)
    tree.loopback()
    for i in range(8):
        host = 0x44 + 0x11 * i
        numa = i // 4
        switch = f"{host:02x} / {host:02x}:00.0 / {host + 1:02x}:00.0"
        for port in range(4):
            nic = f"{host + 2:02x}:01.{port} / {host + 11 + port:02x}:00.0"
            tree.efa(f"{switch} / {nic}", 0xEFA2, numa, 100)
        gpu = f"{host + 2:02x}:01.4 / {host + 15:02x}:00.0"
        tree.pci(f"{switch} / {gpu}", NVIDIA, 0x2330, GPU, numa)
        disk = f"{host + 2:02x}:01.5 / {host + 16:02x}:00.0"
        tree.pci(f"{switch} / {disk}", AMAZON, 0xCD01, NVME, numa)
    ena = tree.pci("00 / 00:20.0", AMAZON, 0xEC20, ETHERNET)
    tree.interface("ens32", ena, "10.1.2.3")  # ENA does not tell its speed
    return tree


def p5en(root: Path) -> SysfsTree:
    """AWS p5en.48xlarge: 4 switches with 4 EFA devices of 200 Gbit/s and 2 H200 each."""
    tree = SysfsTree(root)
    tree.numa(2)
    tree.loopback()
    for i in range(4):
        host = 0x48 + 0x19 * i
        numa = i // 2
        switch = f"{host:02x} / {host:02x}:00.0 / {host + 1:02x}:00.0"
        for port in range(4):
            nic = f"{host + 2:02x}:01.{port} / {host + 13 + port:02x}:00.0"
            tree.efa(f"{switch} / {nic}", 0xEFA3, numa, 200)
        for port in range(2):
            gpu = f"{host + 2:02x}:01.{4 + port} / {host + 17 + port:02x}:00.0"
            tree.pci(f"{switch} / {gpu}", NVIDIA, 0x2335, GPU, numa)
    ena = tree.pci("00 / 00:20.0", AMAZON, 0xEC20, ETHERNET)
    tree.interface("ens32", ena, "10.1.2.3")
    return tree


def vm(root: Path, *, pci: bool = True) -> SysfsTree:
    """A guest without NUMA: two virtio interfaces; without PCI they are a container's."""
    tree = SysfsTree(root)
    tree.loopback()
    for i in range(2):
        device = None
        if pci:
            device = tree.pci(
                f"00 / 00:0{3 + i}.0", VIRTIO, 0x1041, ETHERNET, function=f"virtio{i}"
            )
        speed = -1 if pci else 10_000
        tree.interface(f"eth{i}", device, f"192.0.2.{2 + i}", speed=speed)
    return tree


def plain_host(root: Path) -> SysfsTree:
    """Two sockets without GPUs: 4 ports of 100 Gbit/s, one of them down; slower, virtual ones."""
    tree = SysfsTree(root)
    tree.numa(2)
    tree.loopback()
    for i, bus in enumerate((0x31, 0x4B, 0xB1, 0xCA)):
        way = f"{bus - 1:02x} / {bus - 1:02x}:02.0 / {bus:02x}:00.0"
        device = tree.pci(way, MELLANOX, 0x101D, ETHERNET, i // 2)
        if i == 2:
            tree.interface(f"ens{i}f0", device, f"10.0.{i}.1", state="down")
        else:
            tree.interface(f"ens{i}f0", device, f"10.0.{i}.1", speed=100_000)
    slow = tree.pci("16 / 16:02.0 / 17:00.0", INTEL, 0x158B, ETHERNET, 0)
    tree.interface("eno1", slow, "192.168.0.1", speed=25_000)
    spare = tree.pci("16 / 16:04.0 / 18:00.0", INTEL, 0x158B, ETHERNET, 0)
    tree.interface("eno2", spare, speed=25_000)
    tree.interface("vethab12", None, state="up", speed=10_000)
    tree.interface("docker0", None, "172.17.0.1", kind="bridge", speed=10_000, lowers=("vethab12",))
    tree.interface("eno1.7", None, "10.7.0.1", kind="vlan", speed=25_000, lowers=("eno1",))
    return tree
