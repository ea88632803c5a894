# SPDX-License-Identifier: Apache-2.0
"""The calls of a blocking Client for operations with tables, for reading, and for messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transferd.client.job import PRIORITIES, Job, to_deadline_ns
from transferd.client.mailbox import Mailbox, Send, open_inbox
from transferd.client.operations import (
    COUNTS,
    Barrier,
    PeerGroup,
    Read,
    Scatter,
    open_group,
    pages_request,
)
from transferd.client.plan import Plan, keep
from transferd.client.session import FLAG_CHECKSUM, FLAG_EXACT
from transferd.client.watcher import Armed, Watcher, take_watcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.client.events import Driver
    from transferd.client.memory import Region, RegionSlice
    from transferd.client.operations import Operation
    from transferd.client.session import Request, Session


class Calls:
    """What :class:`transferd.Client` inherits. Errors are those of ``write``, and more."""

    _session: Session
    _driver: Driver

    def _submit(self, requests: Sequence[Request], timeout_s: float | None) -> list[Job]:
        """Submits what one call of the session takes."""
        ids = self._session.submit_many(requests, timeout_s)
        return [
            Job(self._session, self._driver, job_id, request.key)
            for job_id, request in zip(ids, requests, strict=True)
        ]

    def _submit_one(self, request: Request, timeout_s: float | None) -> Job:
        (part,) = self._session.parts([request])
        return self._submit(part, timeout_s)[0]

    def write_pages(
        self,
        src: Region | RegionSlice,
        src_pages: Any,
        dst: bytes,
        dst_pages: Any,
        page_bytes: int,
        *,
        imm: int,
        src_stride: int | None = None,
        dst_stride: int | None = None,
        src_offset: int = 0,
        dst_offset: int = 0,
        count: str = "page",
        exact: bool = False,
        checksum: bool = False,
        priority: str = "bulk",
        deadline_s: float | None = None,
        stream: Any = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Writes pages of a region to pages of a grant, and counts them on the immediate there.

        Page ``i`` lies at ``src_offset + src_pages[i] * src_stride`` in ``src`` and goes to
        ``dst_offset + dst_pages[i] * dst_stride`` in the grant. All indices are checked before
        anything is sent. The arrays are copied before this returns. Destinations may overlap: which
        page's bytes are there in the end is not told then. Without pages the job ends at once.

        Args:
            src: ``region`` or ``region[a:b]``; must stay as it is until the job has ended.
            src_pages: Indices: a list, or an array, tensor (CPU) or buffer of int32, int64, uint32
                or uint64.
            dst: Descriptor.
            dst_pages: Indices, as many.
            page_bytes: Of each page.
            imm: Immediate, inside the grant.
            src_stride: Bytes from one page to the next; None: page_bytes.
            dst_stride: The same in the grant.
            src_offset: Where page 0 begins, in ``src``.
            dst_offset: Where page 0 begins, in the grant.
            count: "page": 1 for each page, nothing without pages; "job": 1 in all.
            exact: As for :meth:`write`.
            checksum: As for :meth:`write`.
            priority: "bulk" or "latency".
            deadline_s: The job ends with DEADLINE after this long.
            stream: With GPU memory of this host at both ends: the CUDA stream that copies, as a
                number or of torch, cupy, cuda.core; None: one of the Client's own, which waits for
                no other: the source has to be ready.
            timeout_s: How long to wait for room; None: as long as it takes.

        Raises:
            InvalidRequest: A value is out of range; the message names the index. TABLE: more
                pages than the session has room for; use several jobs.
        """
        source = getattr(src, "source", None)
        plain = type(dst) is bytes and type(priority) is type(count) is str
        if source is not None and plain and not checksum:
            src.open_handle()
            job_id = self._session.gpu().copier.pages(
                source,
                src,
                (src_pages, dst_pages),
                dst,
                page_bytes,
                imm,
                (src_stride, dst_stride),
                (src_offset, dst_offset),
                COUNTS.get(count),
                PRIORITIES.get(priority),
                0 if deadline_s is None else to_deadline_ns(deadline_s),
                stream,
                timeout_s,
            )
            if job_id:
                return Job(self._session, self._driver, job_id, dst)
        # Not by way of a WritePages: making one would take a third of the time until here.
        request = pages_request(
            src,
            src_pages,
            dst,
            dst_pages,
            page_bytes,
            imm,
            (src_stride, dst_stride),
            (src_offset, dst_offset),
            count,
            (FLAG_EXACT if exact else 0) | (FLAG_CHECKSUM if checksum else 0),
            priority,
            deadline_s,
            stream,
        )
        return self._submit_one(request, timeout_s)

    def peer_group(self, descriptors: Sequence[bytes]) -> PeerGroup:
        """Opens descriptors and connects to their owners, for scatters and barriers.

        Returns:
            The group, in the order given.

        Raises:
            StaleDescriptor, AccessDenied, PeerLost, Conflict: One of them cannot be opened.
        """
        return open_group(self._session, descriptors)

    def scatter(
        self,
        src: Region | RegionSlice,
        targets: Any,
        *,
        imm: int,
        group: PeerGroup | None = None,
        checksum: bool = False,
        priority: str = "bulk",
        deadline_s: float | None = None,
        stream: Any = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Writes parts of a region into several grants; counts 1 on the immediate at each.

        All targets are checked before anything is sent: with one that is wrong, nothing is. One
        that fails later leaves the others alone; the job ends as the first that failed.

        Args:
            src: ``region`` or ``region[a:b]``; must stay as it is until the job has ended.
            targets: At most 4,096 of (descriptor, or index into ``group``; src_offset; dst_offset;
                length). 0 is a legal length, which counts. Or an array of shape (n, 4) of integers
                of 32 or 64 bits: the same, with indices into ``group``.
            imm: Immediate, inside every grant.
            group: What indices refer to.
            checksum: As for :meth:`write`; a target that differs leaves the others alone.
            priority: "bulk" or "latency".
            deadline_s: The job ends with DEADLINE after this long.
            stream: As for :meth:`write_pages`.
            timeout_s: How long to wait for room; None: as long as it takes.
        """
        spec = Scatter(
            src=src,
            targets=targets,
            imm=imm,
            group=group,
            checksum=checksum,
            priority=priority,
            deadline_s=deadline_s,
            stream=stream,
        )
        return self._submit_one(spec.request(), timeout_s)

    def barrier(
        self,
        group: PeerGroup | Sequence[bytes],
        *,
        imm: int,
        priority: str = "bulk",
        deadline_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Counts 1 on the immediate at every member; otherwise as a scatter without bytes.

        A member waits for the number of members that call it. Nothing orders it behind other jobs:
        wait for those whose data it announces.
        """
        spec = Barrier(group=group, imm=imm, priority=priority, deadline_s=deadline_s)
        return self._submit_one(spec.request(), timeout_s)

    def read(
        self,
        src: bytes,
        dst: Region | RegionSlice,
        src_offset: int = 0,
        *,
        priority: str = "bulk",
        deadline_s: float | None = None,
        stream: Any = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Reads from a grant with the right "read" into a region, or part of one. Counts nowhere.

        Args:
            src: Descriptor.
            dst: ``region`` or ``region[a:b]``; its bytes are there once the job has ended OK.
            src_offset: Bytes into the granted range.
            priority: "bulk" or "latency".
            deadline_s: The job ends with DEADLINE after this long.
            stream: As for :meth:`write_pages`.
            timeout_s: How long to wait for room; None: as long as it takes.
        """
        spec = Read(
            src=src,
            dst=dst,
            src_offset=src_offset,
            priority=priority,
            deadline_s=deadline_s,
            stream=stream,
        )
        return self._submit_one(spec.request(), timeout_s)

    def mailbox(self, slots: int = 64, slot_bytes: int = 4096) -> Mailbox:
        """Makes a mailbox, for messages of all who hold its descriptor.

        Args:
            slots: Messages that it holds; the senders of more wait.
            slot_bytes: Of the longest message; at most 8,192.

        Raises:
            InvalidRequest: A value is out of range.
            QuotaExceeded: No room for its memory, its counter or its grant.
        """
        return Mailbox(open_inbox(self._session, slots, slot_bytes), slots, slot_bytes)

    def send(
        self,
        dst: bytes,
        data: Any,
        *,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Sends a message to a mailbox; it arrives as a whole, once or not at all.

        The data is copied before this returns. While the mailbox is full the job waits. OK: it is
        in the mailbox. PEER_LOST: its connection was lost, and it may be there or not. No order is
        kept, not even between the messages of one sender.

        Args:
            dst: Descriptor of the mailbox.
            data: Bytes, or what has a buffer of them; at most the mailbox's slot_bytes.
            deadline_s: The job ends with DEADLINE after this long; it is not delivered then.
            timeout_s: How long to wait for room in the session; None: as long as it takes.

        Raises:
            InvalidRequest: It is no bytes, or longer than any message.
        """
        spec = Send(dst=dst, data=data, deadline_s=deadline_s)
        return self._submit_one(spec.request(), timeout_s)

    def watcher(self, *, device: bool = False) -> Watcher:
        """Takes a watcher: a word that starts at 0, for :meth:`arm`.

        Args:
            device: A kernel of a device bumps it, whose stores wake nobody: while jobs are armed on
                it the daemon's worker polls, a processor's time for a second after it has last had
                anything to do, and every millisecond from then on.

        Raises:
            Conflict: NO_SHARED_MEMORY: the session goes over gRPC.
            QuotaExceeded: WATCHERS: all are taken.
        """
        return Watcher(self._session, take_watcher(self._session), device)

    def arm(
        self, watcher: Watcher, value: int, job: Operation, *, timeout_s: float | None = None
    ) -> Job:
        """Submits a job that starts by itself once a watcher has reached a value.

        It is checked now, and is in flight from now on: its deadline counts, it can be cancelled,
        revoked and fenced, and its region cannot be closed. What it reads from is read when it
        starts. Its record is taken: at most 7/8 of the session's can be; a job beyond them ends as
        QUOTA.

        Args:
            watcher: Of :meth:`watcher`.
            value: The job starts when ``watcher.value >= value``; at once, if it is.
            job: :class:`transferd.Write`, or any other member of a batch (:meth:`submit` takes
                :class:`transferd.Armed` as well); a plan is one launch of it, which reads its table
                when it starts.
            timeout_s: How long to wait for room in the ring; None: as long as it takes.

        Raises:
            InvalidRequest: A value is out of range, or the watcher is another Client's.
            Conflict: The watcher is closed.
        """
        spec = Armed(watcher=watcher, value=value, job=job)
        return self._submit_one(spec.request(), timeout_s)

    def plan(self, job: Operation, *, table: bool = False, timeout_s: float | None = None) -> Plan:
        """Has the daemon check a job and keep it, to be launched by one ring entry each time.

        Destinations, bounds and immediate are kept in the daemon's memory. Each launch looks again
        at what may have changed: a grant that was revoked, or has expired, ends it. Of GPU memory
        of this host at both ends a stream copies for each launch, and reads the rows: a kernel may
        fill ``plan.device_ptr`` and bump the watcher that a launch is armed on.

        Args:
            job: :class:`transferd.Write`, ``WritePages``, ``Scatter``, ``Barrier``, ``Imm`` or
                ``Read``; it is not submitted. Its ``deadline_s`` counts from each launch.
            table: Write, WritePages, Scatter: sizes and offsets are rows of ``plan.table``, in
                shared memory, which each launch reads and checks; as many rows as the job has
                targets or pages. A plan of pages has one in any case.
            timeout_s: How long to wait for room in the ring and the arena; None: as long as it
                takes.

        Raises:
            InvalidRequest: It cannot be kept, or has a value that is out of range.
            Conflict: NO_SHARED_MEMORY: the session goes over gRPC.
            QuotaExceeded: PLANS: the session has all that it may have.
            JobFailed: The daemon refused it; also of the class that fits.
        """
        return Plan(keep(self._session, job, table, timeout_s), self._driver)
