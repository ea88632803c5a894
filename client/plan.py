# SPDX-License-Identifier: Apache-2.0
"""Plans: jobs that the daemon keeps, checked, and that one ring entry launches."""

from __future__ import annotations

import contextlib
import struct
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import errors
from transferd.client.closing import Closing
from transferd.client.job import Job, to_deadline_ns
from transferd.client.session import (
    OP_FORGET,
    OP_LAUNCH,
    OP_SCATTER,
    OP_SEND,
    OP_WRITE,
    OP_WRITE_PAGES,
    Request,
)
from transferd.client.watcher import Armed, no_segment
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from transferd.client.cuda.launches import CopiedPlan
    from transferd.client.events import Driver
    from transferd.client.operations import Operation
    from transferd.client.session import Session

_TABLED = (OP_WRITE, OP_WRITE_PAGES, OP_SCATTER)
_HEAD_BYTES = int(ffi.sizeof("struct tfd_plan_table"))
# Of what a row of a table is: its format, how many numbers.
_PAGE = ("I", int(ffi.sizeof("struct tfd_page")) // 4)
_SLICE = ("Q", int(ffi.sizeof("struct tfd_slice")) // 8)


class Launch(NamedTuple):
    """What launches a plan.

    Attributes:
        plan: The plan.
        number: Of the plan.
        key: Its destinations.
        copied: With GPU memory that a stream copies; None: the daemon moves its bytes.
    """

    plan: BasePlan
    number: int
    key: bytes | tuple[bytes, ...]
    copied: CopiedPlan | None = None


class Kept(NamedTuple):
    """A plan that the daemon has.

    Attributes:
        session: Whose.
        number: Of the plan.
        key: Its destinations.
        deadline_ns: Of each launch, from then on; 0: none.
        capacity: Rows of its table; 0: it has none.
        row: Format and numbers of a row.
        copied: As of :class:`Launch`.
    """

    session: Any
    number: int
    key: bytes | tuple[bytes, ...]
    deadline_ns: int
    capacity: int
    row: tuple[str, int]
    copied: CopiedPlan | None = None


def keep(session: Session, job: Operation, table: bool, timeout_s: float | None) -> Kept:
    """Has the daemon keep a job.

    Raises:
        InvalidRequest: It cannot be kept, or has a value that is out of range.
        Conflict: NO_SHARED_MEMORY.
        QuotaExceeded: PLANS.
        JobFailed: The daemon refused it; of the class that fits.
    """
    request = _request(job)
    if table and request.op not in _TABLED:
        raise errors.InvalidRequest(
            f"a {type(job).__name__} has no sizes and offsets to be put into a table: leave out "
            "table="
        )
    rows = 1 if request.op == OP_WRITE else request.table_count
    tabled = table or request.op == OP_WRITE_PAGES
    if tabled and not rows:
        raise errors.InvalidRequest(
            "a plan with a table has room for the pages or targets that it is made with: none are "
            "there"
        )
    session.check_open()
    if not session.shared_memory:
        raise no_segment("the tables of plans")
    ring: Any = session
    window = None
    if table and request.op == OP_SCATTER:
        src: Any = job
        window = (src.src.start, src.src.length)
    copied = None
    if request.source is not None:
        copied = session.gpu().copier.plan(request, tabled)
    number = ring.plan_open(request._replace(deadline_ns=0), window, table, timeout_s, copied)
    return Kept(
        session,
        number,
        request.key,
        request.deadline_ns,
        rows if tabled else 0,
        _PAGE if request.op == OP_WRITE_PAGES else _SLICE,
        copied,
    )


def _request(job: Operation) -> Request:
    if isinstance(job, Armed):
        raise errors.InvalidRequest(
            "a launch is armed, not the plan: arm(watcher, value, plan) once there is one"
        )
    make = getattr(job, "request", None)
    if make is None or isinstance(job, BasePlan):
        raise errors.InvalidRequest(
            "a plan is made of a Write, Imm, WritePages, Scatter, Barrier or Read, not of "
            f"{type(job).__name__}"
        )
    request: Request = make()
    if request.op == OP_SEND:
        raise errors.InvalidRequest(
            "a message is copied when it is submitted and cannot be kept: use send()"
        )
    return request


class BasePlan:
    """What both faces of a plan have. As a member of a batch, or armed, it is one launch."""

    __slots__ = ("_closed", "_closing", "_given_back", "_head", "_kept", "_table")

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._closed = False
        self._given_back = False
        self._closing = threading.Lock()
        self._head: Any = None
        self._table: memoryview | None = None
        if kept.capacity:
            client = kept.session.client
            head = lib.tfd_client_plan_table(client, kept.number)
            # Views of it keep the mapping alive, also after the Client is closed.
            self._head = ffi.gc(
                ffi.cast("struct tfd_plan_table *", head), lambda _, keep=client: None
            )
            code, numbers = kept.row
            size = struct.calcsize(code) * numbers * kept.capacity
            rows = memoryview(ffi.buffer(self._head, _HEAD_BYTES + size))[_HEAD_BYTES:]
            self._table = rows.cast(code, (kept.capacity, numbers))  # type: ignore[call-overload]

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"plan {self._kept.number}"
        return f"<{type(self).__name__} of {self._kept.session.session_id}: {state}>"

    @property
    def table(self) -> memoryview | None:
        """What launches read: the rows of the table, writable; ``numpy.asarray`` takes it.

        Of a write or a scatter (src_offset, dst_offset, length), three unsigned 64-bit numbers: the
        source counts from the template's ``src`` on, the destination from the grant's beginning; a
        scatter's rows are its targets, in their order. Of pages (src, dst), two unsigned 32-bit
        indices. In the beginning it holds what the plan was made with. It is to be left alone from
        a launch (an armed one: from the bump that starts it) until that job has ended. None: the
        plan has no table.

        Raises:
            Conflict: The plan is closed.
        """
        self._check_open()
        return self._table

    @property
    def count(self) -> int:
        """Rows of the table that a launch takes, from the first on; all, if it was never set.

        Raises:
            InvalidRequest: The plan has no table, or not so many rows.
            Conflict: The plan is closed.
        """
        return int(self._written().count)

    @count.setter
    def count(self, value: int) -> None:
        head = self._written()
        if not isinstance(value, int) or not 0 <= value <= self._kept.capacity:
            raise errors.InvalidRequest(
                f"count is a number of rows from 0 to {self._kept.capacity}, which the plan was "
                f"made with, not {value!r}"
            )
        head.count = value

    def _written(self) -> Any:
        self._check_open()
        if self._head is None:
            raise errors.InvalidRequest("the plan was made without table=True: it has no rows")
        return self._head

    @property
    def device_ptr(self) -> int:
        """Address of the table for kernels: ``transferd::plan_table`` of ``device.cuh``.

        A kernel that fills it, and then bumps the watcher that a launch is armed on, says what is
        copied. Read it once before a stream of the device waits for anything.

        Raises:
            InvalidRequest: The plan has no table.
            Conflict: The plan is closed.
            Unavailable: There is no GPU that is of use.
        """
        head = self._written()
        pointer: int = self._kept.session.gpu().segment_pointer(head)
        return pointer

    def request(self) -> Request:
        """Makes the request of a launch."""
        return self._launch(None)

    def _deadline_ns(self, deadline_s: float | None) -> int:
        return self._kept.deadline_ns if deadline_s is None else to_deadline_ns(deadline_s)

    def _launch(self, deadline_s: float | None) -> Request:
        self._check_open()
        kept = self._kept
        return Request(
            OP_LAUNCH,
            0 if kept.copied is None else kept.copied.priority,
            0,
            0,
            0,
            b"",
            0,
            0,
            self._deadline_ns(deadline_s),
            targets=(),
            launch=Launch(self, kept.number, kept.key, kept.copied),
            source=None if kept.copied is None else kept.copied.source,
            stream=None if kept.copied is None else kept.copied.stream,
        )

    def check(self, session: Session) -> None:
        """Raises unless it can be launched in a session."""
        if self._kept.session is not session:
            raise errors.InvalidRequest("the plan is another Client's: make one of this Client")
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Conflict("the plan is closed", reason="PLAN_CLOSED")

    def _close(self) -> None:
        self._closed = True
        session, number = self._kept.session, self._kept.number
        with self._closing:  # once: another may have the number afterwards
            if self._given_back:
                return
            with contextlib.suppress(errors.Unavailable):  # it went with the session
                session.command(OP_FORGET, 0, number)
                lib.tfd_client_plan_close(session.client, number)
            self._given_back = True


class Plan(BasePlan, Closing):
    """A plan of a :class:`transferd.Client`; a context manager that closes it."""

    __slots__ = ("_driver",)

    def __init__(self, kept: Kept, driver: Driver) -> None:
        super().__init__(kept)
        self._driver = driver

    def launch(self, *, deadline_s: float | None = None, timeout_s: float | None = None) -> Job:
        """Starts the job once more; launches of one plan may be in flight at once.

        Args:
            deadline_s: The job ends with DEADLINE after this long; None: the template's.
            timeout_s: How long to wait for room in the ring; None: as long as it takes.

        Returns:
            The job. INVALID: a row of the table leaves the source or the grant; of a write or a
            scatter nothing was sent then, of pages those before it may have been. Where a stream
            copies, all rows but that one may have been; nothing more is counted.

        Raises:
            Conflict: The plan is closed. GRANT_REVOKED: GPU memory that a stream would write to is
                taken back by its owner.
            CudaError: The driver refused a copy.
            WaitTimeout: No room in time.
            Unavailable: The session is over.
        """
        if self._closed:
            self._check_open()
        kept = self._kept
        deadline_ns = self._deadline_ns(deadline_s)
        if kept.copied is None:
            job_id = kept.session.launch(kept.number, deadline_ns, timeout_s)
        else:
            copier = kept.session.gpu().copier
            job_id = copier.launch(kept.copied, kept.number, deadline_ns, timeout_s)
            if not job_id:
                (job_id,) = kept.session.submit_many([self._launch(deadline_s)], timeout_s)
        return Job(kept.session, self._driver, job_id, kept.key)

    def close(self) -> None:
        """Has the daemon forget it. What was launched, or armed, goes on. Idempotent.

        Raises:
            WaitTimeout: The daemon does not answer; another call tries again.
        """
        self._close()
