# SPDX-License-Identifier: Apache-2.0
"""Many at once: what a small urgent write waits for beside bulk, and how sessions share a rail."""

from __future__ import annotations

import contextlib
import subprocess
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import build
from bench.limited import limited_daemons
from bench.pair import Endpoint, endpoints
from bench.report import Row
from bench.stats import percentile, spread
from transferd.v1 import admin_pb2, admin_pb2_grpc

from support import netns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bench.topic import Run

    from support.daemon import DaemonProcess

KIB, MIB = 1 << 10, 1 << 20
RAIL = "a 1 Gbit/s rail (tbf, burst 128 KiB, limit 1 MiB: 8 ms)"
URGENT_BYTES, PAUSE_S = 4 * KIB, 0.002
BULK_BYTES, BULK_WINDOW = 4 * MIB, 4
LENGTH = 16 * MIB
P99_MORE_MS, BULK_SHARE = 1.0, 0.9
SETTLE_S = 0.5  # until windows have found the rail's rate
LATENCY_IMM, BULK_IMM = 1, 2
SIM_GBPS, SIM_DELAY_US, SIM_MORE = 100, 5, 3.0
# What eight sessions send: the sizes of their jobs in turn, and how many are in flight.
CROWD: tuple[tuple[tuple[int, ...], int], ...] = (
    ((64 * KIB,), 64),
    ((64 * KIB, 256 * KIB), 32),
    ((256 * KIB,), 16),
    ((1 * MIB,), 2),
    ((1 * MIB, 64 * KIB), 8),
    ((4 * MIB,), 4),
    ((16 * MIB,), 2),
    ((16 * MIB, 64 * KIB), 3),
)
JAIN = 0.95
WEIGHT, WEIGHT_OFF = 3, 0.10
WAIT_S = 20.0


def rows(run: Run) -> list[Row]:
    """Measures on rails that are limited, so that the processors are not what is shared."""
    found = [simulated(run)]
    why = netns.missing()
    if why:
        run.skip("sessions beside each other on a 1 Gbit/s rail", why)
        return found
    return [*found, *beside_bulk(run), crowd(run), weights(run)]


def simulated(run: Run) -> Row:
    """In simulated time: windows, turns and the rail are what takes time, and no processor is."""
    program, count = build.urgent(), run.scaled(5000)
    command = [str(program), "", str(SIM_GBPS), str(SIM_DELAY_US), str(count)]
    took = {}
    for load in ("idle", "beside"):
        command[1] = load
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        took[load] = [float(line) for line in done.stdout.split()]
    alone, beside = took["beside"][count:]
    idle_p99, loaded_p99 = (percentile(took[load][:count], 99) for load in ("idle", "beside"))
    note = (
        f"p99 idle {idle_p99 / 1e3:.2f}, beside {loaded_p99 / 1e3:.2f} µs; "
        f"bulk {alone:.1f} Gbps alone, {beside:.1f} beside"
    )
    what = (
        f"4 KiB of the latency class beside saturating bulk, sim at {SIM_GBPS} Gbit/s and up to "
        f"{SIM_DELAY_US} µs each way, in simulated time: p99 over idle p99"
    )
    return Row(what, loaded_p99 / idle_p99, "x", "<=", SIM_MORE, note)


def by_itself(directory: Path) -> dict[str, Any]:
    """The daemon chooses the provider."""
    return {"provider": "auto"}


# ---- a small write beside bulk ----


def beside_bulk(run: Run) -> list[Row]:
    """One session floods, another sends 4 KiB now and then, both from one daemon to the other."""
    count, seconds = run.scaled(1000), 1.0 if run.quick else 3.0
    idle, beside, alone, shares = [], [], [], []
    with (
        limited_daemons(1, by_itself) as pair,
        endpoints(pair, LENGTH) as (urgent, target),
        flooder(pair, target) as bulk,
    ):
        for _ in range(max(3, run.turns // 3)):
            run.gate.wait()
            idle.append(p99_ms(urgent, target, count))
            flood = SETTLE_S + seconds + count * PAUSE_S * 2 + 1
            bulk.tell(
                "saturate", sizes=[BULK_BYTES], window=BULK_WINDOW, seconds=flood, imm=BULK_IMM
            )
            time.sleep(SETTLE_S)
            with rate(pair[0]) as before:
                time.sleep(seconds)
            with rate(pair[0]) as meanwhile:
                beside.append(p99_ms(urgent, target, count))
            bulk.answer()
            alone.append(before.gbps())
            shares.append(meanwhile.gbps(without=count * URGENT_BYTES) / before.gbps())
    more = median(beside) - min(idle)  # other work that meets an idle turn is no excuse
    note = f"{urgent.about['provider']}; p99 idle {spread(idle)}, beside bulk {spread(beside)} ms"
    what = f"4 KiB of the latency class beside saturating bulk, {RAIL}"
    return [
        Row(f"{what}: p99 over idle p99", more, "ms", "<=", P99_MORE_MS, note),
        Row(f"{what}: bulk over bulk alone", median(shares), "", ">=", BULK_SHARE,
            f"{spread(shares)}; alone {spread(alone)} Gbps"),
    ]  # fmt: skip


def p99_ms(urgent: Endpoint, target: Endpoint, count: int) -> float:
    """From a write's call at one host until its count is seen at the other."""
    target.tell("watch", count=count, imm=LATENCY_IMM)
    called = urgent.ask("paced", size=URGENT_BYTES, count=count, imm=LATENCY_IMM, pause_s=PAUSE_S)[
        "called_ns"
    ]
    seen = target.answer()["seen_ns"]
    took = [(there - here) / 1e6 for here, there in zip(called, seen, strict=True)]
    return percentile(took, 99)


@contextlib.contextmanager
def flooder(pair: list[DaemonProcess], target: Endpoint) -> Iterator[Endpoint]:
    """A further session of the first daemon, which writes to the same memory."""
    bulk = Endpoint(pair[0], LENGTH)
    try:
        bulk.ask("join", descriptor=target.about["descriptor"])
        yield bulk
    finally:
        bulk.close()


class Rate:
    """Bytes that a daemon's rails have sent in a time."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0

    def gbps(self, without: int = 0) -> float:
        """Tells the rate, without so many bytes of others."""
        return (self.bytes - without) * 8 / self.seconds / 1e9


@contextlib.contextmanager
def rate(daemon: DaemonProcess) -> Iterator[Rate]:
    """Measures while the block runs."""
    found = Rate()
    with daemon.channel() as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)

        def sent() -> int:
            rails = admin.ListRails(admin_pb2.ListRailsRequest(), timeout=WAIT_S).rails
            return sum(rail.bytes_sent for rail in rails)

        before, begin = sent(), time.monotonic()
        yield found
        found.bytes, found.seconds = sent() - before, time.monotonic() - begin


# ---- sessions beside each other ----


def crowd(run: Run) -> Row:
    """Eight sessions of one daemon to one receiver, which differ in all but their weight."""
    with limited_daemons(1, by_itself) as pair, contextlib.ExitStack() as stack:
        target = stack.enter_context(closing(Endpoint(pair[1], LENGTH)))
        sent = shares(run, pair[0], target, stack, [(pair[0].socket, *load) for load in CROWD])
    square = sum(sent) ** 2 / (len(sent) * sum(x * x for x in sent))
    note = f"MiB each: {', '.join(f'{x / MIB:.0f}' for x in sent)}"
    what = "8 sessions of one daemon to one receiver, jobs of 64 KiB to 16 MiB, 2 to 64 in flight"
    return Row(f"{what}: Jain index of bytes", square, "", ">=", JAIN, note)


def weights(run: Run) -> Row:
    """A session of each of two tenants, whose weights are 1 and 3."""

    def configure(directory: Path) -> dict[str, Any]:
        heavy = directory / "heavy"
        heavy.mkdir()
        return {
            **by_itself(directory),
            "tenants": [
                {"name": "light", "weight": 1},
                {"name": "heavy", "weight": WEIGHT, "socket_dir": str(heavy)},
            ],
        }

    with limited_daemons(1, configure) as pair, contextlib.ExitStack() as stack:
        target = stack.enter_context(closing(Endpoint(pair[1], LENGTH)))
        heavy = f"unix://{pair[0].directory}/heavy/transferd.sock"
        loads = [(pair[0].socket, (1 * MIB,), 8), (heavy, (256 * KIB,), 32)]
        light_bytes, heavy_bytes = shares(run, pair[0], target, stack, loads)
    off = abs(heavy_bytes / light_bytes / WEIGHT - 1)
    note = f"{light_bytes / MIB:.0f} and {heavy_bytes / MIB:.0f} MiB"
    return Row("sessions of weights 1 and 3: shares off by", off, "", "<=", WEIGHT_OFF, note)


def shares(
    run: Run,
    daemon: DaemonProcess,
    target: Endpoint,
    stack: contextlib.ExitStack,
    loads: Sequence[tuple[str, tuple[int, ...], int]],
) -> list[int]:
    """Has sessions of a daemon flood a target, and tells what each has sent in the same time."""
    seconds = 2.0 if run.quick else 5.0
    senders = []
    for socket, sizes, window in loads:
        sender = stack.enter_context(closing(Endpoint(socket, max(sizes))))
        sender.ask("join", descriptor=target.about["descriptor"])
        senders.append((sender, sizes, window))
    run.gate.wait()
    for sender, sizes, window in senders:
        sender.tell(
            "saturate", sizes=sizes, window=window, seconds=seconds + 2 * SETTLE_S, imm=BULK_IMM
        )
    time.sleep(SETTLE_S)
    before = sent_by_session(daemon)
    time.sleep(seconds)
    after = sent_by_session(daemon)
    for sender, _, _ in senders:
        sender.answer()
    return [after[number] - before[number] for number in sorted(after)]


def sent_by_session(daemon: DaemonProcess) -> dict[int, int]:
    """Acknowledged bytes of each session; they are numbered in the order of their opening."""
    with daemon.channel() as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        sessions = admin.ListSessions(admin_pb2.ListSessionsRequest(), timeout=WAIT_S).sessions
    return {session.session_id: session.bytes_sent for session in sessions}


closing = contextlib.closing
