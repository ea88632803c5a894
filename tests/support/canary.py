# SPDX-License-Identifier: Apache-2.0
"""Proof of fences: once one has answered, the owner's canary stays whole, whatever others send."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import transferd
from transferd.native.names import JobStatus

from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from transferd import Client, Grant, Job

PAGE = 256 << 10
PAGES = 16
JOBS = 64  # to a slot in each round, a page each: more than a connection's window
SLOT = PAGE * PAGES
SLOTS = 16  # a slot is looked at again, and used again, this many rounds later
SENT = 0xFF  # every byte that is written; canaries are others
EACH_BYTE = 0x0101010101010101
FENCED, STAYS, MARKER = 1, 2, 3  # immediates
WRITER_PAGE, WRITER_JOBS = 64 << 10, 16  # of the writer that never stops: in flight
KINDS = ("cancel", "revoke", "fence")


class Writer:
    """Submits without end to where it is told, in a thread; refusals do not stop it."""

    def __init__(self, client: Client, source: transferd.Region) -> None:
        """Begins with :meth:`aim`."""
        self._client = client
        self._source = source
        self._target: tuple[bytes, int, int] | None = None
        self._stop = threading.Event()
        self._turn = threading.Condition()
        self.ends: dict[JobStatus, int] = dict.fromkeys(JobStatus, 0)
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer")
        self._thread.start()

    def aim(self, descriptor: bytes, offset: int, imm: int) -> None:
        """Writes pages there from now on."""
        with self._turn:
            self._target = (descriptor, offset, imm)
            self._turn.notify()

    def _run(self) -> None:
        flying: deque[Job] = deque()
        try:
            with self._turn:
                self._turn.wait_for(lambda: self._target is not None or self._stop.is_set())
            while not self._stop.is_set():
                assert self._target is not None
                descriptor, offset, imm = self._target
                with contextlib.suppress(transferd.Conflict, transferd.PeerLost):  # revoked
                    page = self._source[0:WRITER_PAGE]
                    flying.append(self._client.write(page, descriptor, offset, imm=imm))
                while len(flying) > WRITER_JOBS:
                    self._end(flying.popleft())
            for job in flying:
                self._end(job)
        except BaseException as error:
            self.failure = error

    def _end(self, job: Job) -> None:
        with contextlib.suppress(transferd.JobFailed):
            job.wait(WAIT_S)
        self.ends[job.status] += 1

    def close(self) -> None:
        """Stops it when its last job has ended."""
        self._stop.set()
        with self._turn:
            self._turn.notify()
        self._thread.join(2 * WAIT_S)
        assert not self._thread.is_alive(), "the writer hangs"
        if self.failure is not None:
            raise AssertionError("the writer failed") from self.failure


class Canary:
    """Rounds of one kind of fence: pages in flight, fence, canary into the pages, a later write.

    Everything goes by one ordered connection, so that what a fence had left in flight would have
    landed when the later write has. Each slot is looked at once more before it is used again. A
    context manager: at its end the counts must be exact.

    Attributes:
        rounds: So many were good.
        answered_s: How long each fence took.
        caught: Rounds in which the fence ended at least one job in flight.
    """

    def __init__(self, kind: str, sender: Client, receiver: Client, *, busy: bool = True) -> None:
        """Allocates and connects.

        Args:
            kind: One of KINDS.
            sender: Who writes.
            receiver: Who owns the pages.
            busy: A writer that never stops shares the connection.
        """
        self.rounds = self.caught = 0
        self.answered_s: list[float] = []
        self._round: Callable[[int], list[Job]] = getattr(self, f"_{kind}")
        self._sender, self._receiver = sender, receiver
        self._memory = receiver.alloc(SLOT * (SLOTS + 1))  # the last is the writer's
        self._source = sender.alloc(SLOT)
        self._source.numpy()[:] = SENT
        self._grant = self._memory.grant(imms=(FENCED, STAYS, MARKER))
        sender.warm(self._grant.descriptor)
        self._landed = self._lost = 0
        self._busy = busy
        self._slots = self._memory.numpy("uint64").reshape(SLOTS + 1, -1)
        self._expected: dict[int, int] = {}

    def __enter__(self) -> Canary:
        self._writer = Writer(self._sender, self._source)
        self._stay()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
        if error is None:
            self._check_all()

    def _stay(self) -> None:
        if self._busy:
            self._writer.aim(self._grant.descriptor, SLOT * SLOTS, STAYS)

    # ---- a round ----

    def run(self, rounds: int) -> None:
        """Makes rounds.

        Raises:
            AssertionError: A late byte landed, or a job did not end with its fence.
        """
        for _ in range(rounds):
            slot = self.rounds % SLOTS
            self._look(slot)
            jobs = self._round(slot)
            self._fill(slot)
            pending = [job for job in jobs if job.status is JobStatus.PENDING]
            assert not pending, f"round {self.rounds}: the fence answered before {pending}"
            self._tally(jobs)
            self._marker()
            self._look(slot)
            self.rounds += 1

    def _cancel(self, slot: int) -> list[Job]:
        jobs = self._submit(self._grant, slot)
        with self._clock():
            for job in reversed(jobs):
                job.cancel(WAIT_S)
        return jobs

    def _fence(self, slot: int) -> list[Job]:
        jobs = self._submit(self._grant, slot)
        jobs[0].wait(WAIT_S)
        with self._clock():
            self._grant.fence([FENCED])
        return jobs

    def _revoke(self, slot: int) -> list[Job]:
        """Here the writer goes on at the very pages, until it is refused and afterwards."""
        grant = self._memory.grant(slot * SLOT, SLOT, imms=(FENCED, STAYS))
        if self._busy:
            self._writer.aim(grant.descriptor, 0, STAYS)
        jobs = self._submit(grant, slot)
        jobs[0].wait(WAIT_S)
        with self._clock():
            grant.revoke()
        return jobs

    def _submit(self, grant: Grant, slot: int) -> list[Job]:
        first = 0 if grant is not self._grant else slot * SLOT
        return self._sender.submit(
            [
                transferd.Write(
                    src=self._source[at : at + PAGE],
                    dst=grant.descriptor,
                    dst_offset=first + at,
                    imm=FENCED,
                )
                for at in (job % PAGES * PAGE for job in range(JOBS))
            ]
        )

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.answered_s.append(time.perf_counter() - begin)

    # ---- looking ----

    def _fill(self, slot: int) -> None:
        self._slots[slot] = self._expected[slot] = EACH_BYTE * (1 + self.rounds % (SENT - 1))

    def _look(self, slot: int) -> None:
        if slot not in self._expected:
            return
        late = int((self._slots[slot] != self._expected[slot]).sum())
        assert not late, f"round {self.rounds}: {late} words of slot {slot} landed late"

    def _tally(self, jobs: list[Job]) -> None:
        landed = sum(job.status is JobStatus.OK for job in jobs)
        self._landed += landed
        cancelled = sum(job.status is JobStatus.CANCELLED for job in jobs)
        self._lost += cancelled  # refused ones were never sent
        self.caught += cancelled > 0

    def _marker(self) -> None:
        """A later write on the same connection, by a grant that lives."""
        job = self._sender.imm(self._grant.descriptor, MARKER, priority="latency")
        assert job.wait(WAIT_S) is JobStatus.OK

    def _check_all(self) -> None:
        for slot in range(SLOTS):
            self._look(slot)
        counter, wanted = self._receiver.counter(FENCED), (self._landed, self._lost)
        # A cancel is answered to the sender; the receiver learns of the loss a moment later.
        eventually(lambda: (counter.value, counter.lost) == wanted, f"{counter} tells {wanted}")
        assert self._receiver.counter(MARKER).read()[:3] == (self.rounds, 0, 0)
