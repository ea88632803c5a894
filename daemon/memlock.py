# SPDX-License-Identifier: Apache-2.0
"""The limit of pinned memory (RLIMIT_MEMLOCK), which registering memory with a NIC counts against.

The kernel counts each registration, on each rail, against the limit of the process, unless it may
pass it (CAP_IPC_LOCK).
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

CAP_IPC_LOCK = 14  # capability.h
PINNING = frozenset({"verbs"})  # providers that pin by this process's own limit
HOW = (
    "set LimitMEMLOCK=infinity in transferd's systemd unit, run `ulimit -l unlimited` before it in "
    "a shell; a container takes the limit of its runtime (docker run --ulimit memlock=-1; "
    "Kubernetes: LimitMEMLOCK=infinity in containerd's unit, or the capability IPC_LOCK)"
)


def raise_limit() -> None:
    """Raises the limit as far as this process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def limit() -> int | None:
    """Reads how many bytes this process may pin; None: any number."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or _may_pass() else soft


def _may_pass() -> bool:
    """Whether this process has CAP_IPC_LOCK."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        capabilities = int(status.split("CapEff:")[1].split()[0], 16)
        return bool(capabilities >> CAP_IPC_LOCK & 1)
    return False


def ram() -> int:
    """Reads the bytes of memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def warning(may_pin: int | None, wanted: int, rails: int) -> str:
    """Says that the limit is too small for what clients may register; empty if it is not.

    Args:
        may_pin: Of :func:`limit`.
        wanted: Bytes that clients may register.
        rails: How often each of them is pinned.
    """
    need = wanted * rails
    if may_pin is None or may_pin >= need:
        return ""
    times = f" on each of {rails} rails" if rails > 1 else ""
    return (
        f"This process may pin {text(may_pin)} (RLIMIT_MEMLOCK), and clients may register "
        f"{text(wanted)}{times}, which needs {text(need)}: registering more than the limit fails "
        f"(MEMLOCK); {HOW}."
    )


def text(count: int) -> str:
    """Says a number of bytes in the largest unit that it has one of."""
    power, unit = next(
        ((p, u) for p, u in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")) if count >> p),
        (0, "bytes"),
    )
    return f"{count / (1 << power):.4g} {unit}"
