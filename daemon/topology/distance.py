# SPDX-License-Identifier: Apache-2.0
"""How far two PCI devices are from each other, in the words of `nvidia-smi topo`."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from transferd.daemon.topology.model import UNKNOWN_NODE

if TYPE_CHECKING:
    from transferd.daemon.topology.model import Pci


class Distance(enum.IntEnum):
    """Nearest first."""

    PIX = 0
    PXB = 1
    PHB = 2
    NODE = 3
    SYS = 4

    @property
    def words(self) -> str:
        """Says what it means."""
        return WORDS[self]


WORDS = {
    Distance.PIX: "same PCIe switch",
    Distance.PXB: "several PCIe bridges",
    Distance.PHB: "same PCIe host bridge",
    Distance.NODE: "same NUMA node",
    Distance.SYS: "other NUMA node",
}


def distance(one: Pci, other: Pci) -> Distance:
    """Measures two devices.

    A switch is an upstream bridge with a bridge below it for each port: two devices on ports of one
    switch meet at its upstream bridge and have one further bridge each.
    """
    if one.host_bridge != other.host_bridge:
        # Two devices whose nodes the firmware does not tell (both unknown) count as one node's, as
        # in NCCL: single-node guests report that.
        return Distance.NODE if one.numa_node == other.numa_node else Distance.SYS
    shared = 0
    for mine, theirs in zip(one.bridges, other.bridges, strict=False):
        if mine != theirs:
            break
        shared += 1
    if shared == 0:
        return Distance.PHB
    below = max(len(one.bridges), len(other.bridges)) - shared
    return Distance.PIX if below <= 1 else Distance.PXB


def same_node(one: int, other: int) -> bool:
    """Tells whether two NUMA nodes may be the same; an unknown one may be any."""
    return UNKNOWN_NODE in (one, other) or one == other
