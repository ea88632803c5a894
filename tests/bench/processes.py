# SPDX-License-Identifier: Apache-2.0
"""What a process holds and uses, from /proc."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
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


def anonymous_bytes(pid: int) -> int:
    """Tells the resident memory that is the process's own: no files, nothing shared."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"process {pid} has no RssAnon")


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds.

    Attributes:
        counts: Numbers by name; bytes where the name says so.
        named: What the fds and mappings are of.
    """

    counts: dict[str, int]
    named: Counter[str] = field(compare=False)

    def growth(self, before: Holdings) -> dict[str, int]:
        """Tells the differences by name."""
        return {name: count - before.counts[name] for name, count in self.counts.items()}

    def news(self, before: Holdings) -> str:
        """Names what is more than before."""
        return ", ".join(f"{count} x {name}" for name, count in (self.named - before.named).items())


def holdings(pid: int, registered_bytes: int) -> Holdings:
    """Counts now."""
    root = Path(f"/proc/{pid}")
    named: Counter[str] = Counter()
    fds = list((root / "fd").iterdir())
    for fd in fds:
        with contextlib.suppress(OSError):  # closed meanwhile
            named["fd of " + re.sub(r":\[\d+\]", "", str(fd.readlink()))] += 1
    mappings = (root / "maps").read_text().splitlines()
    for line in mappings:
        words = line.split(maxsplit=5)
        named[f"mapping of {words[5] if len(words) > 5 else 'anonymous memory'}"] += 1
    counts = {
        "fds": len(fds),
        "mappings": len(mappings),
        "threads": len(list((root / "task").iterdir())),
        "registered_bytes": registered_bytes,
    }
    return Holdings(counts, named)
