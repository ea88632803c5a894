# SPDX-License-Identifier: Apache-2.0
"""Staging of a data plane that lives in memory: real rings for real helpers, and no worker."""

from __future__ import annotations

import asyncio
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transferd.daemon.plane import STAGE_TO_GPU, STAGE_TO_HOST, StageFds, StageStat
from transferd.native._gpu import ffi, lib

from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

POOL_BYTES = 4 << 20
assert (STAGE_TO_HOST, STAGE_TO_GPU) == (lib.TFD_STAGE_D2H, lib.TFD_STAGE_H2D)


@dataclass
class FakeStage:
    """Rings of a helper, as a worker has them."""

    ring: mmap.mmap
    pool: mmap.mmap
    wake: int
    shared: Any
    closed: bool = False

    def request(self, number: int, memory: int, offset: int, pool_offset: int, length: int) -> int:
        """Asks for a copy; returns how many were asked for by this ring."""
        ring = self.shared.rings[number]
        tail = int(ring.tail)
        entry = ring.entries[tail % lib.TFD_STAGE_ENTRIES]
        entry.memory, entry.offset, entry.pool_offset = memory, offset, pool_offset
        entry.bytes, entry.rows, entry.stride = length, 1, length
        ring.tail = tail + 1
        os.eventfd_write(self.wake, 1)
        return tail + 1

    def copy(self, number: int, memory: int, offset: int, pool_offset: int, length: int) -> int:
        """Has a range copied; returns the entry's status."""
        count = self.request(number, memory, offset, pool_offset, length)
        ring = self.shared.rings[number]
        eventually(lambda: ring.done == count, "the helper has copied")
        return int(ring.status[(count - 1) % lib.TFD_STAGE_ENTRIES])


class FakeStages:
    """The part of the plane.

    Attributes:
        stages: By name.
        said: What was said of which memory, in order.
        closing: Cleared: closing one takes long.
    """

    def __init__(self) -> None:
        self.stages: dict[int, FakeStage] = {}
        self.said: list[tuple[str, int]] = []
        self.closing = asyncio.Event()
        self.closing.set()

    async def stage_open(self) -> tuple[int, StageFds]:
        ring, pool = (os.memfd_create(name) for name in ("ring", "pool"))
        os.ftruncate(ring, ffi.sizeof("struct tfd_stage"))
        os.ftruncate(pool, POOL_BYTES)
        wake = os.eventfd(0)
        mapped = mmap.mmap(ring, ffi.sizeof("struct tfd_stage"))
        shared = ffi.cast("struct tfd_stage *", ffi.from_buffer(mapped))
        shared.magic, shared.version = lib.TFD_STAGE_MAGIC, lib.TFD_STAGE_VERSION
        shared.pool_bytes = POOL_BYTES
        number = len(self.stages) + 1
        self.stages[number] = FakeStage(mapped, mmap.mmap(pool, POOL_BYTES), os.dup(wake), shared)
        return number, StageFds(ring, pool, wake)

    async def stage_close(self, stage: int) -> None:
        assert not self.stages[stage].closed
        self.stages[stage].closed = True
        await self.closing.wait()
        os.close(self.stages[stage].wake)

    def stage_memory_set(self, memory: int, stage: int) -> None:
        assert not self.stages[stage].closed
        self.said.append(("set", memory))

    def stage_memory_fail(self, memory: int) -> None:
        self.said.append(("fail", memory))

    def stage_memory_forget(self, memory: int) -> None:
        self.said.append(("forget", memory))

    def stage_stat(self, stage: int) -> StageStat:
        assert not self.stages[stage].closed
        out, to_gpu = (self.stages[stage].shared.rings[i] for i in (STAGE_TO_HOST, STAGE_TO_GPU))
        return StageStat(copies_out=int(out.done), copies_in=int(to_gpu.done))

    def open_stages(self) -> Iterator[int]:
        """Those of helpers that have not ended."""
        return (number for number, stage in self.stages.items() if not stage.closed)
