# SPDX-License-Identifier: Apache-2.0
"""The program of support/twins.py: serves several configurations until SIGTERM."""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import sys
from pathlib import Path

import uvloop

from transferd.daemon import config, logs
from transferd.daemon.server import Server


async def run(paths: list[str]) -> None:
    """Starts a daemon for each configuration, in order; stops them all."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    servers = [Server(config.load(Path(path))) for path in paths]
    for server in servers:
        await server.start()
    await stop.wait()
    for server in servers:
        await server.stop()


if __name__ == "__main__":
    faulthandler.enable()
    logs.set_up("debug", "json")
    uvloop.run(run(sys.argv[1:]))
