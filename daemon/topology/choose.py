# SPDX-License-Identifier: Apache-2.0
"""Which NICs become rails, with a reason for each one that does and each one that does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transferd.daemon.config import VerbsConfig, is_loopback
from transferd.daemon.plane import MAX_PARTS
from transferd.daemon.topology import groups, rdma
from transferd.daemon.topology.distance import same_node
from transferd.daemon.topology.nic import Nic, Taken, nics, speed_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transferd.daemon.topology.groups import Group
    from transferd.daemon.topology.model import RdmaDevice, Topology

MAX_RAILS = 32  # TFD_MAX_NICS
TOLD_GPUS = 2  # a reason that names more is not read


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a NIC, and why."""

    nic: Nic
    why: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The rails of a daemon.

    Attributes:
        rails: In order; their NICs' names are what the provider is given.
        unused: All other NICs of the host.
        groups: The rails nearest to each GPU and NUMA node.
        why: How they were chosen.
        provider: What drives them; "auto": not chosen yet.
        fallback: Why not what this host's NICs are made for; empty if they are used so.
        gpus: How many the host has.
    """

    rails: tuple[Verdict, ...]
    unused: tuple[Verdict, ...]
    groups: tuple[Group, ...]
    why: str
    provider: str = "auto"
    fallback: str = ""
    gpus: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What the provider is given."""
        return tuple(rail.nic.name for rail in self.rails)


class NoRailError(Exception):
    """The provider that was asked for has nothing here to work on; the message says why."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the configuration says about rails.

    Attributes:
        configured: Names of rails; they are taken as they are.
        libfabric: Whether it says something that only libfabric understands.
        fabric: libfabric's provider; empty: by the rails.
        peer_address: Numeric address that peers reach the daemon at.
        verbs_failed: Why verbs cannot be used, although devices are there; empty: not tried.
    """

    configured: Sequence[str]
    provider: str
    libfabric: bool
    fabric: str
    verbs: VerbsConfig
    peer_address: str
    verbs_failed: str

    @property
    def may_be_verbs(self) -> bool:
        """Whether the choice between verbs and others is ours."""
        return self.provider == "auto" and not self.libfabric


def choose(
    topology: Topology,
    *,
    configured: Sequence[str] = (),
    provider: str = "auto",
    fabric: str = "",
    library: str = "",
    verbs: VerbsConfig | None = None,
    peer_address: str,
    verbs_failed: str = "",
) -> Choice:
    """Chooses the rails of a daemon, and what drives them.

    Args:
        topology: The host.
        configured: Names that the configuration gives; they are taken as they are.
        provider: As configured.
        fabric: libfabric's provider, as configured; empty: by the rails.
        library: Path of libfabric, as configured; empty: where the system has it.
        verbs: How verbs is to be used; None: by its defaults.
        peer_address: Numeric address that peers reach the daemon at.
        verbs_failed: Why provider verbs could not be opened, for a second choice without it.

    Returns:
        At least one rail.

    Raises:
        NoRailError: Provider verbs is asked for, and there is no device that it can use.
    """
    wish = Wish(
        configured=configured,
        provider=provider,
        libfabric=bool(fabric or library),
        fabric=fabric,
        verbs=verbs or VerbsConfig(),
        peer_address=peer_address,
        verbs_failed=verbs_failed,
    )
    choice = _rails(topology, wish)
    if provider == "auto":
        provider = _driver(topology, wish, choice.names)
    return replace(choice, provider=provider, gpus=len(topology.gpus))


def _driver(topology: Topology, wish: Wish, names: Sequence[str]) -> str:
    """Says what drives rails where the configuration leaves it open."""
    devices = [rdma.device_of(topology, name) for name in names]
    found = [device for device in devices if device is not None]
    if wish.libfabric or any(device.is_efa for device in found):
        return "libfabric"
    if not found:
        return "tcp"
    return "verbs" if len(found) == len(names) else "libfabric"


def _rails(topology: Topology, wish: Wish) -> Choice:
    taken = _taken(topology, wish)
    everything = nics(topology, taken, _device_faults(topology, wish, taken))
    if wish.configured:
        return _named(
            topology,
            everything,
            wish.configured,
            "named by rails in the configuration",
            "not named by rails in the configuration",
        )
    own = wish.peer_address
    # On a device both ends may be on this host; addresses of it lead nowhere but here.
    if wish.provider == "sim" or (is_loopback(own) and wish.provider != "verbs"):
        simulated = wish.provider == "sim"
        why = "simulated" if simulated else "peer_address is loopback: this host only"
        return _named(topology, everything, [own], why, f"not needed: {why}")
    chosen = _Sieve(topology, everything, own if taken is Taken.INTERFACES else "")
    fallback = ""
    if taken is Taken.INTERFACES and wish.may_be_verbs:
        fallback = rdma.fallback(topology, wish.verbs, wish.verbs_failed)
    if not chosen.left:
        if wish.provider == "verbs":
            raise NoRailError(rdma.why_none(topology, wish.verbs))
        why = f"the address of peer_address: none of this host's {taken.value} can be used"
        return replace(_named(topology, everything, [own], why, ""), fallback=fallback)
    return replace(chosen.choice(taken), fallback=fallback)


def _taken(topology: Topology, wish: Wish) -> Taken:
    if wish.provider == "verbs":
        return Taken.VERBS
    if wish.provider == "tcp":
        return Taken.INTERFACES
    if wish.fabric:
        return Taken.EFA if wish.fabric.startswith("efa") else Taken.INTERFACES
    if any(device.is_efa and rdma.is_active(device) for device in topology.devices):
        return Taken.EFA
    usable = (rdma.is_made_for_verbs(d) and not rdma.fault(d, wish.verbs) for d in topology.devices)
    if wish.may_be_verbs and not wish.verbs_failed and any(usable):
        return Taken.VERBS
    return Taken.INTERFACES


def _device_faults(topology: Topology, wish: Wish, taken: Taken) -> dict[str, str]:
    """Says of each RDMA device why it cannot be used; empty if it can."""

    def of(device: RdmaDevice) -> str:
        if taken is Taken.VERBS:
            return rdma.fault(device, wish.verbs)
        if taken is Taken.EFA:
            return rdma.efa_fault(device)
        if wish.may_be_verbs:
            return rdma.why_not_verbs(device, wish.verbs, wish.verbs_failed)
        return "RDMA device: the provider takes network interfaces"

    return {device.name: of(device) for device in topology.devices}


def _named(
    topology: Topology, everything: Sequence[Nic], names: Sequence[str], why: str, why_not: str
) -> Choice:
    """Takes the interfaces, devices or addresses that were named."""
    rails, known = [], set()
    for name in names:
        nic = next((nic for nic in everything if name in (nic.name, *nic.addresses)), None)
        device = rdma.device_of(topology, name)
        if nic is None and device is not None:  # a port of it
            nic = next(nic for nic in everything if nic.name == device.name)
        if nic is None and is_loopback(name):  # all of 127.0.0.0/8 is lo's
            nic = next((nic for nic in everything if nic.name == "lo"), None)
        known.add(nic.name if nic is not None else name)
        nic = nic if nic is not None else Nic(name=name, state="", speed_mbit=0)
        rails.append(Verdict(replace(nic, name=name), why))
    unused = [Verdict(nic, why_not or nic.fault) for nic in everything if nic.name not in known]
    used = [rail.nic for rail in rails]
    near = [*groups.of_gpus(topology.gpus, used), *groups.of_nodes(topology.numa_nodes, used)]
    return Choice(tuple(rails), tuple(unused), tuple(near), _with_group(why, len(rails)))


def _with_group(why: str, count: int) -> str:
    text = f"{why}; all of group 0"
    return text + (f", at most {MAX_PARTS} of them for one peer" if count > MAX_PARTS else "")


class _Sieve:
    """Takes out one kind of unsuitable NIC after the other, each with its reason."""

    def __init__(self, topology: Topology, everything: Sequence[Nic], peer_address: str) -> None:
        self._topology = topology
        self._peer_address = peer_address
        self._pinned = next((n for n in everything if peer_address in n.addresses), None)
        self._out = [Verdict(nic, nic.fault) for nic in everything if nic.fault]
        self.left = [nic for nic in everything if not nic.fault]
        self._drop_virtual()
        self._drop_same_wire()
        self._drop_other_fabrics()
        self._drop_slower()
        self._near = groups.of_gpus(topology.gpus, self.left)
        self._drop_far_from_gpus()
        if self._pinned is not None and self._pinned not in self.left:
            self.left = sorted([self._pinned, *self.left], key=lambda nic: nic.order)
        self._drop_beyond(MAX_RAILS)

    def choice(self, taken: Taken) -> Choice:
        """Says what is left, and why."""
        names = {nic.name: self._rail_name(nic) for nic in self.left}
        rails = [Verdict(replace(nic, name=names[nic.name]), self._why(nic)) for nic in self.left]
        kept = {nic.name for nic in self.left}
        unused = [verdict for verdict in self._out if verdict.nic.name not in kept]
        near = [
            replace(group, nics=tuple(names.get(name, name) for name in group.nics))
            for group in (*self._near, *groups.of_nodes(self._topology.numa_nodes, self.left))
        ]
        of = f"chosen from this host's {taken.value}"
        return Choice(
            tuple(rails),
            tuple(sorted(unused, key=lambda verdict: verdict.nic.order)),
            tuple(near),
            _with_group(of, len(rails)),
        )

    def _rail_name(self, nic: Nic) -> str:
        # Of an interface with several addresses, the provider takes the one that peers know.
        several = nic == self._pinned and len(nic.addresses) > 1
        return self._peer_address if several else nic.name

    def _drop(self, unwanted: Callable[[Nic], str]) -> None:
        """Takes out the NICs that a reason is given for."""
        reasons = {nic.name: unwanted(nic) for nic in self.left}
        self._out += [Verdict(nic, reasons[nic.name]) for nic in self.left if reasons[nic.name]]
        self.left = [nic for nic in self.left if not reasons[nic.name]]

    def _drop_virtual(self) -> None:
        real = [nic.name for nic in self.left if not nic.is_virtual]
        if real:
            self._drop(lambda nic: f"virtual, and there is {real[0]}" if nic.is_virtual else "")

    def _drop_same_wire(self) -> None:
        """A VLAN or bridge shares the NIC below it: one of them is enough."""
        names = {nic.name for nic in self.left}
        kept = self._pinned if self._pinned in self.left else None

        def reason(nic: Nic) -> str:
            if kept is not None and (nic == kept or nic.name in kept.lowers):
                return "" if nic == kept else f"{kept.name}, which has peer_address, stands on it"
            shared = ", ".join(sorted(names & set(nic.lowers)))
            return f"on the same wire as {shared}" if shared else ""

        self._drop(reason)

    def _drop_other_fabrics(self) -> None:
        speed: Counter[str] = Counter()
        for nic in self.left:
            speed[nic.fabric] += nic.speed_mbit
        if len(speed) > 1:
            best = max(speed, key=lambda fabric: (speed[fabric], fabric))
            self._drop(
                lambda nic: (
                    ""
                    if nic.fabric == best
                    else f"its fabric is {nic.fabric or 'unknown'}, most have {best}"
                )
            )

    def _drop_slower(self) -> None:
        """Rails carry equal parts, so that all are as fast as the slowest."""
        speeds = sorted({nic.speed_mbit for nic in self.left if nic.speed_mbit}, reverse=True)
        if len(speeds) < 2:
            return

        def total(slowest: int) -> int:
            return slowest * sum(nic.speed_mbit >= slowest for nic in self.left)

        floor = max(speeds, key=total)
        self._drop(
            lambda nic: (
                f"slower than the others: {speed_text(nic.speed_mbit)}, theirs is "
                f"{speed_text(floor)}, and rails carry equal parts"
                if 0 < nic.speed_mbit < floor
                else ""
            )
        )

    def _drop_far_from_gpus(self) -> None:
        if not self._near:
            return
        used = {name for group in self._near for name in group.nics}
        nodes = {gpu.numa_node for gpu in self._topology.gpus}

        def reason(nic: Nic) -> str:
            if nic.name in used:
                return ""
            if not any(same_node(nic.numa_node, node) for node in nodes):
                named = ", ".join(map(str, sorted(nodes)))
                return f"belongs to other NUMA node: {nic.numa_node}, the GPUs to {named}"
            return "management or storage NIC: every GPU has a nearer one"

        self._drop(reason)

    def _drop_beyond(self, limit: int) -> None:
        over = [nic for nic in self.left if nic != self._pinned][limit - bool(self._pinned) :]
        self._drop(lambda nic: f"more than {limit} rails" if nic in over else "")

    def _why(self, nic: Nic) -> str:
        parts = []
        if nic == self._pinned:
            parts.append(f"has peer_address {self._peer_address}")
        near = [group for group in self._near if nic.name in group.nics]
        if near:
            parts.append(f"nearest to {_gpu_text(near)}")
        on = f", on {nic.netdev}" if nic.netdev else ""
        parts.append(f"{nic.state}, {speed_text(nic.speed_mbit)}{on}")
        despite = next((verdict.why for verdict in self._out if verdict.nic == nic), "")
        if despite:
            parts.append(f"taken although {despite}; name others by rails to leave it out")
        elif nic.is_virtual:
            parts.append("virtual, and nothing else can be used")
        return "; ".join(parts)


def _gpu_text(near: Sequence[Group]) -> str:
    told = [f"GPU {group.gpu} ({group.why})" for group in near[:TOLD_GPUS]]
    more = len(near) - len(told)
    return " and ".join(told) + (f" and {more} more GPUs" if more else "")
