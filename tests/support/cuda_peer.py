# SPDX-License-Identifier: Apache-2.0
"""A client process with GPU memory that others write into: a real GPU's, or the fake's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import transferd

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LENGTH = 1 << 16
KINDS = ("fake", "malloc", "vmm", "torch")
TESTS = Path(__file__).resolve().parents[1]


class Peer:
    """The process, as its test sees it."""

    def __init__(self, socket: str, kind: str, length: int, prefix: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "support.cuda_peer", socket, kind, str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.getenv("PYTHONPATH")))),
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
        )
        self.descriptor = bytes.fromhex(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has ended"
        return json.loads(line)

    def ask(self, do: str, *arguments: int) -> Any:
        """Has it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([do, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def bytes_at(self, first: int, length: int) -> bytes:
        """Reads its memory."""
        return bytes.fromhex(self.ask("read", first, length))

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()


@contextlib.contextmanager
def running(
    socket: str, kind: str = "fake", length: int = LENGTH, prefix: Sequence[str] = ()
) -> Iterator[Peer]:
    """Runs one."""
    peer = Peer(socket, kind, length, prefix)
    try:
        yield peer
    finally:
        peer.close()


@contextlib.contextmanager
def memory(kind: str, length: int) -> Iterator[tuple[Any, Any]]:
    """Makes memory; yields it, and what reads it."""
    if kind == "fake":
        from support.fakecuda import DeviceBuffer, installed

        with pytest.MonkeyPatch.context() as patch, installed(patch) as cuda:
            buffer = DeviceBuffer(cuda, cuda.malloc(length), length)
            yield buffer, lambda first, size: bytes(buffer.view[first : first + size])
        return
    if kind == "torch":
        import torch

        tensor = torch.zeros(length, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        yield tensor, lambda first, size: bytes(tensor[first : first + size].cpu().numpy())
        return
    from support.gpu import CHUNK, Gpu

    gpu = Gpu()
    made = gpu.malloc(length) if kind == "malloc" else gpu.vmm(-(-length // CHUNK))[0:length]
    made.clear()
    yield made, made.read


def main(socket: str, kind: str, length: int) -> None:
    """What the process does."""

    def tell(answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    with memory(kind, length) as (made, read), transferd.Client(socket) as client:
        region = client.register(made)
        grant = region.grant(rights={"write", "map"}, imms=range(16))
        tell(grant.descriptor.hex())
        for line in sys.stdin:
            match json.loads(line):
                case ["read", first, size]:
                    tell(read(first, size).hex())
                case ["wait", imm, target]:
                    client.counter(imm).wait(target, 30)
                    tell(client.counter(imm).value)
                case ["revoke"]:
                    try:
                        grant.revoke()
                    except transferd.Conflict as error:
                        tell(error.reason)
                    else:
                        tell("OK")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
