# SPDX-License-Identifier: Apache-2.0
"""Counts for streams of a device that only a thread can flush: words that follow their gates.

A stream that waits for a gate would go on before what a NIC has written is visible, and cannot
flush it. So it waits for a word of ours, which gets what the gate has once a thread has flushed.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.cuda.streams import watcher_pointer
from transferd.client.watcher import take_watcher
from transferd.native.client_half import lib

if TYPE_CHECKING:
    from transferd.client.cuda.gpu import Gpu
    from transferd.client.events import Driver

FAULT = 1 << 62  # TFD_GATE_FAULT


class Relays:
    """Those of one session. Safe to use from several threads."""

    def __init__(self, gpu: Gpu) -> None:
        """Has none yet."""
        self._gpu = gpu
        self._lock = threading.Lock()  # guards what follows, and is held while one is brought on
        self._words: dict[int, int] = {}  # counter's slot: watcher's
        self._told: dict[int, int] = {}  # counter's slot: what its word has
        self._closed = False

    def pointer(self, slot: int, driver: Driver) -> int:
        """Tells where the word of a counter lies for devices; from now on it follows the gate.

        Args:
            slot: Of the counter.
            driver: Looks whenever something has been counted.

        Raises:
            QuotaExceeded: WATCHERS.
        """
        with self._lock:
            first = not self._words
            if slot not in self._words:
                self._words[slot] = take_watcher(self._gpu.session)
                self._told[slot] = 0
            word = self._words[slot]
        self.refresh()
        if first:
            driver.add(self.look)
        return watcher_pointer(self._gpu, word)

    def refresh(self) -> None:
        """Brings all words to what their gates have, behind a flush."""
        session: Any = self._gpu.session
        with self._lock:
            if self._closed:
                return
            moved = {}
            for slot in self._words:
                view = session.slot_read(slot)
                gate = view.value + (FAULT if view.faults > view.acknowledged else 0)
                if gate != self._told[slot]:
                    moved[slot] = gate
            if moved:
                self._gpu.flusher.host()
            for slot, gate in moved.items():
                self._store(slot, gate)

    def _store(self, slot: int, gate: int) -> None:
        self._told[slot] = gate
        lib.tfd_client_watcher_set(self._gpu.session.client, self._words[slot], gate)

    def look(self) -> bool:
        """As :meth:`refresh`; tells whether that is over, and never raises."""
        try:
            self.refresh()
        except errors.TransferdError:  # the session is over, or the context lost
            self.release()
        return self._closed

    def release(self) -> None:
        """Lets all streams through: nothing comes any more. Idempotent."""
        with self._lock:
            self._closed = True
            for slot in self._words:
                self._store(slot, FAULT)
