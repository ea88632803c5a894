# SPDX-License-Identifier: Apache-2.0
"""The session in shared memory: submitting, waiting and counting are one native call each.

The native client is freed by its reference count (``ffi.gc``): a thread inside a call holds a
reference, so :meth:`RingSession.close` never pulls the mapping from under another thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from transferd.client import errors, tables
from transferd.client.fdsocket import FdSocket, close_all
from transferd.client.job import failure
from transferd.client.session import (
    OP_ACKNOWLEDGE,
    OP_CANCEL,
    OP_FORGET,
    OP_RELEASE,
    CounterView,
    JobPath,
    JobResult,
    Memory,
    Session,
    to_ns,
)
from transferd.native.client_half import ffi, lib
from transferd.native.names import JobStatus, detail_name
from transferd.v1 import attach_pb2, region_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transferd.client.cuda.gpu import Gpu
    from transferd.client.cuda.launches import CopiedPlan
    from transferd.client.mailbox import Inbox
    from transferd.client.rpc import Control
    from transferd.client.session import Request

_EAGAIN = -errno.EAGAIN
_EINTR = -errno.EINTR
_submit = lib.tfd_client_job_submit
_submit_wait = lib.tfd_client_submit_wait
_submit_tables = lib.tfd_client_submit_tables
_launch = lib.tfd_client_plan_launch
_wait = lib.tfd_client_job_wait
_poll = lib.tfd_client_job_poll
_release = lib.tfd_client_job_release
_counter_wait = lib.tfd_client_counter_wait
_counter_read = lib.tfd_client_counter_read
_new = ffi.new

_NAMES = ("libfabric", "local", "sim", "tcp", "verbs", "cuda", "staged")
_PROVIDERS = {0: "", **{int(getattr(lib, f"TFD_PATH_{name.upper()}")): name for name in _NAMES}}
_STATUS = {int(status): status for status in JobStatus}


def decode_path(word: int) -> JobPath:
    """Reads the path word of a completion record."""
    number = word & int(lib.TFD_PATH_PROVIDER_MASK)
    rails = (word >> int(lib.TFD_PATH_RAILS_SHIFT)) & 0xFF
    packed = bool(word & int(lib.TFD_PATH_PACKED))
    emulated = bool(word & int(lib.TFD_PATH_EMULATED))
    provider = _PROVIDERS.get(number, f"provider {number}")
    return JobPath(provider, rails, packed=packed, emulated=emulated)


def _free(doorbell_fd: int, client: Any) -> None:
    lib.tfd_client_close(client)
    os.close(doorbell_fd)


class RingSession(Session):
    """A session with a segment."""

    shared_memory = True

    def __init__(
        self, control: Control, path: str, *, name: str, records: int, counters: int, spin_us: float
    ) -> None:
        """Attaches.

        Args:
            control: Calls to the same daemon.
            path: Of the fd socket.
            name: Shown by transferctl.
            records: Jobs in flight; 0: the daemon's default.
            counters: Immediates counted; 0: the daemon's default.
            spin_us: How long a waiting thread polls before it sleeps.

        Raises:
            OSError: Nobody listens on the fd socket.
            TransferdError: The daemon refused.
        """
        self._socket = FdSocket(path, control.timeout_s)
        try:
            attached, fds = self._socket.attach(
                attach_pb2.AttachRequest(
                    abi_version=int(lib.TFD_ABI_VERSION),
                    name=name,
                    record_count=records,
                    counter_count=counters,
                )
            )
            self.client, self.event_fd = self._map(fds)
        except BaseException:
            self._socket.close()
            raise
        super().__init__(control, attached.session_id)
        control.use_token(attached.token.hex())
        header = lib.tfd_client_header(self.client)
        self.provider = ffi.string(header.provider, 64).decode("utf-8", "replace")
        self.batch_limit = min(int(header.ring_entries), int(header.record_count))
        self.table_limit = int(lib.tfd_client_arena_bytes(self.client))
        self._spin_ns = max(0, int(spin_us * 1000))
        self._gpu_lock = threading.Lock()  # guards making it
        me = weakref.ref(self)
        self._socket.start(
            lambda end: _session_ended(me, end), lambda map_ids: _map_revoked(me, map_ids)
        )
        try:
            self._socket.request(attach_pb2.FdRequest(mapped=attach_pb2.MappedRequest()))
        except BaseException:
            self.close()
            self.close_events()
            raise

    @staticmethod
    def _map(fds: list[int]) -> tuple[Any, int]:
        """Maps the segment. Takes the fds; the events fd is the caller's afterwards."""
        segment_fd, doorbell_fd, event_fd = fds
        out = _new("struct tfd_client **")
        rc = lib.tfd_client_open(segment_fd, _new("int[1]", [doorbell_fd]), 1, out)
        os.close(segment_fd)
        if rc:
            close_all([doorbell_fd, event_fd])
            if rc == -errno.EPROTO:
                raise errors.Internal(
                    "the daemon's segment is of another version: "
                    "install the same transferd on both sides",
                    reason="ABI_MISMATCH",
                )
            raise errors.Internal(f"the session's segment cannot be mapped: {os.strerror(-rc)}")
        # Of our ends of the two pipes; the daemon's are its own.
        os.set_blocking(event_fd, False)
        os.set_blocking(doorbell_fd, False)
        return ffi.gc(out[0], lambda pointer: _free(doorbell_fd, pointer)), event_fd

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
        job_id: int = _submit(
            self.client,
            0,
            op,
            priority,
            imm,
            region,
            src_offset,
            self.handles.get(dst) or self.open(dst),
            dst_offset,
            length,
            deadline_ns,
            0,
            -1 if timeout_s is None else to_ns(timeout_s),
        )
        if job_id > 0:
            return job_id
        if job_id == _EINTR:  # Python's own signal handlers run between the two calls
            return self.submit(
                op,
                priority,
                imm,
                region,
                src_offset,
                dst,
                dst_offset,
                length,
                deadline_ns,
                timeout_s,
            )
        raise self.refusal(job_id, timeout_s)

    def publish(self, op: int, imm: int, argument: int) -> int:
        """Publishes an entry that has no destination; returns its id."""
        job_id = _EINTR
        while job_id == _EINTR:
            job_id = _submit(
                self.client,
                0,
                op,
                1,
                imm,
                0,
                0,
                0,
                0,
                0,
                0,
                argument,
                to_ns(self.control.timeout_s),
            )
        if job_id > 0:
            return job_id
        raise self.refusal(job_id, self.control.timeout_s)

    def submit_many(self, requests: Sequence[Request], timeout_s: float | None) -> list[int]:
        """As :meth:`Session.submit_many`."""
        if len(requests) == 1 and requests[0].source is not None:
            job_id = self.gpu().copier.submit(requests[0], timeout_s)
            if job_id is not None:
                return [job_id]
        batch = tables.make(requests, self.handles_of(requests), self.lengths)
        count = len(requests)
        fault = _new("struct tfd_table_fault *")
        rc = _EINTR
        while rc == _EINTR:
            if batch.tables == ffi.NULL:
                rc = _submit_wait(self.client, 0, batch.entries, count, to_ns(timeout_s))
            else:
                rc = _submit_tables(
                    self.client, 0, batch.entries, batch.tables, count, to_ns(timeout_s), fault
                )
        if rc == -errno.ERANGE:
            raise tables.refusal(requests, fault)
        if rc:
            raise self.refusal(rc, timeout_s)
        return [batch.entries[index].job_id for index in range(count)]

    def handles_of(self, requests: Sequence[Request]) -> dict[bytes, int]:
        """Finds the handles of a batch's destinations, opening those that are not open."""
        wanted = {r.dst for r in requests if r.targets is None and r.rows is None}
        for request in requests:
            if request.targets or request.rows:
                wanted.update(request.destinations)
        found = {d: self.handles.get(d, 0) for d in wanted}
        missing = [d for d, handle in found.items() if not handle]
        if missing:
            found.update(zip(missing, self.open_many(missing), strict=True))
        return found

    def plan_open(
        self,
        request: Request,
        window: tuple[int, int] | None,
        with_table: bool,
        timeout_s: float | None,
        copied: CopiedPlan | None = None,
    ) -> int:
        """Has the daemon keep a job; returns the plan's number.

        Args:
            request: The job.
            window: Beginning and bytes of the part of the region that a scatter's rows count from.
            with_table: Launches read sizes and offsets from a table; pages always do.
            timeout_s: How long to wait for room in the ring and the arena.
            copied: Where a stream copies for its launches.
        """
        if copied is not None:
            request = copied.of(request)
        batch = tables.make([request], self.handles_of([request]), self.lengths)
        table, kept = batch.tables, None
        if copied is not None and request.pages is None:
            table, kept = copied.places(request, table)
        entry = batch.entries[0]
        if window is not None:
            entry.src_offset, entry.length = window
        fault = _new("struct tfd_table_fault *")
        rc = _EINTR
        while rc == _EINTR:
            rc = lib.tfd_client_plan_open(
                self.client, 0, batch.entries, table, with_table, to_ns(timeout_s), fault
            )
        del kept
        if rc == -errno.ERANGE:
            raise tables.refusal([request], fault)
        if rc in (-errno.ENOSPC, -errno.EMSGSIZE):
            raise tables.plan_refusal(request, rc, self.table_limit)
        if rc:
            raise self.refusal(rc, timeout_s)
        number: int = entry.plan
        try:
            result = self._end_of(entry.job_id)
        except BaseException:  # WaitTimeout, Ctrl-C: what comes of it is forgotten right afterwards
            with contextlib.suppress(errors.TransferdError):
                _release(self.client, self.publish(OP_FORGET, 0, number))
                lib.tfd_client_plan_close(self.client, number)
            raise
        if result.status is not JobStatus.OK:
            lib.tfd_client_plan_close(self.client, number)
            self.note_end(result, request.key, self.handles.get(request.dst, 0))
            raise failure(result)
        return number

    def launch(self, plan: int, deadline_ns: int, timeout_s: float | None) -> int:
        """Launches a plan; the deadline counts from now, 0: none. Returns the job's id."""
        job_id: int = _EINTR
        while job_id == _EINTR:
            job_id = _launch(
                self.client, 0, plan, deadline_ns, -1 if timeout_s is None else to_ns(timeout_s)
            )
        if job_id > 0:
            return job_id
        raise self.refusal(job_id, timeout_s)

    def table_bytes(self, request: Request) -> int:
        """As :meth:`Session.table_bytes`."""
        return tables.table_size(request)

    def refusal(self, rc: int, timeout_s: float | None) -> errors.TransferdError:
        """Makes the error for what submitting returned."""
        if rc == -errno.EPIPE:
            return self.over()
        if rc in (_EAGAIN, -errno.ETIMEDOUT):
            return errors.WaitTimeout(
                f"no room for the job within {timeout_s or 0:g} s: {self.batch_limit} jobs are in "
                f"flight already, or tables of {self.table_limit} bytes, those of plans included",
                reason="RING_FULL",
            )
        if rc == -errno.ESTALE:
            return errors.Conflict("the watcher is closed", reason="WATCHER_CLOSED")
        return errors.Internal(f"submitting failed: {os.strerror(-rc)}")

    def job_wait(self, job_id: int, timeout_s: float | None) -> Any:
        """As :meth:`Session.job_wait`."""
        raw = _new("struct tfd_result *")
        rc = _wait(
            self.client, job_id, -1 if timeout_s is None else to_ns(timeout_s), self._spin_ns, raw
        )
        if rc == _EINTR:
            rc = self._again(lambda left: _wait(self.client, job_id, left, 0, raw), timeout_s)
        if not rc:
            return raw
        if rc == -errno.ETIMEDOUT:
            raise errors.WaitTimeout(f"job {job_id} has not ended within {timeout_s:g} s")
        if rc == -errno.EPIPE:
            raise self.over()
        return None

    def _again(self, wait: Callable[[int], int], timeout_s: float | None) -> int:
        """Goes on with a wait that a signal interrupted; its bound starts anew, once."""
        end = None if timeout_s is None else time.monotonic_ns() + to_ns(timeout_s)
        rc = _EINTR
        while rc == _EINTR:
            rc = wait(-1 if end is None else max(0, end - time.monotonic_ns()))
        return rc

    def job_poll(self, job_id: int) -> Any:
        """As :meth:`Session.job_poll`."""
        raw = _new("struct tfd_result *")
        rc = _poll(self.client, job_id, raw)
        if rc == -errno.EPIPE:
            raise self.over()
        return None if rc else raw

    def decode(self, job_id: int, raw: Any) -> JobResult:
        """As :meth:`Session.decode`."""
        status = _STATUS.get(raw.status, JobStatus.INVALID)
        return JobResult(
            job_id=job_id,
            status=status,
            detail=detail_name(raw.detail) if raw.detail else "",
            bytes=raw.bytes,
            path=decode_path(raw.path),
            duration_ns=max(0, raw.ended_ns - (raw.accepted_ns or raw.submitted_ns)),
            submitted_ns=raw.submitted_ns,
            accepted_ns=raw.accepted_ns,
            posted_ns=raw.posted_ns or None,
            ended_ns=raw.ended_ns,
        )

    def job_cancel(self, job_id: int) -> None:
        """As :meth:`Session.job_cancel`."""
        _release(self.client, self.publish(OP_CANCEL, 0, job_id))

    def job_release(self, job_id: int) -> None:
        """As :meth:`Session.job_release`."""
        _release(self.client, job_id)

    # ---- counters ----

    def counter_read(self, imm: int) -> CounterView:
        """As :meth:`Session.counter_read`."""
        return self.slot_read(self.slots[imm])

    def slot_read(self, slot: int) -> CounterView:
        """Reads the counter in a slot."""
        view = _new("struct tfd_counter_view *")
        rc = _counter_read(self.client, slot, view)
        if rc:
            raise self.over()
        return CounterView(view.value, view.faults, view.lost, view.acknowledged)

    def slot_wait(self, slot: int, target: int, timeout_s: float) -> None:
        """Waits until the counter in a slot reaches a target, or is faulted, or time is over."""
        rc = _counter_wait(self.client, slot, target, to_ns(timeout_s), self._spin_ns)
        if rc == -errno.EPIPE:
            raise self.over()

    def counter_wait(self, imm: int, target: int, timeout_s: float | None) -> None:
        """As :meth:`Session.counter_wait`."""
        self.counter_wait_slot(imm, self.slots[imm], target, timeout_s)
        self.landed()

    def counter_wait_slot(self, imm: int, slot: int, target: int, timeout_s: float | None) -> None:
        """As :meth:`counter_wait`, for a caller that knows the slot."""
        rc = _counter_wait(
            self.client, slot, target, -1 if timeout_s is None else to_ns(timeout_s), self._spin_ns
        )
        if not rc:
            return
        if rc == _EINTR:
            rc = self._again(
                lambda left: _counter_wait(self.client, slot, target, left, 0), timeout_s
            )
        self._counter_failed(imm, target, timeout_s, rc)

    def _counter_failed(self, imm: int, target: int, timeout_s: float | None, rc: int) -> None:
        if not rc:
            return
        if rc == -errno.EPIPE:
            raise self.over()
        view = self.counter_read(imm)
        if rc == -errno.EIO:
            raise errors.CounterFault(imm, value=view.value, faults=view.faults, lost=view.lost)
        raise errors.WaitTimeout(
            f"immediate {imm} stands at {view.value} of {target} after {timeout_s:g} s"
        )

    def counter_acknowledge(self, imm: int) -> None:
        """As :meth:`Session.counter_acknowledge`."""
        result = self.command(OP_ACKNOWLEDGE, imm, 0)
        if result.status is not JobStatus.OK:
            raise errors.NotFound(f"immediate {imm}: {result.detail}", reason=result.detail)

    def command(self, op: int, imm: int, argument: int) -> JobResult:
        """Has the worker do something that is no job; waits for its answer."""
        return self._end_of(self.publish(op, imm, argument))

    def _end_of(self, job_id: int) -> JobResult:
        try:
            return self.decode(job_id, self.job_wait(job_id, self.control.timeout_s))
        finally:
            _release(self.client, job_id)

    def watch_events(self, watched: bool) -> None:
        """As :meth:`Session.watch_events`."""
        client = self.client
        if client:
            lib.tfd_client_set_event_waiters(client, int(watched))

    # ---- mailboxes ----

    def inbox(self, slots: int, slot_bytes: int) -> Inbox:
        """As :meth:`Session.inbox`."""
        from transferd.client.mailbox import RingInbox  # which needs what this module offers

        return RingInbox(self, slots, slot_bytes)

    def mailbox_release(self, mailbox: int, slot: int, number: int, timeout_s: float) -> None:
        """Gives a slot back.

        Raises:
            WaitTimeout: No room in the ring in time.
        """
        job_id = _EINTR
        while job_id == _EINTR:
            job_id = _submit(
                self.client,
                0,
                OP_RELEASE,
                1,
                0,
                0,
                slot,
                mailbox,
                0,
                0,
                0,
                number,
                to_ns(timeout_s),
            )
        if job_id < 0:
            raise self.refusal(job_id, timeout_s)
        _release(self.client, job_id)

    # ---- memory ----

    def memory_create(self, length: int) -> Memory:
        """As :meth:`Session.memory_create`."""
        fd = os.memfd_create("transferd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, length)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            os.close(fd)
            raise
        return Memory(fd, "")

    def memory_register(self, memory: Memory, length: int, name: str) -> int:
        """As :meth:`Session.memory_register`."""
        self.check_open()
        shared = self._socket.request(
            attach_pb2.FdRequest(share_memory=attach_pb2.ShareMemoryRequest()), [memory.fd]
        ).share_memory
        return int(self.region_register(shared.memory_id, length, name).region)

    def region_register(self, memory_id: int, length: int, name: str) -> Any:
        """Registers memory that the daemon holds; gives its RegisterRegionResponse."""
        request = region_pb2.RegisterRegionRequest(
            memory_id=memory_id, length_bytes=length, name=name
        )
        return self.control.call(self.control.regions.RegisterRegion, request)

    def ask(
        self, message: attach_pb2.FdRequest, fds: Sequence[int] = ()
    ) -> tuple[attach_pb2.FdResponse, list[int]]:
        """Asks by the fd socket; the fds of the answer are the caller's."""
        return self._socket.exchange(message, fds)

    def gpu(self) -> Gpu:
        """As :meth:`Session.gpu`."""
        if self.gpu_or_none is None:
            from transferd.client.cuda.gpu import Gpu  # only who has GPU memory loads it

            self.check_open()
            with self._gpu_lock:
                if self.gpu_or_none is None:
                    self.gpu_or_none = Gpu(self)
        return self.gpu_or_none

    # ---- its end ----

    def _set_end(self, end: errors.Unavailable) -> None:
        if self.end is None:
            self.end = end
        lib.tfd_client_set_dead(self.client)
        if self.on_end is not None:
            self.on_end()

    def _detach(self) -> None:
        if self.end is None:
            with contextlib.suppress(errors.TransferdError):
                self._socket.request(attach_pb2.FdRequest(detach=attach_pb2.DetachRequest()))
        self._socket.close()
        lib.tfd_client_set_dead(self.client)
        if self.on_end is not None:
            self.on_end()
        self.client = ffi.NULL  # the native code answers it with -EPIPE

    def orphan(self) -> None:
        """As :meth:`Session.orphan`."""
        super().orphan()
        self.gpu_or_none = None  # its lanes write to the segment by themselves
        self.client = ffi.NULL
        self._socket.orphan()


def _session_ended(reference: weakref.ref[RingSession], end: errors.Unavailable) -> None:
    """Called by the reader of the fd socket, which must not keep the session alive."""
    session = reference()
    if session is not None:
        session._set_end(end)


def _map_revoked(reference: weakref.ref[RingSession], map_ids: Iterable[int]) -> None:
    """Called by the reader of the fd socket: an owner wants its GPU memory back."""
    session = reference()
    if session is not None and session.gpu_or_none is not None:
        for map_id in map_ids:
            session.gpu_or_none.mappings.revoke(map_id)
