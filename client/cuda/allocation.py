# SPDX-License-Identifier: Apache-2.0
"""Allocations of this process that the daemon knows: each is shared and registered once.

A tensor is rarely an allocation: its region is a part of the allocation's. Allocations are told
apart by CU_POINTER_ATTRIBUTE_BUFFER_ID, never by address alone: a freed address comes back.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.cuda.driver import MEMORY_DEVICE, CudaError
from transferd.client.cuda.flush import Need
from transferd.v1 import attach_pb2

if TYPE_CHECKING:
    from transferd.client.cuda.arrays import DeviceArray
    from transferd.client.cuda.driver import Driver, Pointer
    from transferd.client.cuda.flush import Flusher
    from transferd.client.cuda.gpu import Gpu

# Where allocations begin that this process has shared: by its id, the daemon's life, and number.
_own: dict[tuple[int, bytes, int], int] = {}
FDS_MAX = 15  # of one packet of the fd socket
_ANOTHERS = "if it is another process's, and mapped here, that one registers it"


@dataclass(slots=True, eq=False)
class Allocation:
    """Memory that is registered.

    Attributes:
        base: Address of its first byte.
        length: Bytes.
        device: Ordinal.
        buffer_ids: Of its chunks, by address; of the whole where it has none.
        handle: The daemon's number for its region.
        users: Regions made of it; guarded by the table's lock.
        key: What it is called in this process, whatever Client looks.
        without_nics: Why no NIC reaches it; empty: some do.
    """

    base: int
    length: int
    device: int
    buffer_ids: tuple[int, ...]
    handle: int = 0
    users: int = 1
    key: tuple[int, bytes, int] = (0, b"", 0)
    without_nics: str = ""
    flusher: Flusher | None = None  # where NICs reach it, and have to be flushed after

    def read_into(self) -> None:
        """A NIC is about to read into it: the end of that job is to be flushed after."""
        if self.flusher is not None:
            self.flusher.reads = True

    def holds(self, address: int, length: int) -> bool:
        """Tells whether a range lies in it."""
        return self.base <= address and address + length <= self.base + self.length


@dataclass(slots=True)
class _Export:
    """What the daemon is handed of an allocation; the fds are ours until close()."""

    ipc_handle: bytes = b""
    dmabuf: int = -1
    chunk_bytes: list[int] = field(default_factory=list)
    chunk_fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        for fd in (*self.chunk_fds, self.dmabuf):
            if fd >= 0:
                os.close(fd)


class Allocations:
    """Those of one session."""

    def __init__(self, gpu: Gpu) -> None:
        """Has none yet."""
        self._gpu = gpu
        self._driver: Driver = gpu.driver
        # Guards _by_buffer and users, and is held while one is registered: a second tensor of the
        # same waits for the first.
        self._lock = threading.Lock()
        self._by_buffer: dict[int, list[Allocation]] = {}

    def take(self, array: DeviceArray, name: str) -> Allocation:
        """Finds the allocation of an array, sharing and registering it on first touch.

        Raises:
            InvalidRequest: It is no memory of that GPU, or cannot be shared; the message says why.
            CudaError: The driver refused.
        """
        with self._lock:
            for known in self._by_buffer.get(self._driver.buffer_id(array.address), ()):
                if known.holds(array.address, array.length):
                    known.users += 1
                    return known
            pointer = self._check(array)
            allocation, export = self._export(array, pointer)
            try:
                allocation.handle = self._register(allocation, export, name)
            finally:
                export.close()
            for buffer_id in allocation.buffer_ids:
                self._by_buffer.setdefault(buffer_id, []).append(allocation)
            return allocation

    def give_back(self, allocation: Allocation) -> None:
        """Deregisters it with its last region; after a failure once more.

        Raises:
            Conflict: STILL_MAPPED.
            TransferdError: The daemon did not answer.
        """
        with self._lock:
            if allocation.users:
                allocation.users -= 1
                if allocation.users:
                    return
                self._forget(allocation)
        session = self._gpu.session
        if not session.closed:
            with contextlib.suppress(errors.NotFound, errors.Unavailable):
                session.region_remove(allocation.handle)

    def _forget(self, allocation: Allocation) -> None:
        _own.pop(allocation.key, None)
        for buffer_id in allocation.buffer_ids:
            self._by_buffer[buffer_id].remove(allocation)
            if not self._by_buffer[buffer_id]:
                del self._by_buffer[buffer_id]

    # ---- what it is ----

    def _check(self, array: DeviceArray) -> Pointer:
        pointer = self._driver.pointer(array.address)
        if pointer is None:
            raise errors.InvalidRequest(
                f"{array.what} says that it is CUDA memory at {array.address:#x}, which the driver "
                "does not know: it was freed, or is host memory",
                reason="NOT_CUDA",
            )
        if pointer.memory_type != MEMORY_DEVICE or pointer.managed:
            kind = "managed memory" if pointer.managed else "pinned host memory"
            raise errors.InvalidRequest(
                f"{array.what} is {kind}, which is not shared between processes: use a GPU "
                "allocation, or for host memory alloc()",
                reason="NOT_CUDA",
            )
        if array.device >= 0 and array.device != pointer.device:
            raise errors.InvalidRequest(
                f"{array.what} says device {array.device}, and its memory is of device "
                f"{pointer.device}",
                reason="WRONG_DEVICE",
            )
        return pointer

    def _export(self, array: DeviceArray, pointer: Pointer) -> tuple[Allocation, _Export]:
        driver = self._driver
        with driver.entered(self._gpu.context(pointer.device)):
            try:
                base, length = driver.address_range(array.address)
            except CudaError as error:
                raise errors.InvalidRequest(
                    f"{array.what} is of no allocation ({error}): it was freed", reason="NOT_CUDA"
                ) from None
            export = _Export()
            try:
                if pointer.legacy_ipc:
                    self._check_end(array, base, length)
                    export.ipc_handle = self._handle(array, base)
                    buffer_ids: tuple[int, ...] = (pointer.buffer_id,)
                else:
                    base, length, buffer_ids = self._export_chunks(array, base, length, export)
                if 0 in buffer_ids:
                    raise errors.InvalidRequest(
                        f"{array.what} was freed while it was registered", reason="NOT_CUDA"
                    )
                allocation = Allocation(base, length, pointer.device, buffer_ids)
                export.dmabuf = self._dmabuf(allocation)
                # Synchronous copies of it return before other devices see them, otherwise.
                with contextlib.suppress(CudaError):  # what VMM memory cannot do
                    driver.sync_memops_set(base)
            except BaseException:
                export.close()
                raise
            return allocation, export

    def _handle(self, array: DeviceArray, base: int) -> bytes:
        try:
            return self._driver.ipc_handle(base)
        except CudaError as error:
            raise errors.InvalidRequest(
                f"{array.what} is memory that this process cannot share ({error}): {_ANOTHERS}",
                reason="NOT_SHAREABLE",
            ) from None

    def _check_end(self, array: DeviceArray, base: int, length: int) -> None:
        if array.address + array.length > base + length:
            raise errors.InvalidRequest(
                f"{array.what} has {array.length} bytes at {array.address:#x}, and its allocation "
                f"ends {base + length - array.address} bytes on",
                reason="SOURCE_BOUNDS",
            )

    def _export_chunks(
        self, array: DeviceArray, base: int, length: int, export: _Export
    ) -> tuple[int, int, tuple[int, ...]]:
        """Exports the chunks of VMM memory that an array lies in; each is mapped by itself."""
        driver = self._driver
        end = array.address + array.length
        at, size = base, length
        buffer_ids = []
        while True:
            chunk = self._chunk(array, at)
            try:
                export.chunk_fds.append(driver.chunk_export(chunk))
            except CudaError as error:
                raise errors.InvalidRequest(
                    f"{array.what} is memory that was not made to be shared ({error}): make it "
                    "with CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR (torch: expandable_segments "
                    f"does), or with cudaMalloc; {_ANOTHERS}",
                    reason="NOT_SHAREABLE",
                ) from None
            finally:
                driver.chunk_release(chunk)
            export.chunk_bytes.append(size)
            buffer_ids.append(driver.buffer_id(at))
            at += size
            if at >= end:
                return base, at - base, tuple(buffer_ids)
            try:
                found, size = driver.address_range(at)
            except CudaError:
                found = 0
            if found != at:
                self._check_end(array, base, at - base)

    def _chunk(self, array: DeviceArray, at: int) -> int:
        try:
            return self._driver.chunk_retain(at)
        except CudaError as error:
            raise errors.InvalidRequest(
                f"{array.what} is memory that no other process can map ({error}); of a pool "
                f"(cudaMallocAsync) none is: use cudaMalloc, or torch's own allocator; {_ANOTHERS}",
                reason="NOT_SHAREABLE",
            ) from None

    def _dmabuf(self, allocation: Allocation) -> int:
        """Makes the fd for NICs, where the driver gives one; -1: no NIC reaches it."""
        if self._gpu.flusher.need(allocation.device) is Need.IMPOSSIBLE:
            allocation.without_nics = (
                f"GPU {allocation.device} neither orders what NICs write nor can it be flushed"
            )
            return -1
        rounded = -(-allocation.length // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            return self._driver.dmabuf(allocation.base, rounded)
        except CudaError as error:
            allocation.without_nics = f"the driver makes no dma-buf of it ({error})"
            return -1

    # ---- telling the daemon ----

    def _register(self, allocation: Allocation, export: _Export, name: str) -> int:
        session = self._gpu.session
        shared = self._share(allocation, export)
        allocation.key = self._key(shared.allocation)
        _own[allocation.key] = allocation.base
        made = session.region_register(shared.memory_id, allocation.length, name)
        if made.rails:
            allocation.flusher = self._gpu.flusher.reached(allocation.device)
        elif not allocation.without_nics:
            allocation.without_nics = "no NIC of this host takes it"
        handle: int = made.region
        return handle

    def _key(self, number: int) -> tuple[int, bytes, int]:
        return os.getpid(), self._gpu.daemon, number

    def own(self, number: int) -> int:
        """Where an allocation of this process begins, by the daemon's number; 0: it is another's.

        Of whatever Client. The daemon tells by process ids, which it may not see: in a process
        namespace of its own it does not.
        """
        return _own.get(self._key(number), 0)

    def _share(self, allocation: Allocation, export: _Export) -> Any:
        dmabuf = [export.dmabuf] if export.dmabuf >= 0 else []
        first = FDS_MAX - len(dmabuf)
        request = attach_pb2.ShareCudaMemoryRequest(
            device_uuid=self._driver.device_uuid(allocation.device),
            base=allocation.base,
            size_bytes=allocation.length,
            buffer_id=allocation.buffer_ids[0],
            ipc_handle=export.ipc_handle,
            chunk_bytes=export.chunk_bytes[:first],
            dmabuf=bool(dmabuf),
            flush=self._gpu.flusher.need(allocation.device).word() if dmabuf else None,
        )
        shared = self._send(request, dmabuf + export.chunk_fds[:first])
        for at in range(first, len(export.chunk_fds), FDS_MAX):
            self._send(
                attach_pb2.ShareCudaMemoryRequest(
                    memory_id=shared.memory_id,
                    chunk_bytes=export.chunk_bytes[at : at + FDS_MAX],
                ),
                export.chunk_fds[at : at + FDS_MAX],
            )
        return shared

    def _send(self, request: Any, fds: list[int]) -> Any:
        response, _ = self._gpu.session.ask(attach_pb2.FdRequest(share_cuda_memory=request), fds)
        return response.share_memory
