# SPDX-License-Identifier: Apache-2.0
"""Runs of bytes that two caches have alike, merged as far as both allow."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Loop(NamedTuple):
    """Something that repeats.

    Attributes:
        times: How often; at least 2.
        src_stride: Bytes from one to the next at the source.
        dst_stride: At the destination.
    """

    times: int
    src_stride: int
    dst_stride: int


class Outer(NamedTuple):
    """Where runs are, and how they repeat from page to page and within pages.

    Attributes:
        src_region: Name.
        dst_region: Name.
        src_page: Bytes from a page to the next at the source.
        dst_page: At the destination.
        src_unit: Bytes from a unit to the next of its page; 0: a page is one unit.
        dst_unit: At the destination.
    """

    src_region: str
    dst_region: str
    src_page: int
    dst_page: int
    src_unit: int
    dst_unit: int


class Run(NamedTuple):
    """Bytes of a unit that are contiguous on both sides, and how they repeat within it.

    Attributes:
        src: Bytes from the region's beginning.
        dst: Bytes from the region's beginning.
        size: Bytes.
        loops: Outermost first.
    """

    src: int
    dst: int
    size: int
    loops: tuple[Loop, ...]

    @property
    def pieces(self) -> int:
        """How many pieces it is."""
        count = 1
        for loop in self.loops:
            count *= loop.times
        return count


def make_run(src: int, dst: int, size: int, loops: Iterable[Loop]) -> Run:
    """Makes a run; loops are put in order, those of one turn left out."""
    real = [loop for loop in loops if loop.times > 1]
    ordered = sorted(real, key=lambda loop: (loop.dst_stride, loop.src_stride), reverse=True)
    return Run(src, dst, size, tuple(ordered))


def merge(runs: list[Run]) -> list[Run]:
    """Merges runs of one Outer: adjacent tokens, heads, components, layers.

    Elements of a cache do not overlap, so each run has at most one neighbour behind it on both
    sides, and the order of merging does not matter.
    """
    while True:
        merged = _join([_collapse(run) for run in runs])
        if merged == runs:
            return runs
        runs = merged


def _collapse(run: Run) -> Run:
    """Makes what repeats without gaps on both sides one piece."""
    src, dst, size, loops = run
    again = True
    while again:
        again = False
        for loop in loops:
            if loop.src_stride == loop.dst_stride == size:
                size *= loop.times
                loops = tuple(other for other in loops if other is not loop)
                again = True
                break
    return Run(src, dst, size, loops)


def _join(runs: list[Run]) -> list[Run]:
    """Makes one of runs that follow each other on both sides and repeat alike."""
    alike: defaultdict[tuple[Loop, ...], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.dst, run.src)):
        same = alike[run.loops]
        last = same[-1] if same else None
        if last and (last.src + last.size, last.dst + last.size) == (run.src, run.dst):
            same[-1] = last._replace(size=last.size + run.size)
        else:
            same.append(run)
    return sorted((run for same in alike.values() for run in same), key=lambda run: run.dst)
