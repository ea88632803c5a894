# SPDX-License-Identifier: Apache-2.0
"""GPU memory as a client hands it over: what comes in is checked here. Sans-IO but for its fds.

The daemon never opens the CUDA driver for it: handles and fds go on to whoever may map the memory,
and the dma-buf to the NICs.
"""

from __future__ import annotations

import enum
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transferd.daemon.errors import Conflict, InvalidRequest, QuotaExceeded
from transferd.daemon.plane import MAX_LENGTH, PlaneError
from transferd.daemon.region import Kind, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UUID_BYTES = 16
IPC_HANDLE_BYTES = 64
FDS_MAX = 15  # of one packet
ALIGNMENT = 16  # of a region in an allocation: what a copying kernel moves at a time
NVIDIA_MAJOR = 195  # of the driver's character devices: Linux, Documentation/admin-guide/devices


class Flush(enum.IntEnum):
    """CudaFlush: what the counts of a NIC's writes need in the owner's context."""

    UNSPECIFIED = 0
    NOT_NEEDED = 1
    STREAM = 2
    HOST = 3
    STREAM_OR_HOST = 4
    IMPOSSIBLE = 5


@dataclass(frozen=True, slots=True)
class Share:
    """ShareCudaMemoryRequest, of which nothing is proven."""

    device_uuid: bytes
    base: int
    size: int
    buffer_id: int
    ipc_handle: bytes
    chunk_bytes: tuple[int, ...]
    dmabuf: bool
    flush: int


@dataclass(slots=True)
class CudaMemory(Memory):
    """An allocation of GPU memory; ``fd`` is its dma-buf, or -1.

    Attributes:
        allocation: Number within this life of the daemon.
        device_uuid: Of the GPU.
        base: Where its owner has it.
        buffer_id: CUDA's own number of it in the owner's process.
        ipc_handle: Empty, or what cuIpcOpenMemHandle takes.
        chunk_bytes: Sizes of the physical chunks, by address.
        chunk_fds: One for each; owned; none any more once the owner's session ends.
    """

    allocation: int = 0
    device_uuid: bytes = b""
    base: int = 0
    buffer_id: int = 0
    ipc_handle: bytes = b""
    chunk_bytes: list[int] = field(default_factory=list)
    chunk_fds: list[int] = field(default_factory=list)

    def close_chunks(self) -> None:
        """Lets go of the physical memory; idempotent."""
        for fd in self.chunk_fds:
            os.close(fd)
        self.chunk_fds.clear()

    def close(self) -> None:
        """Closes all fds; idempotent."""
        self.close_chunks()
        # Not super(): a dataclass with slots is another class than the one that was written.
        Memory.close(self)

    def check_complete(self) -> None:
        """Refuses memory of which chunks are still to come.

        Raises:
            Conflict: CHUNKS_MISSING.
        """
        here = sum(self.chunk_bytes)
        if self.chunk_bytes and here != self.size:
            raise Conflict(
                f"memory {self.memory_id} has chunks of {here} bytes, not of {self.size}; share "
                "the others by its memory_id first",
                reason="CHUNKS_MISSING",
            )


def is_driver_fd(fd: int) -> bool:
    """Tells whether an fd can be a chunk: one of the NVIDIA driver's devices holds the memory."""
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) == NVIDIA_MAJOR


def receive(
    memory_id: int,
    allocation: int,
    share: Share,
    fds: Sequence[int],
    *,
    dmabuf_size: Callable[[int], int],
    is_chunk: Callable[[int], bool],
) -> CudaMemory:
    """Checks GPU memory that a client hands over, and takes it.

    Args:
        memory_id: Its number in the session.
        allocation: Its number in the daemon.
        share: What the client says.
        fds: Owned by the result; on failure still the caller's.
        dmabuf_size: Size of a dma-buf; PlaneError: it is none.
        is_chunk: Whether an fd can be a chunk's.

    Raises:
        InvalidRequest: Names the field.
    """
    _check_numbers(share)
    _check_count(fds, share.chunk_bytes, dmabuf=share.dmabuf)
    if not share.ipc_handle and not share.chunk_bytes and not share.dmabuf:
        raise InvalidRequest("ipc_handle", "missing; give it, or chunk_bytes, or a dmabuf")
    if share.dmabuf:
        _check_dmabuf(share, fds[0], dmabuf_size)
    memory = CudaMemory(
        memory_id=memory_id,
        fd=-1,
        size=share.size,
        kind=Kind.CUDA,
        sealed=True,  # who has mapped or registered it holds it: nobody can take it away
        writable=True,
        allocation=allocation,
        device_uuid=share.device_uuid,
        base=share.base,
        buffer_id=share.buffer_id,
        ipc_handle=share.ipc_handle,
    )
    add_chunks(memory, share.chunk_bytes, fds[share.dmabuf :], is_chunk)
    memory.fd = fds[0] if share.dmabuf else -1
    return memory


def add_chunks(
    memory: CudaMemory, sizes: Sequence[int], fds: Sequence[int], is_chunk: Callable[[int], bool]
) -> None:
    """Takes chunks that follow those that are here.

    Args:
        memory: Whose.
        sizes: Of each.
        fds: Owned by the memory; on failure still the caller's.
        is_chunk: Whether an fd can be a chunk's.

    Raises:
        InvalidRequest: Names the field.
    """
    _check_count(fds, sizes, dmabuf=False)
    for i, size in enumerate(sizes):
        if not size:
            raise InvalidRequest(f"chunk_bytes[{i}]", "0; give the size of the physical chunk")
    total = sum(memory.chunk_bytes) + sum(sizes)
    if total > memory.size:
        raise InvalidRequest(
            "chunk_bytes", f"add up to {total}; the allocation has {memory.size} bytes"
        )
    for i, fd in enumerate(fds):
        if not is_chunk(fd):
            raise InvalidRequest(
                "fd",
                f"that of chunk {i} is none of the NVIDIA driver's; export it by "
                "cuMemExportToShareableHandle as POSIX file descriptor",
            )
    memory.chunk_bytes += sizes
    memory.chunk_fds += fds


def check_quota(held: int, more: int, limit: int) -> None:
    """Refuses more chunks than a session may have.

    Raises:
        QuotaExceeded: CHUNKS.
    """
    if held + more > limit:
        raise QuotaExceeded(
            f"the session has handed over {held} chunks of GPU memory and may have {limit}; "
            "deregister some regions, or raise tenants.quotas.per_session_chunks",
            reason="CHUNKS",
            limit=limit,
            used=held,
        )


def check_range(memory: CudaMemory, offset: int, length: int) -> int:
    """Checks the part of an allocation that shall be registered.

    Args:
        memory: The allocation.
        offset: Bytes into it.
        length: 0: up to its end.

    Returns:
        The length in bytes.

    Raises:
        InvalidRequest: The range is not of the allocation, or begins between 16-byte words.
        Conflict: CHUNKS_MISSING.
    """
    memory.check_complete()
    if (memory.base + offset) % ALIGNMENT:
        raise InvalidRequest("offset_bytes", f"{offset} is not a multiple of {ALIGNMENT}")
    if offset >= memory.size:
        raise InvalidRequest("offset_bytes", f"{offset} is past the allocation's {memory.size}")
    length = length or memory.size - offset
    if length > memory.size - offset:
        raise InvalidRequest(
            "length_bytes", f"{offset} + {length} is past the allocation's {memory.size}"
        )
    return length


def _check_numbers(share: Share) -> None:
    if len(share.device_uuid) != UUID_BYTES:
        raise InvalidRequest(
            "device_uuid", f"{len(share.device_uuid)} bytes; give the {UUID_BYTES} of the GPU's"
        )
    if not 1 <= share.size <= MAX_LENGTH:
        raise InvalidRequest("size_bytes", f"{share.size} is not within 1 to {MAX_LENGTH}")
    if not share.base or share.base > (1 << 64) - share.size:
        raise InvalidRequest("base", f"{share.base:#x} is no address of {share.size} bytes")
    if share.base % ALIGNMENT:
        raise InvalidRequest("base", f"{share.base:#x} is not where an allocation of CUDA begins")
    if not share.buffer_id:
        raise InvalidRequest("buffer_id", "missing; give CU_POINTER_ATTRIBUTE_BUFFER_ID")
    if len(share.ipc_handle) not in (0, IPC_HANDLE_BYTES):
        raise InvalidRequest(
            "ipc_handle",
            f"truncated: {len(share.ipc_handle)} bytes instead of {IPC_HANDLE_BYTES}; pass on all "
            "that cuIpcGetMemHandle gave",
        )


def _check_count(fds: Sequence[int], sizes: Sequence[int], *, dmabuf: bool) -> None:
    expected = len(sizes) + dmabuf
    if expected > FDS_MAX:
        raise InvalidRequest(
            "chunk_bytes",
            f"{expected} fds; a message carries {FDS_MAX}: share the others by its memory_id",
        )
    if len(fds) != expected:
        raise InvalidRequest(
            "fd",
            f"{len(fds)} fds came with the message; send one for each chunk, and the dma-buf's "
            f"first if there is one: {expected}",
        )


def _check_dmabuf(share: Share, fd: int, dmabuf_size: Callable[[int], int]) -> None:
    if share.flush not in set(Flush) or share.flush == Flush.UNSPECIFIED:
        raise InvalidRequest("flush", f"{share.flush} is no CudaFlush; it is needed with a dmabuf")
    if share.flush == Flush.IMPOSSIBLE:
        raise InvalidRequest(
            "flush",
            "CUDA_FLUSH_IMPOSSIBLE: counts would overtake what a NIC writes into it; leave the "
            "dmabuf out",
        )
    page = os.sysconf("SC_PAGE_SIZE")
    if share.base % page:
        raise InvalidRequest(
            "base", f"{share.base:#x} is not on a page of {page} bytes; leave the dmabuf out"
        )
    try:
        size = dmabuf_size(fd)
    except PlaneError:
        raise InvalidRequest(
            "fd", "not a dma-buf; export it by cuMemGetHandleForAddressRange in its owner's process"
        ) from None
    if size < share.size:
        raise InvalidRequest("size_bytes", f"{share.size} is more than the dma-buf's {size}")
