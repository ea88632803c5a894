# SPDX-License-Identifier: Apache-2.0
"""What is measured against: fi_raw, the raw provider, and pack_loop, bare loops over a socket."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any, Literal, Self

from bench import build

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from bench.random_pages import Shape

SEGMENT = 1 << 20  # what the daemon cuts writes into
SEGMENTS_IN_FLIGHT = 4  # its window of 4 MiB
TIMEOUT_S = 120


class Flood:
    """A pair of processes that write over one connection, as old as the daemons' own.

    TCP's congestion control treats a connection by its age (BBR, here and there, does), so that one
    made anew for each run would not be the same thing.
    """

    def __init__(self, program: Path, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [str(program), "-r", *(str(argument) for argument in arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def gbps(self) -> float:
        """Runs once.

        Raises:
            RuntimeError: The processes have ended; the error is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of what is measured against ended")
        return float(json.loads(line)["gbps"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=TIMEOUT_S)


def whole(size: int, window: int, count: int) -> Flood:
    """Writes of a size with so many in flight."""
    return Flood(build.fi_raw(), "bw", size, window, count)


def cut(size: int, window: int, count: int) -> Flood:
    """The same bytes cut as the daemon cuts them, under the window that it keeps."""
    return Flood(build.fi_raw(), "bw", size, window, count, SEGMENT, SEGMENTS_IN_FLIGHT)


def segments(set_bytes: int, count: int) -> Flood:
    """Writes of a segment each over a working set, as many in flight as the daemon's window has."""
    return Flood(
        build.fi_raw(), "bw", SEGMENT, set_bytes // SEGMENT, count, SEGMENT, SEGMENTS_IN_FLIGHT
    )


def loop(
    how: Literal["pack", "parts"], shape: Shape, window: int, jobs: int, buffer_bytes: int
) -> Flood:
    """A bare loop over a socket.

    Args:
        how: Pages are gathered and scattered by copies ("pack"), or by the kernel ("parts").
        shape: Of the jobs.
        window: Jobs in flight.
        jobs: Of a run.
        buffer_bytes: Of pages in a message.
    """
    numbers = (shape.page, shape.pages, shape.set_bytes, window, jobs, buffer_bytes)
    return Flood(build.pack_loop(), how, *numbers)


def latency_us(size: int, count: int) -> tuple[float, float]:
    """Measures one way, p50 and p99."""
    done = subprocess.run(
        [str(build.fi_raw()), "lat", str(size), str(count)],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return float(result["p50_us"]), float(result["p99_us"])
