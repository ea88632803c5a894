# SPDX-License-Identifier: Apache-2.0
"""Staging of GPU memory through pinned host memory: which helpers there are, what they have open.

The copies are the data plane's (provider ``staged``) and the helpers'. Here a helper is started
when the first copy needs it, opens the memory that copies need, and is started anew after it died.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from transferd.daemon.helper import Helper, HelperError
from transferd.daemon.plane import PlaneError, StageStat
from transferd.daemon.tasks import TaskOwner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd.daemon.cuda import CudaMemory
    from transferd.daemon.plane import Plane

log = structlog.get_logger("transferd.staging")

UNSEEN = b""  # in the place of every GPU that no helper has seen
READY_S = 10.0  # in the data plane a copy waits for 15 s
PAUSE_S, PAUSE_MAX_S = 0.1, 30.0  # between a helper's death and the next one, doubled by each
STEADY_S = 60.0  # one that has lived as long begins anew with the least
LOOK_S = 10.0  # between two processes that look for GPUs that none has seen
WARN_S = 10.0  # between two warnings of memory of one GPU: a client can have it fail at any rate
IDLE_S = 60.0  # a helper that has nothing open gives its context's GPU memory back


@dataclass(slots=True)
class Failures:
    """Times that memory of a GPU could not be staged.

    Attributes:
        count: All of them.
        warned: How many of those the log knows of.
        not_before: When it is to be told again, on the monotonic clock.
    """

    count: int = 0
    warned: int = 0
    not_before: float = 0.0


@dataclass(slots=True, eq=False)
class Gpu:
    """A GPU whose memory was staged.

    Attributes:
        uuid: Names it in every process.
        helper: That runs; None: there is none.
        starting: Makes one.
        watch: Waits for the end of the one that runs.
        starts: How many there were.
        reason: Why the last one ended.
        pause: Seconds to wait after the next death.
        not_before: When the next one may start, on the monotonic clock.
        past: Copies by helpers that have ended.
        counted: The helper that is ending is one of those.
        rest: Ends the helper, if it has nothing open by then.
    """

    uuid: bytes
    helper: Helper | None = None
    starting: asyncio.Task[Helper] | None = None
    watch: asyncio.Task[None] | None = None
    starts: int = 0
    reason: str = ""
    pause: float = PAUSE_S
    not_before: float = 0.0
    past: StageStat = field(default_factory=StageStat)
    counted: bool = False
    rest: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """As nvidia-smi writes it."""
        return name_of(self.uuid)

    @property
    def busy(self) -> bool:
        """Whether it has a helper, or is about to."""
        return self.helper is not None or self.starting is not None

    @property
    def state(self) -> str:
        """NONE, STARTING, READY: of its helper."""
        if self.helper is None:
            return "NONE"
        return "READY" if self.helper.gpu_name else "STARTING"


def name_of(uuid: bytes) -> str:
    """Writes a GPU's UUID as nvidia-smi does."""
    raw = uuid.hex()
    parts = (raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:])
    return "GPU-" + "-".join(parts)


class Staging:
    """All helpers of the daemon."""

    def __init__(self, plane: Plane, *, enabled: bool, library: str = "") -> None:
        """Starts nothing yet.

        Args:
            plane: The data plane.
            enabled: Whether there are staged rails.
            library: Path of libcuda; empty: where the system has it.
        """
        self._plane = plane
        self._library = library
        self._memories: dict[int, CudaMemory] = {}
        self._gpus: dict[bytes, Gpu] = {}
        self._opening: set[int] = set()
        # By GPU: what is to be opened, and until when its helper is waited for.
        self._queues: dict[bytes, deque[tuple[CudaMemory, float]]] = {}
        self._tasks = TaskOwner("staging")
        self._closed = False
        # Who registers memory says of which GPU it is, and may lie: only the helpers know.
        self._seen: frozenset[bytes] = frozenset()
        self._sought: Gpu | None = None  # the last one that was looked for without being seen
        self._look_after = 0.0
        self.failures: dict[str, Failures] = {}  # by GPU; "unknown": all that were not seen
        self.enabled = enabled

    def __iter__(self) -> Iterator[Gpu]:
        return iter(self._gpus.values())

    def stat(self, gpu: Gpu) -> StageStat:
        """Counts the copies of a GPU, by all of its helpers."""
        if gpu.helper is None or gpu.counted:
            return gpu.past
        return gpu.past.plus(self._plane.stage_stat(gpu.helper.stage))

    # ---- memory ----

    def add(self, memory: CudaMemory) -> int:
        """A region of an allocation is registered; gives the number by which copies name it.

        Returns:
            0 where nothing is staged.
        """
        if not self.enabled:
            return 0
        self._memories[memory.allocation] = memory
        return memory.allocation

    async def forget(self, memory: CudaMemory) -> None:
        """Nothing of an allocation is to be copied any more: whoever has it open lets go of it.

        While regions of it are left copies may yet ask for it, in vain. Once there are none it is
        said again, and nothing of that is kept.
        """
        if not self.enabled:
            return
        number = memory.allocation
        self._memories.pop(number, None)
        self._plane.stage_memory_forget(number)
        gpu = self._gpus.get(memory.device_uuid)
        helper = gpu.helper if gpu is not None else None
        if gpu is None or helper is None or number not in helper.memories:
            return
        await helper.close(number)
        self._let_rest(gpu)

    def _let_rest(self, gpu: Gpu) -> None:
        """Ends a helper that has nothing open, in a while."""
        helper = gpu.helper
        if helper is None or helper.memories or self._closed:
            return
        if gpu.rest is not None:
            gpu.rest.cancel()
        gpu.rest = asyncio.get_running_loop().call_later(IDLE_S, self._idle, gpu, helper)

    def _idle(self, gpu: Gpu, helper: Helper) -> None:
        gpu.rest = None
        if gpu.helper is not helper or helper.memories or self._closed:
            return
        if not self._wanted(gpu):  # else that looks again
            log.info("a GPU's helper has nothing to do", gpu=gpu.name, pid=helper.pid)
            self._tasks.background(helper.stop(), "stop an idle helper")

    def _wanted(self, gpu: Gpu) -> bool:
        """Whether a copy waits for memory of it."""
        opening = [self._memories[number] for number in self._opening if number in self._memories]
        return any(memory.device_uuid == gpu.uuid for memory in opening)

    # ---- events of the data plane ----

    def needed(self, number: int) -> None:
        """TFD_EVENT_STAGE_NEEDED: a copy waits until a helper has this memory open."""
        # Asked for again by the death of a helper: whoever opens it has not come to an end yet.
        if number in self._opening:
            return
        memory = self._memories.get(number)
        if memory is None or self._closed:  # its session ends
            self._plane.stage_memory_fail(number)
            return
        self._opening.add(number)
        self._queue(memory, asyncio.get_running_loop().time() + READY_S)

    def _queue(self, memory: CudaMemory, until: float) -> None:
        """One after the other of a GPU's, however many a client has; so all of unseen GPUs."""
        gpu = memory.device_uuid if memory.device_uuid in self._seen else UNSEEN
        if gpu not in self._queues:
            self._queues[gpu] = deque()
            self._tasks.background(self._open_all(gpu), f"open memory of {name_of(gpu)}")
        self._queues[gpu].append((memory, until))

    async def _open_all(self, gpu: bytes) -> None:
        queue = self._queues[gpu]
        while queue:
            memory, until = queue.popleft()
            if gpu == UNSEEN and memory.device_uuid in self._seen:
                self._queue(memory, until)
                continue
            try:
                await self._open_once(memory, until)
            except Exception:  # the others go on
                log.exception("opening memory", gpu=name_of(gpu), memory=memory.allocation)
        del self._queues[gpu]

    async def _open_once(self, memory: CudaMemory, until: float) -> None:
        number = memory.allocation
        try:
            if self._memories.get(number) is not memory or self._closed:  # its session ends
                self._plane.stage_memory_fail(number)
                return
            await self._open(number, memory, until)
        finally:
            self._opening.discard(number)
        gpu = self._gpus.get(memory.device_uuid)
        if gpu is not None:
            self._let_rest(gpu)

    async def _open(self, number: int, memory: CudaMemory, until: float) -> None:
        try:
            helper = await self._helper(memory.device_uuid, until)
            if number not in helper.memories:
                await helper.open(memory)
        except HelperError as error:
            self._failed(memory, str(error))
            self._plane.stage_memory_fail(number)
            return
        if number not in self._memories:  # forgotten meanwhile
            await helper.close(number)
            self._plane.stage_memory_fail(number)
        elif helper.reason:  # it has ended meanwhile
            self._plane.stage_memory_fail(number)
        else:
            self._plane.stage_memory_set(number, helper.stage)

    def _failed(self, memory: CudaMemory, error: str) -> None:
        known = memory.device_uuid in self._seen
        name = name_of(memory.device_uuid)
        failures = self.failures.setdefault(name if known else "unknown", Failures())
        failures.count += 1
        now = time.monotonic()
        if now < failures.not_before:
            return
        log.warning(
            "GPU memory cannot be staged",
            gpu=name,
            memory=memory.allocation,
            error=error,
            unsaid=failures.count - failures.warned - 1,
        )
        failures.warned, failures.not_before = failures.count, now + WARN_S

    def silent(self, stage: int) -> None:
        """TFD_EVENT_STAGE_SILENT: a helper does not get on, or says that it is dead."""
        for gpu in self._gpus.values():
            if gpu.helper is not None and gpu.helper.stage == stage:
                gpu.helper.give_up("the GPU's helper did not get on with its copies")

    # ---- helpers ----

    async def _helper(self, uuid: bytes, until: float) -> Helper:
        """Gives the one that can copy; starts it if needed, and waits until a time of the loop."""
        gpu = self._gpus.get(uuid)
        if gpu is not None and gpu.starting is None and gpu.helper and not gpu.helper.reason:
            return gpu.helper
        try:
            async with asyncio.timeout_at(until):
                while uuid not in self._seen:
                    look = self._sought.starting if self._sought is not None else None
                    if look is None:
                        return await self._starting(self._look(uuid))
                    await asyncio.wait([look])  # what it sees may be this one
                return await self._starting(self._gpus.setdefault(uuid, Gpu(uuid)))
        except TimeoutError:
            raise HelperError("the GPU's helper is still starting; try again") from None

    def _look(self, uuid: bytes) -> Gpu:
        """Has one process look for a GPU that none has seen, and forgets all such that are over.

        Raises:
            HelperError: One has looked a moment ago.
        """
        wait = self._look_after - time.monotonic()
        if wait > 0:
            why = "the daemon's helpers do not see the GPU whose memory was registered"
            if not self._seen and self._sought is not None:  # nor any other
                why = self._sought.reason or why
            raise HelperError(f"{why}; it is looked for again in {wait:.0f} s")
        self._look_after = time.monotonic() + LOOK_S
        for one in list(self._gpus.values()):
            if one.uuid not in self._seen and not one.busy:
                del self._gpus[one.uuid]
        gpu = self._sought = self._gpus.setdefault(uuid, Gpu(uuid))
        return gpu

    async def _starting(self, gpu: Gpu) -> Helper:
        if gpu.starting is None:
            gpu.starting = self._tasks.spawn(self._start(gpu), f"start a helper of {gpu.name}")
        return await asyncio.shield(gpu.starting)

    async def _start(self, gpu: Gpu) -> Helper:
        try:
            if gpu.watch is not None:  # it is ending
                await asyncio.wait([gpu.watch])
            wait = gpu.not_before - time.monotonic()
            if wait > READY_S:
                raise HelperError(f"{gpu.reason}; a helper is started again in {wait:.0f} s")
            await asyncio.sleep(max(0.0, wait))
            if not self._wanted(gpu):
                raise HelperError("no copy waits for the GPU's helper any more")
            return await self._started(gpu)
        finally:
            gpu.starting = None

    async def _started(self, gpu: Gpu) -> Helper:
        try:
            stage, fds = await self._plane.stage_open()
        except PlaneError as error:
            raise HelperError(error.text) from None
        try:
            if self._closed:
                raise HelperError("the daemon stops")
            helper = Helper.start(stage, fds, gpu.uuid, self._library)
        except BaseException:
            await self._plane.stage_close(stage)
            raise
        finally:
            fds.close()
        gpu.helper = helper
        gpu.starts += 1
        gpu.watch = self._tasks.spawn(self._watch(gpu, helper), f"watch a helper of {gpu.name}")
        try:
            await helper.ready()
        except HelperError as error:
            gpu.reason = str(error)
            raise
        finally:
            self._seen = helper.seen or self._seen
        if not self._wanted(gpu):  # those that waited have given up
            self._let_rest(gpu)
        log.info(
            "a GPU's helper is ready",
            gpu=gpu.name,
            name=helper.gpu_name,
            pid=helper.pid,
            driver=helper.driver,
        )
        return helper

    async def _watch(self, gpu: Gpu, helper: Helper) -> None:
        """Waits for its end; what was under way there fails, and the next copy starts another."""
        born = time.monotonic()
        status = await helper.ended()
        gpu.past, gpu.counted = self.stat(gpu), True
        gpu.reason = helper.reason
        await self._plane.stage_close(helper.stage)
        now = time.monotonic()
        if now - born >= STEADY_S:
            gpu.pause = PAUSE_S
        gpu.not_before = now + gpu.pause
        gpu.pause = min(2 * gpu.pause, PAUSE_MAX_S)
        gpu.helper = gpu.watch = None
        gpu.counted = False
        if not self._closed:
            log.warning(
                "a GPU's helper has ended",
                gpu=gpu.name,
                pid=helper.pid,
                status=status,
                reason=helper.reason,
            )

    async def aclose(self) -> None:
        """Ends all helpers; the data plane has no copies any more."""
        self._closed = True
        for gpu in self._gpus.values():
            if gpu.helper is not None:
                self._tasks.background(gpu.helper.stop(), "stop a helper")
        await self._tasks.idle()
