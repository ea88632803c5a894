# SPDX-License-Identifier: Apache-2.0
"""A client process with "GPU" memory of :mod:`support.fakecuda`, which others write into."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import transferd

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH = 1 << 16
TESTS = Path(__file__).resolve().parents[1]


class Peer:
    """The process, as its test sees it."""

    def __init__(self, socket: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.cuda_peer", socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TESTS,
        )
        self.descriptor = bytes.fromhex(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has ended"
        return json.loads(line)

    def ask(self, do: str, *arguments: int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([do, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def bytes_at(self, first: int, length: int) -> bytes:
        return bytes.fromhex(self.ask("read", first, length))

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()


@contextmanager
def running(socket: str) -> Iterator[Peer]:
    """Runs one."""
    peer = Peer(socket)
    try:
        yield peer
    finally:
        peer.close()


def main(socket: str) -> None:
    """What the process does."""
    from support.fakecuda import DeviceBuffer, installed

    def tell(answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    with (
        pytest.MonkeyPatch.context() as patch,
        installed(patch) as cuda,
        transferd.Client(socket) as client,
    ):
        buffer = DeviceBuffer(cuda, cuda.malloc(LENGTH), LENGTH)
        region = client.register(buffer)
        grant = region.grant(rights={"write", "map"}, imms=range(16))
        tell(grant.descriptor.hex())
        for line in sys.stdin:
            match json.loads(line):
                case ["read", first, length]:
                    tell(bytes(buffer.view[first : first + length]).hex())
                case ["wait", imm, target]:
                    client.counter(imm).wait(target, 30)
                    tell(client.counter(imm).value)
                case ["faults", imm]:
                    tell(client.counter(imm).faults)
                case ["revoke"]:
                    try:
                        grant.revoke()
                    except transferd.Conflict as error:
                        tell(error.reason)
                    else:
                        tell("OK")


if __name__ == "__main__":
    main(sys.argv[1])
