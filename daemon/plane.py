# SPDX-License-Identifier: Apache-2.0
"""What the control plane asks of the data plane: values and one protocol, without any native code.

:mod:`transferd.daemon.dataplane` is the implementation; tests bring one that lives in memory.
Methods that are coroutines may take long and run on the control executor; the others answer in
microseconds.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMM_COUNT = 1 << 20
MAX_LENGTH = 1 << 40
MAX_TARGETS = 4096  # of one scatter or barrier
MAX_PATHS = 16  # of a lane
MAX_PARTS = 8  # that a write is cut into: more rails of NICs would carry nothing at once
ADDRESS_MAX = 256  # bytes of the address of half a connection
MAILBOX_SLOTS_MAX = 65_536
MESSAGE_BYTES_MAX = 8192
LINE_BYTES = 64
LETTER_BYTES = 16
CHANNELS_MAX = 3  # of a connection: TFD_CHANNELS_MAX
STAGE_TO_HOST, STAGE_TO_GPU = 0, 1  # TFD_STAGE_D2H, TFD_STAGE_H2D
ABI_VERSION = 1

Landed = tuple[int, ...]  # how many immediates came by each channel of a connection, from its first


class PlaneError(Exception):
    """A native call failed.

    Attributes:
        errno: Positive error number.
        text: One sentence for people.
    """

    def __init__(self, errno: int, text: str) -> None:
        super().__init__(text)
        self.errno = errno
        self.text = text


class EventType(enum.IntEnum):
    """enum tfd_event_type."""

    NONE = 0
    SESSION_BROKEN = 1
    SESSION_QUIET = 2
    OPEN_QUIET = 3
    CONN_LOST = 4
    PEER_SILENT = 5
    LOST = 6
    REGION_BROKEN = 7
    FENCE_QUIET = 8
    CONN_PROVEN = 9
    RAIL_STATE = 10
    STAGE_NEEDED = 11
    STAGE_SILENT = 12


class RailState(enum.IntEnum):
    """enum tfd_rail_state."""

    UP = 1
    DOWN = 2
    GONE = 3


class Op(enum.IntEnum):
    """TFD_OP_*."""

    WRITE = 1
    IMM = 2
    ACKNOWLEDGE = 3
    CANCEL = 4
    WRITE_PAGES = 5
    SCATTER = 6
    BARRIER = 7
    READ = 8
    SEND = 9
    RELEASE = 10


class Flag(enum.IntFlag):
    """TFD_FLAG_*."""

    EXACT = 1
    COUNT_JOB = 2
    CHECKSUM = 4


class Detail(enum.IntEnum):
    """The words of enum tfd_detail that the control plane itself uses."""

    NONE = 0
    BAD_GRANT = 5
    EXPIRED = 9
    REVOKED = 10
    STALE = 11
    PROVIDER = 15
    HEARTBEAT = 16
    CONNECTION = 17
    SESSION_ENDED = 20
    DEVICE_MEMORY = 29
    STILL_COPIED = 31
    STAGING = 32


class Priority(enum.IntEnum):
    """TFD_PRIORITY_*."""

    BULK = 0
    LATENCY = 1


PROVIDERS = {
    1: "libfabric",
    2: "local",
    3: "sim",
    4: "tcp",
    5: "verbs",
    6: "cuda",
    7: "staged",
}  # TFD_PATH_*
PATH_PACKED = 1 << 16  # TFD_PATH_PACKED
PATH_EMULATED = 1 << 17  # TFD_PATH_EMULATED
STATUS_PENDING = 0
STATUS_OK = 1


@dataclass(frozen=True, slots=True)
class Event:
    """struct tfd_event."""

    type: int
    detail: int
    id: int
    imm: int
    count: int
    session: int = 0
    units: int = 0


@dataclass(frozen=True, slots=True)
class RailInfo:
    """struct tfd_rail_info."""

    name: str
    provider: str
    protocol: str
    max_message_bytes: int
    bytes_sent: int
    writes_sent: int
    imms_received: int
    errors: int
    ordered: bool
    state: RailState
    credit_stalls: int = 0
    credit_floods: int = 0
    why: str = ""

    @property
    def up(self) -> bool:
        """Whether it carries anything now."""
        return self.state is RailState.UP


@dataclass(frozen=True, slots=True)
class VerbsOptions:
    """struct tfd_verbs_options; gid_index None: by the provider's rule."""

    port: int = 0
    gid_index: int | None = None
    link_local: bool = False
    pkey: int = 0
    service_level: int = 0
    bulk_service_level: int = 0
    traffic_class: int = 0
    mtu: int = 0
    timeout: int = 0
    retries: int = 0
    plain_posts: bool = False


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """struct tfd_group_options."""

    provider: str
    fabric: str = ""
    rails: tuple[str, ...] = ()
    with_local: bool = False
    segment_bytes: int = 0
    window_bytes: int = 0
    copy_threads: int = 0
    library: str = ""
    verbs: VerbsOptions = VerbsOptions()
    staging_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """struct tfd_session_options."""

    group: int
    ring_entries: int
    record_count: int
    counter_count: int
    watcher_count: int
    plan_count: int
    arena_bytes: int
    session_id: int
    weight: int


@dataclass(frozen=True, slots=True)
class SessionFds:
    """struct tfd_session_fds; whoever holds it closes them."""

    segment: int
    doorbell: int
    event: int


@dataclass(frozen=True, slots=True)
class StageFds:
    """struct tfd_stage_fds; whoever holds it closes them."""

    ring: int
    pool: int
    wake: int

    def close(self) -> None:
        """Closes all of them."""
        for fd in (self.ring, self.pool, self.wake):
            os.close(fd)


class StageStat(NamedTuple):
    """struct tfd_stage_info, without what is of the moment: copies to the host, and from it."""

    copies_out: int = 0
    bytes_out: int = 0
    copies_in: int = 0
    bytes_in: int = 0
    failed: int = 0

    def plus(self, other: StageStat) -> StageStat:
        """Adds up."""
        return StageStat(*map(sum, zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class SessionStat:
    """struct tfd_session_info."""

    jobs_ended: int
    jobs_failed: int
    jobs_in_flight: int
    bytes_sent: int
    imms_received: int


@dataclass(frozen=True, slots=True)
class RegionKey:
    """struct tfd_region_key."""

    key: int
    address: int


@dataclass(frozen=True, slots=True)
class OpenPath:
    """struct tfd_open_path."""

    conn: int
    key: int
    address: int


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """struct tfd_open_options."""

    paths: tuple[OpenPath, ...]
    rights: int
    length: int
    imm_first: int
    imm_count: int
    name_space: int
    expires_ns: int
    device: bool = False
    unreached: Detail = Detail.DEVICE_MEMORY


class Entry(NamedTuple):
    """What Submit puts into a struct tfd_entry."""

    op: int
    priority: int = 0
    src_region: int = 0
    src_offset: int = 0
    dst_grant: int = 0
    dst_offset: int = 0
    length: int = 0
    imm: int = 0
    deadline_ns: int = 0
    argument: int = 0
    flags: int = 0
    table_offset: int = 0
    table_count: int = 0
    src_stride: int = 0
    dst_stride: int = 0


class Target(NamedTuple):
    """struct tfd_target."""

    dst_grant: int
    src_offset: int
    dst_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class MailboxInfo:
    """struct tfd_mailbox_info."""

    mailbox: int
    counter: int
    first: int


def mailbox_bytes(slots: int, slot_bytes: int) -> int:
    """TFD_MAILBOX_BYTES: what a mailbox takes of its region."""
    letters = -(-slots * LETTER_BYTES // LINE_BYTES) * LINE_BYTES
    return letters + slots * (-(-slot_bytes // LINE_BYTES) * LINE_BYTES)


@dataclass(frozen=True, slots=True)
class JobInfo:
    """struct tfd_job_info."""

    session: int
    job_id: int
    open: int
    length: int
    acknowledged: int
    age_ns: int
    op: int
    imm: int
    status: int
    priority: int


@dataclass(frozen=True, slots=True)
class JobEnd:
    """struct tfd_job_end."""

    job_id: int
    status: int
    detail: int
    bytes: int
    accepted_ns: int
    ended_ns: int
    path: int


@dataclass(frozen=True, slots=True)
class CounterState:
    """struct tfd_counter_state."""

    value: int
    faults: int
    lost: int
    acknowledged: int


class Plane(Protocol):
    """The data plane as the control plane sees it. Every method may raise PlaneError."""

    rails: list[RailInfo]
    warnings: list[str]

    def set_handler(self, handler: Callable[[Event], None]) -> None:
        """Tells who gets the events; called from the event loop."""

    async def open_group(self, options: GroupOptions) -> int:
        """Opens a domain group; returns its number."""

    def rail_stats(self) -> list[RailInfo]:
        """Reads the rails with their counts."""

    async def session_open(self, options: SessionOptions) -> tuple[int, SessionFds]:
        """Makes a session; returns its handle and the fds to hand over."""

    def session_sealed(self, session: int) -> None:
        """The client has mapped the segment."""

    def session_end(self, session: int, detail: int) -> None:
        """Stops a session; SESSION_QUIET follows."""

    async def session_close(self, session: int) -> None:
        """Frees a quiet session."""

    def session_name_space(self, session: int) -> int:
        """Its name space on the wire."""

    def session_stat(self, session: int) -> SessionStat:
        """Its counts."""

    def session_watch_fd(self, session: int) -> int:
        """The eventfd that tells of ended jobs and counts; the core's."""

    def jobs(self, session: int, limit: int) -> list[JobInfo]:
        """Jobs in flight of a session, at most `limit`."""

    def counters_add(self, session: int, first: int, count: int) -> list[int]:
        """Gives counters to immediates; returns their slots."""

    def counter_slot(self, session: int, imm: int) -> int:
        """The slot of an immediate's counter."""

    def counters_fault(
        self, session: int, first: int, count: int, lost: int, units: int = 0, peer: int = 0
    ) -> None:
        """Faults counters; `units` eighths that `peer` has landed are taken out of the sum."""

    def counters_settle(self, peer: int) -> None:
        """A peer is gone: parts of writes that it has not completed are taken out of all counts."""

    def counter_read(self, session: int, imm: int) -> CounterState:
        """Reads a counter."""

    async def region_add(
        self,
        session: int,
        fd: int,
        offset: int,
        length: int,
        *,
        writable: bool,
        address: int = 0,
        memory: int = 0,
    ) -> int:
        """Registers memory; returns the region's handle.

        Args:
            session: Whose.
            fd: The file; of a device's memory its dma-buf, or -1.
            offset: Bytes into it.
            length: Bytes.
            writable: Others may write to it.
            address: Not 0: memory of a device, which its owner has there.
            memory: Not 0: by this number of its allocation copies of staged rails name it.
        """

    def dmabuf_size(self, fd: int) -> int:
        """Tells the size of a dma-buf; PlaneError: the fd is none."""

    async def region_remove(self, session: int, region: int) -> None:
        """Deregisters memory."""

    async def stage_open(self) -> tuple[int, StageFds]:
        """Makes the rings of a helper that is to be started; returns their name, and the fds."""

    async def stage_close(self, stage: int) -> None:
        """A helper has ended: what is under way there fails."""

    def stage_memory_set(self, memory: int, stage: int) -> None:
        """A helper has an allocation open."""

    def stage_memory_fail(self, memory: int) -> None:
        """No helper can open it: what waits for that fails."""

    def stage_memory_forget(self, memory: int) -> None:
        """No region names it any more."""

    def stage_stat(self, stage: int) -> StageStat:
        """Counts a helper's copies."""

    def region_keys(self, session: int, region: int) -> list[RegionKey]:
        """One key for each rail."""

    async def conn_open(self, rail: int, peer: int, *, outgoing: bool) -> tuple[int, bytes]:
        """Makes half a connection with a peer; returns its handle and fabric address.

        Raises:
            PlaneError: ENETDOWN, ENODEV: the rail carries nothing now, or no more.
        """

    async def conn_start(self, conn: int, address: bytes) -> None:
        """Joins it to the other half."""

    async def conn_close(
        self, conn: int, detail: int, far_landed: Landed | None = None
    ) -> Landed | None:
        """Destroys it; nothing of it is in flight afterwards. No error if it is gone.

        It takes as long as a GPU's helper copies for it, at the longest until its stage is closed.

        Args:
            conn: Which.
            detail: Why.
            far_landed: Outgoing: what the far half had taken; None: unknown.

        Returns:
            Incoming: what has landed; None: unknown.
        """

    def open_add(self, session: int, options: OpenOptions) -> int:
        """Lets a session use a grant; returns the handle for its jobs."""

    def conn_probe(self, conn: int) -> None:
        """Has the far side answer by a new connection; CONN_PROVEN or CONN_LOST follows."""

    def open_path_set(self, session: int, open_handle: int, slot: int, path: OpenPath) -> None:
        """Gives an open a path: in place of one whose connection is closed, or one more.

        Args:
            session: Whose open.
            open_handle: Which.
            slot: Number of the path; the number of those that it has adds one.
            path: The new one.
        """

    def open_revoke(self, session: int, open_handle: int, detail: int) -> None:
        """Stops it; OPEN_QUIET follows."""

    def open_fence(
        self, session: int, open_handle: int, imms: Sequence[range], number: int
    ) -> None:
        """Stops what was submitted on these imms; FENCE_QUIET with the number as count follows.

        With the detail STILL_COPIED: a stream of its client's was not through in time.

        Args:
            session: Whose open.
            open_handle: Which.
            imms: Ascending, none overlaps another.
            number: The caller's own name for the fence.
        """

    def open_remove(self, session: int, open_handle: int) -> None:
        """Forgets a quiet one."""

    def mailbox_add(self, session: int, region: int, slots: int, slot_bytes: int) -> MailboxInfo:
        """Makes a mailbox at the beginning of a region."""

    def mailbox_remove(self, session: int, mailbox: int) -> None:
        """Ends it; nobody sends to it any more."""

    def mailbox_take(self, session: int, mailbox: int) -> bytes | None:
        """Takes the oldest message; None: there is none."""

    def submit(
        self, session: int, entries: Sequence[Entry], tables: bytes | bytearray = b""
    ) -> list[int]:
        """Submits jobs, all or none; returns their ids.

        Args:
            session: Whose they are.
            entries: The jobs.
            tables: What the entries' table_offset count from; copied.
        """

    def job_result(self, session: int, job_id: int) -> JobEnd | None:
        """How a job ended; None while it runs."""

    def heartbeat_open(self, address: str, port: int, interval_ms: int, timeout_ms: int) -> None:
        """Starts the heartbeat thread."""

    def peer_watch(self, address: str, port: int, send: bytes, receive: bytes) -> int:
        """Starts heartbeats with a peer; returns the watch's handle."""

    def peer_unwatch(self, peer: int) -> None:
        """Stops them. No error if they are stopped."""

    def detail_name(self, detail: int) -> str:
        """UPPER_SNAKE word of a detail."""

    def detail_text(self, detail: int) -> str:
        """One sentence for a detail."""

    def status_name(self, status: int) -> str:
        """UPPER_SNAKE word of a job's status."""

    async def aclose(self) -> None:
        """Stops everything."""
