# SPDX-License-Identifier: Apache-2.0
"""Jobs and counters of clients that speak gRPC: the same entries, by a ring of our own."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transferd.daemon.errors import Internal, NotFound, QuotaExceeded, TimedOut, Unauthenticated
from transferd.daemon.plane import Entry, Op, PlaneError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transferd.daemon.plane import CounterState, JobEnd, Plane
    from transferd.daemon.session import Session

CANCEL_S = 5.0  # bulk work is posted in bounded windows: a cancelled job is quiet long before
WAITS_MAX = 256  # calls of one session that wait: each of its events wakes them all


@dataclass(slots=True)
class _Watch:
    """One session's eventfd while somebody waits for it.

    Attributes:
        waiters: Those to be woken next.
        users: Calls that wait, woken or not.
    """

    fd: int
    users: int = 0
    waiters: set[asyncio.Future[None]] = field(default_factory=set)


class Transfers:
    """Submitting, following and cancelling; counters."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._watches: dict[int, _Watch] = {}

    # ---- jobs ----

    def submit(
        self, session: Session, entries: Sequence[Entry], tables: bytes | bytearray = b""
    ) -> list[int]:
        """Submits jobs, all or none.

        Args:
            session: Whose they are.
            entries: The jobs.
            tables: What the entries' table_offset count from.

        Raises:
            QuotaExceeded: RING_FULL.
        """
        session.check_open()
        try:
            return self._plane.submit(session.handle, entries, tables)
        except PlaneError as error:
            if error.errno in (errno.EAGAIN, errno.E2BIG):
                raise QuotaExceeded(
                    f"no room for {len(entries)} more jobs in flight, or for their pages, targets "
                    "and messages; wait for some to end, then submit again",
                    reason="RING_FULL",
                ) from None
            raise Internal(f"submitting jobs: {error.text}") from error

    def job_end(self, session: Session, job_id: int) -> JobEnd | None:
        """How a job ended; None while it runs.

        Raises:
            NotFound: JOB_NOT_FOUND.
        """
        try:
            return self._plane.job_result(session.handle, job_id)
        except PlaneError as error:
            raise NotFound(
                f"job {job_id} was not submitted by this service in this session, or ended too "
                "long ago",
                reason="JOB_NOT_FOUND",
            ) from error

    async def wait_jobs(
        self, session: Session, job_ids: Sequence[int], timeout_s: float
    ) -> dict[int, JobEnd]:
        """Waits until all of some jobs have ended, at most for a while; returns those that have."""
        ends: dict[int, JobEnd] = {}

        def all_ended() -> bool:
            for job_id in job_ids:
                if job_id not in ends:
                    end = self.job_end(session, job_id)
                    if end is None:
                        return False
                    ends[job_id] = end
            return True

        await self.wait(session, all_ended, timeout_s)
        for job_id in job_ids:  # the first that runs ends the loop above
            end = ends.get(job_id) or self.job_end(session, job_id)
            if end is not None:
                ends[job_id] = end
        return ends

    async def cancel(self, session: Session, job_id: int) -> JobEnd:
        """Cancels a job; a fence.

        Raises:
            NotFound: No such job.
            TimedOut: It is still in flight after the bound.
        """
        if self.job_end(session, job_id) is None:
            self.submit(session, [Entry(Op.CANCEL, argument=job_id)])
        ends = await self.wait_jobs(session, [job_id], CANCEL_S)
        if job_id not in ends:
            raise TimedOut(f"job {job_id} is still in flight after {CANCEL_S} s; ask again")
        return ends[job_id]

    # ---- counters ----

    def counter(self, session: Session, imm: int) -> tuple[CounterState, int]:
        """Reads a counter, giving the immediate one if it has none; returns its slot, too.

        Raises:
            QuotaExceeded: COUNTERS.
        """
        session.check_open()
        try:
            slot = self._plane.counter_slot(session.handle, imm)
        except PlaneError as missing:
            if missing.errno != errno.ENOENT:
                raise Internal(f"reading a counter: {missing.text}") from missing
            try:
                slot = self._plane.counters_add(session.handle, imm, 1)[0]
            except PlaneError as error:
                raise QuotaExceeded(
                    "the session has no room for another counter; attach with a larger "
                    "counter_count",
                    reason="COUNTERS",
                ) from error
        return self._plane.counter_read(session.handle, imm), slot

    async def wait_counter(
        self, session: Session, imm: int, target: int, timeout_s: float
    ) -> tuple[CounterState, int]:
        """Waits until a counter reaches a target or is faulted, at most for a while."""
        state, slot = self.counter(session, imm)

        def settled() -> bool:
            nonlocal state
            state = self._plane.counter_read(session.handle, imm)
            return state.value >= target or state.faults > state.acknowledged

        await self.wait(session, settled, timeout_s)
        return state, slot

    async def acknowledge(self, session: Session, imm: int) -> tuple[CounterState, int]:
        """Takes a counter's faults as seen."""
        self.counter(session, imm)
        (job_id,) = self.submit(session, [Entry(Op.ACKNOWLEDGE, imm=imm)])
        if job_id not in await self.wait_jobs(session, [job_id], CANCEL_S):
            raise TimedOut("the acknowledgement was not taken in time; ask again")
        return self.counter(session, imm)

    # ---- waiting ----

    async def wait(self, session: Session, done: Callable[[], bool], timeout_s: float) -> None:
        """Waits until `done()` holds, the time is over, or the session ends.

        Raises:
            Unauthenticated: The session ended first.
            QuotaExceeded: WAITS.
        """
        session.check_open()
        if done() or timeout_s <= 0:
            return
        deadline = time.monotonic() + timeout_s
        watch = self._watch(session)
        if watch.users >= WAITS_MAX:
            raise QuotaExceeded(
                f"{watch.users} calls of this session wait already; let some end, or wait for "
                "several jobs in one call",
                reason="WAITS",
                limit=WAITS_MAX,
            )
        watch.users += 1
        waiter: asyncio.Future[None] | None = None
        try:
            while True:
                # Armed before the look, so that what happens between the two is not missed.
                waiter = asyncio.get_running_loop().create_future()
                watch.waiters.add(waiter)
                if done():
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                await asyncio.wait([waiter], timeout=left)
                if not session.is_open:
                    raise Unauthenticated(
                        "the session ended while it was waited", reason="SESSION_ENDED"
                    )
                watch.waiters.discard(waiter)
        finally:
            if waiter is not None:
                watch.waiters.discard(waiter)
            watch.users -= 1
            # By users: those that were woken at the same time wait no more, but may again.
            if not watch.users and self._watches.get(session.session_id) is watch:
                self._unwatch(session)

    def _watch(self, session: Session) -> _Watch:
        watch = self._watches.get(session.session_id)
        if watch is None:
            try:
                fd = self._plane.session_watch_fd(session.handle)
            except PlaneError as error:
                raise Internal(f"watching a session: {error.text}") from error
            watch = _Watch(fd)
            self._watches[session.session_id] = watch
            asyncio.get_running_loop().add_reader(fd, self._signalled, watch)
        return watch

    @staticmethod
    def _signalled(watch: _Watch) -> None:
        try:
            os.read(watch.fd, 8)
        except BlockingIOError:
            return
        waiters, watch.waiters = watch.waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _unwatch(self, session: Session) -> None:
        watch = self._watches.pop(session.session_id, None)
        if watch is not None:
            asyncio.get_running_loop().remove_reader(watch.fd)

    def session_ending(self, session: Session) -> None:
        """Wakes whoever waits in a session that ends; before its eventfd is closed."""
        watch = self._watches.get(session.session_id)
        if watch is None:
            return
        self._unwatch(session)
        waiters, watch.waiters = watch.waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
