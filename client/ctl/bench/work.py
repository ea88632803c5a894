# SPDX-License-Identifier: Apache-2.0
"""What a worker does in a step: makes the jobs of a batch, hands them over, waits for them."""

from __future__ import annotations

import random
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from transferd.client.job import Imm, Write
from transferd.client.operations import Read, Scatter, WritePages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd import Client, Job, Region
    from transferd.client.ctl.bench.pattern import Pattern
    from transferd.client.ctl.bench.sweep import Settings, Step
    from transferd.client.memory import RegionSlice
    from transferd.client.operations import Operation

SAMPLES_MAX = 20_000
SAMPLES_MIN = 5


class Place(NamedTuple):
    """Where a worker's bytes are at the target.

    Attributes:
        descriptor: Of the grant.
        base: Of its part, in the granted range.
        imm: That counts its operations.
    """

    descriptor: bytes
    base: int
    imm: int


class Samples(NamedTuple):
    """Times of single batches, in ns.

    Attributes:
        prep: Making the description of its jobs.
        post: The call that submits them.
        transfer: From then until all were known to have ended.
    """

    prep: list[int]
    post: list[int]
    transfer: list[int]


class Work:
    """One step at one worker.

    Attributes:
        batches: Done so far.
        paths: What the last jobs of each phase used.
    """

    def __init__(
        self,
        client: Client,
        region: Region,
        place: Place,
        step: Step,
        settings: Settings,
        seed: int,
    ) -> None:
        """Prepares it.

        Args:
            client: That submits.
            region: Source of what is written, destination of what is read; ``step.length`` bytes.
            place: The other end.
            step: What to do.
            settings: Of the run.
            seed: Of the order of pages.
        """
        self._client = client
        self._region = region
        self._place = place
        self._step = step
        self._settings = settings
        self._build = getattr(self, f"_{step.operation}")
        self._single = step.operation == "write" and step.batch == 1
        order = random.Random(seed)
        self._src_pages = order.sample(range(step.batch), step.batch)
        self._dst_pages = order.sample(range(step.batch), step.batch)
        self.batches = 0
        self.touched = 0
        self.paths: set[Any] = set()

    def fill(self, pattern: Pattern) -> None:
        """Makes the source such that the pattern is at the destination afterwards."""
        step, view = self._step, self._region.view
        if step.operation != "pages":
            pattern.fill(view)
            return
        size = step.size
        for slot in range(step.slots):
            first = slot * step.slot_bytes
            there = memoryview(pattern.at(first, step.slot_bytes))
            for src, dst in zip(self._src_pages, self._dst_pages, strict=True):
                at = first + src * size
                view[at : at + size] = there[dst * size : (dst + 1) * size]

    # ---- the jobs of a batch ----

    def _write(self, slot: int) -> list[Operation]:
        step, place, region = self._step, self._place, self._region
        first = slot * step.slot_bytes
        return [
            Write(
                src=region[at : at + step.size],
                dst=place.descriptor,
                dst_offset=place.base + at,
                imm=place.imm,
                checksum=self._settings.checksum,
                priority=self._settings.priority,
            )
            for at in range(first, first + step.slot_bytes, step.size)
        ]

    def _pages(self, slot: int) -> list[Operation]:
        step, place = self._step, self._place
        first = slot * step.slot_bytes
        return [
            WritePages(
                src=self._region,
                src_pages=array("i", self._src_pages),
                dst=place.descriptor,
                dst_pages=array("i", self._dst_pages),
                page_bytes=step.size,
                imm=place.imm,
                src_offset=first,
                dst_offset=place.base + first,
                checksum=self._settings.checksum,
                priority=self._settings.priority,
            )
        ]

    def _read(self, slot: int) -> list[Operation]:
        step, place, region = self._step, self._place, self._region
        first = slot * step.slot_bytes
        return [
            Read(
                src=place.descriptor,
                dst=region[at : at + step.size],
                src_offset=place.base + at,
                priority=self._settings.priority,
            )
            for at in range(first, first + step.slot_bytes, step.size)
        ]

    def _scatter(self, slot: int) -> list[Operation]:
        step, place = self._step, self._place
        first = slot * step.slot_bytes
        return [
            Scatter(
                src=self._region,
                targets=[
                    (place.descriptor, at, place.base + at, step.size)
                    for at in range(first, first + step.slot_bytes, step.size)
                ],
                imm=place.imm,
                checksum=self._settings.checksum,
                priority=self._settings.priority,
            )
        ]

    def _imm(self, _: int) -> list[Operation]:
        place, priority = self._place, self._settings.priority
        one = Imm(dst=place.descriptor, imm=place.imm, priority=priority)
        return [one] * self._step.batch

    def _post(self, batch: Sequence[Operation]) -> list[Job]:
        if not self._single:
            return self._client.submit(batch)
        one = batch[0]
        assert isinstance(one, Write)
        return [
            self._client.write(
                cast("RegionSlice", one.src),
                one.dst,
                one.dst_offset,
                imm=one.imm,
                checksum=one.checksum,
                priority=one.priority,
            )
        ]

    # ---- phases ----

    def warm_up(self) -> None:
        """Does some batches that nobody times."""
        for number in range(self._settings.warm_up):
            for job in self._post(self._build(number % self._step.slots)):
                job.wait()
        self._done(self._settings.warm_up)

    def latency(self) -> Samples:
        """Does batches one at a time, and times each."""
        samples = Samples([], [], [])
        now, slots, jobs = time.monotonic_ns, self._step.slots, []
        wanted = self._settings.iterations
        until = now() + int(self._settings.seconds * 1e9)
        count = 0
        while count < wanted if wanted else count < SAMPLES_MIN or now() < until:
            begun = now()
            batch = self._build(count % slots)
            made = now()
            jobs = self._post(batch)
            posted = now()
            for job in jobs:
                job.wait()
            ended = now()
            samples.prep.append(made - begun)
            samples.post.append(posted - made)
            samples.transfer.append(ended - posted)
            count += 1
            if count == SAMPLES_MAX:
                break
        self._done(count, jobs)
        return samples

    def rate(self) -> tuple[int, int, int]:
        """Does batches with several in flight.

        Returns:
            Their number, and when the first began and the last ended (ns of CLOCK_MONOTONIC).
        """
        slots, depth = self._step.slots, self._settings.in_flight
        wanted, now = self._settings.iterations, time.monotonic_ns
        ready = [self._build(slot) for slot in range(slots)]
        flying: deque[list[Job]] = deque()
        count = 0
        begun = now()
        until = begun + int(self._settings.seconds * 1e9)
        while count < wanted if wanted else count < 1 or now() < until:
            if len(flying) == depth:
                for job in flying.popleft():
                    job.wait()
            flying.append(self._post(ready[count % slots]))
            count += 1
        last = flying[-1]
        for jobs in flying:
            for job in jobs:
                job.wait()
        ended = now()
        self._done(count, last)
        return count, begun, ended

    def _done(self, count: int, jobs: Sequence[Job] = ()) -> None:
        self.batches += count
        self.touched = max(self.touched, min(count, self._step.slots))
        self.paths.update(job.path for job in jobs)
