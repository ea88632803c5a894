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
PIPE_BYTES = 65_536  # a pipe's usual capacity

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
        self._lock = threading.Lock()  # guards _added, _closed, _thread, writing to _wake_fd
        self._added: list[Callable[[], bool]] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def add(self, watch: Callable[[], bool]) -> None:
        """As :meth:`Driver.add`."""
        with self._lock:
            if self._closed:
                raise self._session.over()
            self._added.append(watch)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="transferd-events", daemon=True
                )
                self._thread.start()
            os.eventfd_write(self._wake_fd, 1)

    def kick(self) -> None:
        """As :meth:`Driver.kick`."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """As :meth:`Driver.close`. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            os.eventfd_write(self._wake_fd, 1)
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        os.close(self._wake_fd)

    def _run(self) -> None:
        watches: list[Callable[[], bool]] = []
        sleep = _Sleep(self._session.event_fd, self._wake_fd)
        closing = False
        while not closing:
            with self._lock:
                closing = self._closed
                added, self._added = self._added, []
            if added:
                sleep.begin_anew()
            watches += added
            # First asked to be told, then looked: news in between are seen or told.
            if watches:
                self._session.watch_events(True)
            watches = _look(watches)
            if not watches:
                self._session.watch_events(False)
            if not closing:
                sleep.until_news(bool(watches))


class _Sleep:
    """How a :class:`ThreadDriver` waits: for the events fd, or in intervals where there is none."""

    def __init__(self, event_fd: int | None, wake_fd: int) -> None:
        self._event_fd = event_fd
        self._interval_s = ASK_FIRST_S
        self._wake_fd = wake_fd
        self._poll = select.poll()
        self._poll.register(wake_fd, select.POLLIN)
        if event_fd is not None:
            self._poll.register(event_fd, select.POLLIN)

    def begin_anew(self) -> None:
        """Something new is watched: it may end soon."""
        self._interval_s = ASK_FIRST_S

    def until_news(self, watching: bool) -> None:
        """Sleeps; without a bound while nothing is watched."""
        limit_s = RECHECK_S if self._event_fd is not None else self._interval_s
        self._interval_s = min(self._interval_s * 2, ASK_LONGEST_S)
        for fd, _ in self._poll.poll(limit_s * 1000 if watching else None):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            elif not drain(fd):
                self._poll.unregister(fd)  # the daemon is gone; the session's end wakes us


class LoopDriver:
    """Looks from the event loop, for a session with an events fd."""

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
        if not drain(self._event_fd):
            self._loop.remove_reader(self._event_fd)  # the daemon is gone; kick() follows
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


def drain(event_fd: int) -> bool:
    """Empties the events fd, a pipe; false once the daemon has closed it."""
    try:
        return bool(os.read(event_fd, PIPE_BYTES))
    except BlockingIOError:
        return True
