# SPDX-License-Identifier: Apache-2.0
"""Which NICs are nearest to each GPU and to each NUMA node, and how several GPUs share them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transferd.daemon.topology.distance import Distance, distance, same_node
from transferd.daemon.topology.model import UNKNOWN_NODE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.daemon.topology.model import Pci
    from transferd.daemon.topology.nic import Nic


@dataclass(frozen=True, slots=True)
class Group:
    """The NICs of one GPU, or of one NUMA node's memory.

    Attributes:
        gpu: PCI address; empty for a NUMA node's.
        numa_node: UNKNOWN_NODE for all memory.
        nics: Names.
        distance: Of all of them from the GPU; None for a NUMA node's.
        why: A sentence.
    """

    gpu: str
    numa_node: int
    nics: tuple[str, ...]
    distance: Distance | None
    why: str


def of_gpus(gpus: Sequence[Pci], nics: Sequence[Nic]) -> list[Group]:
    """Gives each GPU its nearest NICs.

    GPUs that have the same nearest NICs share them in equal parts, in the order of PCI addresses,
    so that hosts of one kind pair alike. A GPU whose nearest NICs are the nearer ones of others
    takes those that the fewest have.

    Args:
        gpus: By PCI address.
        nics: Usable ones.

    Returns:
        A group for each GPU, in order; none where there are no NICs.
    """
    if not nics:
        return []
    near = {gpu: _nearest(gpu, nics) for gpu in gpus}
    load: Counter[str] = Counter()
    found = {}
    for far, candidates in sorted(set(near.values()), key=lambda each: each[0]):
        sharers = [gpu for gpu in gpus if near[gpu] == (far, candidates)]
        parts = _share(candidates, len(sharers), load, max(1, len(nics) // len(gpus)))
        for gpu, part in zip(sharers, parts, strict=True):
            found[gpu] = Group(
                gpu=gpu.address,
                numa_node=gpu.numa_node,
                nics=part,
                distance=far,
                why=_why(far, part, len(candidates), len(sharers)),
            )
    return [found[gpu] for gpu in gpus]


def _nearest(gpu: Pci, nics: Sequence[Nic]) -> tuple[Distance, tuple[str, ...]]:
    # A NIC without PCI device is as far as any.
    far = {nic.name: distance(gpu, nic.pci) if nic.pci else Distance.SYS for nic in nics}
    least = min(far.values())
    return least, tuple(name for name in far if far[name] == least)


def _share(
    candidates: Sequence[str], sharers: int, load: Counter[str], quota: int
) -> list[tuple[str, ...]]:
    least = min(load[name] for name in candidates)
    free = [name for name in candidates if load[name] == least]
    if least:  # others have them already: no more than everybody's part
        free = free[: quota * sharers]
    if len(free) >= sharers:
        cuts = [i * len(free) // sharers for i in range(sharers + 1)]
        parts = [tuple(free[cuts[i] : cuts[i + 1]]) for i in range(sharers)]
    else:
        parts = [(free[i * len(free) // sharers],) for i in range(sharers)]
    load.update(name for part in parts for name in part)
    return parts


def _why(far: Distance, part: Sequence[str], candidates: int, sharers: int) -> str:
    text = f"{far.name}: {far.words}"
    if sharers > 1:
        text += f"; {sharers} GPUs share {candidates}"
    elif len(part) < candidates:
        text += f"; {len(part)} of {candidates}, those that the fewest other GPUs have"
    return text


def of_nodes(nodes: Sequence[int], nics: Sequence[Nic]) -> list[Group]:
    """Gives each NUMA node's memory its NICs; all memory all NICs where there is one node."""
    if len(nodes) < 2:
        everything = tuple(nic.name for nic in nics)
        return [Group("", UNKNOWN_NODE, everything, None, "one NUMA node: all rails")]
    found = []
    for node in nodes:
        own = tuple(nic.name for nic in nics if same_node(nic.numa_node, node))
        if own:
            found.append(Group("", node, own, None, f"on NUMA node {node}"))
        else:
            everything = tuple(nic.name for nic in nics)
            found.append(Group("", node, everything, None, f"none is on NUMA node {node}: all"))
    return found
