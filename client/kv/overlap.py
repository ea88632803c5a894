# SPDX-License-Identifier: Apache-2.0
"""Whether strided pieces of memory share a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Box(NamedTuple):
    """Bytes that repeat along axes.

    Attributes:
        start: First byte.
        size: Bytes of one element, without gaps.
        axes: Count and stride of each.
    """

    start: int
    size: int
    axes: tuple[tuple[int, int], ...]

    @property
    def end(self) -> int:
        """The first byte behind it all."""
        return self.start + self.size + sum((count - 1) * stride for count, stride in self.axes)

    def is_nested(self) -> bool:
        """Tells whether each axis steps over all that is within it, so that nothing overlaps."""
        span = self.size
        for stride, count in sorted((stride, count) for count, stride in self.axes if count > 1):
            if stride < span:
                return False
            span += (count - 1) * stride
        return True


def find_overlap(named: Sequence[tuple[Box, str]]) -> tuple[str, str] | None:
    """Finds two of several nested boxes that share a byte.

    Boxes whose extents overlap have to repeat by one stride along their outermost axis, as layers
    do that lie within one page; else they are told as overlapping. Takes n log n for each axis.
    """
    pending = [[(_sorted(box), name) for box, name in named]]
    while pending:
        for cluster in _clusters(pending.pop()):
            outermost = {box.axes[0][1] if box.axes else 0 for box, _ in cluster}
            stride = outermost.pop()
            if outermost or not stride:
                return cluster[0][1], _next_other(cluster)
            pending.append(_within(cluster, stride))
    return None


def _sorted(box: Box) -> Box:
    axes = sorted((axis for axis in box.axes if axis[0] > 1), key=lambda axis: -axis[1])
    return box._replace(axes=tuple(axes))


def _clusters(named: list[tuple[Box, str]]) -> list[list[tuple[Box, str]]]:
    """Groups those whose extents overlap; leaves out what overlaps nobody else's."""
    clusters: list[list[tuple[Box, str]]] = []
    end = -1
    for box, name in sorted(named, key=lambda one: one[0].start):
        if clusters and box.start < end:
            clusters[-1].append((box, name))
            end = max(end, box.end)
        else:
            clusters.append([(box, name)])
            end = box.end
    return [cluster for cluster in clusters if len({name for _, name in cluster}) > 1]


def _within(cluster: list[tuple[Box, str]], stride: int) -> list[tuple[Box, str]]:
    """Takes the outermost axis away: what is left, in the bytes from 0 to its stride."""
    base = cluster[0][0].start
    inner: dict[tuple[Box, str], None] = {}
    for box, name in cluster:
        one = Box((box.start - base) % stride, box.size, box.axes[1:])
        inner[one, name] = None
        if one.end > stride:  # the next period's beginning is in its way, too
            inner[one._replace(start=one.start - stride), name] = None
    return list(inner)


def _next_other(cluster: list[tuple[Box, str]]) -> str:
    """Names whom the first of a cluster overlaps."""
    first = cluster[0][1]
    return next((name for _, name in cluster if name != first), first)
