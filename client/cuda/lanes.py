# SPDX-License-Identifier: Apache-2.0
"""Lanes: streams that copy, each with a watcher of the session; see native/shm/lane.c.

Two lanes for each device and priority, so that small jobs do not wait for large ones; one for each
stream of the caller's that is passed as ``stream=``; and some for armed copies, whose streams wait.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from transferd.client import errors
from transferd.client.cuda.driver import NOT_READY
from transferd.client.session import OP_DISARM
from transferd.client.watcher import take_watcher
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.client.cuda.gpu import Gpu

# Copies enqueued at once on a lane. Together the lanes stay below what the daemon lets a session
# arm; beyond about a thousand the driver itself would wait, with a lock held.
COPIES_MAX = 64
ARMED_COPIES_MAX = 16
# Streams of one priority share 8 queues of the device (CUDA_DEVICE_MAX_CONNECTIONS); one that waits
# for a word may hold up what shares its queue, so there are few.
ARMED_LANES_MAX = 4
# Writes of such sizes take turns on two streams: what lies between two copies on one stream (the
# store of the word, the next one's start) takes microseconds, in which the other stream copies.
TURNS_MIN, TURNS_END = int(lib.TFD_LANE_MEMCPY_MIN), 128 << 20
NO_MARKS = int(lib.TFD_LANE_NO_MARKS)
POLL_S = 0.0005
GUARD_S = 0.05


class Lane:
    """One stream and its watcher.

    Attributes:
        native: struct tfd_lane.
        device: Ordinal.
        stream: CUstream.
        own: Whether the stream is ours.
        armed: Whether its copies wait for watchers; the next two are of the newest of them.
        trigger_slot: Slot of the watcher that it waits for.
        trigger_at: The value.
        jobs: Ids of the newest of them, as many as can be enqueued.
    """

    __slots__ = (
        "_watchers", "armed", "device", "jobs", "native", "own", "stream", "trigger_at",
        "trigger_slot",
    )  # fmt: skip

    def __init__(
        self, gpu: Gpu, device: int, stream: int, *, number: int = -1, armed: bool = False
    ) -> None:
        """Takes watchers of the session, and makes the native half.

        Args:
            gpu: Of the session.
            device: Of the stream.
            stream: CUstream.
            number: Of a stream of the caller's, which no other has; -1: the stream is ours.
            armed: As the attribute.
        """
        own = number < 0
        self.device = device
        self.stream = stream
        self.own = own
        self.armed = armed
        self.trigger_slot = self.trigger_at = -1
        self.jobs: deque[int] = deque(maxlen=ARMED_COPIES_MAX)
        session = gpu.session
        self._watchers = [take_watcher(session)]
        try:
            if armed:
                self._watchers.append(take_watcher(session))
            kernels = gpu.kernels(device)
            options = ffi.new(
                "struct tfd_lane_options *",
                {
                    "driver": {
                        name: ffi.cast("void *", address)
                        for name, address in gpu.driver.entry_points().items()
                    },
                    "context": ffi.cast("void *", gpu.context(device)),
                    "stream": ffi.cast("void *", stream),
                    "pages": ffi.cast("void *", kernels.pages),
                    "targets": ffi.cast("void *", kernels.targets),
                    "plan_pages": ffi.cast("void *", kernels.plan_pages),
                    "plan_slices": ffi.cast("void *", kernels.plan_slices),
                    "segment": gpu.segment(device),
                    "watcher": self._watchers[0],
                    "marks": self._watchers[1] if armed else NO_MARKS,
                    "copies_max": ARMED_COPIES_MAX if armed else COPIES_MAX,
                    "foreign": not own,
                    "stream_id": 0 if own else number,
                },
            )
            out = ffi.new("struct tfd_lane **")
            if lib.tfd_lane_open(session.client, options, out):
                raise session.over()
        except BaseException:
            self.give_back(gpu)
            raise
        self.native = out[0]

    @property
    def pending(self) -> int:
        """Copies that are not through."""
        return int(lib.tfd_lane_pending(self.native))

    @property
    def last(self) -> int:
        """Value of the newest copy."""
        return int(lib.tfd_lane_last(self.native))

    def fail(self, gpu: Gpu) -> None:
        """Ends the jobs that wait for it: its stream's work is over, done or not."""
        disarmed = False
        with contextlib.suppress(errors.TransferdError):
            gpu.session.command(OP_DISARM, 0, self._watchers[0])
            disarmed = True
        lib.tfd_lane_fail(self.native, disarmed)

    def give_back(self, gpu: Gpu) -> None:
        """Gives its watchers back; nothing waits for them any more."""
        for slot in self._watchers:
            lib.tfd_client_watcher_close(gpu.session.client, slot)
        self._watchers.clear()


class Lanes:
    """The lanes of one session."""

    def __init__(self, gpu: Gpu) -> None:
        """Has none yet."""
        self._gpu = gpu
        self.arming = threading.Lock()  # held from choosing a lane to wait until it does
        self._lock = threading.Lock()  # guards what follows
        self._copying: dict[tuple[int, int, int], Lane] = {}  # by device, priority and turn
        self._turn = 0  # of the next that takes turns; guarded by nothing: any will do
        self._callers: dict[int, Lane] = {}  # by the stream's number
        self._handles: dict[tuple[int, int], Lane] = {}  # of those, by device and CUstream
        self._armed: list[Lane] = []
        self._old: list[Lane] = []  # take no more; their copies may be under way
        self._guard: threading.Thread | None = None
        self._idle = True
        self._stop = False
        self._work = threading.Condition(self._lock)

    # ---- choosing one ----

    def of(self, device: int, priority: int, length: int = 0) -> Lane:
        """A lane of a device for a priority, and a write of so many bytes."""
        turns = (0, 1) if TURNS_MIN <= length < TURNS_END else (0,)
        with self._lock:
            for turn in turns:
                if (device, priority, turn) not in self._copying:
                    first = self._copying.get((device, priority, 0))
                    self._copying[device, priority, turn] = self._copying_lane(device, first)
            return self._copying[device, priority, self._take_turn(length)]

    def _copying_lane(self, device: int, first: Lane | None) -> Lane:
        try:
            return self._make(device, armed=False)
        except errors.QuotaExceeded:  # of watchers: one lane has to do
            if first is None:
                raise
            return first

    def known(self, device: int, priority: int, length: int = 0) -> Lane | None:
        """The same, if it is there."""
        return self._copying.get((device, priority, self._take_turn(length)))

    def _take_turn(self, length: int) -> int:
        if TURNS_MIN <= length < TURNS_END:
            self._turn = 1 - self._turn
            return self._turn
        return 0

    def known_caller(self, device: int, stream: int) -> Lane | None:
        """The lane of what was a stream of the caller's; whether it still is the copy finds."""
        return self._handles.get((device, stream))

    def of_caller(self, device: int, stream: int) -> Lane:
        """The lane of a stream of the caller's, which belongs to the device's context."""
        driver = self._gpu.driver
        with driver.entered(self._gpu.context(device)):
            number = driver.stream_id(stream)
        with self._lock:
            lane = self._callers.get(number)
            if lane is None:
                lane = self._callers[number] = self._of_new_caller(device, stream, number)
            self._handles[device, stream] = lane
        return lane

    def _of_new_caller(self, device: int, stream: int, number: int) -> Lane:
        try:
            return Lane(self._gpu, device, stream, number=number)
        except errors.QuotaExceeded:
            # Streams come and go: those that have nothing under way make room.
            for idle in [lane for lane in self._callers.values() if not lane.pending]:
                idle.give_back(self._gpu)
                self._forget_caller(idle)
            return Lane(self._gpu, device, stream, number=number)

    def _forget_caller(self, lane: Lane) -> None:
        self._callers = {k: v for k, v in self._callers.items() if v is not lane}
        self._handles = {k: v for k, v in self._handles.items() if v is not lane}

    def of_armed(self, device: int, slot: int, value: int) -> Lane:
        """A lane whose stream waits for nothing that comes later than this.

        Raises:
            QuotaExceeded: ARMED_COPIES.
        """
        with self._lock:
            lanes = [lane for lane in self._armed if lane.device == device]
            chosen = next(
                (
                    lane
                    for lane in lanes
                    if lane.pending < ARMED_COPIES_MAX
                    and (
                        (lane.trigger_slot == slot and lane.trigger_at <= value) or not lane.pending
                    )
                ),
                None,
            )
            if chosen is None and len(lanes) < ARMED_LANES_MAX:
                chosen = self._make(device, armed=True)
                self._armed.append(chosen)
            if chosen is None:
                raise errors.QuotaExceeded(
                    f"{ARMED_LANES_MAX} streams of device {device} wait for other watchers, or "
                    f"{ARMED_COPIES_MAX} copies for this one: arm a copy later",
                    reason="ARMED_COPIES",
                )
            chosen.trigger_slot, chosen.trigger_at = slot, value
        return chosen

    def _make(self, device: int, *, armed: bool) -> Lane:
        driver = self._gpu.driver
        with driver.entered(self._gpu.context(device)):
            stream = driver.stream_create()
            try:
                return Lane(self._gpu, device, stream, armed=armed)
            except BaseException:
                driver.stream_destroy(stream)
                raise

    def drop(self, lane: Lane) -> None:
        """Takes a lane out that the driver refused work for; the next job makes another."""
        with self._lock:
            self._copying = {k: v for k, v in self._copying.items() if v is not lane}
            self._forget_caller(lane)
            if lane in self._armed:
                self._armed.remove(lane)
            self._old.append(lane)

    def all(self) -> list[Lane]:
        """Lists the lanes."""
        with self._lock:
            copying = dict.fromkeys(self._copying.values())
            return [*copying, *self._callers.values(), *self._armed, *self._old]

    # ---- watching over them ----

    def watch(self) -> None:
        """Has the guard look: something is enqueued."""
        if self._idle:
            with self._lock:
                if self._stop:
                    return
                self._idle = False
                if self._guard is None:
                    self._guard = threading.Thread(
                        target=self._run, name="transferd-cuda", daemon=True
                    )
                    self._guard.start()
                self._work.notify()

    def _run(self) -> None:
        """Finds contexts that have failed, whose streams would never write their words."""
        self._gpu.driver.captures_disregard()
        while True:
            with self._lock:
                while self._idle and not self._stop:
                    self._work.wait()
                self._work.wait(GUARD_S)
                if self._stop:
                    return
                self._idle = True  # whoever has enqueued from now on says so
            if self.check():
                with self._lock:
                    self._idle = False

    def check(self) -> bool:
        """Looks at all lanes once; tells whether any has work."""
        busy = [lane for lane in self.all() if lane.pending]
        for device in {lane.device for lane in busy}:
            on_device = [lane for lane in busy if lane.device == device]
            result = self._probe(device)
            if result not in (0, NOT_READY):
                self._gpu.failed(device, result)
                for lane in on_device:
                    lane.fail(self._gpu)
        for lane in self._old:
            # What was refused will not be written; all before it is through.
            if lane.pending == 1:
                lane.fail(self._gpu)
        return bool(busy)

    def _probe(self, device: int) -> int:
        """Asks one of our own streams: what has failed has failed for the whole context."""
        own = next((lane for lane in self.all() if lane.own and lane.device == device), None)
        if own is None:
            return 0
        driver = self._gpu.driver
        try:
            with driver.entered(self._gpu.context(device)):
                return driver.stream_result(own.stream)
        except errors.TransferdError as error:
            return int(getattr(error, "result", 0))

    # ---- waiting ----

    @staticmethod
    def until(look: Callable[[], bool], timeout_s: float) -> bool:
        """Polls: nobody wakes for a stream's word."""
        end = time.monotonic() + timeout_s
        while not look():
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_S)
        return True

    def release(self, slot: int, timeout_s: float) -> None:
        """Ends the copies that wait for a watcher, and lets their streams through."""
        waiting = [lane for lane in self.all() if lane.trigger_slot == slot and lane.pending]
        if not waiting:
            return
        for lane in waiting:
            for job_id in lane.jobs:
                with contextlib.suppress(
                    errors.Unavailable
                ):  # the session is over, and they with it
                    self._gpu.session.job_cancel(job_id)
        end = time.monotonic() + timeout_s
        self.until(
            lambda: all(not lib.tfd_lane_settle(x.native, x.last) for x in waiting), timeout_s
        )
        lib.tfd_lane_release(self._gpu.session.client, slot)
        self.until(
            lambda: not any(lane.pending for lane in waiting), max(0.0, end - time.monotonic())
        )

    def close(self, timeout_s: float) -> bool:
        """Ends all work; tells whether all streams are through. Nothing is enqueued any more."""
        with self._lock:
            self._stop = True
            self._work.notify()
        if self._guard is not None:
            self._guard.join(timeout_s)
        lanes = self.all()
        end = time.monotonic() + timeout_s
        for slot in {lane.trigger_slot for lane in lanes if lane.armed}:
            self.release(slot, max(0.0, end - time.monotonic()))
        quiet = not any(lane.pending for lane in lanes)
        while not quiet and time.monotonic() < end:
            quiet = self.until(lambda: not any(lane.pending for lane in lanes), GUARD_S)
            if not quiet:
                self.check()
        return quiet

    def _has_ended(self, stream: int) -> bool:
        return self._gpu.driver.stream_result(stream) != NOT_READY

    def destroy(self) -> None:
        """Ends our own streams, after :meth:`close`."""
        driver = self._gpu.driver
        for lane in self.all():
            if not lane.own:
                continue
            with (
                contextlib.suppress(errors.TransferdError),
                driver.entered(self._gpu.context(lane.device)),
            ):
                # A kernel stores its word before its end.
                self.until(functools.partial(self._has_ended, lane.stream), GUARD_S)
                driver.stream_destroy(lane.stream)
