# SPDX-License-Identifier: Apache-2.0
"""Watchers: words that a program, or a kernel of a device, counts up; jobs that start by them.

A bump is one native call: a store, and a wake-up of the daemon's worker only if that sleeps.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import errors
from transferd.client.closing import Closing
from transferd.client.session import FLAG_ARMED, FLAG_POLLED, OP_DISARM
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from transferd.client.operations import Operation
    from transferd.client.session import Request, Session

_bump = lib.tfd_client_watcher_bump
_read = lib.tfd_client_watcher_read
BUMP_MAX = (1 << 63) - 1
RELEASE_S = 10.0


class Trigger(NamedTuple):
    """What an armed job waits for.

    Attributes:
        watcher: Its watcher.
        slot: Of the watcher.
        value: The job starts once the watcher has reached it.
        flags: FLAG_ARMED, and FLAG_POLLED where a device bumps.
    """

    watcher: BaseWatcher
    slot: int
    value: int
    flags: int


def no_segment(what: str) -> errors.Conflict:
    """Makes the error for what lives in shared memory, in a session that has none."""
    return errors.Conflict(
        f"{what} are words of shared memory, which a session over gRPC has not: attach by the "
        "daemon's Unix socket, without shared_memory=False",
        reason="NO_SHARED_MEMORY",
    )


def take_watcher(session: Session) -> int:
    """Takes a free watcher of a session; its word is 0.

    Raises:
        Conflict: NO_SHARED_MEMORY.
        QuotaExceeded: All are taken.
    """
    session.check_open()
    if not session.shared_memory:
        raise no_segment("watchers")
    slot = ffi.new("uint32_t *")
    rc = lib.tfd_client_watcher_open(_client(session), slot)
    if rc == -errno.ENOSPC:
        raise errors.QuotaExceeded(
            "all watchers of this session are taken: close some, or raise limits.watchers of the "
            "daemon",
            reason="WATCHERS",
        )
    if rc:
        raise session.over()
    taken: int = slot[0]
    return taken


def _client(session: Any) -> Any:
    return session.client


class BaseWatcher:
    """What both faces of a watcher have.

    Attributes:
        device: Whether a device bumps it.
    """

    __slots__ = ("_closed", "_closing", "_given_back", "_session", "_slot", "device")

    def __init__(self, session: Session, slot: int, device: bool) -> None:
        self._session: Any = session
        self._slot = slot
        self.device = device
        self._closed = False
        self._given_back = False
        self._closing = threading.Lock()

    def __repr__(self) -> str:
        try:
            state = "closed" if self._closed else str(self.value)
        except errors.Unavailable:
            state = "its session is over"
        return f"<{type(self).__name__} {self._slot}: {state}>"

    def bump(self, n: int = 1) -> None:
        """Adds to it; what this thread wrote before is what the jobs that it starts will move.

        About a microsecond; several threads may. Not for one that a device bumps: a word has one
        writer.

        Args:
            n: From 1 to 2^63 - 1.

        Raises:
            InvalidRequest: n is out of range, or its value would pass 2^64.
            Conflict: The watcher is closed.
            Unavailable: The session is over.
        """
        if type(n) is not int or not 0 < n <= BUMP_MAX:
            raise errors.InvalidRequest(f"n is a number from 1 to 2^63 - 1, not {n!r}")
        if self._closed:
            raise self._is_closed()
        rc = _bump(self._session.client, self._slot, n)
        if rc == -errno.ERANGE:
            raise errors.InvalidRequest(
                f"the watcher stands at {self.value}: with {n} more it would pass 2^64; take "
                "another watcher"
            )
        if rc:
            raise self._session.over()

    def cuda_bump(self, stream: Any, n: int = 1) -> None:
        """Has a CUDA stream add to it; in a graph that is captured, each time that it runs.

        What the stream did before is what the jobs that it starts will move.

        Args:
            stream: As a number, or of torch, cupy, cuda.core.
            n: As for :meth:`bump`.

        Raises:
            InvalidRequest: n is out of range, or the watcher is not one for a device.
            Conflict: The watcher is closed.
        """
        if type(n) is not int or not 0 < n <= BUMP_MAX:
            raise errors.InvalidRequest(f"n is a number from 1 to 2^63 - 1, not {n!r}")
        if not self.device:
            raise errors.InvalidRequest(
                "the daemon polls what a device bumps: take it by watcher(device=True)"
            )
        if self._closed:
            raise self._is_closed()
        from transferd.client.cuda import streams

        streams.watcher_bump(self._session.gpu(), self._slot, n, stream)

    @property
    def device_ptr(self) -> int:
        """Where kernels find its word, to be written as transferd/device.cuh does."""
        if self._closed:
            raise self._is_closed()
        from transferd.client.cuda import streams

        return streams.watcher_pointer(self._session.gpu(), self._slot)

    @property
    def value(self) -> int:
        """What has been added up. Never waits."""
        if self._closed:
            raise self._is_closed()
        out = ffi.new("uint64_t *")
        if _read(self._session.client, self._slot, out):
            raise self._session.over()
        value: int = out[0]
        return value

    def check(self, session: Session) -> None:
        """Raises unless jobs of a session can be armed on it."""
        if self._session is not session:
            raise errors.InvalidRequest("the watcher is another Client's: make one of this Client")
        if self._closed:
            raise self._is_closed()

    def trigger(self, value: int) -> Trigger:
        """Makes what a job waits for."""
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise errors.InvalidRequest(
                f"value is what the watcher has to reach, from 0 to 2^64 - 1, not {value!r}"
            )
        flags = FLAG_ARMED | (FLAG_POLLED if self.device else 0)
        return Trigger(self, self._slot, value, flags)

    @staticmethod
    def _is_closed() -> errors.Conflict:
        return errors.Conflict("the watcher is closed", reason="WATCHER_CLOSED")

    def _close(self) -> None:
        self._closed = True
        with self._closing:  # once: another may have the slot afterwards
            if self._given_back:
                return
            with contextlib.suppress(errors.Unavailable):  # it went with the session
                self._session.command(OP_DISARM, 0, self._slot)
                if self._session.gpu_or_none is not None:  # streams of ours may wait for it, too
                    self._session.gpu_or_none.lanes.release(self._slot, RELEASE_S)
                lib.tfd_client_watcher_close(self._session.client, self._slot)
            self._given_back = True


class Watcher(BaseWatcher, Closing):
    """A watcher of a :class:`transferd.Client`; a context manager that closes it."""

    __slots__ = ()

    def close(self) -> None:
        """Ends the jobs that still wait for it, with CANCELLED, and gives it back. Idempotent.

        Raises:
            WaitTimeout: The daemon does not answer; another call tries again.
        """
        self._close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Armed:
    """An armed job of a batch; the fields are the arguments of :meth:`Client.arm`."""

    watcher: BaseWatcher
    value: int
    job: Operation

    def request(self) -> Request:
        """Checks the values and makes the request."""
        if not isinstance(self.watcher, BaseWatcher):
            raise errors.InvalidRequest(
                f"watcher is what Client.watcher() makes, not {type(self.watcher).__name__}"
            )
        if isinstance(self.job, Armed):
            raise errors.InvalidRequest("job waits for one watcher, not for two")
        make = getattr(self.job, "request", None)
        if make is None:
            raise errors.InvalidRequest(
                "job is a plan, or a Write, Imm, WritePages, Scatter, Barrier, Read or Send, which "
                f"is not submitted yet, not {type(self.job).__name__}"
            )
        request: Request = make()
        return request._replace(trigger=self.watcher.trigger(self.value))
