# SPDX-License-Identifier: Apache-2.0
"""GPU to GPU over tcp, through host memory, beside host to host over the same daemons."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import transferd
from bench.gpu_gemms import EVERY_S, JOBS, beside
from bench.gpu_world import KIB, MIB, WAIT_S
from bench.pair import daemons
from bench.stats import median, percentile, spread
from bench.turns import in_turn, ratio_row

from support.gpu import Gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.report import Row
    from bench.topic import Run
    from transferd import Client, Region

LENGTH, PIECE, WINDOW = 256 * MIB, 32 * MIB, 8
COUNT = 64  # pieces of a run: 2 GiB
SHARE = 0.9
SMALL, PINGS, WARM_UP = 4 * KIB, 500, 50
STAGED, IMM = "staged", 1
GPUS, HOSTS = "GPU to GPU", "host to host"


@dataclass
class Way:
    """A region here, and a grant on one of the other daemon's client."""

    sender: Client
    receiver: Client
    source: Region
    descriptor: bytes
    imm: int

    def flood(self, provider: str) -> float:
        """Writes pieces, several in flight; gives Gbps, and refuses another path than that."""
        jobs: list[transferd.Job] = []
        begin = time.perf_counter()
        for i in range(COUNT):
            at = i * PIECE % LENGTH
            part = self.source[at : at + PIECE]
            jobs.append(self.sender.write(part, self.descriptor, at, imm=self.imm))
            if i >= WINDOW:
                jobs[i - WINDOW].wait(WAIT_S)
        for job in jobs[-WINDOW:]:
            job.wait(WAIT_S)
        took = time.perf_counter() - begin
        self.check(jobs[-1], provider)
        return COUNT * PIECE * 8 / took / 1e9

    @staticmethod
    def check(job: transferd.Job, provider: str) -> None:
        """Whether a job went the way that is measured."""
        assert job.result is not None
        assert job.result.path.provider == provider, str(job.result.path)

    def small(self, count: int) -> list[float]:
        """From submitting 4 KiB to the receiver's counter, in us."""
        counter = self.receiver.counter(IMM + 2)
        told = counter.value
        times = []
        for i in range(1, count + 1):
            begin = time.perf_counter()
            part = self.source[0:SMALL]
            job = self.sender.write(part, self.descriptor, imm=IMM + 2, priority="latency")
            counter.wait(told + i, WAIT_S)
            times.append((time.perf_counter() - begin) * 1e6)
            job.wait(WAIT_S)
        return times


@contextlib.contextmanager
def ways() -> Iterator[dict[str, Way]]:
    """Two daemons over tcp, and a client of each, with memory of both kinds."""
    gpu = Gpu()
    with daemons(2, provider="tcp", gpu={"staging": "on"}) as pair, contextlib.ExitStack() as stack:
        sender, receiver = (stack.enter_context(transferd.Client(d.socket)) for d in pair)
        buffers = [gpu.malloc(LENGTH) for _ in range(2)]
        for buffer in buffers:
            stack.callback(buffer.free)
        stack.callback(receiver.close)
        stack.callback(sender.close)
        imms = range(16)
        made = {}
        for imm, (name, source, target) in enumerate(
            (
                (GPUS, sender.register(buffers[0]), receiver.register(buffers[1])),
                (HOSTS, sender.alloc(LENGTH), receiver.alloc(LENGTH)),
            ),
            start=IMM,
        ):
            grant = target.grant(imms=imms)
            made[name] = Way(sender, receiver, source, grant.descriptor, imm)
        yield made


def rows(run: Run) -> Iterator[Row]:
    """Measures the bar."""
    with ways() as way:
        measured: dict[str, Callable[[], float]] = {
            GPUS: functools.partial(way[GPUS].flood, STAGED),
            HOSTS: functools.partial(way[HOSTS].flood, "tcp"),
        }
        for measure in measured.values():
            measure()
        found = in_turn(run, measured, run.turns)
        for name, values in found.items():
            run.beside(f"{name} over tcp, 32 MiB writes", f"{spread(values, 1)} Gbps")
        yield ratio_row("staged GPU to GPU over tcp: ratio to host", found, GPUS, HOSTS, SHARE)
        for name in (GPUS, HOSTS):
            tell(run, name, way[name].small(run.scaled(PINGS) + WARM_UP)[WARM_UP:])
        # 10 ms apart all workers and helpers sleep in between: what waking them takes is told by
        # both, beside GEMMs or not.
        for name in (GPUS, HOSTS):
            tell(run, f"{name}, 10 ms apart", spaced(way[name]))
        beside_gemms(run, way)


def tell(run: Run, what: str, times: list[float]) -> None:
    """Says how long 4 KiB took."""
    figures = f"{median(times):.1f} us, p99 {percentile(times, 99):.1f}"
    run.beside(f"{what}: 4 KiB over tcp, submit to the receiver's counter", figures)


def spaced(way: Way) -> list[float]:
    """4 KiB every 10 ms."""
    begin = time.perf_counter()
    times = []
    for i in range(JOBS):
        while time.perf_counter() < begin + i * EVERY_S:
            pass
        times += way.small(1)
    return times


def beside_gemms(run: Run, way: dict[str, Way]) -> None:
    """The same while the client's process computes: nothing of it waits for a time slice."""
    try:
        import torch
    except ImportError:
        run.skip("staged beside GEMMs", "torch is not installed")
        return
    for name in (GPUS, HOSTS):
        times, _ = beside(torch, functools.partial(way[name].small, 1))
        tell(run, f"{name}, 10 ms apart beside GEMMs", times)
