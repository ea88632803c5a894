# SPDX-License-Identifier: Apache-2.0
"""The session of a client without the fd socket: a lease, POSIX shared memory, jobs over gRPC.

The same calls with the same meaning, at about a millisecond each instead of microseconds.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from transferd.client import errors, tables
from transferd.client.session import (
    FLAG_CHECKSUM,
    FLAG_COUNT_JOB,
    FLAG_EXACT,
    NS_PER_S,
    OP_BARRIER,
    OP_IMM,
    OP_READ,
    OP_SCATTER,
    OP_SEND,
    OP_WRITE,
    OP_WRITE_PAGES,
    CounterView,
    JobPath,
    JobResult,
    Memory,
    Request,
    Session,
)
from transferd.native.names import JobStatus
from transferd.v1 import mailbox_pb2, region_pb2, session_pb2, transfer_pb2, types_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transferd.client.indices import Rows
    from transferd.client.mailbox import Inbox
    from transferd.client.rpc import Control
    from transferd.client.session import Target

SHM_FOLDER = "/dev/shm"
SLICE_S = 10.0  # one call's share of a long wait: short enough to notice a daemon that froze
CALL_SLACK_S = 5.0  # what a call may take beyond the wait that it asks for
FULL_SLEEP_S = 0.001
BATCH_MAX = 4096
# The daemon's bounds of one Submit: 131,072 pages, or 32,768 targets, which take as much.
TABLES_MAX = 131_072 * 8
MS_PER_S = 1000

# The proto enum cannot have PENDING as 0, so the numbers differ from the ABI's there.
_STATUS = {getattr(types_pb2, f"JOB_STATUS_{status.name}"): status for status in JobStatus}


class LeaseSession(Session):
    """A session over gRPC alone."""

    shared_memory = False
    batch_limit = BATCH_MAX
    table_limit = TABLES_MAX
    provider = ""

    def __init__(self, control: Control, *, name: str) -> None:
        """Opens the session and keeps its lease.

        Raises:
            TransferdError: The daemon refused, or cannot be reached.
        """
        opened = control.call(
            control.sessions.OpenSession, session_pb2.OpenSessionRequest(name=name)
        )
        super().__init__(control, opened.session_id)
        control.use_token(opened.token)
        self._stop = threading.Event()
        me = weakref.ref(self)
        self._renewer = threading.Thread(
            target=_renew, args=(me, self._stop, opened.lease_ms / MS_PER_S / 3),
            name="transferd-lease", daemon=True,
        )  # fmt: skip
        self._renewer.start()

    # ---- jobs ----

    def submit(
        self,
        op: int,
        priority: int,
        imm: int,
        region: int,
        src_offset: int,
        dst: bytes,
        dst_offset: int,
        length: int,
        deadline_ns: int,
        timeout_s: float | None,
    ) -> int:
        """As :meth:`Session.submit`."""
        request = Request(
            op, priority, imm, region, src_offset, dst, dst_offset, length, deadline_ns
        )
        return self.submit_many([request], timeout_s)[0]

    def submit_many(self, requests: Sequence[Request], timeout_s: float | None) -> list[int]:
        """As :meth:`Session.submit_many`."""
        self.check_open()
        tables.check(requests)
        message = transfer_pb2.SubmitRequest(jobs=[_job(r) for r in requests])
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                response = self.control.call(self.control.transfers.Submit, message)
                return list(response.job_ids)
            except errors.QuotaExceeded as error:
                if error.reason != "RING_FULL":
                    raise
                if end is not None and time.monotonic() >= end:
                    raise errors.WaitTimeout(str(error), reason="RING_FULL") from None
            time.sleep(FULL_SLEEP_S)

    def table_bytes(self, request: Request) -> int:
        """As :meth:`Session.table_bytes`."""
        return tables.table_size(request)

    def job_wait(self, job_id: int, timeout_s: float | None) -> Any:
        """As :meth:`Session.job_wait`."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = SLICE_S if end is None else min(SLICE_S, max(0.0, end - time.monotonic()))
            result = self._ask(job_id, left)
            if result is not None:
                return result
            if end is not None and time.monotonic() >= end:
                raise errors.WaitTimeout(f"job {job_id} has not ended within {timeout_s:g} s")

    def job_poll(self, job_id: int) -> Any:
        """As :meth:`Session.job_poll`."""
        return self._ask(job_id, 0.0)

    def _ask(self, job_id: int, wait_s: float) -> JobResult | None:
        self.check_open()
        request = transfer_pb2.WaitJobsRequest(job_ids=[job_id], timeout_ms=_ms(wait_s))
        response = self.control.call(
            self.control.transfers.WaitJobs, request, self.control.timeout_s + wait_s + CALL_SLACK_S
        )
        return _result(response.jobs[0])

    def decode(self, job_id: int, raw: Any) -> JobResult:
        """As :meth:`Session.decode`."""
        result: JobResult = raw
        return result

    def job_cancel(self, job_id: int) -> None:
        """As :meth:`Session.job_cancel`."""
        self.control.call(
            self.control.transfers.CancelJob, transfer_pb2.CancelJobRequest(job_id=job_id)
        )

    def job_release(self, job_id: int) -> None:
        """As :meth:`Session.job_release`."""
        pass  # the daemon keeps a bounded number of ends

    # ---- counters ----

    def counter_read(self, imm: int) -> CounterView:
        """As :meth:`Session.counter_read`."""
        self.check_open()
        response = self.control.call(
            self.control.transfers.GetCounter, transfer_pb2.GetCounterRequest(imm=imm)
        )
        return _view(response.counter)

    def counter_wait(self, imm: int, target: int, timeout_s: float | None) -> None:
        """As :meth:`Session.counter_wait`."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self.check_open()
            left = SLICE_S if end is None else min(SLICE_S, max(0.0, end - time.monotonic()))
            response = self.control.call(
                self.control.transfers.WaitCounter,
                transfer_pb2.WaitCounterRequest(imm=imm, target=target, timeout_ms=_ms(left)),
                self.control.timeout_s + left + CALL_SLACK_S,
            )
            state = response.counter
            if response.reached:
                return
            if response.faulted:
                raise errors.CounterFault(
                    imm, value=state.value, faults=state.faults, lost=state.lost
                )
            if end is not None and time.monotonic() >= end:
                raise errors.WaitTimeout(
                    f"immediate {imm} stands at {state.value} of {target} after {timeout_s:g} s"
                )

    def counter_acknowledge(self, imm: int) -> None:
        """As :meth:`Session.counter_acknowledge`."""
        self.control.call(
            self.control.transfers.AcknowledgeCounter,
            transfer_pb2.AcknowledgeCounterRequest(imm=imm),
        )

    # ---- mailboxes ----

    def inbox(self, slots: int, slot_bytes: int) -> Inbox:
        """As :meth:`Session.inbox`."""
        from transferd.client.mailbox import LeaseInbox  # which needs what this module offers

        return LeaseInbox(self, slots, slot_bytes)

    def mailbox_receive(self, mailbox: int, timeout_s: float) -> list[bytes]:
        """Takes a message, if one comes in time: its slot is free when this process has it."""
        self.check_open()
        response = self.control.call(
            self.control.mailboxes.ReceiveMessages,
            mailbox_pb2.ReceiveMessagesRequest(mailbox=mailbox, limit=1, timeout_ms=_ms(timeout_s)),
            self.control.timeout_s + timeout_s + CALL_SLACK_S,
        )
        return list(response.messages)

    # ---- memory ----

    def memory_create(self, length: int) -> Memory:
        """As :meth:`Session.memory_create`."""
        name = f"/transferd-{os.getpid()}-{secrets.token_hex(8)}"
        path = SHM_FOLDER + name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, length)  # a full /dev/shm is an error now, not a SIGBUS later
        except OSError as error:
            os.close(fd)
            os.unlink(path)
            raise errors.QuotaExceeded(
                f"{SHM_FOLDER} has no room for {length} bytes: {error.strerror}", reason="SHM"
            ) from None
        return Memory(fd, name)

    def memory_register(self, memory: Memory, length: int, name: str) -> int:
        """As :meth:`Session.memory_register`."""
        try:
            response = self.control.call(
                self.control.regions.RegisterRegion,
                region_pb2.RegisterRegionRequest(
                    shm_path=memory.shm_name, length_bytes=length, name=name
                ),
            )
        finally:
            # The daemon has mapped it by now: without a name nothing is left behind, however this
            # process ends.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SHM_FOLDER + memory.shm_name)
        region: int = response.region
        return region

    # ---- its end ----

    def renew(self) -> None:
        """Renews the lease; the session is over where the daemon says so."""
        try:
            self.control.call(self.control.sessions.RenewSession, session_pb2.RenewSessionRequest())
        except errors.Unavailable as error:
            self.end = error
            if self.on_end is not None:
                self.on_end()
        except errors.TransferdError:
            return  # the next one may work

    def _detach(self) -> None:
        self._stop.set()
        if self.end is None:
            with contextlib.suppress(errors.TransferdError):
                self.control.call(
                    self.control.sessions.CloseSession, session_pb2.CloseSessionRequest()
                )
        if self.on_end is not None:
            self.on_end()


def _renew(reference: weakref.ref[LeaseSession], stop: threading.Event, every_s: float) -> None:
    """Keeps a lease without keeping the session alive. Runs in its own thread."""
    while not stop.wait(every_s):
        session = reference()
        if session is None or session.end is not None:
            return
        session.renew()
        del session


def _job(request: Request) -> transfer_pb2.Job:
    job = transfer_pb2.Job(
        # Whole milliseconds over gRPC: never sooner than asked for.
        deadline_ms=-(-request.deadline_ns * MS_PER_S // NS_PER_S),
        priority=types_pb2.PRIORITY_LATENCY if request.priority else types_pb2.PRIORITY_BULK,
    )
    _FILL[request.op](job, request)
    return job


def _fill_write(job: transfer_pb2.Job, request: Request) -> None:
    job.write.src_region = request.region
    job.write.src_offset_bytes = request.src_offset
    job.write.dst = request.dst
    job.write.dst_offset_bytes = request.dst_offset
    job.write.length_bytes = request.length
    job.write.imm = request.imm
    job.write.exact = bool(request.flags & FLAG_EXACT)
    job.write.checksum = bool(request.flags & FLAG_CHECKSUM)


def _fill_imm(job: transfer_pb2.Job, request: Request) -> None:
    job.imm.dst = request.dst
    job.imm.imm = request.imm


def _fill_pages(job: transfer_pb2.Job, request: Request) -> None:
    pages = request.pages
    assert pages is not None
    body = job.write_pages
    body.src_region = request.region
    body.src_offset_bytes = request.src_offset
    body.src_pages.extend(pages.src.view.tolist())
    body.src_stride_bytes = pages.src_stride
    body.dst = request.dst
    body.dst_offset_bytes = request.dst_offset
    body.dst_pages.extend(pages.dst.view.tolist())
    body.dst_stride_bytes = pages.dst_stride
    body.page_bytes = request.length
    body.imm = request.imm
    body.count = (
        transfer_pb2.PAGE_COUNT_JOB
        if request.flags & FLAG_COUNT_JOB
        else transfer_pb2.PAGE_COUNT_PAGE
    )
    body.exact = bool(request.flags & FLAG_EXACT)
    body.checksum = bool(request.flags & FLAG_CHECKSUM)


def _fill_scatter(job: transfer_pb2.Job, request: Request) -> None:
    job.scatter.src_region = request.region
    job.scatter.imm = request.imm
    job.scatter.checksum = bool(request.flags & FLAG_CHECKSUM)
    for dst, src_offset, dst_offset, length in request.targets or _rows(request.rows):
        job.scatter.targets.add(
            dst=dst, src_offset_bytes=src_offset, dst_offset_bytes=dst_offset, length_bytes=length
        )


def _rows(rows: Rows | None) -> Iterator[Target]:
    """Turns the rows of an array, which have been checked, into targets."""
    if rows is not None:
        numbers: list[list[int]] = rows.numbers.view.tolist()  # type: ignore[assignment]
        for member, src_offset, dst_offset, length in numbers:
            yield rows.members[member], rows.src_start + src_offset, dst_offset, length


def _fill_barrier(job: transfer_pb2.Job, request: Request) -> None:
    job.barrier.dsts.extend(request.destinations)
    job.barrier.imm = request.imm


def _fill_read(job: transfer_pb2.Job, request: Request) -> None:
    job.read.src = request.dst
    job.read.src_offset_bytes = request.dst_offset
    job.read.dst_region = request.region
    job.read.dst_offset_bytes = request.src_offset
    job.read.length_bytes = request.length


def _fill_send(job: transfer_pb2.Job, request: Request) -> None:
    job.send.dst = request.dst
    job.send.data = request.data or b""


_FILL = {
    OP_WRITE: _fill_write,
    OP_IMM: _fill_imm,
    OP_WRITE_PAGES: _fill_pages,
    OP_SCATTER: _fill_scatter,
    OP_BARRIER: _fill_barrier,
    OP_READ: _fill_read,
    OP_SEND: _fill_send,
}


def _result(end: transfer_pb2.JobEnd) -> JobResult | None:
    status = _STATUS.get(end.status, JobStatus.INVALID)
    if status is JobStatus.PENDING:
        return None
    used = end.path
    path = JobPath(used.provider, used.rails, used.staged, used.packed, used.emulated)
    return JobResult(end.job_id, status, end.detail, end.bytes, path, end.duration_ns)


def _view(state: transfer_pb2.CounterState) -> CounterView:
    return CounterView(state.value, state.faults, state.lost, state.acknowledged)


def _ms(seconds: float) -> int:
    return -int(-seconds * MS_PER_S // 1)
