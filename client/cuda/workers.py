# SPDX-License-Identifier: Apache-2.0
"""Threads for calls of the driver that may wait for a stream: nothing else waits for them.

A process that exits does not, either: they are daemons, which those of an executor are not.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.client.cuda.driver import Driver


class Workers:
    """Some threads that take what is submitted, in order. Made as they are needed."""

    def __init__(self, driver: Driver, name: str, count: int) -> None:
        """Has none yet."""
        self._driver = driver
        self._name = name
        self._count = count
        self._lock = threading.Lock()  # guards _threads
        self._threads: list[threading.Thread] = []
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, call: Callable[[], None]) -> None:
        """Has a thread call it, which must not raise. Does not wait."""
        with self._lock:
            if len(self._threads) < self._count:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
        self._calls.put(call)

    def _run(self) -> None:
        self._driver.captures_disregard()
        while (call := self._calls.get()) is not None:
            call()

    def close(self) -> None:
        """Waits for what is submitted; nothing is after this."""
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._calls.put(None)
        for thread in threads:
            thread.join()


def bounded(driver: Driver, name: str, call: Callable[[], None], timeout_s: float) -> bool:
    """Calls in a thread, which is left behind if it takes longer; tells whether it is through."""
    done = threading.Event()

    def run() -> None:
        try:
            driver.captures_disregard()
            call()
        finally:
            done.set()

    threading.Thread(target=run, name=name, daemon=True).start()
    return done.wait(timeout_s)
