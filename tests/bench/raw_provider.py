# SPDX-License-Identifier: Apache-2.0
"""The raw provider: runs fi_raw."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from bench import build

SEGMENT = 1 << 20  # what the daemon cuts writes into
SEGMENTS_IN_FLIGHT = 4  # its window of 4 MiB
TIMEOUT_S = 120


def run(*arguments: object) -> dict[str, Any]:
    """Runs it once; returns what it printed."""
    command = [str(build.fi_raw()), *(str(argument) for argument in arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def whole_gbps(size: int, window: int, count: int) -> float:
    """Measures writes of a size with so many in flight."""
    return float(run("bw", size, window, count)["gbps"])


def cut_gbps(size: int, window: int, count: int) -> float:
    """Measures the same bytes cut as the daemon cuts them, under the window that it keeps."""
    return float(run("bw", size, window, count, SEGMENT, SEGMENTS_IN_FLIGHT)["gbps"])


def latency_us(size: int, count: int) -> tuple[float, float]:
    """Measures one way, p50 and p99."""
    result = run("lat", size, count)
    return float(result["p50_us"]), float(result["p99_us"])
