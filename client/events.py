# SPDX-License-Identifier: Apache-2.0
"""Calls back when jobs end and counters move, for callbacks and for asyncio.

Somebody has to look: a thread of ours (:class:`ThreadDriver`), or the event loop itself through the
session's events fd (:class:`LoopDriver`). The daemon signals that fd only while something is
watched here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from transferd.client.session import Session

# Longest sleep of a driver: what has no event (a peer's answer over gRPC, a daemon that froze) is
# looked at this often.
RECHECK_S = 0.5
# A session without an events fd is asked; often at first, for short jobs.
ASK_FIRST_S = 0.002
ASK_LONGEST_S = 0.05

log = logging.getLogger("transferd")


class Driver(Protocol):
    """What jobs and counters need of either driver."""

    def add(self, watch: Callable[[], bool]) -> None:
        """Has ``watch`` called until it returns True."""

    def kick(self) -> None:
        """Has everything looked at soon."""

    def close(self) -> None:
        """Looks a last time and stops."""


def run_callback(callback: Callable[..., object], *arguments: object) -> None:
    """Calls back; what it raises is logged, never passed on to those who wait for others."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback given to transferd raised")


def _look(watches: list[Callable[[], bool]]) -> list[Callable[[], bool]]:
    """Looks at each; returns those that are not finished."""
    left = []
    for watch in watches:
        try:
            finished = watch()
        except Exception:
            log.exception("watching a job or a counter failed")
            finished = True
        if not finished:
            left.append(watch)
    return left


class ThreadDriver:
    """Looks from a thread of its own, which starts with the first watch."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._event_fd = session.event_fd  # None: the session is asked in intervals
        self._kick_fd = -1 if self._event_fd is None else os.eventfd(0, os.EFD_NONBLOCK)
        self._wake = threading.Condition()  # guards _added, _closed, _thread
        self._added: list[Callable[[], bool]] = []
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, watch: Callable[[], bool]) -> None:
        """As :meth:`Driver.add`."""
        with self._wake:
            if self._closed:
                raise self._session.over()
            self._added.append(watch)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="transferd-events", daemon=True
                )
                self._thread.start()
            self._signal_locked()

    def kick(self) -> None:
        """As :meth:`Driver.kick`."""
        with self._wake:
            self._signal_locked()

    def close(self) -> None:
        """As :meth:`Driver.close`."""
        with self._wake:
            self._closed = True
            thread = self._thread
            self._signal_locked()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._wake:
            self._event_fd = None  # the session closes it next
            kick_fd, self._kick_fd = self._kick_fd, -1
        if kick_fd >= 0:
            os.close(kick_fd)

    def _signal_locked(self) -> None:
        self._wake.notify()
        if self._kick_fd >= 0:
            os.eventfd_write(self._kick_fd, 1)

    def _run(self) -> None:
        watches: list[Callable[[], bool]] = []
        interval_s = ASK_FIRST_S
        while True:
            with self._wake:
                if not watches and not self._added:
                    self._session.watch_events(False)
                    if not self._closed:
                        self._wake.wait()
                closing = self._closed
                if self._added:
                    interval_s = ASK_FIRST_S
                watches += self._added
                self._added = []
            self._session.watch_events(bool(watches))
            watches = _look(watches)
            if closing:
                return
            if watches:
                self._sleep(interval_s)
                interval_s = min(interval_s * 2, ASK_LONGEST_S)

    def _sleep(self, interval_s: float) -> None:
        if self._event_fd is None:
            with self._wake:
                if not self._added and not self._closed:
                    self._wake.wait(interval_s)
            return
        poller = select.poll()
        poller.register(self._event_fd, select.POLLIN)
        poller.register(self._kick_fd, select.POLLIN)
        for fd, _ in poller.poll(RECHECK_S * 1000):
            _clear(fd)


class LoopDriver:
    """Looks from the event loop, for a session with an events fd. Of that loop's thread."""

    def __init__(self, session: Session, event_fd: int, loop: asyncio.AbstractEventLoop) -> None:
        self._session = session
        self._event_fd = event_fd
        self._loop = loop
        self._watches: list[Callable[[], bool]] = []
        self._armed = False
        self._closed = False

    def add(self, watch: Callable[[], bool]) -> None:
        """As :meth:`Driver.add`."""
        if self._closed:
            raise self._session.over()
        if not self._armed:
            self._armed = True
            self._loop.add_reader(self._event_fd, self._on_event)
            self._session.watch_events(True)
        # Looked at once more after the daemon knows that it has to tell: news of before would not
        # be told.
        self._watches.append(watch)
        self._look()

    def kick(self) -> None:
        """As :meth:`Driver.kick`."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._look)

    def close(self) -> None:
        """As :meth:`Driver.close`."""
        self._closed = True
        _look(self._watches)
        self._watches = []
        self._disarm()

    def _on_event(self) -> None:
        _clear(self._event_fd)
        self._look()

    def _look(self) -> None:
        watches, self._watches = self._watches, []
        left = _look(watches)
        self._watches = left + self._watches  # a callback may have added some
        self._disarm()

    def _disarm(self) -> None:
        if self._armed and not self._watches:
            self._armed = False
            self._session.watch_events(False)
            self._loop.remove_reader(self._event_fd)


def _clear(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 4096)
