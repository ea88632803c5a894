# SPDX-License-Identifier: Apache-2.0
"""One job of 64 MiB every 10 ms while the client computes, beside a kernel by hand in its place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bench.gpu_world import KIB, WAIT_S, ByHand, permutations, world
from bench.report import Row
from bench.stats import median, percentile

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.topic import Run

PAGE, COUNT = 64 * KIB, 1024
SIDE, GEMMS, EVERY_S, JOBS = 8192, 1200, 0.010, 100
OVER_HAND, SLOWED = 2.0, 1.05


def rows(run: Run) -> list[Row]:
    """Measures the bars."""
    try:
        import torch
    except ImportError:
        run.skip("64 MiB beside GEMMs", "torch is not installed")
        return []
    with world(64 << 20) as here:
        src, dst = permutations(COUNT)
        by_hand = ByHand(here, src, dst, PAGE)
        with here.gpu.driver.entered(here.gpu.context):
            stream = here.gpu.driver.stream_create()

        def hand() -> None:
            by_hand.launch(stream)
            here.gpu.sync(stream)

        def ours() -> None:
            here.sender.write_pages(
                here.region, src, here.grant.descriptor, dst, PAGE, imm=5, count="job"
            ).wait(WAIT_S)

        for warm in (hand, ours):
            warm()
        alone = [beside(torch, None)[1] for _ in range(3)]
        hand_us, hand_ms = beside(torch, hand)
        ours_us, ours_ms = beside(torch, ours)
    note = f"{median(ours_us):.0f} of {median(hand_us):.0f} us; p95 {percentile(ours_us, 95):.0f}"
    run.beside("GEMMs with the kernel by hand, times those alone", f"{hand_ms / median(alone):.3f}")
    return [
        Row(
            "64 MiB beside GEMMs: p50, ratio to a kernel by hand",
            median(ours_us) / median(hand_us),
            "x",
            "<=",
            OVER_HAND,
            note,
        ),
        Row("GEMMs beside it, times those alone", ours_ms / median(alone), "x", "<=", SLOWED),
    ]


def beside(torch: Any, call: Callable[[], object] | None) -> tuple[list[float], float]:
    """Runs GEMMs, and the call every 10 ms; gives its times in us, and those of the GEMMs in ms."""
    a = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda")
    b, c = torch.randn_like(a), torch.empty_like(a)
    stream = torch.cuda.Stream()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    times: list[float] = []
    with torch.cuda.stream(stream):
        torch.matmul(a, b, out=c)
        first.record(stream)
        for _ in range(GEMMS):
            torch.matmul(a, b, out=c)
        last.record(stream)
    begin = time.perf_counter()
    for i in range(JOBS if call is not None else 0):
        while time.perf_counter() < begin + i * EVERY_S:
            pass
        if last.query():
            break
        at = time.perf_counter()
        assert call is not None
        call()
        times.append((time.perf_counter() - at) * 1e6)
    torch.cuda.synchronize()
    return times, float(first.elapsed_time(last))
