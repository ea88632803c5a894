# SPDX-License-Identifier: Apache-2.0
"""Staging by the control plane, on a data plane that is none: what its tests do again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transferd.daemon.cuda import CudaMemory
from transferd.daemon.region import Kind as MemoryKind

from support.hosts import eventually
from support.softcuda import MIB, uuid

if TYPE_CHECKING:
    from transferd.daemon.staging import Gpu, Staging

    from support.fake_plane import FakePlane
    from support.fake_stages import FakeStage

WAIT_S = 20.0
LENGTH = MIB


def of_handle(number: int, handle: bytes, size: int = LENGTH, gpu: bytes = b"") -> CudaMemory:
    """Memory that its owner has given an IPC handle of."""
    return CudaMemory(
        memory_id=number,
        fd=-1,
        size=size,
        kind=MemoryKind.CUDA,
        sealed=True,
        writable=True,
        allocation=number,
        device_uuid=gpu or uuid(),
        base=1 << 20,
        buffer_id=number,
        ipc_handle=handle,
    )


async def said(plane: FakePlane, count: int) -> list[tuple[str, int]]:
    """What the data plane was told, once that is so much."""
    await eventually(lambda: len(plane.said) >= count, WAIT_S)
    return plane.said


async def opened(staging: Staging, plane: FakePlane, memory: CudaMemory) -> FakeStage:
    """A copy needs a memory; the rings of the helper that has it."""
    count = len(plane.said)
    staging.add(memory)
    staging.needed(memory.allocation)
    assert (await said(plane, count + 1))[-1] == ("set", memory.allocation)
    (number,) = plane.open_stages()
    return plane.stages[number]


async def refused(staging: Staging, plane: FakePlane, memory: CudaMemory) -> None:
    """A copy needs a memory, and does not get it."""
    count = len(plane.said)
    staging.add(memory)
    staging.needed(memory.allocation)
    assert (await said(plane, count + 1))[-1] == ("fail", memory.allocation)
    gpu = the_gpu(staging)
    if gpu.helper is None or gpu.helper.reason:  # it goes
        await eventually(lambda: gpu.helper is None, WAIT_S)


def the_gpu(staging: Staging) -> Gpu:
    """The one that there is."""
    (gpu,) = staging
    return gpu
