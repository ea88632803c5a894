# SPDX-License-Identifier: Apache-2.0
"""When a helper is started, for whom, and for whom not."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from transferd.daemon import staging as stagings
from transferd.daemon.helper import HelperError
from transferd.daemon.staging import Staging, name_of

from support.hosts import eventually
from support.softcuda import SoftCuda, allocated, uuid
from support.staging import LENGTH, WAIT_S, of_handle, opened, refused, said, the_gpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.daemon.cuda import CudaMemory

    from support.fake_plane import FakePlane

pytestmark = pytest.mark.slow  # each starts processes


def nobodys(number: int) -> CudaMemory:
    """Memory of a GPU that there is not: what a client says of it is not believed."""
    return of_handle(number, bytes(64), gpu=number.to_bytes(16, "big"))


async def failed(staging: Staging, plane: FakePlane, memories: Sequence[CudaMemory]) -> None:
    """Copies need memories at once, and get none."""
    count = len(plane.said)
    for one in memories:
        staging.add(one)
        staging.needed(one.allocation)
    answers = (await said(plane, count + len(memories)))[count:]
    assert sorted(answers) == [("fail", one.allocation) for one in memories]
    for one in memories:
        await staging.forget(one)


async def test_for_gpus_that_there_are_not_one_process_looks_in_a_while(
    staging: Staging, plane: FakePlane, memory: CudaMemory
) -> None:
    await failed(staging, plane, [nobodys(i) for i in range(100, 200)])
    assert len(plane.stages) == 1
    (sought,) = staging
    assert "none of the 2 GPUs" in sought.reason
    await opened(staging, plane, memory)  # it has been seen: who lied costs it nothing
    assert len(plane.stages) == 2
    await failed(staging, plane, [nobodys(i) for i in range(200, 300)])
    assert len(plane.stages) == 2
    staging._look_after = 0.0  # a GPU may be there that was not
    await failed(staging, plane, [nobodys(i) for i in range(300, 400)])
    assert len(plane.stages) == 3
    assert {gpu.uuid for gpu in staging} == {memory.device_uuid, nobodys(300).device_uuid}
    assert staging.failures["unknown"].count == 300


async def test_what_is_asked_for_at_once_takes_one_task_for_each_gpu(
    staging: Staging, plane: FakePlane, memory: CudaMemory
) -> None:
    await opened(staging, plane, memory)
    before = len(staging._tasks)
    for i in range(100, 400):
        for one in (nobodys(i), of_handle(1000 + i, bytes(64))):
            staging.add(one)
            staging.needed(one.allocation)
    assert len(staging._tasks) == before + 2
    answers = (await said(plane, 601))[1:]
    assert sorted(number for _, number in answers) == [*range(100, 400), *range(1100, 1400)]
    assert {word for word, _ in answers} == {"fail"}
    await eventually(lambda: not staging._queues)


async def test_a_gpu_that_is_put_in_is_found(
    staging: Staging, plane: FakePlane, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SoftCuda(1)
    with allocated(other, LENGTH) as address:
        late = of_handle(2, other.handle(address), gpu=uuid(1))
        with monkeypatch.context() as patch:
            patch.setenv("SOFTCUDA_DEVICES", "1")
            await opened(staging, plane, memory)
        await failed(staging, plane, [late])
        assert len(plane.stages) == 1
        staging._look_after = 0.0
        staging.add(late)
        staging.needed(2)
        assert (await said(plane, len(plane.said) + 1))[-1] == ("set", 2)
        assert len(plane.stages) == 2


async def test_one_that_looks_in_vain_holds_up_no_gpu_that_was_seen(
    staging: Staging,
    plane: FakePlane,
    memory: CudaMemory,
    mute: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await opened(staging, plane, memory)
    staging._look_after = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", mute)
        strangers = [nobodys(i) for i in range(100, 120)]
        for one in strangers:
            staging.add(one)
            staging.needed(one.allocation)
        await eventually(lambda: len(plane.stages) == 2, WAIT_S)
    other = SoftCuda(1)
    with allocated(other, LENGTH) as address:
        real = of_handle(2, other.handle(address), gpu=uuid(1))
        staging.add(real)
        staging.needed(2)
        assert (await said(plane, 2))[1:] == [("set", 2)], "before any of those is refused"
        await staging.forget(real)


async def test_those_that_wait_for_one_that_looks_go_on_with_what_it_sees(
    staging: Staging, plane: FakePlane, cuda: SoftCuda, memory: CudaMemory
) -> None:
    other = SoftCuda(1)
    with allocated(other, LENGTH) as address:
        real = [memory, of_handle(2, other.handle(address), gpu=uuid(1))]
        for one in (nobodys(100), *real):
            staging.add(one)
            staging.needed(one.allocation)
        assert sorted(await said(plane, 3)) == [("fail", 100), ("set", 1), ("set", 2)]
        await staging.forget(real[1])


async def test_nothing_starts_for_copies_that_have_given_up(
    staging: Staging, plane: FakePlane, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await opened(staging, plane, memory)
    gpu = the_gpu(staging)
    plane.closing.clear()
    assert gpu.helper is not None
    gpu.helper.kill("test")  # and its end takes long
    monkeypatch.setattr(stagings, "READY_S", 0.05)
    staging.needed(1)
    assert (await said(plane, 2))[-1] == ("fail", 1)
    starting = gpu.starting
    assert starting is not None, "it waits for that end"
    monkeypatch.undo()
    plane.closing.set()
    await asyncio.wait([starting])
    with pytest.raises(HelperError, match="no copy waits"):
        starting.result()
    assert gpu.starts == 1
    assert stage.closed


async def test_one_that_is_ready_too_late_does_not_stay(
    staging: Staging, plane: FakePlane, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stagings, "IDLE_S", 0.01)
    monkeypatch.setattr(stagings, "READY_S", 0.001)
    await refused(staging, plane, memory)
    gpu = the_gpu(staging)
    await eventually(lambda: "was stopped" in gpu.reason and gpu.helper is None, WAIT_S)


async def test_the_log_is_not_flooded(
    staging: Staging, plane: FakePlane, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened(staging, plane, memory)
    with capture_logs() as logs:
        for _ in range(50):
            await failed(staging, plane, [of_handle(2, bytes(64)), nobodys(100)])
        of_memory = [entry for entry in logs if entry["event"] == "GPU memory cannot be staged"]
        names = {name_of(one.device_uuid) for one in (memory, nobodys(100))}
        assert {entry["gpu"] for entry in of_memory} == names
        assert len(of_memory) == 2
        for failures in staging.failures.values():
            assert failures.count == 50
            failures.not_before = 0.0
        await failed(staging, plane, [of_handle(2, bytes(64))])
        assert logs[-1]["unsaid"] == 49
