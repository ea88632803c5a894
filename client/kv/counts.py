# SPDX-License-Identifier: Apache-2.0
"""Counters of a decoder rank, looked at all together: one native call, one comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from transferd.client.counter import read_slots

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NEVER = (1 << 64) - 1
VALUE, FAULTS = 0, 1


class Counts:
    """The counters of a range of immediates.

    Attributes:
        imms: The immediates; each has a counter.
    """

    def __init__(self, session: Any, imms: range) -> None:
        """Takes counters that the session has."""
        self.imms = imms
        self._session = session
        self._slots = np.array([session.slots[imm] for imm in imms], dtype=np.uint32)
        self._targets = np.full(len(imms), NEVER, dtype=np.uint64)
        self._faults = np.zeros(len(imms), dtype=np.uint64)
        self._watched = np.zeros(0, dtype=np.int64)  # indices
        self._watched_slots = self._slots[:0]
        self._views = np.zeros((0, 4), dtype=np.uint64)
        self._busy = np.zeros(len(imms), dtype=bool)
        self._stale = False

    def watch(self, imm: int, targets: Sequence[int]) -> None:
        """Looks at some from now on: each until it has reached its target, and once more then."""
        first = imm - self.imms.start
        self._targets[first : first + len(targets)] = targets
        for at, (_, faults) in enumerate(self.read(imm, len(targets)), first):
            self._faults[at] = faults
        self._busy[first : first + len(targets)] = True
        self._stale = True

    def forget(self, imm: int, count: int) -> None:
        """Looks at some no more."""
        first = imm - self.imms.start
        self._targets[first : first + count] = NEVER
        self._busy[first : first + count] = False
        self._stale = True

    def read(self, imm: int, count: int) -> list[tuple[int, int]]:
        """Reads values and faults of some."""
        first = imm - self.imms.start
        views = np.zeros((count, 4), dtype=np.uint64)
        read_slots(self._session, self._slots[first : first + count], views)
        return [(int(view[VALUE]), int(view[FAULTS])) for view in views]

    def faults_seen(self, imm: int, count: int) -> list[int]:
        """Tells the faults that were there when they were watched first, or were told since."""
        first = imm - self.imms.start
        return [int(faults) for faults in self._faults[first : first + count]]

    def look(self) -> Iterator[tuple[int, int | None]]:
        """Tells what is new: immediate and value; without a value, it has a fault."""
        if self._stale:
            self._watched = np.flatnonzero(self._busy)
            self._watched_slots = np.ascontiguousarray(self._slots[self._watched])
            self._views = np.zeros((len(self._watched), 4), dtype=np.uint64)
            self._stale = False
        if not len(self._watched):
            return
        read_slots(self._session, self._watched_slots, self._views)
        watched = self._watched
        values, faults = self._views[:, VALUE], self._views[:, FAULTS]
        reached = values >= self._targets[watched]
        faulted = faults > self._faults[watched]
        if not (reached | faulted).any():
            return
        news = [
            (int(watched[i]), int(values[i]), bool(faulted[i]))
            for i in np.flatnonzero(reached | faulted)
        ]
        self._faults[watched] = faults
        for at, value, is_faulted in news:
            if self._targets[at] <= value:
                self._targets[at] = value + 1  # one more is one too many
                yield self.imms[at], value
            if is_faulted:
                yield self.imms[at], None
