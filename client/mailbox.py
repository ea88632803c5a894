# SPDX-License-Identifier: Apache-2.0
"""Mailboxes: the receiving side of ``send``.

An *inbox* is how messages come: :class:`RingInbox` looks into the mailbox's memory, which the
daemon fills, and gives slots back through the submit ring; :class:`LeaseInbox` asks by gRPC.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from transferd.client import errors
from transferd.client.closing import Closing
from transferd.client.job import to_deadline_ns
from transferd.client.memory import allocate
from transferd.client.session import MESSAGE_BYTES_MAX, OP_SEND, Request, to_descriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd.client.lease import LeaseSession
    from transferd.client.ring import RingSession
    from transferd.client.session import Session

SLOTS_MAX = 65_536
LINE = 64
LETTER = struct.Struct("<IIQ")  # struct tfd_letter: slot, bytes, number
SLICE_S = 1.0  # a sleeping receiver looks this often whether its mailbox was closed


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """A message of a batch; the fields are the arguments of :meth:`Client.send`."""

    dst: bytes
    data: Any
    deadline_s: float | None = None

    def request(self) -> Request:
        """Checks the values and makes the request."""
        return Request(
            OP_SEND,
            0,
            0,
            0,
            0,
            to_descriptor(self.dst),
            0,
            0,
            to_deadline_ns(self.deadline_s),
            data=_to_data(self.data),
        )


def _to_data(data: Any) -> bytes:
    """Copies a message."""
    try:
        view = memoryview(data)
    except TypeError:
        raise errors.InvalidRequest(
            f"data is bytes, or what has a buffer of them, not {type(data).__name__}"
        ) from None
    if view.nbytes > MESSAGE_BYTES_MAX:
        raise errors.InvalidRequest(
            f"data has {view.nbytes} bytes; a message has at most {MESSAGE_BYTES_MAX}",
            reason="DESTINATION_BOUNDS",
        )
    return view.tobytes()


def _line(size: int) -> int:
    return -(-size // LINE) * LINE


def closed() -> errors.Conflict:
    """Makes the error of a mailbox that is no more."""
    return errors.Conflict("the mailbox is closed", reason="MAILBOX_CLOSED")


class Inbox(Protocol):
    """How messages of one mailbox come. Safe to use from several threads."""

    number: int
    descriptor: bytes

    def take(self) -> bytes | None:
        """Takes the oldest message; None: none is there. Raises once the mailbox is closed."""

    def kept(self) -> bytes | None:
        """Takes the oldest message of those that are in this process already."""

    def put_back(self, message: bytes) -> None:
        """Has :meth:`take` return this next."""

    def wait(self, timeout_s: float) -> None:
        """Waits until a message may be there, at most for a while."""

    def settle(self) -> None:
        """Gives back what slots could not be given back without waiting."""

    def close(self) -> None:
        """Ends the mailbox. Idempotent."""


class RingInbox:
    """An inbox in shared memory.

    Attributes:
        due: Slots, with the numbers of their messages, that are still to be given back.
    """

    def __init__(self, session: RingSession, slots: int, slot_bytes: int) -> None:
        """Makes the mailbox, with memory of its own."""
        self._session = session
        self._slots = slots
        self._stride = _line(slot_bytes)
        self._data_at = _line(slots * LETTER.size)
        size = self._data_at + slots * self._stride
        self._region, self._view = allocate(session, size, None, "mailbox")
        try:
            made = session.mailbox_create(slots, slot_bytes, self._region)
        except BaseException:
            session.region_remove(self._region)
            raise
        self.number = made.mailbox
        self.descriptor = made.descriptor
        self._counter = made.counter_slot
        self._next = made.first
        self._closed = False
        self._lock = threading.Lock()  # guards _next, _back and due
        self._back: deque[bytes] = deque()
        self.due: deque[tuple[int, int]] = deque()

    def take(self) -> bytes | None:
        """As :meth:`Inbox.take`."""
        with self._lock:
            if self._back:
                return self._back.popleft()
            if self._closed:
                raise closed()
            self._session.check_open()
            counter = self._session.slot_read(self._counter)
            if counter.faults > counter.acknowledged:
                raise closed()
            if self._next >= counter.value:
                return None
            message = self._read()
            self._give_back(0.0)
            return message

    def kept(self) -> bytes | None:
        """As :meth:`Inbox.kept`."""
        with self._lock:
            return self._back.popleft() if self._back else None

    def _read(self) -> bytes:
        """Copies message number ``_next``, which the counter has told of."""
        at = self._next % self._slots * LETTER.size
        slot, size, number = LETTER.unpack_from(self._view, at)
        first = self._data_at + slot * self._stride
        message = bytes(self._view[first : first + size])
        self._next += 1
        self.due.append((slot, number))
        return message

    def _give_back(self, timeout_s: float) -> None:
        with contextlib.suppress(errors.WaitTimeout):  # the ring is full: later
            while self.due:
                self._session.mailbox_release(self.number, *self.due[0], timeout_s)
                self.due.popleft()

    def put_back(self, message: bytes) -> None:
        """As :meth:`Inbox.put_back`."""
        with self._lock:
            self._back.appendleft(message)

    def wait(self, timeout_s: float) -> None:
        """As :meth:`Inbox.wait`."""
        self._session.slot_wait(self._counter, self._next + 1, min(timeout_s, SLICE_S))

    def settle(self) -> None:
        """As :meth:`Inbox.settle`."""
        if self.due:
            with self._lock:
                self._give_back(self._session.control.timeout_s)

    def close(self) -> None:
        """As :meth:`Inbox.close`."""
        if self._closed:
            return
        self._closed = True
        if self._session.closed:
            return
        with contextlib.suppress(errors.NotFound, errors.Unavailable):
            self._session.mailbox_close(self.number)
        with contextlib.suppress(errors.NotFound, errors.Unavailable):
            self._session.region_remove(self._region)


class LeaseInbox:
    """An inbox by gRPC."""

    def __init__(self, session: LeaseSession, slots: int, slot_bytes: int) -> None:
        """Makes the mailbox, in memory of the daemon's."""
        self._session = session
        made = session.mailbox_create(slots, slot_bytes, 0)
        self.number = made.mailbox
        self.descriptor = made.descriptor
        self._closed = False
        self._came: deque[bytes] = deque()

    def take(self) -> bytes | None:
        """As :meth:`Inbox.take`."""
        if not self._came:
            self._ask(0.0)
        return self.kept()

    def kept(self) -> bytes | None:
        """As :meth:`Inbox.kept`."""
        try:
            return self._came.popleft()
        except IndexError:  # none, or another thread was quicker
            return None

    def _ask(self, timeout_s: float) -> None:
        if self._closed:
            raise closed()
        try:
            self._came.extend(self._session.mailbox_receive(self.number, timeout_s))
        except errors.NotFound:
            raise closed() from None

    def put_back(self, message: bytes) -> None:
        """As :meth:`Inbox.put_back`."""
        self._came.appendleft(message)

    def wait(self, timeout_s: float) -> None:
        """As :meth:`Inbox.wait`."""
        self._ask(min(timeout_s, SLICE_S))

    def settle(self) -> None:
        """As :meth:`Inbox.settle`: the daemon has done it."""

    def close(self) -> None:
        """As :meth:`Inbox.close`."""
        if self._closed:
            return
        self._closed = True
        if not self._session.closed:
            with contextlib.suppress(errors.NotFound, errors.Unavailable):
                self._session.mailbox_close(self.number)


def open_inbox(session: Session, slots: int, slot_bytes: int) -> Inbox:
    """Makes a mailbox of a session.

    Raises:
        InvalidRequest: A size is out of range.
        QuotaExceeded: No room for it.
    """
    if not isinstance(slots, int) or not 1 <= slots <= SLOTS_MAX:
        raise errors.InvalidRequest(f"slots is a number from 1 to {SLOTS_MAX}, not {slots!r}")
    if not isinstance(slot_bytes, int) or not 1 <= slot_bytes <= MESSAGE_BYTES_MAX:
        raise errors.InvalidRequest(
            f"slot_bytes is a number from 1 to {MESSAGE_BYTES_MAX}, not {slot_bytes!r}"
        )
    session.check_open()
    return session.inbox(slots, slot_bytes)


class BaseMailbox:
    """What both faces of a mailbox have.

    Attributes:
        descriptor: Opaque bytes that name it. Whoever holds them may send to it.
        slots: Messages that it holds.
        slot_bytes: Of the longest message.
    """

    __slots__ = ("__weakref__", "_inbox", "descriptor", "slot_bytes", "slots")

    def __init__(self, inbox: Inbox, slots: int, slot_bytes: int) -> None:
        self._inbox = inbox
        self.descriptor = inbox.descriptor
        self.slots = slots
        self.slot_bytes = slot_bytes

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.slots} slots of {self.slot_bytes} bytes>"


class Mailbox(BaseMailbox, Closing):
    """A mailbox of a :class:`transferd.Client`: a context manager, and an iterator of messages.

    Several threads may receive from it; each message goes to one of them.
    """

    __slots__ = ()

    def receive(self, timeout_s: float | None = None) -> bytes:
        """Takes the oldest message, waiting for it; its slot is free again.

        Raises:
            WaitTimeout: None came in time.
            Conflict: MAILBOX_CLOSED.
            Unavailable: The session is over.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        inbox = self._inbox
        while True:
            message = inbox.take()
            if message is not None:
                inbox.settle()
                return message
            left = SLICE_S if end is None else end - time.monotonic()
            if left <= 0:
                raise errors.WaitTimeout(f"no message came within {timeout_s:g} s")
            inbox.wait(left)

    def __iter__(self) -> Iterator[bytes]:
        """Receives until the mailbox is closed."""
        while True:
            try:
                message = self.receive()
            except errors.Conflict:
                return
            yield message

    def close(self) -> None:
        """Ends the mailbox: a fence. Jobs that wait for a slot end with CANCELLED. Idempotent."""
        self._inbox.close()
