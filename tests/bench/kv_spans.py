# SPDX-License-Identifier: Apache-2.0
"""How long a process is in what prepares, and in what posts, a transfer of transferd.kv."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from typing import Any


class Stopwatch:
    """Sums the time in methods, of all threads.

    Of a method that calls another one that is watched, both count: watch such as do not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = defaultdict(float)
        self._undo: list[tuple[type, str, Any]] = []

    def watch(self, owner: type, method: str, part: str) -> None:
        """Times a method of a class from now on.

        Args:
            owner: The class.
            method: Name.
            part: What its time is added to.
        """
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                took = time.perf_counter() - begin
                with self._lock:
                    self._sums[part] += took

        self._undo.append((owner, method, call))
        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Gives the seconds of each part since the last call."""
        with self._lock:
            found = dict(self._sums)
            self._sums.clear()
        return found

    def stop(self) -> None:
        """Times nothing any more."""
        while self._undo:
            owner, method, call = self._undo.pop()
            setattr(owner, method, call)
