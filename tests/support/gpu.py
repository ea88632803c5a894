# SPDX-License-Identifier: Apache-2.0
"""A real GPU for tests and benchmarks: memory, streams and kernels by the driver alone."""

from __future__ import annotations

import ctypes
import functools
import threading
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from transferd.client.cuda import driver as drivers
from transferd.client.cuda import nvrtc
from transferd.client.errors import TransferdError

from support.waiting import eventually

CHUNK = 2 << 20
TEST_WAIT_S = 10.0


@functools.cache
def why_not() -> str:
    """Tells why no GPU can be used here; empty: one can."""
    try:
        drivers.load().context_retain(0)
    except TransferdError as error:
        return str(error)
    return ""


class _AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location_type", c_int),
        ("location_id", c_int),
        ("win32", c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Gpu:
    """One device, whose primary context is current in the thread that made this."""

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.driver = drivers.load()
        self.lib: Any = ctypes.CDLL(drivers.LIBRARY)
        self.context = self.driver.context_retain(device)
        self.enter()
        self._modules: dict[bytes, int] = {}

    def enter(self) -> None:
        """Makes its context current in this thread."""
        self.check(self.lib.cuCtxSetCurrent(c_void_p(self.context)))

    @staticmethod
    def check(result: int) -> None:
        assert not result, f"the CUDA driver answered {result}"

    def malloc(self, length: int) -> Buffer:
        """As cudaMalloc."""
        out = c_uint64()
        self.check(self.lib.cuMemAlloc_v2(byref(out), c_size_t(length)))
        return Buffer(self, out.value, length)

    def vmm(self, chunks: int, chunk: int = CHUNK) -> Buffer:
        """Chunks one behind the other, each an allocation that can be exported."""
        base = self.driver.reserve(chunks * chunk)
        prop = _AllocationProp(1, 1, 1, self.device)
        for i in range(chunks):
            handle = c_uint64()
            self.check(
                self.lib.cuMemCreate(byref(handle), c_size_t(chunk), byref(prop), c_uint64(0))
            )
            self.driver.chunk_map(base + i * chunk, chunk, handle.value)
            self.driver.chunk_release(handle.value)
        self.driver.access_set(base, chunks * chunk, self.device)
        return Buffer(self, base, chunks * chunk)

    def pinned(self, length: int) -> Buffer:
        """As cudaMallocHost."""
        out = c_void_p()
        self.check(self.lib.cuMemHostAlloc(byref(out), c_size_t(length), c_uint(0)))
        return Buffer(self, out.value or 0, length)

    def stream(self) -> int:
        """A stream that waits for no other."""
        out = c_void_p()
        self.check(self.lib.cuStreamCreate(byref(out), c_uint(1)))
        return int(out.value or 0)

    def sync(self, stream: int) -> None:
        self.check(self.lib.cuStreamSynchronize(c_void_p(stream)))

    def wait(self, stream: int) -> None:
        """As sync, with a bound: a device that hangs is a failure, not the end of a run."""
        eventually(lambda: self.done(stream), "the stream is through", TEST_WAIT_S)

    def settle(self) -> None:
        """Waits for all work of the context, with a bound."""
        results: list[int] = []

        def settle() -> None:
            with self.driver.entered(self.context):
                results.append(self.lib.cuCtxSynchronize())

        thread = threading.Thread(target=settle, daemon=True)
        thread.start()
        thread.join(TEST_WAIT_S)
        assert results, f"not within {TEST_WAIT_S:g} s: nothing of the context waits any more"
        self.check(results[0])

    def done(self, stream: int) -> bool:
        return self.driver.stream_result(stream) == 0

    def kernel(self, source: bytes, name: str) -> int:
        """Compiles a kernel."""
        if source not in self._modules:
            major, minor = self.driver.capability(self.device)
            image = nvrtc.Nvrtc().compile(source, f"sm_{major}{minor}")
            self._modules[source] = self.driver.module_load(image)
        return self.driver.function(self._modules[source], name)

    def launch(
        self, function: int, grid: int, block: int, stream: int, arguments: list[Any]
    ) -> None:
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self.check(
            self.lib.cuLaunchKernel(
                c_void_p(function), grid, 1, 1, block, 1, 1, 0, c_void_p(stream), pointers, None
            )
        )

    def copy(self, dst: int, src: int, length: int, stream: int) -> None:
        """Enqueues a plain copy."""
        self.check(
            self.lib.cuMemcpyDtoDAsync_v2(
                c_uint64(dst), c_uint64(src), c_size_t(length), c_void_p(stream)
            )
        )

    def word(self, address: int, value: int, stream: int) -> None:
        """Enqueues a store of 64 bits."""
        self.check(
            self.lib.cuStreamWriteValue64_v2(
                c_void_p(stream), c_uint64(address), c_uint64(value), c_uint(0)
            )
        )

    def event(self) -> int:
        out = c_void_p()
        self.check(self.lib.cuEventCreate(byref(out), c_uint(0)))
        return int(out.value or 0)

    def record(self, event: int, stream: int) -> None:
        self.check(self.lib.cuEventRecord(c_void_p(event), c_void_p(stream)))

    def elapsed_us(self, first: int, last: int) -> float:
        out = ctypes.c_float()
        self.check(self.lib.cuEventElapsedTime(byref(out), c_void_p(first), c_void_p(last)))
        return out.value * 1000

    def free_bytes(self) -> int:
        """What the driver has left."""
        free, total = c_size_t(), c_size_t()
        self.check(self.lib.cuMemGetInfo_v2(byref(free), byref(total)))
        return free.value


class Buffer:
    """Memory with ``__cuda_array_interface__``.

    Attributes:
        address: Of its first byte.
        length: Bytes.
    """

    def __init__(self, gpu: Gpu, address: int, length: int) -> None:
        self.gpu = gpu
        self.address = address
        self.length = length

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.length,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }

    def __getitem__(self, part: slice) -> Buffer:
        first, last, _ = part.indices(self.length)
        return Buffer(self.gpu, self.address + first, last - first)

    def write(self, data: bytes, first: int = 0) -> None:
        self.gpu.check(
            self.gpu.lib.cuMemcpyHtoD_v2(c_uint64(self.address + first), data, c_size_t(len(data)))
        )

    def read(self, first: int = 0, length: int | None = None) -> bytes:
        size = self.length - first if length is None else length
        out = ctypes.create_string_buffer(size)
        self.gpu.check(
            self.gpu.lib.cuMemcpyDtoH_v2(out, c_uint64(self.address + first), c_size_t(size))
        )
        return out.raw

    def clear(self) -> None:
        self.gpu.check(
            self.gpu.lib.cuMemsetD8_v2(
                c_uint64(self.address), ctypes.c_ubyte(0), c_size_t(self.length)
            )
        )

    def free(self) -> None:
        self.gpu.check(self.gpu.lib.cuMemFree_v2(c_uint64(self.address)))
