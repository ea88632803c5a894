# SPDX-License-Identifier: Apache-2.0
"""The asyncio face of the SDK: the same names as :mod:`transferd.client`, awaited.

Submitting and looking stay plain native calls of about a microsecond. Ends and counts come through
the session's events fd, which the loop reads itself. Control calls run in a small executor of the
Client's.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from transferd.client import errors
from transferd.client.adopt import adopt
from transferd.client.aiocalls import AsyncCalls
from transferd.client.closing import AsyncClosing
from transferd.client.connect import Options, open_session
from transferd.client.counter import BaseCounter, to_target
from transferd.client.cuda.arrays import device_array
from transferd.client.events import LoopDriver, ThreadDriver
from transferd.client.grant import BaseGrant, fence_all
from transferd.client.job import BaseJob, Imm, Write, to_imm
from transferd.client.memory import BaseRegion, RegionSlice, allocate, register_device
from transferd.client.operations import to_requests
from transferd.client.session import to_descriptor
from transferd.native.names import JobStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from typing import Self

    from transferd.client.cuda.mapping import DevicePointer
    from transferd.client.events import Driver
    from transferd.client.operations import Operation
    from transferd.client.session import Request, Session

T = TypeVar("T")

THREADS = 4  # control calls at once; each waits for the daemon, none computes
WAIT_THREADS = 64  # calls at once that wait for others: none of them keeps a control call waiting
FULL_SLEEP_S = 0.0005  # how often a full ring is tried again


class _Runtime:
    """What the objects of one Client share: session, driver, executor."""

    def __init__(
        self, session: Session, loop: asyncio.AbstractEventLoop, pool: ThreadPoolExecutor
    ) -> None:
        self.session = session
        self.loop = loop
        self.pool = pool
        self._waits: ThreadPoolExecutor | None = None
        self.driver: Driver
        if session.event_fd is None:
            self.driver = _PostingDriver(session, loop)
        else:
            self.driver = LoopDriver(session, session.event_fd, loop)

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Runs a control call."""
        return await self._run(self.pool, call, *arguments)

    async def run_wait(self, call: Callable[..., T], *arguments: Any) -> T:
        """Runs a call that answers when somebody else has done something."""
        if self._waits is None:
            self._waits = ThreadPoolExecutor(WAIT_THREADS, thread_name_prefix="transferd-wait")
        return await self._run(self._waits, call, *arguments)

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return await self.loop.run_in_executor(pool, call, *arguments)
        except RuntimeError:
            if self.session.closed:  # the executor is shut
                raise self.session.over() from None
            raise

    def shut(self) -> None:
        """Lets the threads go; calls that are under way end by themselves."""
        self.pool.shutdown(wait=False)
        if self._waits is not None:
            self._waits.shutdown(wait=False)

    async def until(self, look: Callable[[], bool], timeout_s: float | None) -> None:
        """Waits until ``look()`` is true; it is called in whatever thread watches."""
        future: asyncio.Future[None] = self.loop.create_future()

        def watch() -> bool:
            if future.cancelled():
                return True
            try:
                if not look():
                    return False
            except Exception as error:
                self._settle(future, error)
            else:
                self._settle(future, None)
            return True

        self.driver.add(watch)
        async with asyncio.timeout(timeout_s):
            await future

    def _settle(self, future: asyncio.Future[None], error: Exception | None) -> None:
        def settle() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        if isinstance(self.driver, LoopDriver):
            settle()
        else:
            self.loop.call_soon_threadsafe(settle)


class _PostingDriver(ThreadDriver):
    """Watches from a thread (there is no events fd), but calls users' callbacks in the loop."""

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(session)
        self.loop = loop


class Job(BaseJob):
    """A job of a :class:`transferd.aio.Client`. ``await job`` is ``await job.wait()``."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: _Runtime, job_id: int, dst: bytes | tuple[bytes, ...]) -> None:
        super().__init__(runtime.session, runtime.driver, job_id, dst)
        self._runtime = runtime

    def __await__(self) -> Generator[Any, None, JobStatus]:
        return self.wait().__await__()

    async def wait(self, timeout_s: float | None = None) -> JobStatus:
        """Waits until the job has ended. As :meth:`transferd.Job.wait`."""
        await self._wait(timeout_s)
        return self._check()

    async def cancel(self, timeout_s: float | None = None) -> JobStatus:
        """Stops the job: a fence. As :meth:`transferd.Job.cancel`."""
        if not self._ended():
            await self._runtime.run(self._session.job_cancel, self.id)
            await self._wait(timeout_s)
        return self.status

    def add_done_callback(self, callback: Callable[[Self], object]) -> None:
        """Has ``callback(job)`` called once in the event loop. As with :class:`transferd.Job`."""
        driver = self._driver
        if not isinstance(driver, _PostingDriver):
            super().add_done_callback(callback)
            return

        def post(job: Self) -> None:
            driver.loop.call_soon_threadsafe(callback, job)

        super().add_done_callback(post)

    async def _wait(self, timeout_s: float | None) -> None:
        if self._session.shared_memory and self.status is not JobStatus.PENDING:
            return
        try:
            await self._runtime.until(lambda: self.status is not JobStatus.PENDING, timeout_s)
        except TimeoutError:
            raise errors.WaitTimeout(
                f"job {self.id} has not ended within {timeout_s:g} s"
            ) from None


class Counter(BaseCounter):
    """A counter of a :class:`transferd.aio.Client`.

    Without shared memory its properties block the loop for a millisecond, as they ask the daemon.
    """

    __slots__ = ("_runtime",)

    def __init__(self, runtime: _Runtime, imm: int) -> None:
        super().__init__(runtime.session, runtime.driver, imm)
        self._runtime = runtime

    async def wait(self, target: int, timeout_s: float | None = None) -> None:
        """Waits until ``value >= target``. As :meth:`transferd.Counter.wait`."""
        wanted = to_target(target)

        def look() -> bool:
            view = self.read()
            if view.value >= wanted:
                return True
            if view.faults > view.acknowledged:
                raise errors.CounterFault(
                    self.imm, value=view.value, faults=view.faults, lost=view.lost
                )
            self._session.check_open()
            return False

        if not (self._session.shared_memory and look()):
            try:
                await self._runtime.until(look, timeout_s)
            except TimeoutError:
                raise errors.WaitTimeout(
                    f"immediate {self.imm} has not reached {target} within {timeout_s:g} s"
                ) from None
        self._session.landed()

    async def acknowledge(self) -> None:
        """Takes all faults so far as seen."""
        await self._runtime.run(self._session.counter_acknowledge, self.imm)
        self._session.landed()


class Grant(BaseGrant):
    """A grant of a :class:`transferd.aio.Client`."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: _Runtime, *arguments: Any) -> None:
        super().__init__(runtime.session, *arguments)
        self._runtime = runtime

    async def revoke(self) -> None:
        """Takes the grant back: a fence. Idempotent."""
        await self._runtime.run(self._revoke)

    async def fence(self, imms: Iterable[int | range]) -> None:
        """Ends what was submitted on some immediates. As :meth:`transferd.Grant.fence`."""
        await self._runtime.run(self._fence, imms)


class Region(BaseRegion, AsyncClosing):
    """A region of a :class:`transferd.aio.Client`; an asynchronous context manager."""

    __slots__ = ("_runtime",)

    def __init__(
        self, runtime: _Runtime, handle: int, view: memoryview | None, **options: Any
    ) -> None:
        super().__init__(runtime.session, handle, view, **options)
        self._runtime = runtime

    async def grant(
        self,
        offset: int = 0,
        length: int | None = None,
        rights: Iterable[str] = ("write",),
        imms: Iterable[int] = (),
        expires_s: float | None = None,
    ) -> Grant:
        """Gives others the right to write. As :meth:`transferd.Region.grant`."""
        made = await self._runtime.run(self._grant, offset, length, rights, imms, expires_s)
        return Grant(self._runtime, *made)

    async def close(self) -> None:
        """Revokes its grants and deregisters it. Idempotent."""
        await self._runtime.run(self._close)


class Client(AsyncCalls[Job], AsyncClosing):
    """A session with this host's daemon, for one event loop: ``async with Client() as c``."""

    def __init__(
        self,
        address: str | None = None,
        *,
        name: str = "",
        shared_memory: bool | None = None,
        records: int = 0,
        counters: int = 0,
        timeout_s: float = 30.0,
    ) -> None:
        """Takes the arguments of :class:`transferd.Client`; attaches when entered or opened."""
        self._options = Options(
            address=address,
            name=name,
            shared_memory=shared_memory,
            records=records,
            counters=counters,
            timeout_s=timeout_s,
        )
        self._runtime_or_none: _Runtime | None = None
        self._counters: dict[int, Counter] = {}

    async def open(self) -> Self:
        """Attaches. Errors as for :class:`transferd.Client`."""
        if self._runtime_or_none is None:
            loop = asyncio.get_running_loop()
            pool = ThreadPoolExecutor(THREADS, thread_name_prefix="transferd")
            try:
                session = await loop.run_in_executor(pool, open_session, self._options)
            except BaseException:
                pool.shutdown(wait=False)
                raise
            runtime = _Runtime(session, loop, pool)
            session.on_end = runtime.driver.kick
            self._runtime_or_none = runtime
        return self

    @property
    def _runtime(self) -> _Runtime:
        if self._runtime_or_none is None:
            raise errors.Unavailable(
                "the Client is not open: use it in `async with`, or await its open()",
                reason="CLOSED",
            )
        return self._runtime_or_none

    # ---- what it is ----

    @property
    def session_id(self) -> int:
        """Number of the session, as transferctl shows it."""
        return self._runtime.session.session_id

    @property
    def shared_memory(self) -> bool:
        """Whether jobs go through shared memory; False: over gRPC."""
        return self._runtime.session.shared_memory

    @property
    def provider(self) -> str:
        """The daemon's provider, for people; empty without shared memory."""
        return self._runtime.session.provider

    @property
    def batch_limit(self) -> int:
        """Jobs that one :meth:`submit` hands over as a whole."""
        return self._runtime.session.batch_limit

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._runtime_or_none is not None and self._runtime_or_none.session.closed

    # ---- memory ----

    async def alloc(self, length: int, near: int | str | None = None, *, name: str = "") -> Region:
        """Makes and registers new host memory. As :meth:`transferd.Client.alloc`."""
        runtime = self._runtime
        handle, view = await runtime.run(allocate, runtime.session, length, near, name)
        return Region(runtime, handle, view, name=name)

    async def register(
        self, memory: Any, near: int | str | None = None, *, name: str = ""
    ) -> Region:
        """Registers a GPU tensor, or adopts host memory. As :meth:`transferd.Client.register`."""
        runtime = self._runtime
        array = device_array(memory)
        if array is not None:
            source = await runtime.run(register_device, runtime.session, array, near, name)
            return Region(
                runtime,
                source.handle,
                None,
                start=array.address - source.base,
                length=array.length,
                name=name,
                owner=memory,
                source=source,
            )
        handle, view, start = await runtime.run(adopt, runtime.session, memory, near, name)
        return Region(runtime, handle, view, start=start, name=name, owner=memory)

    async def map(self, dst: bytes, *, device: int | None = None) -> DevicePointer:
        """Maps GPU memory for the application's own kernels. As :meth:`transferd.Client.map`."""
        runtime = self._runtime
        return await runtime.run(runtime.session.gpu().map, to_descriptor(dst), device)

    # ---- jobs ----

    async def warm(self, *descriptors: bytes) -> None:
        """Opens descriptors ahead of the first use. As :meth:`transferd.Client.warm`."""
        runtime = self._runtime
        await runtime.run(runtime.session.open_many, descriptors)
        if runtime.session.gpu_or_none is not None:
            await runtime.run(runtime.session.gpu_or_none.warm, descriptors)

    async def write(
        self,
        src: Region | RegionSlice,
        dst: bytes,
        dst_offset: int = 0,
        *,
        imm: int,
        exact: bool = False,
        checksum: bool = False,
        priority: str = "bulk",
        deadline_s: float | None = None,
        stream: Any = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Writes a region, or part of one, into a grant. As :meth:`transferd.Client.write`."""
        spec = Write(
            src=src,
            dst=dst,
            imm=imm,
            dst_offset=dst_offset,
            exact=exact,
            checksum=checksum,
            priority=priority,
            deadline_s=deadline_s,
            stream=stream,
        )
        return (await self._submit([spec.request()], timeout_s))[0]

    async def imm(
        self,
        dst: bytes,
        imm: int,
        *,
        priority: str = "bulk",
        deadline_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Counts 1 on an immediate of a grant. As :meth:`transferd.Client.imm`."""
        spec = Imm(dst=dst, imm=imm, priority=priority, deadline_s=deadline_s)
        return (await self._submit([spec.request()], timeout_s))[0]

    async def fence(self, fences: Mapping[Grant, Iterable[int | range]]) -> None:
        """Fences immediates of several grants at once. As :meth:`transferd.Client.fence`."""
        await self._runtime.run(fence_all, self._runtime.session, fences)

    async def submit(
        self, jobs: Iterable[Operation], *, timeout_s: float | None = None
    ) -> list[Job]:
        """Submits a batch. As :meth:`transferd.Client.submit`."""
        requests = to_requests(jobs)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        made: list[Job] = []
        for part in self._runtime.session.parts(requests):
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                made += await self._submit(part, left)
            except Exception as error:
                error.jobs = made  # type: ignore[attr-defined]
                raise
        return made

    async def _submit(self, requests: Sequence[Request], timeout_s: float | None) -> list[Job]:
        """Submits up to ``batch_limit`` jobs; waits for room without blocking the loop."""
        runtime = self._runtime
        session = runtime.session
        if session.shared_memory:
            ids = await self._submit_ring(runtime, requests, timeout_s)
        else:
            ids = await runtime.run(session.submit_many, requests, timeout_s)
        return [Job(runtime, job_id, r.key) for job_id, r in zip(ids, requests, strict=True)]

    @staticmethod
    async def _submit_ring(
        runtime: _Runtime, requests: Sequence[Request], timeout_s: float | None
    ) -> list[int]:
        session = runtime.session
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            missing = [d for r in requests for d in r.destinations if d not in session.handles]
            if missing:
                await runtime.run(session.open_many, missing)
            for request in requests:
                if request.source is not None and not session.gpu().copier.ready(request):
                    await runtime.run(session.gpu().copier.prepare, request)
            try:
                if len(requests) == 1 and requests[0].plain:
                    return [session.submit(*requests[0][:9], 0.0)]
                return session.submit_many(requests, 0.0)
            except errors.WaitTimeout as error:
                if error.reason != "RING_FULL" or (end is not None and time.monotonic() >= end):
                    raise
            await asyncio.sleep(FULL_SLEEP_S)

    # ---- counting ----

    async def counter(self, imm: int) -> Counter:
        """Finds the counter of an own immediate. As :meth:`transferd.Client.counter`."""
        runtime = self._runtime
        counter = self._counters.get(imm)
        if counter is None:
            runtime.session.check_open()
            spec = to_imm(imm)
            if spec not in runtime.session.slots:
                await runtime.run(runtime.session.counter_open, spec)
            counter = self._counters[imm] = Counter(runtime, imm)
        return counter

    # ---- its end ----

    async def close(self) -> None:
        """Ends the session cleanly; waiting tasks get Unavailable. Idempotent."""
        runtime = self._runtime_or_none
        if runtime is None:
            return
        await asyncio.get_running_loop().run_in_executor(None, runtime.session.close)
        runtime.driver.close()
        runtime.session.close_events()
        runtime.shut()

    async def __aenter__(self) -> Self:
        return await self.open()

    def __del__(self) -> None:
        runtime = getattr(self, "_runtime_or_none", None)
        if (
            runtime is not None
            and not runtime.session.closed
            and not runtime.session.control.orphaned
        ):
            warnings.warn(
                "an aio.Client was not closed", ResourceWarning, source=self, stacklevel=2
            )
            runtime.session.close()


__all__ = ["Client", "Counter", "Grant", "Job", "Region"]
