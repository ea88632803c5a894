# SPDX-License-Identifier: Apache-2.0
"""What a session offers to the rest of the SDK, whichever way it speaks to the daemon.

Two kinds: :class:`transferd.client.ring.RingSession` (shared memory; microseconds) and
:class:`transferd.client.lease.LeaseSession` (gRPC only). Both have the same validation behind them.
"""

from __future__ import annotations

import abc
import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import errors, living
from transferd.client.rpc import Control, forked
from transferd.native.names import JobStatus
from transferd.v1 import mailbox_pb2, region_pb2, transfer_pb2, types_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from transferd.client.cuda.allocation import Allocation
    from transferd.client.cuda.gpu import Gpu
    from transferd.client.indices import Pages, Rows
    from transferd.client.mailbox import Inbox
    from transferd.client.plan import Launch
    from transferd.client.watcher import Trigger

OP_WRITE = 1
OP_IMM = 2
OP_ACKNOWLEDGE = 3
OP_CANCEL = 4
OP_WRITE_PAGES = 5
OP_SCATTER = 6
OP_BARRIER = 7
OP_READ = 8
OP_SEND = 9
OP_RELEASE = 10
OP_DISARM = 11
OP_LAUNCH = 12
OP_FORGET = 13
FLAG_EXACT = 1
FLAG_COUNT_JOB = 2
FLAG_CHECKSUM = 4
FLAG_ARMED = 8
FLAG_POLLED = 16
FLAG_PLAN = 32
FLAG_TABLE = 64

NS_PER_S = 1_000_000_000
IMM_COUNT = 1 << 20
LENGTH_MAX = 1 << 40  # bytes of one job, and of one page
TARGETS_MAX = 4096  # of one scatter or barrier
MESSAGE_BYTES_MAX = 8192
PAGE_BYTES = os.sysconf("SC_PAGESIZE")
DESCRIPTORS_MAX = 4096  # of one OpenDescriptors

_RIGHTS = {
    "write": types_pb2.RIGHT_WRITE,
    "read": types_pb2.RIGHT_READ,
    "map": types_pb2.RIGHT_MAP,
}

# Ends after which the handle of the destination is of no use any more; the next call opens the
# descriptor again.
_HANDLE_LOST = frozenset({"STALE", "REVOKED", "CONNECTION", "HEARTBEAT", "BAD_GRANT", "EXPIRED"})


@dataclass(frozen=True, slots=True)
class JobPath:
    """What a job really used.

    Attributes:
        provider: As in "tcp"; empty where the job ended before any.
        rails: NICs of this host that carried it.
        staged: Whether it was staged through host memory of the daemon.
        packed: Whether small pages travelled packed.
        emulated: Whether a rail that it wrote by has no RDMA write (old EFA devices): processors
            copied at both ends.
    """

    provider: str
    rails: int
    staged: bool = False
    packed: bool = False
    emulated: bool = False

    def __str__(self) -> str:
        """Says it in a line."""
        words = [self.provider or "none", f"{self.rails} rail{'' if self.rails == 1 else 's'}"]
        words += [word for word in ("staged", "packed", "emulated") if getattr(self, word)]
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended.

    Attributes:
        job_id: The job.
        status: How.
        detail: UPPER_SNAKE word that says why; empty when OK.
        bytes: Acknowledged by the far side.
        path: What it used.
        duration_ns: From its acceptance by the daemon to its end.
        submitted_ns: CLOCK_MONOTONIC when it was published; None in a session without shared
            memory, as are the next three.
        accepted_ns: When the daemon took it.
        posted_ns: When the last of it was handed to a NIC; None as well where nothing was.
        ended_ns: When it ended.
    """

    job_id: int
    status: JobStatus
    detail: str
    bytes: int
    path: JobPath
    duration_ns: int
    submitted_ns: int | None = None
    accepted_ns: int | None = None
    posted_ns: int | None = None
    ended_ns: int | None = None


class CounterView(NamedTuple):
    """A counter at one moment.

    Attributes:
        value: Landed writes.
        faults: Times that writes became untrustworthy.
        lost: Writes known lost.
        acknowledged: Faults that the owner has acknowledged.
    """

    value: int
    faults: int
    lost: int
    acknowledged: int


# A destination of a scatter or barrier: descriptor, src_offset, dst_offset, length. Plain, as there
# are many.
Target = tuple[bytes, int, int, int]


class Request(NamedTuple):
    """One job of a batch; the first nine in the order of :meth:`Session.submit`'s arguments."""

    op: int
    priority: int
    imm: int
    region: int
    src_offset: int
    dst: bytes
    dst_offset: int
    length: int
    deadline_ns: int
    flags: int = 0
    pages: Pages | None = None
    targets: tuple[Target, ...] | None = None
    data: bytes | None = None
    trigger: Trigger | None = None
    rows: Rows | None = None
    launch: Launch | None = None
    source: Allocation | None = None  # where the region is GPU memory
    stream: Any = None  # of the caller's, to copy it

    @property
    def plain(self) -> bool:
        """Whether :meth:`Session.submit` can take it."""
        return not self.flags and self[10:] == _PLAIN

    @property
    def destinations(self) -> tuple[bytes, ...]:
        """The descriptors that it uses."""
        if self.rows is not None:
            return self.rows.members
        return (self.dst,) if self.targets is None else tuple(t[0] for t in self.targets)

    @property
    def key(self) -> bytes | tuple[bytes, ...]:
        """What its job remembers of them."""
        if self.launch is not None:
            return self.launch.key
        return self.dst if self.targets is None and self.rows is None else self.destinations

    @property
    def table_count(self) -> int:
        """Entries of its table."""
        if self.pages is not None:
            return self.pages.src.count
        if self.data is not None:
            return len(self.data)
        if self.rows is not None:
            return self.rows.numbers.count
        return 0 if self.targets is None else len(self.targets)


_PLAIN = (None,) * (len(Request._fields) - 10)  # what follows the flags of a plain one


class Memory(NamedTuple):
    """Memory that can be registered: an fd, and the name of its POSIX object if it has one."""

    fd: int
    shm_name: str


def to_ns(timeout_s: float | None) -> int:
    """Turns a bound in seconds into ns, none into -1."""
    return -1 if timeout_s is None else max(0, int(timeout_s * NS_PER_S))


def no_region(name: str, value: object) -> errors.InvalidRequest:
    """Makes the error for memory that is no region."""
    return errors.InvalidRequest(
        f"{name} is a region, or a part of one as region[0:4096], not {type(value).__name__}; "
        "alloc() and register() make regions"
    )


def to_handle(name: str, value: Any) -> int:
    """Checks memory of a job's; gives its region's handle."""
    try:
        handle: int = value.open_handle()
    except AttributeError:
        raise no_region(name, value) from None
    return handle


def to_descriptor(value: object) -> bytes:
    """Checks a destination."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise errors.InvalidRequest(
        f"a destination is the bytes of a grant's descriptor, not {type(value).__name__}"
    )


class Session(abc.ABC):
    """One attachment to a daemon. Safe to use from several threads."""

    shared_memory: bool
    batch_limit: int  # jobs that one submit takes as a whole
    table_limit: int  # bytes of tables that one submit takes as a whole
    provider: str  # for people
    gpu_or_none: Gpu | None = None  # what gpu() has made
    event_fd: int | None = None  # signalled after ends and counts while watch_events is on

    def __init__(self, control: Control, session_id: int) -> None:
        self.control = control
        self.session_id = session_id
        self.handles: dict[bytes, int] = {}  # descriptor -> handle; read without the lock
        self.lengths: dict[bytes, int] = {}  # descriptor -> bytes of its grant
        self.slots: dict[int, int] = {}  # immediate -> slot of its counter
        self.closed = False
        self.end: errors.Unavailable | None = None
        self.on_end: Callable[[], None] | None = None
        # Guards writes to handles, lengths, _dropped and _suspects, and the closing.
        self._lock = threading.Lock()
        self._dropped: list[int] = []
        self._suspects: dict[bytes, int] = {}
        living.add(self)

    # ---- jobs ----

    @abc.abstractmethod
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
        """Submits one job; waits while there is no room. The deadline counts from now; 0: none.

        Returns:
            The job's id.
        """

    @abc.abstractmethod
    def submit_many(self, requests: Sequence[Request], timeout_s: float | None) -> list[int]:
        """Submits at most ``batch_limit`` jobs, all or none; see :meth:`parts`."""

    @abc.abstractmethod
    def table_bytes(self, request: Request) -> int:
        """What its table takes of ``table_limit``."""

    def _check_owners(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.trigger is not None:
                request.trigger.watcher.check(self)
            if request.launch is not None:
                request.launch.plan.check(self)

    def parts(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Cuts a batch into what :meth:`submit_many` takes.

        Raises:
            InvalidRequest: The table of one job alone is too large, or a watcher or plan is another
                Client's; raised before the first part.
            Conflict: A watcher or plan was closed.
        """
        self._check_owners(requests)
        if len(requests) == 1:
            request = requests[0]
            listed = request.pages or request.targets or request.rows
            if listed and self.table_bytes(request) > self.table_limit:
                raise self.table_too_large(request)
            yield requests
            return
        if any(r.source is not None for r in requests):
            # What a stream copies is submitted by itself.
            for copied, group in itertools.groupby(requests, lambda r: r.source is not None):
                run = list(group)
                for part in ([r] for r in run) if copied else (run,):
                    yield from self.parts(part)
            return
        if not any(r.pages or r.targets or r.rows for r in requests):
            for first in range(0, len(requests), self.batch_limit):
                yield requests[first : first + self.batch_limit]
            return
        sizes = [self.table_bytes(request) for request in requests]
        for request, size in zip(requests, sizes, strict=True):
            if size > self.table_limit:
                raise self.table_too_large(request)
        first = total = 0
        for i, size in enumerate(sizes):
            if i - first == self.batch_limit or total + size > self.table_limit:
                yield requests[first:i]
                first, total = i, 0
            total += size
        if first < len(requests):
            yield requests[first:]

    def table_too_large(self, request: Request) -> errors.InvalidRequest:
        """Makes the error for a table that never has room."""
        each = self.table_bytes(request) // request.table_count
        return errors.InvalidRequest(
            f"the table of {request.table_count} entries has no room in this session: a job has at "
            f"most {self.table_limit // each}; use several jobs"
            f"{', or raise limits.arena of the daemon' if self.shared_memory else ''}",
            reason="TABLE",
        )

    @abc.abstractmethod
    def job_wait(self, job_id: int, timeout_s: float | None) -> Any:
        """Waits for a job's end; None: it was released by another thread.

        Returns:
            Something with the attributes ``status`` and ``bytes``, for :meth:`decode`.
        """

    @abc.abstractmethod
    def job_poll(self, job_id: int) -> Any:
        """As :meth:`job_wait`, but does not wait: None while it runs."""

    @abc.abstractmethod
    def decode(self, job_id: int, raw: Any) -> JobResult:
        """Makes the public result of what wait and poll gave."""

    @abc.abstractmethod
    def job_cancel(self, job_id: int) -> None:
        """Asks to stop a job. Its end, once it is quiet, is told by wait and poll."""

    @abc.abstractmethod
    def job_release(self, job_id: int) -> None:
        """Says that nobody will ask for this job's end any more. Never fails."""

    # ---- counters ----

    @abc.abstractmethod
    def counter_read(self, imm: int) -> CounterView:
        """Reads a counter that exists."""

    @abc.abstractmethod
    def counter_wait(self, imm: int, target: int, timeout_s: float | None) -> None:
        """Waits for a target; raises CounterFault, WaitTimeout, Unavailable."""

    @abc.abstractmethod
    def counter_acknowledge(self, imm: int) -> None:
        """Takes the faults of a counter as seen."""

    def watch_events(self, watched: bool) -> None:
        """Has the daemon signal ``event_fd`` after every end and count, or not."""
        del watched  # nothing to tell where there is no such fd

    # ---- mailboxes ----

    @abc.abstractmethod
    def inbox(self, slots: int, slot_bytes: int) -> Inbox:
        """Makes a mailbox, and how its messages come."""

    def mailbox_create(self, slots: int, slot_bytes: int, region: int) -> Any:
        """Makes a mailbox in a region; 0: in memory of the daemon's."""
        return self.control.call(
            self.control.mailboxes.CreateMailbox,
            mailbox_pb2.CreateMailboxRequest(slots=slots, slot_bytes=slot_bytes, region=region),
        )

    def mailbox_close(self, mailbox: int) -> None:
        """Ends a mailbox; answers when nobody sends to it any more."""
        self.control.call(
            self.control.mailboxes.CloseMailbox, mailbox_pb2.CloseMailboxRequest(mailbox=mailbox)
        )

    # ---- memory ----

    @abc.abstractmethod
    def memory_create(self, length: int) -> Memory:
        """Makes memory of whole pages that the daemon will take."""

    @abc.abstractmethod
    def memory_register(self, memory: Memory, length: int, name: str) -> int:
        """Registers it; returns the region's handle. Consumes the memory's name, not its fd."""

    def gpu(self) -> Gpu:
        """What the session has of GPUs, made on first use: Unavailable where there is no driver."""
        raise errors.Conflict(
            "GPU memory needs the daemon's Unix socket: attach without shared_memory=False",
            reason="NO_SHARED_MEMORY",
        )

    def landed(self) -> None:
        """A count was waited for: what a NIC has written into GPU memory is visible afterwards."""
        gpu = self.gpu_or_none
        if gpu is not None and gpu.flusher.devices:
            gpu.flusher.host()
            gpu.relays.look()

    @abc.abstractmethod
    def _detach(self) -> None:
        """Ends the session at the daemon, without raising."""

    # ---- common ----

    def counter_open(self, imm: int) -> None:
        """Sees to it that an immediate has a counter."""
        if imm not in self.slots:
            state = self.control.call(
                self.control.transfers.GetCounter, transfer_pb2.GetCounterRequest(imm=imm)
            ).counter
            self.slots[imm] = state.slot

    def open(self, descriptor: bytes) -> int:
        """Opens a descriptor, or finds it opened; returns its handle."""
        return self.open_many([descriptor])[0]

    def open_many(self, descriptors: Iterable[bytes]) -> list[int]:
        """Opens descriptors, those that are not open already, in as few calls as possible."""
        wanted = [to_descriptor(d) for d in descriptors]
        missing = list(dict.fromkeys(d for d in wanted if d not in self.handles))
        for first in range(0, len(missing), DESCRIPTORS_MAX):
            part = missing[first : first + DESCRIPTORS_MAX]
            response = self.control.call(
                self.control.regions.OpenDescriptors,
                region_pb2.OpenDescriptorsRequest(descriptors=part),
            )
            with self._lock:
                for descriptor, grant in zip(part, response.grants, strict=True):
                    self.handles[descriptor] = grant.handle
                    self.lengths[descriptor] = grant.length_bytes
                    suspect = self._suspects.pop(descriptor, grant.handle)
                    if suspect != grant.handle:
                        self._dropped.append(suspect)
        self._close_dropped()
        try:
            return [self.handles[d] for d in wanted]
        except KeyError:  # another thread found one of them lost meanwhile
            raise errors.PeerLost("a descriptor was lost while it was opened; try again") from None

    def note_end(
        self, result: JobResult, descriptor: bytes | tuple[bytes, ...], handle: int
    ) -> None:
        """Forgets the handle of a destination that a job found lost.

        It is asked for anew, and the daemon answers with the same handle if it is still good: then
        the job was lost with one path of several. Of several destinations nobody tells which it
        was.
        """
        if result.status is not JobStatus.PEER_LOST and result.detail not in _HANDLE_LOST:
            return
        with self._lock:
            if isinstance(descriptor, tuple):
                for one in descriptor:
                    if one in self.handles:
                        self._suspects[one] = self.handles.pop(one)
                return
            if self.handles.get(descriptor) == handle:
                self._suspects[descriptor] = self.handles.pop(descriptor)

    def _close_dropped(self) -> None:
        """Gives lost handles back to the daemon; after an open, so that no job waits for it."""
        with self._lock:
            dropped, self._dropped = self._dropped, []
        for handle in dropped:
            try:
                self.control.call(
                    self.control.regions.CloseDescriptor,
                    region_pb2.CloseDescriptorRequest(handle=handle),
                )
            except (errors.NotFound, errors.Conflict):
                continue  # gone already, or still busy: it ends with the session

    def region_remove(self, region: int) -> None:
        """Deregisters a region; answers when no byte can land in it any more."""
        self.control.call(
            self.control.regions.DeregisterRegion, region_pb2.DeregisterRegionRequest(region=region)
        )

    def grant_create(
        self,
        region: int,
        offset: int,
        length: int,
        rights: Iterable[str],
        imms: range,
        expires_ms: int,
    ) -> tuple[int, bytes]:
        """Makes a grant; returns its number and descriptor."""
        response = self.control.call(
            self.control.regions.CreateGrant,
            region_pb2.CreateGrantRequest(
                region=region,
                offset_bytes=offset,
                length_bytes=length,
                rights=[_RIGHTS[right] for right in sorted(rights)],
                imm_first=imms.start if imms else 0,
                imm_count=len(imms),
                expires_ms=expires_ms,
            ),
        )
        self.slots.update(zip(imms, response.counter_slots, strict=False))
        return response.grant_id, response.descriptor

    def grant_revoke(self, grant_id: int) -> None:
        """Takes a grant back; answers when no byte can land by it any more."""
        self.control.call(
            self.control.regions.RevokeGrant, region_pb2.RevokeGrantRequest(grant_id=grant_id)
        )

    def grant_fence(self, grant_id: int, imms: Sequence[range]) -> None:
        """Fences immediates; answers when nothing submitted on them before can land any more."""
        parts = [region_pb2.ImmRange(first=part.start, count=len(part)) for part in imms]
        self.control.call(
            self.control.regions.FenceGrant,
            region_pb2.FenceGrantRequest(grant_id=grant_id, imms=parts),
        )

    def over(self) -> errors.Unavailable:
        """Makes the error for a session that has ended."""
        if self.control.orphaned:
            return forked()
        if self.closed:
            return errors.Unavailable("the Client is closed", reason="CLOSED")
        if self.end is not None:
            return errors.Unavailable(str(self.end), reason=self.end.reason)
        return errors.Unavailable(
            f"the daemon at {self.control.address} ended the session", reason="SESSION_ENDED"
        )

    def check_open(self) -> None:
        """Raises unless the session lives, as far as this process knows."""
        if self.closed or self.end is not None or self.control.orphaned:
            raise self.over()

    def close(self) -> None:
        """Ends the session. Idempotent; every waiting thread gets Unavailable."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        if not self.control.orphaned:
            if self.gpu_or_none is not None:
                self.gpu_or_none.close()  # while the daemon still answers
            self._detach()
            self.control.close()

    def close_events(self) -> None:
        """Closes ``event_fd``, after whoever reads it has stopped. Idempotent."""
        fd, self.event_fd = self.event_fd, None
        if fd is not None:
            os.close(fd)

    def orphan(self) -> None:
        """Makes the session unusable in a forked child; the parent's goes on."""
        self.control.orphaned = True
