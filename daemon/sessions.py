# SPDX-License-Identifier: Apache-2.0
"""The life of sessions: opening, memory and regions, and an end that leaves nothing behind.

Whatever changes a session runs as a task that the session owns, to its end, even if the client is
gone by then; the end of the session waits for these tasks before it takes away what they worked on.
All of them are bounded.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from typing import TYPE_CHECKING

import structlog

from transferd.daemon import cuda, memlock
from transferd.daemon import region as regions
from transferd.daemon.cuda import CudaMemory
from transferd.daemon.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    Unavailable,
)
from transferd.daemon.peer import is_nic
from transferd.daemon.plane import Detail, PlaneError, SessionOptions
from transferd.daemon.region import Memory, Region, RegionState
from transferd.daemon.session import Session, SessionState, SessionTable
from transferd.daemon.tasks import TaskOwner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transferd.daemon.config import LimitsConfig, TimeoutConfig
    from transferd.daemon.opens import Opener
    from transferd.daemon.owner import Owner
    from transferd.daemon.peers import Peers
    from transferd.daemon.plane import Plane, SessionFds
    from transferd.daemon.policy import Tenant
    from transferd.daemon.session import Origin
    from transferd.daemon.staging import Staging

log = structlog.get_logger("transferd.sessions")

# Before the connections are destroyed that others share, too. The data plane itself destroys one on
# which nothing moves for 15 s, and asks the peer for up to 6 s what has landed.
STAGED_S = 25.0
BUSY_PAUSE_S = 0.01  # between two tries to deregister what jobs still read
LEASE_RING_ENTRIES = (
    16  # a session without the fd socket has no ring; the data plane wants one all the same
)
LEASE_RECORDS = 16


class Sessions:
    """All sessions of the daemon.

    Attributes:
        stopping: No new ones are taken.
        on_ending: Told of each session that begins to end.
        is_chunk: Whether an fd can be a chunk of GPU memory.
        maps: Who has GPU memory of whom.
    """

    def __init__(
        self,
        plane: Plane,
        opener: Opener,
        owner: Owner,
        peers: Peers,
        *,
        group: int,
        limits: LimitsConfig,
        timeouts: TimeoutConfig,
        staging: Staging,
    ) -> None:
        """Takes what it works with; `group` is the domain group that sessions get."""
        self._staging = staging
        self._plane = plane
        self._opener = opener
        self._owner = owner
        self._peers = peers
        self._group = group
        self._limits = limits
        self._timeouts = timeouts
        self.table = SessionTable(limits.sessions)
        self.tasks = TaskOwner("sessions")
        self._next_region = 1
        self._next_allocation = 1
        self.is_chunk: Callable[[int], bool] = cuda.is_driver_fd
        self.stopping = False
        self.maps = owner.maps
        self.on_ending: list[Callable[[Session], None]] = [owner.maps.session_ending]

    # ---- opening ----

    async def open(
        self, tenant: Tenant, origin: Origin, *, record_count: int = 0, counter_count: int = 0
    ) -> tuple[Session, SessionFds]:
        """Opens a session.

        To be run as an owned task: whoever runs it owns the fds and the session.

        Raises:
            QuotaExceeded: SESSIONS or COUNTERS.
            InvalidRequest: Names the field.
            Unavailable: The daemon stops, or the data plane has no room.
        """
        if self.stopping:
            raise Unavailable(
                "the daemon is stopping; attach again when it is back", reason="STOPPING"
            )
        records = self._records(record_count)
        counters = self._counters(tenant, counter_count)
        session = self.table.add(tenant, origin, time.monotonic_ns())
        lease = bool(origin.lease_ms)
        try:
            handle, fds = await self._plane.session_open(
                SessionOptions(
                    group=self._group,
                    ring_entries=LEASE_RING_ENTRIES if lease else self._limits.ring_entries,
                    record_count=LEASE_RECORDS if lease else records,
                    counter_count=counters,
                    watcher_count=0 if lease else self._limits.watchers,
                    plan_count=0 if lease else self._limits.plans,
                    arena_bytes=0 if lease else self._limits.arena,
                    session_id=session.session_id,
                    weight=tenant.config.weight,
                )
            )
        except PlaneError as error:
            self.table.closed(session)
            if error.errno == errno.EMFILE:
                raise QuotaExceeded(f"opening a session: {error.text}", reason="SESSIONS") from None
            raise Unavailable(f"opening a session: {error.text}") from error
        except BaseException:
            self.table.closed(session)
            raise
        self.table.opened(session, handle)
        log.info("session open", session=session.session_id, tenant=tenant.name, name=origin.name)
        return session, fds

    def _records(self, asked: int) -> int:
        if not asked:
            return self._limits.records
        if asked & (asked - 1) or not 16 <= asked <= self._limits.records:
            raise InvalidRequest(
                "record_count", f"{asked} is not a power of two within 16 to {self._limits.records}"
            )
        return asked

    def _counters(self, tenant: Tenant, asked: int) -> int:
        limit = tenant.config.quotas.per_session_counters
        if asked > limit:
            raise QuotaExceeded(
                f"counter_count: {asked} is above the tenant's {limit}",
                reason="COUNTERS",
                limit=limit,
            )
        return asked or min(self._limits.counters, limit)

    # ---- memory ----

    def add_memory(self, session: Session, fd: int) -> Memory:
        """Takes a file of memory from a client.

        Args:
            session: Whose.
            fd: Owned by the session on success; on failure still the caller's.
        """
        _check_room(session)
        return self._added(session, regions.inspect(session.next_memory, fd))

    def add_cuda_memory(self, session: Session, share: cuda.Share, fds: list[int]) -> CudaMemory:
        """Takes an allocation of GPU memory from a client.

        Args:
            session: Whose.
            share: What the client says of it.
            fds: Owned by the session on success; on failure still the caller's.
        """
        _check_room(session)
        _check_chunks(session, len(share.chunk_bytes))
        memory = cuda.receive(
            session.next_memory,
            self._next_allocation,
            share,
            fds,
            dmabuf_size=self._plane.dmabuf_size,
            is_chunk=self.is_chunk,
        )
        self._next_allocation += 1
        self._added(session, memory)
        return memory

    def add_chunks(
        self, session: Session, memory_id: int, sizes: Sequence[int], fds: list[int]
    ) -> CudaMemory:
        """Takes more chunks of GPU memory that was begun before; the fds as for the first."""
        session.check_open()
        memory = self._memory(session, memory_id)
        if not isinstance(memory, CudaMemory) or not memory.chunk_bytes:
            raise InvalidRequest("memory_id", f"{memory_id} is no GPU memory of chunks")
        _check_chunks(session, len(sizes))
        cuda.add_chunks(memory, sizes, fds, self.is_chunk)
        return memory

    @staticmethod
    def _added(session: Session, memory: Memory) -> Memory:
        session.next_memory += 1
        session.memories[memory.memory_id] = memory
        return memory

    async def register(
        self, session: Session, memory: int | str, *, offset: int, length: int, name: str
    ) -> Region:
        """Registers memory. To be run by the session's ops.

        Args:
            session: Whose.
            memory: Number of handed over memory, or the name of POSIX shared memory.
            offset: Bytes into the file.
            length: 0: up to the file's end.
            name: Shown to people.
        """
        session.check_open()
        source = self._memory(session, memory)
        try:
            if isinstance(source, CudaMemory):
                length = cuda.check_range(source, offset, length)
            else:
                length = regions.check_range(source, offset, length)
            region = await self._register(session, source, offset, length, name)
        except BaseException:
            self.drop_memory(session, source, only_own=isinstance(memory, str))
            raise
        if not source.sealed:
            self._opener.isolate(session)
        if isinstance(source, CudaMemory):
            keys = self._plane.region_keys(session.handle, region.handle)
            session.unreached.update(rail for rail, key in enumerate(keys) if not key.key)
            await self._opener.staged.give(session)
        return region

    async def _register(
        self, session: Session, source: Memory, offset: int, length: int, name: str
    ) -> Region:
        tenant = session.tenant
        tenant.charge("regions")
        try:
            tenant.charge("registered_bytes", length)
        except BaseException:
            tenant.refund("regions")
            raise
        source.regions += 1
        try:
            handle = await self._plane.region_add(
                session.handle,
                source.fd,
                offset,
                length,
                writable=source.writable,
                address=source.base + offset if isinstance(source, CudaMemory) else 0,
                memory=self._staging.add(source) if isinstance(source, CudaMemory) else 0,
            )
        except BaseException as error:
            source.regions -= 1
            tenant.refund("regions")
            tenant.refund("registered_bytes", length)
            if isinstance(error, PlaneError):
                raise _registration(error) from error
            raise
        region = Region(self._next_region, handle, session, source, offset, length, name)
        self._next_region += 1
        session.regions[handle] = region
        return region

    def rails_of(self, region: Region) -> int:
        """Counts the NICs that reach a region."""
        keys = self._plane.region_keys(region.session.handle, region.handle)
        return sum(
            is_nic(rail.protocol) and key.key != 0
            for rail, key in zip(self._plane.rails, keys, strict=True)
        )

    def _memory(self, session: Session, memory: int | str) -> Memory:
        if isinstance(memory, str):
            fd = regions.open_shm(memory, session.tenant)
            try:
                return self.add_memory(session, fd)
            except BaseException:
                os.close(fd)
                raise
        found = session.memories.get(memory)
        if found is None:
            raise NotFound(
                f"memory_id: {memory} was not handed over by this session's fd socket",
                reason="MEMORY_NOT_FOUND",
            )
        return found

    @staticmethod
    def drop_memory(session: Session, memory: Memory, *, only_own: bool = True) -> None:
        """Lets go of a file that no region is made from any more."""
        if only_own and not memory.regions:
            session.memories.pop(memory.memory_id, None)
            memory.close()

    async def deregister(self, session: Session, handle: int) -> None:
        """Revokes a region's grants and deregisters it. To be run by the session's ops.

        Raises:
            Conflict: REGION_BUSY: jobs of the session still read it; STILL_MAPPED.
        """
        region = session.region(handle, "region")
        if region.state is RegionState.ZOMBIE:
            raise Conflict(f"region {handle} is being deregistered already", reason="REGION_ENDING")
        before = region.state
        region.state = RegionState.ZOMBIE
        await self._owner.end_grants(list(region.grants.values()))
        try:
            await self._owner.maps.region_unmapped(region)
        except Conflict:
            region.state = before
            raise
        deadline = time.monotonic() + self._timeouts.quiet
        while True:
            try:
                await self._plane.region_remove(session.handle, handle)
                break
            except PlaneError as error:
                if error.errno == errno.EBUSY and time.monotonic() < deadline and session.is_open:
                    await asyncio.sleep(BUSY_PAUSE_S)
                    continue
                region.state = before
                raise Conflict(
                    f"region {handle} is still read by jobs of this session; wait for them or "
                    "cancel them",
                    reason="REGION_BUSY",
                ) from error
        self._forget_region(region)
        if isinstance(region.memory, CudaMemory) and not region.memory.regions:
            await self._staging.forget(region.memory)
        self.drop_memory(session, region.memory)

    def _forget_region(self, region: Region) -> None:
        session = region.session
        session.regions.pop(region.handle, None)
        session.tenant.refund("regions")
        session.tenant.refund("registered_bytes", region.length)
        region.memory.regions -= 1

    def region_broken(self, session_handle: int, handle: int) -> None:
        """TFD_EVENT_REGION_BROKEN: its owner took pages away; nobody may write to it any more."""
        session = self.table.by_handle(session_handle)
        region = session.regions.get(handle) if session is not None else None
        if region is None or region.state is not RegionState.ACTIVE:
            return
        region.state = RegionState.BROKEN
        log.warning("region broken", session=region.session.session_id, region=handle)
        if region.grants and region.session.is_open:
            region.session.ops.background(
                self._owner.end_grants(list(region.grants.values())), "end grants of broken region"
            )

    # ---- ending ----

    def end(
        self, session: Session, *, clean: bool, reason: str, message: str = ""
    ) -> asyncio.Task[None]:
        """Ends a session; idempotent.

        Args:
            session: Which.
            clean: It said goodbye; else what it could still have written counts as lost.
            reason: UPPER_SNAKE word for the client and the log.
            message: One sentence.

        Returns:
            A task that ends when nothing of it is left.
        """
        if session.ended is None:
            session.end_reason, session.end_message = reason, message
            self.table.ending(session)
            session.quiet = asyncio.get_running_loop().create_future()
            session.ended = self.tasks.spawn(
                self._end(session, clean=clean), f"end session {session.session_id}"
            )
            try:
                self._plane.session_end(session.handle, Detail.SESSION_ENDED)
            except PlaneError as error:
                log.error("ending a session", session=session.session_id, error=error.text)
                session.quiet.set_result(None)
            for listener in self.on_ending:
                listener(session)
        return session.ended

    async def _end(self, session: Session, *, clean: bool) -> None:
        started = time.monotonic()
        if not clean:  # who was killed has memory that is to be back, whoever is to be told of it
            letting_go = self.tasks.spawn(self._let_go(session), "let go of GPU memory")
        await session.ops.idle()
        await self._quiet(session)
        for step in (
            self._owner.end_grants(list(session.grants.values())),
            self._opener.release_session(session, self._peers.all(), clean=clean),
        ):
            try:
                await step
            except Exception:
                log.exception("ending a session", session=session.session_id)
        self._opener.drop_session(session)
        for region in list(session.regions.values()):
            self._forget_region(region)
        try:
            await self._plane.session_close(session.handle)
        except PlaneError as error:
            log.error("closing a session", session=session.session_id, error=error.text)
        if not clean:
            await asyncio.wait([letting_go])
        await self._let_go(session)
        for memory in session.memories.values():
            memory.close()
        session.memories.clear()
        self.table.closed(session)
        log.info(
            "session closed",
            session=session.session_id,
            reason=session.end_reason,
            clean=clean,
            ms=round((time.monotonic() - started) * 1000, 1),
        )

    async def _let_go(self, session: Session) -> None:
        """Takes its GPU memory from the helpers: what is copied for it fails, each job alone."""
        for memory in list(session.memories.values()):
            if isinstance(memory, CudaMemory):
                await self._staging.forget(memory)

    async def _quiet(self, session: Session) -> None:
        """Waits for its last jobs; what does not come to rest has its connections destroyed."""
        assert session.quiet is not None
        if session.quiet.done():
            return
        await asyncio.wait([session.quiet], timeout=self._timeouts.quiet)
        through_host = any(opened.staged is not None for opened in session.opens.values())
        for staged in (False, True) if through_host else (False,):
            if session.quiet.done():
                return
            log.warning(
                "jobs do not come to rest; destroying connections",
                session=session.session_id,
                staged=staged,
            )
            await self._opener.cut_off(session, staged=staged)
            bound_s = STAGED_S if through_host and not staged else self._timeouts.quiet
            await asyncio.wait([session.quiet], timeout=bound_s)

    def quiet(self, handle: int) -> None:
        """TFD_EVENT_SESSION_QUIET."""
        session = self.table.by_handle(handle)
        if session is not None and session.quiet is not None and not session.quiet.done():
            session.quiet.set_result(None)

    def broken(self, handle: int, detail: int) -> None:
        """TFD_EVENT_SESSION_BROKEN: garbage in its ring."""
        session = self.table.by_handle(handle)
        if session is None or session.state is not SessionState.OPEN:
            return
        word, text = self._plane.detail_name(detail), self._plane.detail_text(detail)
        log.warning("session broken by its client", session=session.session_id, detail=word)
        message = f"the submit ring holds what no client of this version writes: {text or word}"
        self.end(session, clean=False, reason="RING_BROKEN", message=message)

    def reap_leases(self) -> None:
        """Ends sessions whose lease is over."""
        for session in self.table.leases_over(time.monotonic_ns()):
            self.end(session, clean=False, reason="LEASE_OVER", message="the lease was not renewed")

    async def aclose(self) -> None:
        """Ends all sessions."""
        self.stopping = True
        for session in self.table:
            if session.state is SessionState.OPEN:
                self.end(session, clean=True, reason="STOPPING", message="the daemon stops")
        await self.tasks.idle()


def _check_room(session: Session) -> None:
    session.check_open()
    limit = session.tenant.config.quotas.per_session_shared_files
    if len(session.memories) >= limit:
        raise QuotaExceeded(
            f"the session has handed over {limit} files; deregister some regions",
            reason="SHARED_FILES",
        )


def _check_chunks(session: Session, more: int) -> None:
    memories = session.memories.values()
    held = sum(len(one.chunk_fds) for one in memories if isinstance(one, CudaMemory))
    cuda.check_quota(held, more, session.tenant.config.quotas.per_session_chunks)


def _registration(error: PlaneError) -> Exception:
    """Says to a client why memory could not be registered."""
    if error.errno == errno.ENOMEM:
        may_pin = memlock.limit()
        if may_pin is None:
            return QuotaExceeded(f"registering memory: {error.text}", reason="MEMORY")
        return QuotaExceeded(
            f"registering memory: {error.text}; the daemon may pin {memlock.text(may_pin)} "
            f"(RLIMIT_MEMLOCK): {memlock.HOW}",
            reason="MEMLOCK",
            limit=may_pin,
        )
    if error.errno == errno.EINVAL:
        return InvalidRequest("length_bytes", error.text)
    return Unavailable(f"registering memory: {error.text}", reason="REGISTRATION_FAILED")
