# SPDX-License-Identifier: Apache-2.0
"""A CUDA driver of host memory, behind the C interface that the SDK and its native half call.

"Device" memory is shared memory by name, so that a handle can be opened by another process; its
addresses are real ones. A stream is a thread that does what is enqueued, in order; kernels are
Python functions. Errors can be had by :meth:`FakeCuda.fail` and :meth:`FakeCuda.break_context`.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import queue
import secrets
import threading
import time
from contextlib import contextmanager
from ctypes import c_char, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transferd.client.cuda import driver as drivers
from transferd.client.cuda import nvrtc
from transferd.client.cuda.driver import NOT_READY, Driver

from support import fakekernels
from support.fakekernels import word

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

INVALID_VALUE, INVALID_CONTEXT, INVALID_DEVICE, NOT_FOUND = 1, 201, 101, 500
ILLEGAL_ADDRESS = 700
CUBIN = b"\x7fELF of no device"
SHM = "/dev/shm"
CHUNK = 2 << 20
SIGN = 1 << 63
POLL_S = 0.0001
# For these the driver waits until no stream of the context has anything to do.
WAITING = frozenset(
    {"cuModuleLoadData", "cuModuleUnload", "cuMemHostUnregister", "cuIpcCloseMemHandle"}
)
PROT, SHARED, FIXED, PRIVATE_RESERVE = 3, 1, 0x10, 0x4022
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = c_void_p
_libc.mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, ctypes.c_long)
_libc.munmap.argtypes = (c_void_p, c_size_t)


@dataclass
class Memory:
    """One allocation, or one mapped chunk."""

    base: int
    size: int
    device: int
    buffer_id: int
    name: str = ""  # of its file; VMM memory has none
    chunk: int = 0
    imported: bool = False
    legacy: bool = True
    host: bool = False


@dataclass
class Stream:
    """Work is a function that returns once it is done, or None to stop."""

    number: int
    context: int
    work: queue.Queue[Callable[[], None] | None] = field(default_factory=queue.Queue)
    pending: int = 0
    thread: threading.Thread | None = None


class FakeCuda:
    """One process's driver; processes that have the same ``prefix`` share memory by handles.

    ``flush`` is WRITES_ORDERING and FLUSH_WRITES_OPTIONS; with ``dmabufs`` a file passes for one.
    """

    def __init__(
        self, devices: int = 2, *, flush: tuple[int, int] = (100, 0), dmabufs: bool = False
    ) -> None:
        self.devices = devices
        self.flush = flush
        self.dmabufs = dmabufs
        self.flushes: list[tuple[str, int]] = []  # by whom, and device
        self.version = 13_000
        self.calls: list[str] = []
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        self.memory: dict[int, Memory] = {}
        self.chunks: dict[int, tuple[int, int]] = {}  # fd and size
        self.reserved: dict[int, int] = {}
        self.registered: dict[int, int] = {}
        self.streams: dict[int, Stream] = {}
        self.capturing: set[int] = set()
        self.stream_ids: dict[int, int] = {}  # of those that are not their handle
        self.broken: dict[int, int] = {}  # context -> result
        self.held = threading.Event()  # clear: no stream does anything
        self.held.set()
        self.copied = 0
        self.opens_own = True  # handles of its own: CUDA does not, tests may play another process
        self._fails: dict[str, list[int]] = {}
        self._numbers = itertools.count(1000)
        self._current = threading.local()
        self._contexts: dict[int, int] = {}
        self._functions: dict[int, str] = {}
        self._lock = threading.RLock()
        self._stopped = False
        self.pages = self.targets = self.bumps = 0
        for name, arguments in (drivers._CALLS | drivers._OPTIONAL).items():
            made = ctypes.CFUNCTYPE(c_int, *arguments)(self._wrapped(name))
            setattr(self, name, made)

    def _wrapped(self, name: str) -> Callable[..., int]:
        method = getattr(self, f"do_{name}")

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            fails = self._fails.get(name)
            if fails:
                return fails.pop(0)
            context = self.current
            if context in self.broken and name.startswith(
                ("cuMem", "cuIpc", "cuLaunch", "cuStreamW", "cuStreamC")
            ):
                return self.broken[context]
            if name in WAITING:
                self._settle(context)
            return int(method(*arguments) or 0)

        return call

    # ---- for tests ----

    def fail(self, name: str, result: int, times: int = 1) -> None:
        """Has the next calls of a name fail."""
        self._fails.setdefault(name, []).extend([result] * times)

    def break_context(self, device: int, result: int = ILLEGAL_ADDRESS) -> None:
        """A kernel has used a wrong address: the context is lost, its streams do nothing more."""
        self.broken[self.context_of(device)] = result

    def context_of(self, device: int) -> int:
        with self._lock:
            return self._contexts.setdefault(device, 0xC0000 + device)

    @property
    def stack(self) -> list[int]:
        if not hasattr(self._current, "stack"):
            self._current.stack = []
        stack: list[int] = self._current.stack
        return stack

    @property
    def current(self) -> int:
        return self.stack[-1] if self.stack else 0

    def malloc(self, size: int, device: int = 0, *, legacy: bool = True) -> int:
        """cudaMalloc; legacy False: of a pool."""
        number = next(self._numbers)
        name = f"tfd-fakecuda-{secrets.token_hex(8)}"
        rounded = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.open(f"{SHM}/{name}", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        os.ftruncate(fd, rounded)
        base = _libc.mmap(None, rounded, PROT, SHARED, fd, 0)
        os.close(fd)
        self.memory[base] = Memory(base, size, device, number, name, legacy=legacy)
        return int(base)

    def vmm(self, chunks: int, device: int = 0, *, chunk_bytes: int = CHUNK) -> int:
        """Chunks one behind the other, as torch's expandable segments are."""
        base = self._reserve(chunks * chunk_bytes)
        for i in range(chunks):
            fd = os.memfd_create("chunk")
            os.ftruncate(fd, chunk_bytes)
            number = next(self._numbers)
            self.chunks[number] = (fd, chunk_bytes)
            self._map(base + i * chunk_bytes, chunk_bytes, number, device)
        return base

    def free(self, base: int) -> None:
        """As cudaFree."""
        gone = self.memory.pop(base)
        _libc.munmap(base, -(-gone.size // mmap.PAGESIZE) * mmap.PAGESIZE)
        if gone.name and not gone.imported:
            os.unlink(f"{SHM}/{gone.name}")

    def bytes_at(self, address: int, length: int) -> memoryview:
        return memoryview((c_char * length).from_address(address)).cast("B")

    def stream(self, device: int = 0) -> int:
        """A stream of the application's."""
        return self._stream(self.context_of(device))

    def done(self, stream: int) -> bool:
        return self.streams[stream].pending == 0

    def close(self) -> None:
        """Ends the streams and frees everything."""
        self._stopped = True
        self.held.set()
        for stream in list(self.streams.values()):
            stream.work.put(None)
            if stream.thread is not None:
                stream.thread.join(20)
                assert not stream.thread.is_alive(), "a stream waits for ever"
        for base in list(self.memory):
            self.free(base)
        for fd, _ in self.chunks.values():
            os.close(fd)

    # ---- streams ----

    def _stream(self, context: int) -> int:
        number = next(self._numbers)
        stream = Stream(number, context)
        stream.thread = threading.Thread(target=self._run, args=(stream,), daemon=True)
        self.streams[number] = stream
        stream.thread.start()
        return number

    def _run(self, stream: Stream) -> None:
        while (work := stream.work.get()) is not None:
            if not self._lost(stream) and not self._stopped:
                self.held.wait()
                if not self._lost(stream):
                    work()
            if not self._lost(stream):
                stream.pending -= 1

    def _settle(self, context: int) -> None:
        while not self._stopped and any(
            s.pending and s.context == context and not self._lost(s)
            for s in list(self.streams.values())
        ):
            time.sleep(POLL_S)

    def _lost(self, stream: Stream) -> bool:
        return stream.context in self.broken

    def _enqueue(self, number: int, work: Callable[[], None]) -> int:
        stream = self.streams.get(number)
        if stream is None:
            return 400
        if self._lost(stream):
            return self.broken[stream.context]
        stream.pending += 1
        stream.work.put(work)
        return 0

    def _value_wait(self, stream: Stream, address: int, value: int) -> None:
        # CU_STREAM_WAIT_VALUE_GEQ: (int64_t)(word - value) >= 0
        while word(address).value - value & SIGN and not self._stopped and not self._lost(stream):
            time.sleep(POLL_S)

    # ---- the calls, without their prefix and suffix ----

    def do_cuInit(self, flags: int) -> int:
        return 0 if self.devices else 100

    def do_cuDriverGetVersion(self, out: Any) -> None:
        out[0] = self.version

    def do_cuGetErrorName(self, result: int, out: Any) -> None:
        self._error_name = b"CUDA_ERROR_%d" % result  # the caller reads it after this
        out[0] = self._error_name

    def do_cuDeviceGetCount(self, out: Any) -> None:
        out[0] = self.devices

    def do_cuDeviceGetUuid_v2(self, out: int, device: int) -> int:
        ctypes.memmove(out, b"fake-uuid-000000"[:15] + bytes([device]), 16)
        return 0 if device < self.devices else INVALID_DEVICE

    def do_cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> None:
        ordering, options = self.flush
        out[0] = {75: 9, 76: 0, 117: options, 118: ordering}[attribute]

    def do_cuFlushGPUDirectRDMAWrites(self, target: int, scope: int) -> int:
        if not self.flush[1] & 1:
            return 801
        self.flushes.append(("host", self.current - 0xC0000))
        return 0 if (target, scope) == (0, 100) else INVALID_VALUE

    def do_cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> int:
        if device >= self.devices:
            return INVALID_DEVICE
        out[0] = self.context_of(device)
        return 0

    def do_cuDevicePrimaryCtxRelease_v2(self, device: int) -> None:
        pass

    def do_cuCtxGetCurrent(self, out: Any) -> None:
        out[0] = self.current or None

    def do_cuCtxGetDevice(self, out: Any) -> int:
        if not self.current:
            return INVALID_CONTEXT
        out[0] = self.current - 0xC0000
        return 0

    def do_cuCtxPushCurrent_v2(self, context: int) -> None:
        self.stack.append(context)

    def do_cuCtxPopCurrent_v2(self, out: Any) -> None:
        self.stack.pop()

    def do_cuCtxEnablePeerAccess(self, context: int, flags: int) -> None:
        pass

    def do_cuCtxGetStreamPriorityRange(self, least: Any, greatest: Any) -> None:
        least[0], greatest[0] = 0, -5

    def find(self, address: int) -> Memory | None:
        for memory in self.memory.values():
            if memory.base <= address < memory.base + memory.size:
                return memory
        return None

    def do_cuPointerGetAttribute(self, out: int, attribute: int, address: int) -> int:
        memory = self.find(address)
        if memory is None:
            return INVALID_VALUE
        if attribute == 7:
            c_uint64.from_address(out).value = memory.buffer_id
            return 0
        value = {
            2: 1 if memory.host else 2,
            8: 0,
            9: memory.device,
            10: memory.legacy and not memory.chunk,
        }[attribute]
        c_uint32.from_address(out).value = value
        return 0

    def do_cuPointerGetAttributes(self, count: int, kinds: Any, out: Any, address: int) -> None:
        if self.find(address) is not None:
            for i in range(count):
                self.do_cuPointerGetAttribute(out[i], kinds[i], address)

    def do_cuPointerSetAttribute(self, value: int, attribute: int, address: int) -> int:
        return 0 if self.find(address) else INVALID_VALUE

    def do_cuMemGetAddressRange_v2(self, base: Any, size: Any, address: int) -> int:
        memory = self.find(address)
        if memory is None:
            return NOT_FOUND
        base[0], size[0] = memory.base, memory.size
        return 0

    def do_cuMemGetHandleForAddressRange(
        self, out: int, address: int, size: int, kind: int, flags: int
    ) -> int:
        memory = self.find(address)
        if not self.dmabufs or memory is None:
            return 801
        if size % mmap.PAGESIZE or address % mmap.PAGESIZE:
            return INVALID_VALUE
        c_int.from_address(out).value = os.open(f"{SHM}/{memory.name}", os.O_RDWR)
        return 0

    def do_cuIpcGetMemHandle(self, out: int, address: int) -> int:
        memory = self.memory.get(address)
        if memory is None or not memory.name or memory.imported:
            return INVALID_VALUE
        told = b"%d %d %s" % (memory.size, memory.device, memory.name.encode())
        ctypes.memmove(out, told.ljust(64, b"\0"), 64)
        return 0

    def do_cuIpcOpenMemHandle_v2(self, out: Any, handle: Any, flags: int) -> int:
        try:
            size, device, name = bytes(handle.reserved).rstrip(b"\0").split()
            fd = os.open(f"{SHM}/{name.decode()}", os.O_RDWR)
        except (ValueError, OSError):
            return INVALID_VALUE
        if not self.opens_own and any(m.name == name.decode() for m in self.memory.values()):
            os.close(fd)
            return INVALID_CONTEXT
        rounded = -(-int(size) // mmap.PAGESIZE) * mmap.PAGESIZE
        out[0] = base = _libc.mmap(None, rounded, PROT, SHARED, fd, 0)
        os.close(fd)
        self.memory[base] = Memory(
            base, int(size), int(device), next(self._numbers), name.decode(), imported=True
        )
        return 0

    def do_cuIpcCloseMemHandle(self, address: int) -> int:
        if address not in self.memory or not self.memory[address].imported:
            return INVALID_VALUE
        self.free(address)
        return 0

    def do_cuMemRetainAllocationHandle(self, out: Any, address: int) -> int:
        memory = self.find(address)
        if memory is None or not memory.chunk:
            return INVALID_VALUE
        out[0] = memory.chunk
        return 0

    def do_cuMemExportToShareableHandle(self, out: int, chunk: int, kind: int, flags: int) -> None:
        c_int.from_address(out).value = os.dup(self.chunks[chunk][0])

    def do_cuMemImportFromShareableHandle(self, out: Any, fd: int, kind: int) -> None:
        number = next(self._numbers)
        self.chunks[number] = (os.dup(fd or 0), os.fstat(fd or 0).st_size)
        out[0] = number

    def do_cuMemRelease(self, chunk: int) -> int:
        return 0 if chunk in self.chunks else INVALID_VALUE

    def _reserve(self, size: int) -> int:
        base = _libc.mmap(None, size, 0, PRIVATE_RESERVE, -1, 0)
        self.reserved[base] = size
        return int(base)

    def do_cuMemAddressReserve(
        self, out: Any, size: int, alignment: int, address: int, flags: int
    ) -> None:
        out[0] = self._reserve(size)

    def do_cuMemAddressFree(self, address: int, size: int) -> int:
        if self.reserved.pop(address, None) != size or self.find(address):
            return INVALID_VALUE
        _libc.munmap(address, size)
        return 0

    def _map(self, address: int, size: int, chunk: int, device: int) -> None:
        _libc.mmap(address, size, PROT, SHARED | FIXED, self.chunks[chunk][0], 0)
        self.memory[address] = Memory(
            address, size, device, next(self._numbers), chunk=chunk, legacy=False
        )

    def do_cuMemMap(self, address: int, size: int, offset: int, chunk: int, flags: int) -> int:
        if chunk not in self.chunks or self.chunks[chunk][1] != size:
            return INVALID_VALUE
        self._map(address, size, chunk, 0)
        return 0

    def do_cuMemUnmap(self, address: int, size: int) -> int:
        if address not in self.memory:
            return INVALID_VALUE
        del self.memory[address]
        _libc.mmap(address, size, 0, PRIVATE_RESERVE | FIXED, -1, 0)
        return 0

    def do_cuMemSetAccess(self, address: int, size: int, access: int, count: int) -> None:
        pass

    def do_cuMemHostRegister_v2(self, address: int, size: int, flags: int) -> int:
        if address in self.registered:
            return 712
        self.registered[address] = size
        return 0

    def do_cuMemHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, 0) else 713

    def do_cuMemHostGetDevicePointer_v2(self, out: Any, address: int, flags: int) -> int:
        out[0] = address
        return 0 if address in self.registered else 713

    def do_cuMemcpyDtoDAsync_v2(self, dst: int, src: int, size: int, stream: int) -> int:
        def copy() -> None:
            ctypes.memmove(dst, src, size)
            self.copied += 1

        return self._enqueue(stream, copy)

    def do_cuStreamCreateWithPriority(self, out: Any, flags: int, priority: int) -> int:
        if not self.current:
            return INVALID_CONTEXT
        out[0] = self._stream(self.current)
        return 0

    def do_cuStreamDestroy_v2(self, stream: int) -> int:
        found = self.streams.pop(stream, None)
        if found is None:
            return 400
        found.work.put(None)
        return 0

    def do_cuStreamQuery(self, stream: int) -> int:
        found = self.streams.get(stream)
        if found is None:
            return 400
        if self._lost(found):
            return self.broken[found.context]
        return NOT_READY if found.pending else 0

    def do_cuStreamGetCtx(self, stream: int, out: Any) -> int:
        found = self.streams.get(stream)
        if found is None:
            return 400
        out[0] = found.context
        return 0

    def do_cuStreamGetId(self, stream: int, out: Any) -> int:
        if stream in self.capturing:
            return 900  # and the capture is spoilt
        out[0] = self.stream_ids.get(stream, stream)
        return 0 if stream in self.streams else 400

    def do_cuStreamIsCapturing(self, stream: int, out: Any) -> None:
        out[0] = stream in self.capturing

    def do_cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:
        mode[0] = 0

    def do_cuStreamWaitValue64_v2(self, stream: int, address: int, value: int, flags: int) -> int:
        found = self.streams.get(stream)
        if found is None:
            return 400
        flush = bool(flags & 1 << 30)
        if flags & ~(1 << 30) or (flush and not self.flush[1] & 2):
            return 801

        def wait() -> None:
            self._value_wait(found, address, value)
            if flush:
                self.flushes.append(("stream", found.context - 0xC0000))

        return self._enqueue(stream, wait)

    def do_cuStreamWriteValue64_v2(self, stream: int, address: int, value: int, flags: int) -> int:
        def write() -> None:
            word(address).value = value

        return self._enqueue(stream, write)

    def do_cuModuleLoadData(self, out: Any, image: bytes) -> int:
        out[0] = next(self._numbers)
        return 0 if image == CUBIN else 209

    def do_cuModuleUnload(self, module: int) -> None:
        pass

    def do_cuModuleGetFunction(self, out: Any, module: int, name: bytes) -> None:
        number = next(self._numbers)
        self._functions[number] = name.decode()
        out[0] = number

    def do_cuFuncLoad(self, function: int) -> int:
        return 0 if function in self._functions else INVALID_VALUE

    def do_cuLaunchKernel(self, function: int, *arguments: Any) -> int:
        *shape, _, stream, parameters, _ = arguments
        name = self._functions[function]
        self.launches.append((name, tuple(shape)))
        cells = ctypes.cast(parameters, ctypes.POINTER(c_void_p))
        kinds, work = fakekernels.KERNELS[name]
        values = [kind.from_address(cells[i] or 0).value for i, kind in enumerate(kinds)]
        return self._enqueue(stream or 0, lambda: work(*values))


class DeviceBuffer:
    """What an application has: an array with ``__cuda_array_interface__``."""

    def __init__(
        self, cuda: FakeCuda, address: int, length: int, *, base: int | None = None
    ) -> None:
        self.cuda = cuda
        self.address = address
        self.length = length
        self.base = address if base is None else base

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.length,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }

    def write(self, data: bytes, first: int = 0) -> None:
        self.view[first : first + len(data)] = data

    @property
    def view(self) -> memoryview:
        return self.cuda.bytes_at(self.address, self.length)


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[FakeCuda]:
    """Puts a fake in the place of libcuda and NVRTC, for this process."""
    cuda = FakeCuda(**options)
    fake = Driver(cuda)
    monkeypatch.setattr(drivers, "load", lambda: fake)
    monkeypatch.setattr(nvrtc, "cubin", lambda capability, version: CUBIN)
    try:
        yield cuda
    finally:
        cuda.close()
