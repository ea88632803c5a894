# SPDX-License-Identifier: Apache-2.0
"""The raw provider: runs fi_raw."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any, Self

from bench import build

if TYPE_CHECKING:
    from types import TracebackType

SEGMENT = 1 << 20  # what the daemon cuts writes into
SEGMENTS_IN_FLIGHT = 4  # its window of 4 MiB
TIMEOUT_S = 120


def _command(*arguments: object) -> list[str]:
    return [str(build.fi_raw()), *(str(argument) for argument in arguments)]


class Flood:
    """A pair of processes that write over one connection, as old as the daemons' own.

    TCP's congestion control treats a connection by its age (BBR, here and there, does), so that one
    made anew for each run would not be the same thing.
    """

    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            _command("-r", "bw", *arguments),
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
            raise RuntimeError("the raw provider ended")
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
    return Flood(size, window, count)


def cut(size: int, window: int, count: int) -> Flood:
    """The same bytes cut as the daemon cuts them, under the window that it keeps."""
    return Flood(size, window, count, SEGMENT, SEGMENTS_IN_FLIGHT)


def latency_us(size: int, count: int) -> tuple[float, float]:
    """Measures one way, p50 and p99."""
    done = subprocess.run(
        _command("lat", size, count),
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return float(result["p50_us"]), float(result["p99_us"])
