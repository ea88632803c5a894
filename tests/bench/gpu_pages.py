# SPDX-License-Identifier: Apache-2.0
"""Pages from GPU to GPU, one job: the GPU's time beside a kernel's by hand; the call's cost."""

from __future__ import annotations

import time
from ctypes import c_uint64
from typing import TYPE_CHECKING

from bench.gpu_world import KIB, WAIT_S, ByHand, World, permutations, world
from bench.report import Row
from bench.stats import median, spread
from transferd import WritePages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from bench.topic import Run

SHAPES = ((64 * KIB, 1024), (4 * KIB, 4096))
OVER_HAND = 1.5
SUBMIT_US, SUBMIT_PAGE_US = 20.0, 0.02
ROUNDS = 100


def rows(run: Run) -> Iterator[Row]:
    """Measures the bars."""
    with world(64 << 20) as here:
        for page, count in SHAPES:
            yield from shape_rows(run, here, page, count)


def shape_rows(run: Run, here: World, page: int, count: int) -> list[Row]:
    """Measures one shape."""
    src, dst = permutations(count)
    by_hand = ByHand(here, src, dst, page)
    stream = here.gpu.stream()
    timer = Timer(here, stream)
    calls: list[float] = []

    def ours() -> None:
        begin = time.perf_counter()
        job = here.sender.write_pages(
            here.region, src, here.grant.descriptor, dst, page, imm=1, count="job", stream=stream
        )
        calls.append((time.perf_counter() - begin) * 1e6)
        jobs.append(job)

    plan = here.sender.plan(pages_of(here, src, dst, page, stream))

    def planned() -> None:
        jobs.append(plan.launch())

    jobs: list[object] = []
    ours()  # loads and maps, which no stream may wait for
    by_hand.launch(stream)
    here.gpu.sync(stream)
    both = {"SDK": ours, "by hand": lambda: by_hand.launch(stream), "a plan": planned}
    times: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(run.scaled(ROUNDS) + 5):
        for name, call in both.items():
            times[name].append(timer.us(call))
        jobs.clear()
    plan.close()
    taken = {name: values[5:] for name, values in times.items()}
    what = f"{page // KIB} KiB x {count:,}"
    ratios = [a / b for a, b in zip(taken["SDK"], taken["by hand"], strict=True)]
    own = own_lane(run, here, page, count)
    of_plan = taken.pop("a plan")
    run.beside(
        f"{what}: a plan of it: the launch; GPU time, us",
        f"{spread(launches(run, here, page, count), 1)}; {spread(of_plan, 1)}",
    )
    return [
        Row(
            f"{what}, one job: GPU time, ratio to a kernel by hand",
            median(ratios),
            "x",
            "<=",
            OVER_HAND,
            "; ".join(f"{name} {spread(values, 1)} us" for name, values in taken.items()),
        ),
        Row(
            f"{what}: submitting",
            own,
            "us",
            "<=",
            SUBMIT_US + SUBMIT_PAGE_US * count,
            f"with stream= {median(calls[5:]):.1f} us",
        ),
    ]


class Timer:
    """Times a stream's work by the GPU alone: the stream is held until all of it is enqueued."""

    def __init__(self, here: World, stream: int) -> None:
        gpu = self._gpu = here.gpu
        self._stream = stream
        self._first, self._last = gpu.event(), gpu.event()
        self._address = gpu.pinned(8).address
        self._word = c_uint64.from_address(self._address)
        self._word.value = 0

    def us(self, call: Callable[[], None]) -> float:
        """What the stream takes for what a call enqueues."""
        gpu, stream = self._gpu, self._stream
        value = self._word.value + 1
        gpu.driver.wait_value(stream, self._address, value)
        try:
            gpu.record(self._first, stream)
            call()
            gpu.record(self._last, stream)
        finally:
            self._word.value = value
        gpu.sync(stream)
        return gpu.elapsed_us(self._first, self._last)


def pages_of(
    here: World, src: np.ndarray, dst: np.ndarray, page: int, stream: int | None = None
) -> WritePages:
    """What both a job and a plan are made of."""
    return WritePages(
        src=here.region, src_pages=src, dst=here.grant.descriptor, dst_pages=dst, page_bytes=page,
        imm=1, count="job", stream=stream,
    )  # fmt: skip


def launches(run: Run, here: World, page: int, count: int) -> list[float]:
    """What a launch of a plan takes, which reads its rows on the GPU."""
    calls = []
    with here.sender.plan(pages_of(here, *permutations(count), page)) as plan:
        for _ in range(run.scaled(ROUNDS) + 5):
            begin = time.perf_counter()
            job = plan.launch()
            calls.append((time.perf_counter() - begin) * 1e6)
            job.wait(WAIT_S)
    return calls[5:]


def own_lane(run: Run, here: World, page: int, count: int) -> float:
    """What the call takes on the Client's own stream."""
    src, dst = permutations(count)
    calls = []
    for _ in range(run.scaled(ROUNDS) + 5):
        begin = time.perf_counter()
        job = here.sender.write_pages(
            here.region, src, here.grant.descriptor, dst, page, imm=1, count="job"
        )
        calls.append((time.perf_counter() - begin) * 1e6)
        job.wait(WAIT_S)
    return median(calls[5:])
