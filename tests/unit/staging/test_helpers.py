# SPDX-License-Identifier: Apache-2.0
"""Helpers of GPUs by the control plane: real processes, on a GPU that is none."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from transferd.daemon import helper as helpers
from transferd.daemon import staging as stagings
from transferd.daemon.helper import MESSAGE, Helper, Kind, message
from transferd.daemon.plane import STAGE_TO_GPU as TO_GPU
from transferd.daemon.plane import STAGE_TO_HOST as TO_HOST
from transferd.daemon.plane import StageStat
from transferd.daemon.staging import Staging
from transferd.native._gpu import ffi, lib

from support.fake_stages import POOL_BYTES
from support.hosts import eventually
from support.softcuda import CHUNK, OUT_OF_MEMORY, Faults, SoftCuda, allocated, mapped_by, uuid
from support.staging import LENGTH, WAIT_S, of_handle, opened, refused, said, the_gpu

if TYPE_CHECKING:
    from typing import Any

    from transferd.daemon.cuda import CudaMemory

    from support.fake_plane import FakePlane

ENOENT = 2

pytestmark = pytest.mark.slow  # each starts processes


def test_messages_are_those_of_the_helper() -> None:
    assert ffi.sizeof("struct tfd_gpu_message") == MESSAGE.size
    assert helpers.CHUNKS == lib.TFD_GPU_CHUNKS
    assert helpers.SEEN == lib.TFD_GPU_SEEN
    assert {kind.name: int(kind) for kind in Kind} == {
        name: int(getattr(lib, f"TFD_GPU_{name}")) for name in Kind.__members__
    }
    raw = message(Kind.OPEN, 7, size=9, more=True, ipc_handle=b"h" * 64, chunks=(4, 5))
    native = ffi.from_buffer("struct tfd_gpu_message *", bytearray(raw))
    assert (native.type, native.memory, native.bytes) == (lib.TFD_GPU_OPEN, 7, 9)
    assert (native.chunk_count, native.more, bytes(native.ipc_handle)) == (2, 1, b"h" * 64)
    assert list(native.chunk_bytes[0:3]) == [4, 5, 0]


async def test_copies_both_ways(
    staging: Staging, plane: FakePlane, cuda: SoftCuda, address: int, memory: CudaMemory
) -> None:
    stage = await opened(staging, plane, memory)
    device = cuda.bytes_at(address, LENGTH)
    device[100:164] = bytes(range(64))
    assert stage.copy(TO_HOST, 1, 100, 4096, 64) == 0
    assert stage.pool[4096:4160] == bytes(range(64))
    stage.pool[0:3] = b"abc"
    assert stage.copy(TO_GPU, 1, LENGTH - 3, 0, 3) == 0
    assert device[-3:].tobytes() == b"abc"
    gpu = the_gpu(staging)
    assert staging.stat(gpu) == StageStat(copies_out=1, copies_in=1)
    assert (gpu.state, gpu.starts, gpu.name[:4]) == ("READY", 1, "GPU-")
    assert gpu.helper is not None
    assert (gpu.helper.gpu_name, gpu.helper.driver) == ("softcuda 0", 13_000)


async def test_nothing_starts_without_need(
    staging: Staging, plane: FakePlane, memory: CudaMemory
) -> None:
    assert staging.add(memory) == 1
    await staging.forget(memory)
    staging.needed(1)  # its session ends: what waits for it fails
    assert await said(plane, 2) == [("forget", 1), ("fail", 1)]
    await staging.forget(memory)  # it has ended
    assert plane.said[2:] == [("forget", 1)]
    assert not list(staging)


async def test_where_nothing_is_staged_memory_has_no_number(
    plane: FakePlane, memory: CudaMemory
) -> None:
    staging = Staging(plane, enabled=False)
    assert staging.add(memory) == 0
    await staging.forget(memory)
    assert not plane.said


async def test_forgotten_memory_is_unmapped(
    staging: Staging, plane: FakePlane, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stagings, "IDLE_S", 0.01)
    stage = await opened(staging, plane, memory)
    gpu = the_gpu(staging)
    assert gpu.helper is not None
    pid = gpu.helper.pid
    assert mapped_by(pid) == 1
    await staging.forget(memory)
    assert mapped_by(pid) == 0
    assert plane.said[-1] == ("forget", 1)
    assert stage.copy(TO_HOST, 1, 0, 0, 8) == ENOENT
    await eventually(lambda: gpu.helper is None, WAIT_S)  # it has nothing to do, and gives its own
    assert stage.closed
    await opened(staging, plane, memory)
    assert gpu.starts == 2


async def test_chunks_by_many_messages(staging: Staging, plane: FakePlane, cuda: SoftCuda) -> None:
    count = 130
    base, fds = cuda.chunks(count)
    memory = of_handle(3, b"", size=count * CHUNK)
    memory.chunk_bytes, memory.chunk_fds = [CHUNK] * count, fds
    stage = await opened(staging, plane, memory)
    device = cuda.bytes_at(base, count * CHUNK)
    at = 100 * CHUNK - 5  # over the seam of two
    device[at : at + 10] = b"0123456789"
    assert stage.copy(TO_HOST, 3, at, 0, 10) == 0
    assert stage.pool[:10] == b"0123456789"
    await staging.forget(memory)
    gpu = the_gpu(staging)
    assert gpu.helper is not None
    assert mapped_by(gpu.helper.pid) == 0
    cuda.unmap(base, count * CHUNK, fds)


async def test_memory_that_is_forgotten_while_it_is_opened(
    staging: Staging, plane: FakePlane, cuda: SoftCuda, memory: CudaMemory
) -> None:
    await opened(staging, plane, memory)
    helper = the_gpu(staging).helper
    assert helper is not None
    os.kill(helper.pid, signal.SIGSTOP)
    with allocated(cuda, LENGTH) as address:
        other = of_handle(2, cuda.handle(address))
        staging.add(other)
        staging.needed(2)
        await asyncio.sleep(0)  # it asks
        await staging.forget(other)
        staging.needed(2)  # a copy that came to it since then
        os.kill(helper.pid, signal.SIGCONT)
        assert (await said(plane, 3))[1:] == [("forget", 2), ("fail", 2)]
        assert mapped_by(helper.pid) == 1


def in_chunks(number: int, fds: list[int]) -> CudaMemory:
    memory = of_handle(number, b"", size=len(fds) * CHUNK)
    memory.chunk_bytes, memory.chunk_fds = [CHUNK] * len(fds), fds
    return memory


async def test_chunks_that_are_closed_before_their_turn(
    staging: Staging, plane: FakePlane, cuda: SoftCuda, memory: CudaMemory
) -> None:
    stage = await opened(staging, plane, memory)
    helper = the_gpu(staging).helper
    assert helper is not None
    os.kill(helper.pid, signal.SIGSTOP)
    base, fds = cuda.chunks(2)
    with allocated(cuda, LENGTH) as address:
        for other in (of_handle(2, cuda.handle(address)), cut := in_chunks(3, [*fds])):
            staging.add(other)
            staging.needed(other.allocation)
            await asyncio.sleep(0)  # it asks, or waits for its turn to
        cut.close_chunks()  # its owner's session ends
        os.kill(helper.pid, signal.SIGCONT)
        assert (await said(plane, 3))[1:] == [("set", 2), ("fail", 3)]
        assert stage.copy(TO_HOST, 1, 0, 0, 8) == 0, "it costs nobody else anything"
        assert mapped_by(helper.pid) == 2
        await staging.forget(cut)
    cuda.unmap(base, 2 * CHUNK, [])


async def test_of_chunks_that_cannot_all_be_had_none_stays_mapped(
    staging: Staging, plane: FakePlane, cuda: SoftCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = helpers.CHUNKS + 2
    base, fds = cuda.chunks(count)
    memory = in_chunks(3, fds)
    ask = Helper._ask

    async def end_after(helper: Helper, *what: Any) -> None:
        await ask(helper, *what)
        memory.close_chunks()  # its owner's session ends between two messages

    monkeypatch.setattr(Helper, "_ask", end_after)
    await refused(staging, plane, memory)
    helper = the_gpu(staging).helper
    assert helper is not None
    assert mapped_by(helper.pid) == 0
    cuda.unmap(base, count * CHUNK, [])


async def test_one_that_ends_when_it_has_opened_memory_fails_what_waits(
    staging: Staging, plane: FakePlane, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = Helper.open

    async def open_and_end(helper: Helper, memory: CudaMemory) -> None:
        await opens(helper, memory)
        helper.kill("test")

    with monkeypatch.context() as patch:
        patch.setattr(Helper, "open", open_and_end)
        await refused(staging, plane, memory)
    await opened(staging, plane, memory)


async def test_one_that_could_open_nothing_does_not_stay(
    staging: Staging, plane: FakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stagings, "IDLE_S", 0.01)
    await refused(staging, plane, of_handle(1, bytes(64)))
    gpu = the_gpu(staging)
    assert gpu.starts == 1
    await eventually(lambda: gpu.helper is None, WAIT_S)


async def test_memory_that_cannot_be_opened_costs_nobody_else(
    staging: Staging, plane: FakePlane, cuda: SoftCuda, memory: CudaMemory
) -> None:
    stage = await opened(staging, plane, memory)
    gone = cuda.malloc(LENGTH)
    handle = cuda.handle(gone)
    cuda.free(gone)
    await refused(staging, plane, of_handle(2, handle))  # freed
    await refused(staging, plane, of_handle(3, bytes(64)))  # nobody's
    await refused(staging, plane, of_handle(4, memory.ipc_handle, size=2 * LENGTH))  # longer
    await refused(staging, plane, of_handle(5, b""))  # its owner gave a dma-buf alone
    cut = of_handle(6, b"", size=CHUNK)
    cut.chunk_bytes, cut.chunk_fds = [CHUNK], []
    await refused(staging, plane, cut)  # its owner's session is ending
    assert stage.copy(TO_HOST, 1, 0, 0, LENGTH) == 0
    assert the_gpu(staging).starts == 1


async def test_another_gpu_has_a_helper_of_its_own(
    staging: Staging, plane: FakePlane, memory: CudaMemory
) -> None:
    await opened(staging, plane, memory)
    other = SoftCuda(1)
    with allocated(other, LENGTH) as address:
        far = of_handle(2, other.handle(address), gpu=uuid(1))
        staging.add(far)
        staging.needed(2)
        assert (await said(plane, 2))[-1] == ("set", 2)
        assert len(list(plane.open_stages())) == 2
        await staging.forget(far)


async def test_a_helper_that_is_killed_is_started_again(
    staging: Staging, plane: FakePlane, memory: CudaMemory
) -> None:
    first = await opened(staging, plane, memory)
    assert first.copy(TO_HOST, 1, 0, 0, 8) == 0
    gpu = the_gpu(staging)
    assert gpu.helper is not None
    plane.closing.clear()
    os.kill(gpu.helper.pid, signal.SIGKILL)
    await eventually(lambda: first.closed, WAIT_S)
    assert staging.stat(gpu).copies_out == 1, "its counts are told while it is closed, too"
    plane.closing.set()
    second = await opened(staging, plane, memory)
    assert second.copy(TO_HOST, 1, 0, 0, 8) == 0
    assert gpu.starts == 2
    assert gpu.reason == "the GPU's helper has ended"
    assert staging.stat(gpu).copies_out == 2


async def test_a_gpu_that_is_lost_costs_the_helper_alone(
    staging: Staging, plane: FakePlane, memory: CudaMemory, faults: Faults
) -> None:
    first = await opened(staging, plane, memory)
    faults.set("context", 700)
    first.request(TO_HOST, 1, 0, 0, 8)
    await eventually(lambda: first.closed, WAIT_S)
    gpu = the_gpu(staging)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in gpu.reason
    second = await opened(staging, plane, memory)
    assert second.copy(TO_HOST, 1, 0, 0, 8) == 0
    assert not faults.left()


async def test_one_that_keeps_dying_is_started_less_and_less(
    staging: Staging, plane: FakePlane, memory: CudaMemory, faults: Faults
) -> None:
    faults.set("cuMemHostRegister_v2", OUT_OF_MEMORY, always=True)
    await refused(staging, plane, memory)
    gpu = the_gpu(staging)
    assert "lower gpu.staging_bytes" in gpu.reason
    assert gpu.pause == 2 * stagings.PAUSE_S
    gpu.pause = stagings.PAUSE_MAX_S
    await refused(staging, plane, memory)
    assert gpu.starts == 2
    await refused(staging, plane, memory)
    assert gpu.starts == 2, "it is not due for half a minute"
    faults.clear("cuMemHostRegister_v2")
    gpu.not_before = 0.0
    stage = await opened(staging, plane, memory)
    assert stage.copy(TO_HOST, 1, 0, 0, 8) == 0


@pytest.mark.parametrize(
    ("library", "version", "reason"),
    [
        ("/nowhere/libcuda.so.1", "", "host memory works without it"),
        ("", "11040", "the driver here is of CUDA 11.4, staging needs 12.0 or later"),
    ],
)
async def test_a_driver_that_is_of_no_use(
    plane: FakePlane,
    cuda: SoftCuda,
    memory: CudaMemory,
    library: str,
    version: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if version:
        monkeypatch.setenv("SOFTCUDA_VERSION", version)
    staging = Staging(plane, enabled=True, library=library or cuda.path)
    await refused(staging, plane, memory)
    assert reason in the_gpu(staging).reason
    await staging.aclose()


async def test_one_that_does_not_answer_is_ended(
    staging: Staging,
    plane: FakePlane,
    cuda: SoftCuda,
    memory: CudaMemory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(helpers, "ASK_S", 0.2)
    first = await opened(staging, plane, memory)
    gpu = the_gpu(staging)
    assert gpu.helper is not None
    os.kill(gpu.helper.pid, signal.SIGSTOP)
    with allocated(cuda, LENGTH) as address:
        await refused(staging, plane, of_handle(2, cuda.handle(address)))
    await eventually(lambda: first.closed, WAIT_S)
    assert "did not answer" in gpu.reason
    second = await opened(staging, plane, memory)
    os.kill(gpu.helper.pid if gpu.helper is not None else 0, signal.SIGSTOP)
    staging.silent(2)  # what the data plane says of copies that do not get on
    await eventually(lambda: second.closed, WAIT_S)
    assert "did not get on" in gpu.reason


async def test_one_that_cannot_let_go_of_memory_takes_it_along(
    staging: Staging, plane: FakePlane, memory: CudaMemory, faults: Faults
) -> None:
    stage = await opened(staging, plane, memory)
    faults.set("cuIpcCloseMemHandle", 1)
    await staging.forget(memory)
    await eventually(lambda: stage.closed, WAIT_S)
    assert "could not let go of memory: cuIpcCloseMemHandle failed" in the_gpu(staging).reason


async def test_memory_is_opened_once(
    staging: Staging, plane: FakePlane, memory: CudaMemory
) -> None:
    staging.add(memory)
    for _ in range(3):
        staging.needed(1)
    assert await said(plane, 1) == [("set", 1)]
    assert the_gpu(staging).starts == 1


async def test_one_that_never_gets_ready(
    staging: Staging,
    plane: FakePlane,
    memory: CudaMemory,
    mute: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(helpers, "START_S", 0.2)
    monkeypatch.setattr(sys, "executable", mute)
    await refused(staging, plane, memory)
    assert "was not ready within" in the_gpu(staging).reason
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    staging._look_after = 0.0
    await refused(staging, plane, memory)


async def test_no_fd_is_left(staging: Staging, plane: FakePlane, memory: CudaMemory) -> None:
    stage = await opened(staging, plane, memory)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        gpu = the_gpu(staging)
        assert gpu.helper is not None
        gpu.helper.kill("test")
        await eventually(lambda: stage.closed, WAIT_S)  # noqa: B023 - it is awaited here
        stage.ring.close()
        stage.pool.close()
        stage = await opened(staging, plane, memory)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert stage.copy(TO_HOST, 1, 0, POOL_BYTES - 8, 8) == 0
