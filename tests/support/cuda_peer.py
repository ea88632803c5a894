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
from transferd.client.cuda import driver as drivers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LENGTH = 1 << 16
KINDS = ("fake", "fake-vmm", "fake-short", "soft", "malloc", "vmm", "torch")
TESTS = Path(__file__).resolve().parents[1]


class Peer:
    """The process, as its test sees it."""

    def __init__(
        self,
        socket: str,
        kind: str,
        length: int,
        prefix: Sequence[str],
        device: int,
        visible: str | None,
    ) -> None:
        arguments = [socket, kind, str(length), str(device)]
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "support.cuda_peer", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.getenv("PYTHONPATH")))),
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
                **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}),
            },
        )
        try:
            self.descriptor = bytes.fromhex(self._answer())
        except BaseException:
            self.close()
            raise

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has ended"
        return json.loads(line)

    def tell(self, do: str, *arguments: int | str) -> None:
        """Has it do something that it does not answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([do, *arguments]) + "\n")
        self.process.stdin.flush()

    def ask(self, do: str, *arguments: int | str) -> Any:
        """Has it do something."""
        self.tell(do, *arguments)
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
    socket: str,
    kind: str = "fake",
    length: int = LENGTH,
    prefix: Sequence[str] = (),
    *,
    device: int = 0,
    visible: str | None = None,
) -> Iterator[Peer]:
    """Runs one, on a device of those that are visible to it (CUDA_VISIBLE_DEVICES)."""
    peer = Peer(socket, kind, length, prefix, device, visible)
    try:
        yield peer
    finally:
        peer.close()


@contextlib.contextmanager
def memory(kind: str, length: int, device: int) -> Iterator[tuple[Any, Any]]:
    """Makes memory; yields it, and what reads it."""
    if kind.startswith("fake"):
        from support.fakecuda import CHUNK, DeviceBuffer, FakeCuda, installed

        handle = FakeCuda.do_cuIpcGetMemHandle

        def of_another(cuda: FakeCuda, out: int, _: int) -> int:
            return handle(cuda, out, cuda.malloc(length // 2, device))

        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            if kind == "fake-short":  # it shares the handle of a shorter allocation
                patch.setattr(FakeCuda, "do_cuIpcGetMemHandle", of_another)
            cuda = stack.enter_context(installed(patch))
            vmm = kind == "fake-vmm"
            at = cuda.vmm(-(-length // CHUNK), device) if vmm else cuda.malloc(length, device)
            buffer = DeviceBuffer(cuda, at, length)
            yield buffer, lambda first, size: bytes(buffer.view[first : first + size])
        return
    if kind == "soft":  # by the library that TRANSFERD_CUDA_LIBRARY names
        from support.softcuda import SoftBuffer, SoftCuda

        soft = SoftBuffer(SoftCuda(), length)
        yield soft, lambda first, size: bytes(soft.view[first : first + size])
        return
    if kind == "torch":
        import torch

        tensor = torch.zeros(length, dtype=torch.uint8, device=f"cuda:{device}")
        torch.cuda.synchronize()
        yield tensor, lambda first, size: bytes(tensor[first : first + size].cpu().numpy())
        return
    from support.gpu import CHUNK, Gpu

    gpu = Gpu(device)
    made = gpu.malloc(length) if kind == "malloc" else gpu.vmm(-(-length // CHUNK))[0:length]
    made.clear()
    yield made, made.read


def write(client: transferd.Client, region: transferd.Region, descriptor: str) -> str:
    """Writes all of a region; tells the path, or why not."""
    try:
        job = client.write(region, bytes.fromhex(descriptor), imm=1)
        job.wait(30)
    except transferd.TransferdError as error:
        return error.reason
    return str(job.path)


def main(socket: str, kind: str, length: int, device: int) -> None:
    """What the process does."""

    def tell(answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    with memory(kind, length, device) as (made, read), transferd.Client(socket) as client:
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
                case ["flood", descriptor, count]:
                    dst = bytes.fromhex(descriptor)
                    jobs = [client.write(region, dst, imm=1) for _ in range(count)]
                    tell(len(jobs))
                case ["exit"]:  # as an application that forgets what it has begun
                    os._exit(0)
                case ["free"]:  # behind the region's back
                    made.cuda.free(made.address) if kind == "fake" else made.free()
                    tell("OK")
                case ["write", descriptor]:
                    tell(write(client, region, descriptor))
                case ["fill", first, data]:
                    made.write(bytes.fromhex(data), first)
                    tell("OK")
                case ["uuid"]:
                    tell(drivers.load().device_uuid(device).hex())
                case ["revoke"]:
                    try:
                        grant.revoke()
                    except transferd.Conflict as error:
                        tell(error.reason)
                    else:
                        tell("OK")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
