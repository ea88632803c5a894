# SPDX-License-Identifier: Apache-2.0
"""What is due when. A key has one time at most."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

SLACK = 64  # entries of the heap that may be stale before it is made anew


class Timers:
    """Keys by time. Setting, cancelling and taking cost O(log n)."""

    def __init__(self) -> None:
        self._times: dict[Hashable, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._serial = itertools.count()

    def __len__(self) -> int:
        return len(self._times)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._times

    def set(self, key: Hashable, when: float) -> None:
        """Has a key come due at a time, instead of the one that it had."""
        entry = (when, next(self._serial))
        self._times[key] = entry
        heapq.heappush(self._heap, (*entry, key))
        if len(self._heap) > 2 * len(self._times) + SLACK:
            self._heap = [(*entry, key) for key, entry in self._times.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: Hashable) -> None:
        """Forgets a key, if it is there."""
        self._times.pop(key, None)

    def _prune(self) -> None:
        while self._heap:
            when, serial, key = self._heap[0]
            if self._times.get(key) == (when, serial):
                return
            heapq.heappop(self._heap)

    def next(self) -> float | None:
        """Tells the earliest time; None: nothing will come due."""
        self._prune()
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[Hashable]:
        """Takes out what is due, earliest first.

        What is set meanwhile is taken only by a later call, so that the loop ends.
        """
        bound = next(self._serial)
        later = []
        self._prune()
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            when, serial, key = entry
            if serial > bound:
                later.append(entry)
            elif self._times.get(key) == (when, serial):
                del self._times[key]
                yield key
            self._prune()
        for entry in later:
            heapq.heappush(self._heap, entry)
