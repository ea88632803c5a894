# SPDX-License-Identifier: Apache-2.0
"""Whether the machine has time for us: figures taken beside other work say little."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_S = 0.1
CORES_BUSY = 0.25  # what may go on beside, in cores
PATIENCE_S = 20.0


def busy_ticks() -> int:
    """Tells the ticks that all cores have worked so far, stolen ones included."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in words)
    return user + nice + system + irq + softirq + steal


def cores_busy() -> float:
    """Watches for a moment; tells how many cores were busy."""
    before, begin = busy_ticks(), time.monotonic()
    time.sleep(SAMPLE_S)
    ticks, elapsed = busy_ticks() - before, time.monotonic() - begin
    return ticks / os.sysconf("SC_CLK_TCK") / elapsed


@dataclass(slots=True)
class Gate:
    """Lets measurements pass while nobody else works.

    Attributes:
        patience_s: How long it waits in all, before it lets everything pass.
        loads: Cores that were busy with other work before each measurement.
    """

    patience_s: float = 120.0
    loads: list[float] = field(default_factory=list)

    def wait(self) -> None:
        """Waits until the machine is quiet, or patience is out."""
        begin = time.monotonic()
        end = begin + min(PATIENCE_S, self.patience_s)
        while (load := cores_busy()) > CORES_BUSY and time.monotonic() < end:
            pass
        self.patience_s -= time.monotonic() - begin
        self.loads.append(load)
