# SPDX-License-Identifier: Apache-2.0
"""The program of support/twins.py: serves several configurations until SIGTERM.

With MEMFD_IS_DMABUF in the environment it takes any file for a dma-buf, as softverbs does.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
from pathlib import Path

import uvloop

from transferd.daemon import config, logs
from transferd.daemon.dataplane import DataPlane
from transferd.daemon.server import Server


async def run(paths: list[str]) -> None:
    """Starts a daemon for each configuration, in order; stops them all."""
    stop = asyncio.Event()
    servers = [Server(config.load(Path(path))) for path in paths]
    for server in servers:
        await server.start()
    # By now libraries have been loaded that would handle them, too (libfabric).
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    for server in servers:
        await server.stop()


if __name__ == "__main__":
    faulthandler.enable()
    if "MEMFD_IS_DMABUF" in os.environ:
        DataPlane.dmabuf_size = lambda self, fd: os.fstat(fd).st_size  # type: ignore[method-assign]
    logs.set_up("debug", "json")
    uvloop.run(run(sys.argv[1:]))
