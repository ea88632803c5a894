# SPDX-License-Identifier: Apache-2.0
"""A client process of the benchmarks: commands as lines of JSON on stdin, answers on stdout.

Run as ``python -m bench.endpoint SOCKET LENGTH [SPIN_US]``; :mod:`bench.pair` starts two and joins
them. SPIN_US: how long a wait polls before it sleeps, if not as by default.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

import transferd
from bench import ping
from bench.random_pages import Shape
from transferd.native.client_half import lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.random_pages import Tables
    from transferd import Client, Job

WAIT_S = 60.0
JOIN_S = 60.0
SPIN_US = 200.0  # the client's default
IMMS = 64


class Endpoint:
    """One session with memory that the other side may write to, and one to write from."""

    def __init__(self, client: Client, length: int) -> None:
        self._client = client
        self._source = client.alloc(length)
        self._region = client.alloc(length)
        self._source.view[:] = b"\x5a" * length
        self._region.view[:] = bytes(length)  # its pages are there before anything is timed
        self._grant = self._region.grant(imms=range(IMMS))
        self._far = b""
        self._counted = dict.fromkeys(range(IMMS), 0)
        self._tables: dict[tuple[int, int, int], Tables] = {}

    def describe(self) -> dict[str, Any]:
        """Tells what the other side and the reports need to know."""
        session = self._client._session
        header = lib.tfd_client_header(session.client)  # type: ignore[attr-defined]
        return {
            "descriptor": base64.b64encode(self._grant.descriptor).decode(),
            "segment_bytes": int(header.segment_bytes),
            "provider": self._client.provider,
        }

    def join(self, descriptor: str) -> dict[str, Any]:
        """Learns where to write to."""
        self._far = base64.b64decode(descriptor)
        deadline = time.monotonic() + JOIN_S
        while True:
            try:
                self._client.warm(self._far)
                break
            except transferd.PeerLost:  # in an emulated machine the first call takes long
                if time.monotonic() > deadline:
                    raise
        self._client.write(self._source[0:8], self._far, imm=IMMS - 1).wait(WAIT_S)
        return {}

    def flood(self, size: int, window: int, count: int, imm: int, page: int = 0) -> dict[str, Any]:
        """Writes count times, ``window`` jobs in flight; tells when it began and ended.

        With ``page`` each job writes pages of so many bytes, in reverse, and counts once.
        """
        write = self._writer(size, window, imm, page)
        flying: deque[Job] = deque()
        begin_ns = time.monotonic_ns()
        for index in range(count):
            if len(flying) == window:
                flying.popleft().wait(WAIT_S)
            flying.append(write(index % window))
        path = flying[-1]
        for job in flying:
            job.wait(WAIT_S)
        return {"begin_ns": begin_ns, "end_ns": time.monotonic_ns(), "path": str(path.path)}

    def prepare_pages(self, page: int, pages: int, set_bytes: int) -> dict[str, Any]:
        """Makes the tables of a shape, before anything is timed."""
        self._tables[page, pages, set_bytes] = Shape(page, pages, set_bytes).tables()
        return {}

    def flood_pages(
        self, page: int, pages: int, set_bytes: int, window: int, count: int, imm: int
    ) -> dict[str, Any]:
        """Writes count jobs of a shape that was prepared; tells when it began."""
        tables = self._tables[page, pages, set_bytes]
        source, far, write_pages = self._source[0:set_bytes], self._far, self._client.write_pages
        flying: deque[Job] = deque()
        begin_ns = time.monotonic_ns()
        for index in range(count):
            if len(flying) == window:
                flying.popleft().wait(WAIT_S)
            here, there = tables[index % len(tables)]
            flying.append(write_pages(source, here, far, there, page, imm=imm, count="job"))
        path = flying[-1]
        for job in flying:
            job.wait(WAIT_S)
        return {"begin_ns": begin_ns, "path": str(path.path)}

    def _writer(self, size: int, window: int, imm: int, page: int) -> Callable[[int], Job]:
        client, far = self._client, self._far
        sources = [self._source[slot * size : (slot + 1) * size] for slot in range(window)]
        if not page:
            return lambda slot: client.write(sources[slot], far, slot * size, imm=imm)
        here = array("i", range(size // page))
        there = array("i", reversed(here))  # no two are adjacent on both sides
        return lambda slot: client.write_pages(
            sources[slot], here, far, there, page, dst_offset=slot * size, imm=imm, count="job"
        )

    def saturate(self, sizes: list[int], window: int, seconds: float, imm: int) -> dict[str, Any]:
        """Writes for a time, ``window`` jobs in flight, of these sizes in turn."""
        write, far = self._client.write, self._far
        sources = [self._source[0:size] for size in sizes]
        flying: deque[Job] = deque()
        index, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            if len(flying) == window:
                flying.popleft().wait(WAIT_S)
            flying.append(write(sources[index % len(sources)], far, imm=imm))
            index += 1
        for job in flying:
            job.wait(WAIT_S)
        return {"jobs": index}

    def paced(self, size: int, count: int, imm: int, pause_s: float) -> dict[str, Any]:
        """Writes of the latency class, one at a time with pauses; tells when they were called."""
        write, source, far, now = (
            self._client.write,
            self._source[0:size],
            self._far,
            time.monotonic_ns,
        )
        called = [0] * count
        for index in range(count):
            time.sleep(pause_s)
            called[index] = now()
            write(source, far, imm=imm, priority="latency").wait(WAIT_S)
        return {"called_ns": called}

    def watch(self, count: int, imm: int) -> dict[str, Any]:
        """Waits for writes one by one; tells when they were seen."""
        wait, now = self._client.counter(imm).wait, time.monotonic_ns
        before, seen = self._counted[imm], [0] * count
        for index in range(count):
            wait(before + index + 1, WAIT_S)
            seen[index] = now()
        self._counted[imm] += count
        return {"seen_ns": seen}

    def landed(self, count: int, imm: int) -> dict[str, Any]:
        """Waits for so many more writes; tells when the last was seen."""
        self._counted[imm] += count
        self._client.counter(imm).wait(self._counted[imm], WAIT_S)
        return {"seen_ns": time.monotonic_ns()}

    def ping(self, size: int, count: int, imm: int, first: bool) -> dict[str, Any]:
        """Writes back and forth by the SDK; tells when writes were called and counts seen."""
        called, seen = [0] * count, [0] * count
        write, wait = self._client.write, self._client.counter(imm).wait
        source, far, now = self._source[0:size], self._far, time.monotonic_ns
        before = self._counted[imm]
        for index in range(count):
            if first:
                called[index] = now()
                write(source, far, imm=imm, priority="latency")
            wait(before + index + 1, WAIT_S)
            seen[index] = now()
            if not first:
                called[index] = now()
                write(source, far, imm=imm, priority="latency")
        self._counted[imm] += count
        return {"called_ns": called, "seen_ns": seen}

    def ping_native(self, size: int, count: int, imm: int, first: bool) -> dict[str, Any]:
        """The same loop in C."""
        called, seen = ping.run(
            self._client._session, self._source.open_handle(), self._far, size, imm,
            count=count, counted=self._counted[imm], first=first,
        )  # fmt: skip
        self._counted[imm] += count
        return {"called_ns": called, "seen_ns": seen}


def cycle(address: str, count: int, far: str) -> dict[str, Any]:
    """Opens and closes sessions that each use what a session has."""
    descriptor = base64.b64decode(far)
    begin = time.monotonic()
    for _ in range(count):
        with transferd.Client(address, name="cycle") as client:
            region = client.alloc(1 << 16)
            region.grant(imms=range(4))
            client.write(region, descriptor, imm=0).wait(WAIT_S)
    return {"seconds": time.monotonic() - begin}


def commands(endpoint: Endpoint) -> dict[str, Callable[..., dict[str, Any]]]:
    """Lists what an endpoint can be told."""
    return {
        "join": endpoint.join,
        "flood": endpoint.flood,
        "prepare_pages": endpoint.prepare_pages,
        "flood_pages": endpoint.flood_pages,
        "saturate": endpoint.saturate,
        "paced": endpoint.paced,
        "watch": endpoint.watch,
        "landed": endpoint.landed,
        "ping": endpoint.ping,
        "ping_native": endpoint.ping_native,
    }


def serve(endpoint: Endpoint, known: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers until stdin closes."""
    print(json.dumps(endpoint.describe()), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(known[command.pop("do")](**command)), flush=True)


def main() -> None:
    """Runs one endpoint."""
    address, length = sys.argv[1], int(sys.argv[2])
    spin_us = float(sys.argv[3]) if len(sys.argv) > 3 else SPIN_US
    with transferd.Client(address, name=f"bench {os.getpid()}", spin_us=spin_us) as client:
        endpoint = Endpoint(client, length)
        of_sessions = {"cycle": lambda count, far: cycle(address, count, far)}
        serve(endpoint, commands(endpoint) | of_sessions)


if __name__ == "__main__":
    main()
