# SPDX-License-Identifier: Apache-2.0
"""What a daemon holds: its own count of things, and what the kernel says of its process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from transferd.v1 import admin_pb2, admin_pb2_grpc

from support.waiting import eventually

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

# gRPC's own: threads and connections that it makes and ends as it sees fit. Less than what ten
# repetitions would leave if each left one.
SLACK = {"fds": 4, "threads": 6}
FD_LOOKS = 5
FD_PAUSE_S = 0.01
BACK_S = 10.0


class Level(NamedTuple):
    """What a daemon holds at one moment.

    Attributes:
        sessions: Sessions, ending ones included.
        regions: Regions of all sessions.
        registered_bytes: Their size.
        opened: Grants of peers open here, and of ours open there.
        connections: To and from peers.
        fds: Open files of its process.
        threads: Threads of its process.
        maps: Memory mappings of client memory and segments.
    """

    sessions: int
    regions: int
    registered_bytes: int
    opened: int
    connections: int
    fds: int
    threads: int
    maps: int

    def above(self, other: Level) -> dict[str, tuple[int, int]]:
        """Tells where this level is higher than another, beyond what gRPC does by itself."""
        return {
            name: (there, here)
            for name, here, there in zip(self._fields, self, other, strict=True)
            if here > there + SLACK.get(name, 0)
        }


def level(daemon: DaemonProcess) -> Level:
    """Looks at a daemon."""
    with daemon.channel() as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        status = admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5)
        peers = admin.ListPeers(admin_pb2.ListPeersRequest(), timeout=5).peers
    process = psutil.Process(daemon.pid)
    return Level(
        sessions=status.sessions,
        regions=status.regions,
        registered_bytes=status.registered_bytes,
        opened=sum(peer.opened_there + peer.opened_here for peer in peers),
        connections=sum(peer.connections for peer in peers),
        fds=_steady_fds(process),
        threads=process.num_threads(),
        maps=_shared_mappings(daemon.pid),
    )


def _steady_fds(process: psutil.Process) -> int:
    """Counts open files; the least of some looks, because connections of questions come and go."""
    least: int = process.num_fds()
    for _ in range(FD_LOOKS):
        time.sleep(FD_PAUSE_S)
        least = min(least, process.num_fds())
    return least


def _shared_mappings(pid: int) -> int:
    """Counts mappings of memfds and of POSIX shared memory."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("/memfd:" in line or "/dev/shm/" in line for line in lines)


def back_to(daemon: DaemonProcess, before: Level, timeout_s: float = BACK_S) -> None:
    """Waits until a daemon holds no more than before.

    Raises:
        AssertionError: It still does after the bound.
    """
    seen = before

    def not_above() -> bool:
        nonlocal seen
        seen = level(daemon)
        return not seen.above(before)

    try:
        eventually(not_above, "back to the level before", timeout_s)
    except AssertionError:
        raise AssertionError(f"still held (before, now): {seen.above(before)}") from None
