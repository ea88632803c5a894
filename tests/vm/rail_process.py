# SPDX-License-Identifier: Apache-2.0
"""Opens a rail of provider verbs, registers memory with it: without a daemon, so within a second.

    python rail_process.py RAIL OPTIONS BYTES

prints what the rail says why it is as it is, or what was refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from transferd.daemon.dataplane import DataPlane
from transferd.daemon.plane import GroupOptions, PlaneError, SessionOptions, VerbsOptions

RING, COUNTERS, ARENA = 16, 8, 65_536


async def register(plane: DataPlane, group: int, length: int) -> None:
    """Registers memory of a session."""
    options = SessionOptions(group, RING, RING, COUNTERS, 1, 1, ARENA, session_id=1, weight=1)
    session, _ = await plane.session_open(options)
    fd = os.memfd_create("memory")
    os.truncate(fd, length)
    await plane.region_add(session, fd, 0, length, writable=True)


async def main() -> None:
    """Does it."""
    rail, verbs, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    plane = DataPlane.open(
        daemon_id=bytes(16), boot_epoch=bytes(16), spin_us=50, busy=False, max_sessions=8
    )
    try:
        group = await plane.open_group(
            GroupOptions("verbs", rails=(rail,), verbs=VerbsOptions(**verbs))
        )
        await register(plane, group, length)
    except PlaneError as error:
        print(f"refused: {error}")
    else:
        print(f"why: {plane.rails[0].why}")


asyncio.run(main())
