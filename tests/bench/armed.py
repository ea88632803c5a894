# SPDX-License-Identifier: Apache-2.0
"""From the bump of a watcher until the write that waited for it is posted, on a worker that runs.

A thread bumps; the daemon's worker polls on a core of its own. Both stamps are CLOCK_MONOTONIC. The
worker reads its clock when it has seen the bump, just before it posts, so the bar is taken from the
end of a write within one daemon, which comes after the post and is the longer figure. Of a write to
another daemon the posting alone is told.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import cffi
import numpy as np

import transferd
from bench import build
from bench.pair import daemons
from bench.report import Row
from bench.stats import median, percentile
from transferd import Imm, Scatter, Write
from transferd.native.client_half import ffi as client_ffi

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.topic import Run

    from support.daemon import DaemonProcess

ROUNDS, CALLS = 20_000, 2_000
WARM_UP = 100
BYTES, TARGETS = 64, 56
OTHERS = 800  # jobs armed beside, of the 1,024 records that a session has by default
PAUSE_NS = 20_000
LIMIT_US, CORES = 2.0, 16
WAIT_S = 30.0

_ffi = cffi.FFI()
_ffi.cdef("""
    struct armed {
        void *client;
        uint64_t region, grant, length, count, value, pause_ns;
        uint32_t imm, watcher;
    };
    int armed_run(const struct armed *armed, uint64_t *bumped, uint64_t *posted, uint64_t *ended);
""")


def rows(run: Run) -> list[Row]:
    """Measures the bar where there are cores enough, and says the figures in any case."""
    with daemons(2) as (near, far):
        run.gate.wait()
        posted, ended = bumps(run, near, near, 0)
        say(run, "bump → posted, same daemon", posted)
        say(run, "bump → ended, same daemon", ended)
        run.gate.wait()
        say(run, f"… with {OTHERS} others armed on it", bumps(run, near, near, OTHERS)[1])
        run.gate.wait()
        say(run, "bump → posted, to another daemon", bumps(run, near, far, 0)[0])
        run.gate.wait()
        calls(run, near)
    bar = f"watcher bump by a CPU thread → armed write posted, running worker, {CORES} cores"
    cores = len(os.sched_getaffinity(0))
    if cores < CORES:
        run.skip(bar, f"this machine has {cores} cores")
        return []
    note = f"posted p50 {median(posted):.2f}; ended p99 {percentile(ended, 99):.2f} µs"
    return [Row(bar, median(ended), "µs", "<=", LIMIT_US, note)]


def say(run: Run, what: str, us: list[float]) -> None:
    """Says percentiles."""
    run.beside(what, f"p50 {median(us):.2f}, p99 {percentile(us, 99):.2f}, least {min(us):.2f} µs")


def bumps(
    run: Run, near: DaemonProcess, far: DaemonProcess, others: int
) -> tuple[list[float], list[float]]:
    """Bumps from C; returns the times until the write was posted, and until it had ended."""
    native: Any = _ffi.dlopen(str(build.armed()))
    count = run.scaled(ROUNDS) + WARM_UP
    with transferd.Client(near.socket) as client, transferd.Client(far.socket) as receiver:
        grant = receiver.alloc(4096).grant(imms=range(2))
        region = client.alloc(4096)
        client.warm(grant.descriptor)
        watcher = client.watcher()
        for i in range(others):
            client.arm(watcher, (1 << 62) + i, Imm(dst=grant.descriptor, imm=1))
        session: Any = client._session
        arguments: Any = _ffi.new("struct armed *")
        pointer = int(client_ffi.cast("uintptr_t", session.client))
        arguments.client = _ffi.cast("void *", pointer)
        arguments.region, arguments.grant = region.handle, session.handles[grant.descriptor]
        arguments.length, arguments.count, arguments.pause_ns = BYTES, count, PAUSE_NS
        arguments.watcher = watcher._slot
        stamps: list[Any] = [np.zeros(count, np.uint64) for _ in range(3)]
        rc = native.armed_run(arguments, *(_ffi.from_buffer("uint64_t[]", s) for s in stamps))
        if rc:
            raise OSError(abs(rc), f"armed_run: {os.strerror(-rc) if rc < 0 else f'ended {rc}'}")
        bumped, posted, ended = (stamp[WARM_UP:].astype(np.int64) for stamp in stamps)
        return ((posted - bumped) / 1e3).tolist(), ((ended - bumped) / 1e3).tolist()


def calls(run: Run, daemon: DaemonProcess) -> None:
    """Times the calls of the SDK themselves, on one thread."""
    with transferd.Client(daemon.socket) as client:
        region = client.alloc(1 << 20)
        desc = region.grant(imms=range(2)).descriptor
        client.warm(desc)
        write = Write(src=region[0:BYTES], dst=desc, imm=1)
        scatter = Scatter(src=region, targets=[(desc, 0, 0, BYTES)] * TARGETS, imm=1)
        with (
            client.watcher() as watcher,
            client.plan(write) as plan,
            client.plan(scatter, table=True) as many,
        ):
            value = iter(range(1, 1 << 30))
            timed(run, "watcher.bump()", watcher.bump, None)
            timed(run, "arm() of a write, reached", lambda: client.arm(watcher, next(value), write))
            timed(run, "plan.launch() of a write", plan.launch)
            timed(run, "write() of the same", lambda: client.write(region[0:BYTES], desc, imm=1))
            timed(run, f"plan.launch() of a scatter to {TARGETS} by table", many.launch)
            timed(
                run,
                f"scatter() of the same, {TARGETS} tuples",
                lambda: client.scatter(region, scatter.targets, imm=1),
            )


def timed(
    run: Run,
    what: str,
    call: Callable[[], Any],
    wait: Callable[[Any], Any] | None = lambda job: job.wait(WAIT_S),
) -> None:
    """Times calls until they return; what they start is waited for outside of that."""
    took = []
    for _ in range(WARM_UP + run.scaled(CALLS)):
        begin = time.perf_counter_ns()
        made = call()
        took.append((time.perf_counter_ns() - begin) / 1e3)
        if wait is not None:
            wait(made)
    say(run, f"SDK: {what}", took[WARM_UP:])
