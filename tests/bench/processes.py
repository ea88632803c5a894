# SPDX-License-Identifier: Apache-2.0
"""What a process holds and uses, from /proc."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Tells the processor time used so far.

    The larger of utime + stime, which counts whole ticks, and what the scheduler has counted in ns,
    which sees the many wake-ups that end before a tick.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    by_ticks = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    by_scheduler = sum(
        int(task.joinpath("schedstat").read_text().split()[0])
        for task in Path(f"/proc/{pid}/task").iterdir()
    )
    return max(by_ticks, by_scheduler / 1e9)


def rss_bytes(pid: int) -> int:
    """Tells the resident memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"process {pid} has no VmRSS")


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds; numbers, and bytes where the name says so."""

    fds: int
    mappings: int
    threads: int
    registered_bytes: int

    def growth(self, before: Holdings) -> dict[str, int]:
        """Tells the differences by name."""
        then = asdict(before)
        return {name: value - then[name] for name, value in asdict(self).items()}


def holdings(pid: int, registered_bytes: int) -> Holdings:
    """Counts now."""
    root = Path(f"/proc/{pid}")
    return Holdings(
        fds=len(list((root / "fd").iterdir())),
        mappings=len((root / "maps").read_text().splitlines()),
        threads=len(list((root / "task").iterdir())),
        registered_bytes=registered_bytes,
    )
