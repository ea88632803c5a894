# SPDX-License-Identifier: Apache-2.0
"""A raw client of the fd socket, for a control plane that runs in the test's own process."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from typing import TYPE_CHECKING

from transferd.v1 import attach_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

ATTACH = pb.FdRequest(request_id=1, attach=pb.AttachRequest(abi_version=1, name="c"))


def open_fds() -> set[str]:
    """Lists the fds of this process, by what they are."""
    return set(os.listdir("/proc/self/fd"))


class Client:
    """One raw connection."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.sock.connect(os.fspath(path))
        self.fds: list[int] = []

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds or []))]
        self.sock.sendmsg([data], rights if fds else [])

    async def receive(self) -> pb.FdResponse | None:
        """Reads one answer; None at the end of the connection."""
        async with asyncio.timeout(5):
            while True:
                try:
                    data, fds, _, _ = socket.recv_fds(self.sock, 65_536, 16)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                except ConnectionResetError:
                    return None
        self.fds += fds
        return pb.FdResponse.FromString(data) if data else None

    async def ask(self, request: pb.FdRequest, fds: list[int] | None = None) -> pb.FdResponse:
        self.send(request.SerializeToString(), fds)
        response = await self.receive()
        assert response is not None
        return response

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.sock.close()
