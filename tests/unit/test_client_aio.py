# SPDX-License-Identifier: Apache-2.0
"""The asyncio SDK against a fake daemon, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

import transferd
import transferd.aio
from transferd.native.names import Detail, JobStatus

from support.fake_daemon import ARENA_BYTES, FakeDaemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from pathlib import Path


@pytest.fixture
def fake(short_tmp: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(short_tmp)
    yield daemon
    daemon.close()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    def on_loop(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main)

    return on_loop


@contextlib.asynccontextmanager
async def attached(
    fake: FakeDaemon,
) -> AsyncIterator[tuple[transferd.aio.Client, transferd.aio.Region, transferd.aio.Grant]]:
    async with transferd.aio.Client(fake.address, timeout_s=5) as client:
        region = await client.alloc(8192)
        yield client, region, await region.grant(4096, 4096, imms=range(16))


def test_write_counts(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with attached(fake) as (client, region, grant):
            region.view[:5] = b"hello"
            await client.warm(grant.descriptor)
            job = await client.write(region[:5], grant.descriptor, 1, imm=2)
            assert await job is JobStatus.OK
            assert await job.wait(1) is JobStatus.OK
            counter = await client.counter(2)
            await counter.wait(1, timeout_s=5)
            assert bytes(region.view[4097:4102]) == b"hello"
            jobs = await client.submit(
                [transferd.Imm(dst=grant.descriptor, imm=3) for _ in range(100)], timeout_s=5
            )
            assert await asyncio.gather(*jobs) == [JobStatus.OK] * 100
            await (await client.counter(3)).wait(100, timeout_s=5)
            assert (await client.counter(50)).value == 0
            assert not fake.sessions[0].header.event_waiters
            await grant.fence([3, 4])
            await client.fence({grant: [5]})
            assert fake.fenced == [[(3, 2)], [(5, 1)]]
            fake.fence_ends[grant.id] = "STILL_COPIED"
            with pytest.raises(transferd.FencesFailed) as caught:
                await client.fence({grant: [5]})
            assert caught.value.failed[grant].reason == "STILL_COPIED"
            await grant.revoke()
            await region.close()

    run(main())


def test_many_wait_at_once(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with attached(fake) as (client, _, grant):
            fake.hold.add(1)
            jobs = [await client.imm(grant.descriptor, 1) for _ in range(20)]
            counter = await client.counter(1)
            waits = [asyncio.create_task(job.wait(5)) for job in jobs]
            waits += [asyncio.create_task(counter.wait(n, 5)) for n in (1, 20)]  # type: ignore[arg-type]
            await asyncio.sleep(0.02)
            assert not any(task.done() for task in waits)
            assert fake.sessions[0].header.event_waiters
            fake.release()
            await asyncio.gather(*waits)

    run(main())


def test_time_limits_and_cancel(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with attached(fake) as (client, _, grant):
            fake.hold.add(1)
            job = await client.imm(grant.descriptor, 1)
            with pytest.raises(transferd.WaitTimeout):
                await job.wait(0.01)
            counter = await client.counter(1)
            with pytest.raises(transferd.WaitTimeout):
                await counter.wait(1, timeout_s=0.01)
            waiting = asyncio.create_task(job.wait())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await job.cancel(5) is JobStatus.CANCELLED
            with pytest.raises(transferd.JobFailed):
                await job

    run(main())


def test_back_pressure_does_not_block_the_loop(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with attached(fake) as (client, _, grant):
            fake.hold.add(1)
            jobs = [await client.imm(grant.descriptor, 1) for _ in range(fake.records)]
            with pytest.raises(transferd.WaitTimeout, match="no room"):
                await client.imm(grant.descriptor, 1, timeout_s=0.02)
            asyncio.get_running_loop().call_later(0.02, fake.release)
            assert await (await client.imm(grant.descriptor, 2)) is JobStatus.OK
            await asyncio.gather(*jobs)

    run(main())


def test_faults_and_failures(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with attached(fake) as (client, _, grant):
            counter = await client.counter(3)
            waiting = asyncio.create_task(counter.wait(1))
            await asyncio.sleep(0.01)
            fake.sessions[0].fault(3, 1)
            with pytest.raises(transferd.CounterFault):
                await waiting
            await counter.acknowledge()
            fake.refuse[4] = (JobStatus.PEER_LOST, Detail.HEARTBEAT)
            with pytest.raises(transferd.PeerLost):
                await (await client.imm(grant.descriptor, 4))
            assert await (await client.imm(grant.descriptor, 5)) is JobStatus.OK
            assert fake.calls.count("OpenDescriptors") == 2

    run(main())


def test_callbacks_run_in_the_loop(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with attached(fake) as (client, _, grant):
            fake.hold.add(1)
            called: list[transferd.aio.Job] = []
            job = await client.imm(grant.descriptor, 1)
            job.add_done_callback(called.append)
            fake.release()
            await job.wait(5)
            await asyncio.sleep(0.01)
            assert called == [job]

    run(main())


def test_daemon_gone(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with attached(fake) as (client, _, grant):
            fake.hold.add(1)
            job = await client.imm(grant.descriptor, 1)
            tasks = [
                asyncio.create_task(job.wait()),
                asyncio.create_task((await client.counter(1)).wait(1)),
            ]
            await asyncio.sleep(0.01)
            started = time.monotonic()
            fake.end_sessions()
            for task in tasks:
                with pytest.raises(transferd.Unavailable, match="an operator"):
                    await task
            assert time.monotonic() - started < 1
            with pytest.raises(transferd.Unavailable):
                await client.imm(grant.descriptor, 1)

    run(main())


def test_close_wakes_tasks(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        client = transferd.aio.Client(fake.address)
        with pytest.raises(transferd.Unavailable, match="not open"):
            await client.alloc(1)
        async with client:
            counter = await client.counter(1)
            waiting = asyncio.create_task(counter.wait(1))
            await asyncio.sleep(0.01)
        with pytest.raises(transferd.Unavailable, match="closed"):
            await waiting
        await client.close()
        assert client.closed
        with pytest.raises(transferd.Unavailable, match="closed"):
            await client.alloc(4096)

    run(main())


def test_a_full_arena_does_not_block_the_loop(fake: FakeDaemon, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with attached(fake) as (client, region, grant):
            fake.hold.add(1)
            index = [0] * (ARENA_BYTES // 16)
            dst = grant.descriptor
            jobs = [await client.write_pages(region, index, dst, index, 1, imm=1) for _ in range(2)]
            with pytest.raises(transferd.WaitTimeout, match="no room"):
                await client.barrier([dst], imm=2, timeout_s=0.02)
            with pytest.raises(transferd.InvalidRequest, match="a job has at most"):
                await client.write_pages(region, index * 3, dst, index * 3, 1, imm=1)
            asyncio.get_running_loop().call_later(0.02, fake.release)
            group = await client.peer_group([dst])
            for job in (
                await client.scatter(region, [(0, 0, 0, 8)], imm=2, group=group),
                await client.barrier(group, imm=2),
                await client.read(dst, region[:8]),
                await client.write(region[:8], dst, imm=2, exact=True),
            ):
                assert await job is JobStatus.OK
            await asyncio.gather(*jobs)

    run(main())
