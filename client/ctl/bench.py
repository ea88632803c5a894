# SPDX-License-Identifier: Apache-2.0
"""``transferctl bench``: writes from this process to one of its own, through one daemon or two."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click
from rich.progress import Progress

import transferd
from transferd.client.child import Child
from transferd.client.ctl import render
from transferd.client.rpc import ADDRESS_VARIABLE, resolve_address

if TYPE_CHECKING:
    from transferd import Client, Job, Region

RECEIVER = "transferd.client.ctl.receiver"
MEMORY_MAX = 256 << 20  # of each side
WARM_UP = 50
LATENCY_WRITES_MAX = 5000
LATENCY_WRITES_MIN = 20
WAIT_S = 60.0
SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one size.

    Attributes:
        size_bytes: Of each write.
        latency_p50_us: From the call of write() until the receiver's counter.wait() returned.
        latency_p99_us: The same.
        latency_writes: Number of writes behind the two, one at a time.
        writes: Number of writes behind the rate, several in flight.
        seconds: From the first call until the receiver saw the last count.
        gbps: Rate.
        path: What the last job used.
        consistent: Whether the receiver's memory holds what was sent.
    """

    size_bytes: int
    latency_p50_us: float
    latency_p99_us: float
    latency_writes: int
    writes: int
    seconds: float
    gbps: float
    path: str
    consistent: bool


class Bench:
    """The sending side."""

    def __init__(
        self, client: Client, region: Region, receiver: Child, seconds: float, window: int
    ) -> None:
        self._client = client
        self._region = region
        self._receiver = receiver
        self._seconds = seconds
        self._window = window
        self._descriptor = base64.b64decode(receiver.read()["descriptor"])
        client.warm(self._descriptor)

    def run(self, size: int, imm: int) -> Row:
        """Measures one size; uses the immediates ``imm`` to ``imm + 2``."""
        slots = slots_of(size, self._window)
        self._receiver.ask(do="clear", length=size * slots)
        latencies = self._latency(size, imm)
        writes, started_ns, last = self._flood(size, slots, imm + 2)
        landed = self._receiver.ask(do="landed", imm=imm + 2, count=writes, length=size * slots)
        seconds = (landed["seen_ns"] - started_ns) / 1e9
        sent = hashlib.sha256(self._region.view[: size * slots]).hexdigest()
        return Row(
            size_bytes=size,
            latency_p50_us=percentile(latencies, 50) / 1e3,
            latency_p99_us=percentile(latencies, 99) / 1e3,
            latency_writes=len(latencies),
            writes=writes,
            seconds=seconds,
            gbps=writes * size * 8 / seconds / 1e9,
            path=str(last.path),
            consistent=landed["sha256"] == sent,
        )

    def _latency(self, size: int, imm: int) -> list[int]:
        """Writes one at a time; returns ns from each call to its count there, sorted."""
        source = self._region[0:size]
        started = time.monotonic()
        for _ in range(WARM_UP):
            self._client.write(source, self._descriptor, imm=imm, priority="latency").wait(WAIT_S)
            if time.monotonic() - started > self._seconds:
                break
        each = (time.monotonic() - started) / WARM_UP
        count = int(self._seconds / 2 / each)
        count = max(LATENCY_WRITES_MIN, min(LATENCY_WRITES_MAX, count))
        self._receiver.ask(do="latency", imm=imm + 1, count=count)
        called = [0] * count
        write, now = self._client.write, time.monotonic_ns
        for index in range(count):
            called[index] = now()
            write(source, self._descriptor, imm=imm + 1, priority="latency").wait(WAIT_S)
        seen = self._receiver.read()["seen_ns"]
        return sorted(there - here for here, there in zip(called, seen, strict=True))

    def _flood(self, size: int, slots: int, imm: int) -> tuple[int, int, Job]:
        """Writes with several in flight for a while, every slot at least once."""
        sources = [self._region[slot * size : (slot + 1) * size] for slot in range(slots)]
        flying: deque[Job] = deque()
        started_ns = time.monotonic_ns()
        until_ns = started_ns + int(self._seconds * 1e9)
        count = 0
        while count < slots or time.monotonic_ns() < until_ns:
            slot = count % slots
            if len(flying) == self._window:
                flying.popleft().wait(WAIT_S)
            flying.append(self._client.write(sources[slot], self._descriptor, slot * size, imm=imm))
            count += 1
        last = flying[-1]
        for job in flying:
            job.wait(WAIT_S)
        return count, started_ns, last


def slots_of(size: int, window: int) -> int:
    """Tells how many places writes of a size go to in turn."""
    return max(1, min(window, MEMORY_MAX // max(1, size)))


def percentile(ordered: list[int], share: int) -> float:
    """Reads a percentile off a sorted list."""
    return float(ordered[min(len(ordered) - 1, len(ordered) * share // 100)])


def parse_sizes(text: str) -> list[int]:
    """Reads "4K,1M".

    Raises:
        InvalidRequest: Not sizes, or above what the benchmark holds.
    """
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", word.strip().upper())
        size = int(match[1]) * SUFFIXES[match[2]] if match else 0
        if not 0 < size <= MEMORY_MAX:
            raise transferd.InvalidRequest(
                f"--sizes: {word!r} is not a size from 1 to 256M, as in 4K,64K,1M,32M"
            )
        sizes.append(size)
    return sizes


def measure(
    address: str, to: str, sizes: list[int], seconds: float, window: int, progress: Progress
) -> list[Row]:
    """Measures all sizes."""
    length = max(size * slots_of(size, window) for size in sizes)
    task = progress.add_task("attaching", total=len(sizes))
    with (
        Child(RECEIVER, to, str(length), str(3 * len(sizes))) as receiver,
        transferd.Client(address, name="bench sender") as client,
    ):
        region = client.alloc(length, name="bench")
        filled = 0
        while filled < length:
            part = os.urandom(min(length - filled, 16 << 20))
            region.view[filled : filled + len(part)] = part
            filled += len(part)
        bench = Bench(client, region, receiver, seconds, window)
        rows = []
        for number, size in enumerate(sizes):
            progress.update(task, description=f"writes of {render.bytes_text(size)}")
            rows.append(bench.run(size, 3 * number))
            progress.advance(task)
        return rows


COLUMNS = (
    render.size("SIZE", "size_bytes"),
    render.Column("P50", lambda row: f"{row['latency_p50_us']:,.1f} µs", right=True),
    render.Column("P99", lambda row: f"{row['latency_p99_us']:,.1f} µs", right=True),
    render.Column("RATE", lambda row: f"{row['gbps']:.2f} Gbps", right=True),
    render.number("WRITES", "writes"),
    render.column("PATH", "path"),
    render.Column("DATA", lambda row: "ok" if row["consistent"] else "WRONG"),
)


@click.command("bench")
@click.option(
    "--socket",
    "address",
    metavar="ADDRESS",
    help=f"The sender's daemon. Default: {ADDRESS_VARIABLE}.",
)
@click.option("--to", metavar="ADDRESS", help="The receiver's daemon. Default: the same.")
@click.option("--sizes", default="4K,64K,1M,32M", show_default=True, help="Sizes of the writes.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 3600),
    default=2.0,
    show_default=True,
    help="How long each size is measured.",
)
@click.option(
    "--window",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Writes in flight while the rate is measured.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def bench_command(
    address: str | None, to: str | None, sizes: str, seconds: float, window: int, as_json: bool
) -> None:
    """Measures writes: latency one at a time, rate with several in flight, and whether they land.

    Latency runs from the call of write() in the sender until counter.wait() returned in the
    receiver, which is a process of its own.
    """
    sender = resolve_address(address)
    receiver = resolve_address(to) if to else sender
    with Progress(console=render.make_console(error=True), transient=True) as progress:
        rows = measure(sender, receiver, parse_sizes(sizes), seconds, window, progress)
    plain = [asdict(row) for row in rows]
    if as_json:
        render.print_json(plain)
    else:
        render.print_table(COLUMNS, plain, "no sizes", render.make_console())
    if not all(row.consistent for row in rows):
        raise transferd.Internal("the receiver's memory does not hold what was sent")
