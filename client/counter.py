# SPDX-License-Identifier: Apache-2.0
"""ImmCounters: how many writes on an immediate have landed here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.session import OP_ACKNOWLEDGE
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from transferd.client.events import Driver
    from transferd.client.session import CounterView, Session


def to_target(target: int) -> int:
    """Checks a target."""
    if not isinstance(target, int) or not 0 <= target < 1 << 62:
        raise errors.InvalidRequest(f"target is a number of writes from 0 on, not {target!r}")
    return target


def read_slots(session: Any, slots: Any, views: Any) -> None:
    """Reads many counters of a session with shared memory, in one native call.

    Args:
        session: A RingSession.
        slots: Buffer of uint32: where they are, as ``session.slots`` tells it.
        views: Buffer of uint64, four for each: value, faults, lost, acknowledged.

    Raises:
        Unavailable: The session is over.
    """
    rc = lib.tfd_client_counters_read(
        session.client,
        ffi.from_buffer("uint32_t[]", slots),
        len(slots),
        ffi.from_buffer("struct tfd_counter_view[]", views, True),
    )
    if rc:
        raise session.over()


def acknowledge_soon(session: Any, imm: int) -> None:
    """As :meth:`Counter.acknowledge`, but does not wait for the daemon's worker."""
    session.job_release(session.publish(OP_ACKNOWLEDGE, imm, 0))


class BaseCounter:
    """What both faces of a counter have. Over shared memory, reading takes a microsecond."""

    __slots__ = ("_driver", "_session", "imm")

    def __init__(self, session: Session, driver: Driver, imm: int) -> None:
        self._session = session
        self._driver = driver
        self.imm = imm

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of immediate {self.imm}>"

    def read(self) -> CounterView:
        """Reads all of it at once."""
        return self._session.counter_read(self.imm)

    @property
    def value(self) -> int:
        """Landed writes; only grows. Of GPU memory their data is good after :meth:`wait` alone."""
        return self._session.counter_read(self.imm).value

    @property
    def faults(self) -> int:
        """Times that writes on this immediate became untrustworthy."""
        return self._session.counter_read(self.imm).faults

    @property
    def lost(self) -> int:
        """Writes known lost."""
        return self._session.counter_read(self.imm).lost

    def cuda_wait(self, target: int, stream: Any) -> None:
        """Has a CUDA stream wait until ``value >= target``; in a graph that is captured, too.

        A fault that is not acknowledged lets it through as well, and so does the session's end:
        look at ``faults`` afterwards.

        Args:
            target: As for :meth:`wait`.
            stream: As a number, or of torch, cupy, cuda.core; of the device whose memory is
                written.

        Raises:
            QuotaExceeded: WATCHERS: it takes one, where only a thread can flush what NICs write.
        """
        from transferd.client.cuda import streams

        session: Any = self._session
        slot = session.slots[self.imm]
        streams.counter_wait(session.gpu(), slot, to_target(target), stream, self._driver)

    @property
    def device_ptr(self) -> int:
        """Where kernels find the gate: ``value``, and 2^62 more while there is a fault.

        A kernel that has seen a count sees what streams and hosts have written; what a NIC has
        written into GPU memory is for kernels that are launched after :meth:`wait`, or behind
        :meth:`cuda_wait`.
        """
        from transferd.client.cuda import streams

        session: Any = self._session
        return streams.counter_pointer(session.gpu(), session.slots[self.imm])


class Counter(BaseCounter):
    """A counter of a :class:`transferd.Client`. Safe to use from several threads."""

    __slots__ = ()

    def wait(self, target: int, timeout_s: float | None = None) -> None:
        """Waits until ``value >= target``. The data of the writes that it counts is visible then.

        Args:
            target: All writes that are to land on this immediate until then, since the session's
                start.
            timeout_s: Bound; None: as long as it takes.

        Raises:
            CounterFault: A sender failed, and the fault is not acknowledged yet.
            WaitTimeout: The bound passed.
            Unavailable: The session is over.
        """
        self._session.counter_wait(self.imm, to_target(target), timeout_s)

    def acknowledge(self) -> None:
        """Takes all faults so far as seen: waits work again, for a retry on the same immediate."""
        self._session.counter_acknowledge(self.imm)
        self._session.landed()
