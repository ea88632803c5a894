# SPDX-License-Identifier: Apache-2.0
"""A prefiller rank's jobs: what the core wants pushed, layer by layer, in an order, within bounds.

A *unit* is one Push of the core: tokens of one transfer. Its paged writes are made when its turn
comes, one object for each (layer, pattern), never one for a page. Those of layers that are still to
be computed are armed on the engine's watcher, as many layers ahead as the session has room for: the
earliest layers of all units first. Layers of one stage that are computed already share their jobs.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import JobStatus, errors
from transferd.client.job import Write
from transferd.client.watcher import Armed
from transferd.kv.pump import DEAD, is_dead, why

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transferd.client.job import Job
    from transferd.client.memory import Region, RegionSlice
    from transferd.client.operations import Operation
    from transferd.client.watcher import Watcher
    from transferd.kv.plan import PagesWrite, Sending
    from transferd.kv.protocol.actions import TransferKey
    from transferd.kv.pump import Pump

BATCH = 64  # jobs of one native call
TABLE_SHARE = 4  # of the arena, what one batch takes at most; the rest is for others
PAGE_BYTES = 8  # of the arena, a page
NOW = -1  # of a unit that waits for no layer
ARMED_AGAIN_S = 0.002
REFILL_SHARE = 32  # of what may be armed at once; for less room nothing is armed


def stage_of(step: int, steps: int, stages: int) -> int:
    """Tells which immediate of a transfer a step is counted on; both sides have to agree."""
    return step * stages // steps


class Armor(NamedTuple):
    """What units of a step of the engine wait for.

    Attributes:
        number: Of the step; those of an earlier one go first.
        watcher: Bumped once for each layer.
        base: Its value before the first layer.
        ranks: For each layer of this rank, by its number in the model, its place among them.
    """

    number: int
    watcher: Watcher
    base: int
    ranks: Mapping[int, int]

    def value(self, layers: tuple[int, ...]) -> int:
        """Tells what the watcher has reached once all of some layers are computed."""
        return self.base + 1 + max((self.ranks[n] for n in layers if n in self.ranks), default=-1)


class Ways(NamedTuple):
    """Where the units of a transfer come from and go to.

    Attributes:
        regions: Of the source, by name.
        grants: Of the decoder, by the region's name.
        imm: First of the transfer's immediates.
        stages: How many there are, without the tail's.
        steps: Layers that are sent together.
        deadline_s: Of a job: no job outlives its request by far.
    """

    regions: Mapping[str, Region]
    grants: Mapping[str, bytes]
    imm: int
    stages: int
    steps: tuple[tuple[int, ...], ...]
    deadline_s: float


class Tail(NamedTuple):
    """The tail of a transfer.

    Attributes:
        src: Its bytes.
        dst: Descriptor.
        offset: Where it goes.
    """

    src: RegionSlice
    dst: bytes
    offset: int


class Piece(NamedTuple):
    """One job.

    Attributes:
        make: Makes it; as late as it can be, as it takes memory.
        dst: Descriptor that has to be open.
        pages: Of its table.
        value: That the watcher has to reach; 0: it need not wait.
    """

    make: Callable[[], Operation]
    dst: bytes
    pages: int
    value: int


@dataclass(slots=True, eq=False)
class Unit:
    """One Push of the core.

    Attributes:
        key: The transfer.
        number: Of the push.
        ways: Where it comes from and goes to.
        begin: Begins to make its paged writes.
        tail: Goes with it.
        armor: What its layers wait for; None: they are computed.
        jobs: Submitted and not known to have ended; whether each is armed.
        queued: It has jobs that are not submitted.
        failed: How the first of its jobs failed.
        dead: The destination is gone for good.
    """

    key: TransferKey
    number: int
    ways: Ways
    begin: Callable[[], Sending]
    tail: Tail | None
    armor: Armor | None
    pieces: Iterator[Piece] | None = None
    next: Piece | None = None
    jobs: dict[Job, bool] = field(default_factory=dict)
    queued: bool = True
    failed: str = ""
    dead: bool = False

    def made(self) -> Iterator[Piece]:
        """Makes its jobs, by layer; those of steps of a stage that are computed go together."""
        sending, steps, at = self.begin(), len(self.ways.steps), 0
        while at < steps:
            value, last = self._computed(at)
            last = sending.together(at, last)
            imm = self.ways.imm + self._stage(at)
            for write in sending.writes(at, last):
                yield Piece(
                    functools.partial(self._operation, sending, write, imm),
                    self.ways.grants[write.joined.pattern.dst_region],
                    len(write.pieces),
                    value,
                )
            at = last
        if self.tail is not None:
            yield Piece(functools.partial(self._tail, self.tail), self.tail.dst, 0, 0)

    def _stage(self, step: int) -> int:
        return stage_of(step, len(self.ways.steps), self.ways.stages)

    def _value(self, step: int) -> int:
        """Tells what the watcher has reached once a step is computed; 0: it is."""
        return self.armor.value(self.ways.steps[step]) if self.armor is not None else 0

    def _computed(self, first: int) -> tuple[int, int]:
        """Tells what a step waits for, and up to which one all of its stage are computed."""
        value, last = self._value(first), first + 1
        reached = self.armor.watcher.value if self.armor is not None else 0
        stage = self._stage(first)
        if value <= reached:
            while (
                last < len(self.ways.steps)
                and self._stage(last) == stage
                and self._value(last) <= reached
            ):
                last += 1
        return value, last

    def _operation(self, sending: Sending, write: PagesWrite, imm: int) -> Operation:
        ways = self.ways
        return sending.job(write).operation(
            ways.regions, ways.grants, imm, deadline_s=ways.deadline_s
        )

    def _tail(self, tail: Tail) -> Operation:
        return Write(
            src=tail.src,
            dst=tail.dst,
            dst_offset=tail.offset,
            imm=self.ways.imm + self.ways.stages,
            deadline_s=self.ways.deadline_s,
        )

    def fail(self, text: str, *, dead: bool) -> None:
        """Notes how it fails, first of all."""
        self.failed = self.failed or text
        self.dead = self.dead or dead


class Pushes:
    """All units of a prefiller rank that have not ended. Used under the pump's lock."""

    def __init__(
        self, pump: Pump, ended: Callable[[Unit], None], *, armed_max: int | None = None
    ) -> None:
        """Begins without any.

        Args:
            pump: The rank.
            ended: Called when no job of a unit is under way any more, and none will be.
            armed_max: Jobs that may be armed at once, if fewer than the session takes.
        """
        self._pump = pump
        self._ended = ended
        self._heap: list[tuple[int, int, int, Unit]] = []
        self._serial = itertools.count()
        self._of: dict[TransferKey, list[Unit]] = {}
        # By pair and by whether they wait for layers: in the order in which they end, as a rule.
        self._flying: dict[tuple[int, bool], deque[tuple[Job, Unit]]] = {}
        self._stopped: set[Unit] = set()  # with jobs that end in any order
        self._parked = 0
        limit = pump.client.batch_limit
        self._armed_max = limit // 2 if armed_max is None else min(armed_max, limit // 2)
        self._refill = max(1, self._armed_max // REFILL_SHARE)
        self._most = limit * 3 // 4
        self._armed = 0
        self._count = 0
        self._table_pages = max(1, pump.session.table_limit // PAGE_BYTES // TABLE_SHARE)

    def __len__(self) -> int:
        """Counts the jobs under way."""
        return self._count

    def add(self, unit: Unit) -> None:
        """Takes a unit."""
        self._of.setdefault(unit.key, []).append(unit)
        self._queue(unit, 1)

    def _queue(self, unit: Unit, value: int) -> None:
        """Has a unit's next piece wait for its turn; with the value 0 it waits for no layer."""
        number = unit.armor.number if unit.armor is not None and value else NOW
        heapq.heappush(self._heap, (number, value, next(self._serial), unit))

    def stop(self, key: TransferKey) -> None:
        """Cancels the jobs of a transfer; each of its units still ends."""
        for unit in list(self._of.get(key, ())):
            unit.fail("CANCELLED", dead=False)
            self._give_up(unit)
            self._end_if_idle(unit)

    # ---- submitting ----

    def turn(self) -> None:
        """Looks which jobs have ended, and submits more, unless events wait for the next turn."""
        self._reap()
        if self._pump.posted:  # whoever waits for a unit's end does not wait for jobs of others
            return
        while self._heap and self._count < self._most:
            batch = self._batch()
            if not batch or not self._submit(batch):
                return

    def _batch(self) -> list[tuple[Unit, Piece]]:
        """Takes what is next."""
        batch: list[tuple[Unit, Piece]] = []
        pages = armed = 0
        room = min(BATCH, self._most - self._count)
        free = self._armed_max - self._armed
        if free < self._refill:
            free = 0
        while self._heap and len(batch) < room:
            _, _, _, unit = self._heap[0]
            piece = self._peek(unit)
            if piece is None:
                heapq.heappop(self._heap)
                continue
            if batch and pages + piece.pages > self._table_pages:
                break
            waits = self._waits(unit, piece)
            if waits and armed >= free:
                break
            heapq.heappop(self._heap)
            if piece.dst not in self._pump.session.handles:
                self._park(unit, piece)
                continue
            batch.append((unit, piece))
            pages += piece.pages
            armed += waits
            unit.next = None
            following = self._peek(unit)
            if following is not None:
                self._queue(unit, following.value)
        return batch

    @staticmethod
    def _waits(unit: Unit, piece: Piece) -> bool:
        """Tells whether a piece has to be armed."""
        armor = unit.armor
        return armor is not None and piece.value > 0 and armor.watcher.value < piece.value

    def _peek(self, unit: Unit) -> Piece | None:
        """Finds a unit's next piece; None: there is none any more."""
        if not unit.queued:
            return None
        if unit.next is None:
            if unit.pieces is None:
                unit.pieces = unit.made()
            try:
                unit.next = next(unit.pieces, None)
            except errors.TransferdError as error:
                unit.fail(str(error), dead=False)
            if unit.next is None:
                unit.queued = False
                unit.pieces = None
                self._pump.post(lambda _: self._end_if_idle(unit))
        return unit.next

    def _park(self, unit: Unit, piece: Piece) -> None:
        """Keeps a unit until its destination is open."""

        def opened(error: Exception | None) -> None:
            if error is None:
                if unit.queued:
                    self._queue(unit, piece.value)
                return
            unit.fail(str(error), dead=not isinstance(error, errors.PeerLost))
            unit.queued = False
            self._end_if_idle(unit)

        self._pump.when_open(piece.dst, opened)

    def _submit(self, batch: list[tuple[Unit, Piece]]) -> bool:
        """Submits; false: there is no room now."""
        rest = self._try(batch)
        for unit, piece in reversed(rest):
            self._again(unit, piece)
        return not rest

    def _try(self, batch: list[tuple[Unit, Piece]]) -> list[tuple[Unit, Piece]]:
        """Submits; gives what has found no room."""
        operations = [self._operation(unit, piece) for unit, piece in batch]
        try:
            jobs = self._pump.client.submit(operations, timeout_s=0)
        except errors.WaitTimeout as error:
            jobs = getattr(error, "jobs", [])
        except errors.Unavailable:
            raise
        except errors.TransferdError as error:
            jobs = getattr(error, "jobs", [])
            if error.reason == "ARMED_COPIES":  # others arm copies on the device, too
                self._pump.later(ARMED_AGAIN_S, self._pump.kick)
            elif len(batch) == 1:
                self._refused(batch[0][0], error)
                return []
            else:
                self._fly(batch[: len(jobs)], operations, jobs)
                rest = batch[len(jobs) :]
                while rest and not self._try(rest[:1]):
                    rest = rest[1:]
                return rest
        self._fly(batch[: len(jobs)], operations, jobs)
        return batch[len(jobs) :]

    def _operation(self, unit: Unit, piece: Piece) -> Operation:
        operation = piece.make()
        if not self._waits(unit, piece):
            return operation
        assert unit.armor is not None
        return Armed(watcher=unit.armor.watcher, value=piece.value, job=operation)

    def _fly(
        self, batch: list[tuple[Unit, Piece]], operations: list[Operation], jobs: list[Job]
    ) -> None:
        for (unit, _), operation, job in zip(batch, operations, jobs, strict=False):
            armed = isinstance(operation, Armed)
            self._armed += armed
            self._count += 1
            unit.jobs[job] = armed
            self._flying.setdefault((unit.key.pair, armed), deque()).append((job, unit))

    def _again(self, unit: Unit, piece: Piece) -> None:
        """Puts a piece back that found no room."""
        if unit.failed:
            return
        rest = unit.pieces
        behind = unit.next
        unit.next = None
        unit.pieces = itertools.chain(
            [piece], [] if behind is None else [behind], rest if rest is not None else ()
        )
        unit.queued = True
        self._queue(unit, piece.value)

    def _refused(self, unit: Unit, error: errors.TransferdError) -> None:
        dead = isinstance(error, errors.StaleDescriptor) or error.reason in DEAD
        unit.fail(str(error), dead=dead)
        unit.queued = False
        self._pump.post(lambda _: self._end_if_idle(unit))

    # ---- ends ----

    def _reap(self) -> None:
        for which, flying in list(self._flying.items()):
            while flying and flying[0][0].done():
                job, unit = flying.popleft()
                self._landed(job, unit)
            if not flying:
                del self._flying[which]
        for unit in list(self._stopped):
            for job in [job for job in unit.jobs if job.done()]:
                self._landed(job, unit)
            if not unit.jobs:
                self._stopped.discard(unit)

    def _landed(self, job: Job, unit: Unit) -> None:
        """Counts a job that has ended; one that was stopped may be met a second time."""
        armed = unit.jobs.pop(job, None)
        if armed is None:
            return
        self._count -= 1
        self._armed -= armed
        if job.status is not JobStatus.OK:
            unit.fail(why(job), dead=is_dead(job))
            self._give_up(unit)
        self._end_if_idle(unit)

    def _give_up(self, unit: Unit) -> None:
        """Stops the rest of a unit that has failed; its jobs end out of order from now on."""
        unit.queued = False
        if not unit.jobs or unit in self._stopped:
            return
        self._stopped.add(unit)
        for job in unit.jobs:
            with contextlib.suppress(errors.WaitTimeout):
                job.cancel(timeout_s=0)

    def _end_if_idle(self, unit: Unit) -> list[Any]:
        if unit.queued or unit.jobs:
            return []
        units = self._of.get(unit.key)
        if units is None or unit not in units:
            return []
        units.remove(unit)
        if not units:
            del self._of[unit.key]
        self._ended(unit)
        return []
