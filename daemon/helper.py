# SPDX-License-Identifier: Apache-2.0
"""The helper process of one GPU as the daemon has it: started, asked, ended.

What it does, and the messages: native/include/transferd/gpu.h.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import functools
import os
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

from transferd.daemon.cuda import IPC_HANDLE_BYTES, UUID_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transferd.daemon.cuda import CudaMemory
    from transferd.daemon.plane import StageFds

HELPER = "transferd.native.gpu_helper"
START_S = 30.0  # hosts with many GPUs take some seconds to start the driver
ASK_S = 4.0  # 1 to 3 ms; closing waits for copies, which the data plane gives 3 s to get on
END_S = 2.0
CHUNKS = 64  # of one message: TFD_GPU_CHUNKS
SEEN = 32  # TFD_GPU_SEEN
SEEN_BYTES = SEEN * UUID_BYTES
# struct tfd_gpu_message
MESSAGE = struct.Struct(f"<IiQQII{IPC_HANDLE_BYTES}s{CHUNKS}Q{SEEN_BYTES}s256s")
NO_CHUNKS = (0,) * CHUNKS
LAST_WORDS = 4  # more messages than can wait to be read
SPARE = 4096  # more than any message


class Kind(enum.IntEnum):
    """enum tfd_gpu_message_type."""

    HELLO = 1
    OPEN = 2
    CLOSE = 3
    DONE = 4
    ERROR = 5


class HelperError(Exception):
    """A GPU's memory cannot be staged; one sentence."""


def message(
    kind: Kind,
    memory: int,
    *,
    size: int = 0,
    more: bool = False,
    ipc_handle: bytes = b"",
    chunks: Sequence[int] = (),
) -> bytes:
    """Packs a struct tfd_gpu_message."""
    sizes = (*chunks, *NO_CHUNKS[len(chunks) :])
    return MESSAGE.pack(kind, 0, memory, size, len(chunks), more, ipc_handle, *sizes, b"", b"")


def environment() -> dict[str, str]:
    """What a helper runs in: it looks for its GPU by UUID, whatever this daemon was to see."""
    return {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}


class Helper:
    """One process. Made by :meth:`start`.

    Attributes:
        stage: The data plane's name for its rings.
        pid: Of the process.
        gpu_name: As the driver has it; known with the process's hello.
        driver: The driver's version, as 13000.
        seen: UUIDs of the GPUs that there are, as far as it got to see any.
        memories: Numbers of the allocations that it has open.
        reason: Why it ended; empty while it runs.
    """

    def __init__(self, stage: int, process: subprocess.Popen[bytes], own: socket.socket) -> None:
        self.stage = stage
        self.pid = process.pid
        self.gpu_name = ""
        self.driver = 0
        self.seen: frozenset[bytes] = frozenset()
        self.memories: set[int] = set()
        self.reason = ""
        self._process = process
        self._socket = own
        self._lock = asyncio.Lock()  # one question at a time
        self._answer: asyncio.Future[tuple[int, str]] | None = None
        self._hello: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hello.add_done_callback(_seen)
        self._gone = asyncio.Event()
        self._pidfd = os.pidfd_open(process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(own, self._readable)
        loop.add_reader(self._pidfd, self._reap)

    @classmethod
    def start(cls, stage: int, fds: StageFds, uuid: bytes, library: str) -> Helper:
        """Starts a process for a GPU; :meth:`ready` tells when it can copy.

        Args:
            stage: The data plane's name for its rings.
            fds: Theirs; still the caller's.
            uuid: Of the GPU.
            library: Path of libcuda; empty: where the system has it.

        Raises:
            HelperError: There is no process to be had.
        """
        own, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own.setblocking(False)
        passed = (far.fileno(), fds.ring, fds.pool, fds.wake)
        try:
            # By vfork, as Popen does it: libraries' handlers of forks (gRPC's) are left alone, and
            # none of this process's memory is copied.
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    HELPER,
                    *map(str, passed),
                    uuid.hex(),
                    str(os.getpid()),
                    library,
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                env=environment(),
                start_new_session=True,  # Ctrl-C at the daemon's terminal is for the daemon
            )
        except OSError as error:
            own.close()
            raise HelperError(f"no process for the GPU's helper: {error.strerror}") from None
        finally:
            far.close()
        return cls(stage, process, own)

    async def ready(self) -> None:
        """Waits until it can copy.

        Raises:
            HelperError: It cannot, and says why.
        """
        done, _ = await asyncio.wait([self._hello], timeout=START_S)
        if not done:
            self.kill(f"the GPU's helper was not ready within {START_S:.0f} s")
        await self._hello

    # ---- asking ----

    async def open(self, memory: CudaMemory) -> None:
        """Has it open an allocation.

        Raises:
            HelperError: It cannot, and says why.
        """
        number = memory.allocation
        if memory.chunk_bytes:
            await self._open_chunks(number, memory)
        elif memory.ipc_handle:
            await self._ask(
                message(Kind.OPEN, number, size=memory.size, ipc_handle=memory.ipc_handle)
            )
        else:
            raise HelperError("its owner gave neither an IPC handle nor chunks of it")
        self.memories.add(number)

    async def _open_chunks(self, number: int, memory: CudaMemory) -> None:
        count = len(memory.chunk_bytes)
        for at in range(0, count, CHUNKS):
            end = min(at + CHUNKS, count)
            raw = message(
                Kind.OPEN,
                number,
                size=memory.size,
                more=end < count,
                chunks=memory.chunk_bytes[at:end],
            )
            try:
                await self._ask(raw, functools.partial(_chunk_fds, memory, at, end))
            except HelperError:
                if at and not self.reason:  # it has mapped those before
                    await self.close(number)
                raise

    async def close(self, number: int) -> None:
        """Has it let go of an allocation; one that it cannot let go of ends it."""
        self.memories.discard(number)
        try:
            await self._ask(message(Kind.CLOSE, number))
        except HelperError as error:
            self.kill(f"the GPU's helper could not let go of memory: {error}")

    async def _ask(self, raw: bytes, fds: Callable[[], Sequence[int]] = tuple) -> None:
        async with self._lock:
            self._check()
            passed = fds()  # now: until its turn came they may have been closed, and used again
            answer = self._answer = asyncio.get_running_loop().create_future()
            try:
                socket.send_fds(self._socket, [raw], passed)
                done, _ = await asyncio.wait([answer], timeout=ASK_S)
            except OSError as error:
                self.kill(f"the GPU's helper cannot be asked: {error.strerror}")
                done = set()
            self._answer = None
            if not done:
                self.kill(f"the GPU's helper did not answer within {ASK_S:.0f} s")
                self._check()
            result, text = answer.result()
            if result:
                raise HelperError(text)

    def _check(self) -> None:
        if self.reason:
            raise HelperError(self.reason)

    # ---- what it says ----

    def _readable(self) -> None:
        try:
            raw = self._socket.recv(SPARE)
        except BlockingIOError:
            return
        except OSError as error:
            raw = b""
            self._over(f"the GPU's helper: {error.strerror}")
        if len(raw) != MESSAGE.size:
            self.kill("the GPU's helper has ended")
            return
        kind, result, _, size, _, _, _, *_, seen, text = MESSAGE.unpack(raw)
        said = text.split(b"\0")[0].decode("utf-8", "replace")
        if kind in (Kind.HELLO, Kind.ERROR):
            self.seen = _uuids(seen)
        if kind == Kind.HELLO and not self._hello.done():
            self.gpu_name, self.driver = said, size
            self._hello.set_result(None)
        elif kind == Kind.DONE and self._answer is not None and not self._answer.done():
            self._answer.set_result((result, said))
        else:
            self.kill(said or "the GPU's helper has ended")

    def _over(self, reason: str) -> None:
        """Nobody waits for it any more. The first reason is the one."""
        if self.reason:
            return
        self.reason = reason
        asyncio.get_running_loop().remove_reader(self._socket)
        if not self._hello.done():
            self._hello.set_exception(HelperError(reason))
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((-errno.EPIPE, reason))

    # ---- its end ----

    def kill(self, reason: str) -> None:
        """Ends it, whatever it is doing; :meth:`ended` tells when. Idempotent."""
        self._over(reason)
        self._process.kill()  # nothing happens to one that is reaped

    def give_up(self, reason: str) -> None:
        """Ends it for a reason, unless it has said one itself."""
        if not self.reason:
            self._readable()
        self.kill(reason)

    async def stop(self) -> None:
        """Ends it, by closing its socket."""
        self._over("the GPU's helper was stopped")
        self._socket.close()
        try:
            async with asyncio.timeout(END_S):
                await self._gone.wait()
        except TimeoutError:
            self.kill("the GPU's helper was stopped")
            await self._gone.wait()

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._gone.set()

    async def ended(self) -> int:
        """Waits until the process is gone: nothing of it copies any more.

        Returns:
            Its exit status; negative: the signal.
        """
        await self._gone.wait()
        for _ in range(LAST_WORDS):
            if not self.reason:
                self._readable()
        self._over("the GPU's helper has ended")
        self._socket.close()
        return self._process.returncode or 0


def _chunk_fds(memory: CudaMemory, first: int, end: int) -> Sequence[int]:
    """Gives those of some chunks, for as long as nothing is awaited.

    Raises:
        HelperError: They are closed.
    """
    fds = memory.chunk_fds[first:end]
    if len(fds) != end - first:
        raise HelperError("its owner's session is ending")
    return fds


def _uuids(raw: bytes) -> frozenset[bytes]:
    uuids = {raw[at : at + UUID_BYTES] for at in range(0, len(raw), UUID_BYTES)}
    return frozenset(uuids - {bytes(UUID_BYTES)})


def _seen(future: asyncio.Future[None]) -> None:
    """Nobody may be waiting for it."""
    future.exception()
