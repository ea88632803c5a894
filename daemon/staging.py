# SPDX-License-Identifier: Apache-2.0
"""Staging of GPU memory through pinned host memory: which helpers there are, what they have open.

The copies are the data plane's (provider ``staged``) and the helpers'. Here a helper is started
when the first copy needs it, opens the memory that copies need, and is started anew after it died.
"""

from __future__ import annotations

import asyncio
import time
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

READY_S = 10.0  # the data plane breaks a connection on which nothing is staged for 15 s
PAUSE_S, PAUSE_MAX_S = 0.1, 30.0  # between a helper's death and the next one, doubled by each
STEADY_S = 60.0  # one that has lived as long begins anew with the least
GPUS_MAX = 64  # that are remembered: who registers memory says of which GPU it is, and may lie
STARTS_MAX = 4  # helpers that start at the same time
IDLE_S = 60.0  # a helper that has nothing open gives its context's GPU memory back


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
        raw = self.uuid.hex()
        parts = (raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:])
        return "GPU-" + "-".join(parts)

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
        self._tasks = TaskOwner("staging")
        self._starts = asyncio.Semaphore(STARTS_MAX)
        self._closed = False
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
        """No region of an allocation is left: whoever has it open lets go of it."""
        number = memory.allocation
        if self._memories.pop(number, None) is None:
            return
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
        opening = [self._memories[number] for number in self._opening if number in self._memories]
        if all(memory.device_uuid != gpu.uuid for memory in opening):  # else that looks again
            log.info("a GPU's helper has nothing to do", gpu=gpu.name, pid=helper.pid)
            self._tasks.background(helper.stop(), "stop an idle helper")

    # ---- events of the data plane ----

    def needed(self, number: int) -> None:
        """TFD_EVENT_STAGE_NEEDED: a copy waits until a helper has this memory open."""
        # Asked for again by the death of a helper: whoever opens it has not come to an end yet.
        if number not in self._opening:
            self._opening.add(number)
            self._tasks.background(self._open_once(number), f"open memory {number}")

    async def _open_once(self, number: int) -> None:
        try:
            memory = self._memories.get(number)
            if memory is None or self._closed:  # its region is gone, and nothing waits any more
                return
            gpu = self._gpu(memory.device_uuid)
            await self._open(gpu, number, memory)
        finally:
            self._opening.discard(number)
        self._let_rest(gpu)

    async def _open(self, gpu: Gpu, number: int, memory: CudaMemory) -> None:
        try:
            helper = await self._helper(gpu)
            if number not in helper.memories:
                await helper.open(memory)
        except HelperError as error:
            log.warning(
                "GPU memory cannot be staged", gpu=gpu.name, memory=number, error=str(error)
            )
            self._plane.stage_memory_fail(number)
            return
        if number not in self._memories:  # deregistered meanwhile
            await helper.close(number)
        elif helper.reason:  # it has ended meanwhile
            self._plane.stage_memory_fail(number)
        else:
            self._plane.stage_memory_set(number, helper.stage)

    def silent(self, stage: int) -> None:
        """TFD_EVENT_STAGE_SILENT: a helper does not get on, or says that it is dead."""
        for gpu in self._gpus.values():
            if gpu.helper is not None and gpu.helper.stage == stage:
                gpu.helper.give_up("the GPU's helper did not get on with its copies")

    # ---- helpers ----

    def _gpu(self, uuid: bytes) -> Gpu:
        """Finds a GPU, or remembers it in the place of one that has no helper."""
        gpu = self._gpus.get(uuid)
        if gpu is None:
            gpu = self._gpus[uuid] = Gpu(uuid)
            idle = [one for one in self._gpus.values() if one is not gpu and not one.busy]
            if len(self._gpus) > GPUS_MAX and idle:
                del self._gpus[min(idle, key=lambda one: one.not_before).uuid]
        return gpu

    async def _helper(self, gpu: Gpu) -> Helper:
        """Gives the one that can copy; starts it if needed."""
        if gpu.helper is not None and gpu.starting is None and not gpu.helper.reason:
            return gpu.helper
        if gpu.starting is None:
            gpu.starting = self._tasks.spawn(self._start(gpu), f"start a helper of {gpu.name}")
        starting = gpu.starting
        await asyncio.wait([starting], timeout=READY_S)
        if not starting.done():
            raise HelperError("the GPU's helper is still starting; try again")
        return starting.result()

    async def _start(self, gpu: Gpu) -> Helper:
        try:
            if gpu.watch is not None:  # it is ending
                await asyncio.wait([gpu.watch])
            wait = gpu.not_before - time.monotonic()
            if wait > READY_S:
                raise HelperError(f"{gpu.reason}; it is started again in {wait:.0f} s")
            await asyncio.sleep(max(0.0, wait))
            async with self._starts:
                if self._closed:
                    raise HelperError("the daemon stops")
                return await self._started(gpu)
        finally:
            gpu.starting = None

    async def _started(self, gpu: Gpu) -> Helper:
        try:
            stage, fds = await self._plane.stage_open()
        except PlaneError as error:
            raise HelperError(error.text) from None
        try:
            helper = Helper.start(stage, fds, gpu.uuid, self._library)
        except BaseException:
            await self._plane.stage_close(stage)
            raise
        finally:
            fds.close()
        gpu.helper = helper
        gpu.starts += 1
        gpu.watch = self._tasks.spawn(self._watch(gpu, helper), f"watch a helper of {gpu.name}")
        await helper.ready()
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
