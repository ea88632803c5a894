# SPDX-License-Identifier: Apache-2.0
"""The one seam to the CUDA driver: exactly the calls that the SDK uses, with plain numbers.

libcuda has a C interface that does not change, so ctypes is enough: no wheel has to fit the
driver's version. Tests put ``support.fakecuda`` in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, NamedTuple

from transferd.client import errors
from transferd.native.client_half import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIBRARY = "libcuda.so.1"
LIBRARY_VARIABLE = "TRANSFERD_CUDA_LIBRARY"  # another path of it
VERSION_MIN = 12_000  # cuStreamGetId, and stream memory operations that need no opting in
HANDLE_BYTES = 64
UUID_BYTES = 16

NOT_READY = 600
INVALID_VALUE = 1
INVALID_CONTEXT = 201
PEER_ACCESS_ALREADY_ENABLED = 704

MEMORY_HOST = 1
MEMORY_DEVICE = 2

# CUpointer_attribute
_MEMORY_TYPE, _SYNC_MEMOPS, _BUFFER_ID, _IS_MANAGED = 2, 6, 7, 8
_DEVICE_ORDINAL, _IS_LEGACY_IPC = 9, 10
_OF_POINTERS = (_MEMORY_TYPE, _DEVICE_ORDINAL, _BUFFER_ID, _IS_LEGACY_IPC, _IS_MANAGED)
# CUdevice_attribute
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _FLUSH_OPTIONS, _WRITES_ORDERING = 75, 76, 117, 118
_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_DMA_BUF_FD = 1  # CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
_LOCATION_DEVICE = 1
_READ_WRITE = 3
_NON_BLOCKING = 1
_LAZY_PEER_ACCESS = 1
_PORTABLE_DEVICEMAP = 3
_CAPTURE_MODE_RELAXED = 2
_WAIT_FLUSH = 1 << 30  # CU_STREAM_WAIT_VALUE_FLUSH, with 0: CU_STREAM_WAIT_VALUE_GEQ
_CURRENT_CONTEXT, _TO_OWNER = 0, 100  # CUflushGPUDirectRDMAWritesTarget, …Scope

_int, _ptr, _u64, _size, _out = c_int, c_void_p, c_uint64, c_size_t, POINTER
_CALLS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_out(c_int),),
    "cuGetErrorName": (c_int, _out(c_char_p)),
    "cuDeviceGetCount": (_out(c_int),),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuDeviceGetAttribute": (_out(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_out(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxGetCurrent": (_out(c_void_p),),
    "cuCtxGetDevice": (_out(c_int),),
    "cuCtxPushCurrent_v2": (_ptr,),
    "cuCtxPopCurrent_v2": (_out(c_void_p),),
    "cuCtxEnablePeerAccess": (_ptr, c_uint),
    "cuCtxGetStreamPriorityRange": (_out(c_int), _out(c_int)),
    "cuPointerGetAttribute": (_ptr, c_int, _u64),
    "cuPointerGetAttributes": (c_uint, _out(c_int), _out(c_void_p), _u64),
    "cuPointerSetAttribute": (_ptr, c_int, _u64),
    "cuMemGetAddressRange_v2": (_out(c_uint64), _out(c_size_t), _u64),
    "cuMemGetHandleForAddressRange": (_ptr, _u64, _size, c_int, _u64),
    "cuIpcGetMemHandle": (_ptr, _u64),
    "cuIpcCloseMemHandle": (_u64,),
    "cuMemRetainAllocationHandle": (_out(c_uint64), _ptr),
    "cuMemExportToShareableHandle": (_ptr, _u64, c_int, _u64),
    "cuMemImportFromShareableHandle": (_out(c_uint64), _ptr, c_int),
    "cuMemRelease": (_u64,),
    "cuMemAddressReserve": (_out(c_uint64), _size, _size, _u64, _u64),
    "cuMemAddressFree": (_u64, _size),
    "cuMemMap": (_u64, _size, _size, _u64, _u64),
    "cuMemUnmap": (_u64, _size),
    "cuMemSetAccess": (_u64, _size, _ptr, _size),
    "cuMemHostRegister_v2": (_ptr, _size, c_uint),
    "cuMemHostUnregister": (_ptr,),
    "cuMemHostGetDevicePointer_v2": (_out(c_uint64), _ptr, c_uint),
    "cuMemcpyDtoDAsync_v2": (_u64, _u64, _size, _ptr),
    "cuStreamCreateWithPriority": (_out(c_void_p), c_uint, c_int),
    "cuStreamDestroy_v2": (_ptr,),
    "cuStreamQuery": (_ptr,),
    "cuStreamGetCtx": (_ptr, _out(c_void_p)),
    "cuStreamGetId": (_ptr, _out(c_uint64)),
    "cuStreamIsCapturing": (_ptr, _out(c_int)),
    "cuThreadExchangeStreamCaptureMode": (_out(c_int),),
    "cuStreamWaitValue64_v2": (_ptr, _u64, _u64, c_uint),
    "cuStreamWriteValue64_v2": (_ptr, _u64, _u64, c_uint),
    "cuModuleLoadData": (_out(c_void_p), c_char_p),
    "cuModuleUnload": (_ptr,),
    "cuModuleGetFunction": (_out(c_void_p), _ptr, c_char_p),
    "cuLaunchKernel": (_ptr, *[c_uint] * 7, _ptr, _ptr, _ptr),
}
# What a driver may lack.
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    "cuFuncLoad": (_ptr,),  # CUDA 12.4; without it a kernel is loaded by its first launch
    "cuFlushGPUDirectRDMAWrites": (c_int, c_int),
}
# Fields of struct tfd_cuda_driver.
ENTRY_POINTS = {
    "launch_kernel": "cuLaunchKernel",
    "memcpy_dtod_async": "cuMemcpyDtoDAsync_v2",
    "wait_value": "cuStreamWaitValue64_v2",
    "write_value": "cuStreamWriteValue64_v2",
    "ctx_get_current": "cuCtxGetCurrent",
    "ctx_push_current": "cuCtxPushCurrent_v2",
    "ctx_pop_current": "cuCtxPopCurrent_v2",
    "stream_get_id": "cuStreamGetId",
    "stream_capturing": "cuStreamIsCapturing",
}
_REMEDIES = {
    2: "the GPU has no memory left: free some",
    100: "no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES",
    101: "CUDA_VISIBLE_DEVICES does not show that GPU to this process",
    201: "the CUDA context is gone; was the device reset?",
    217: "these two GPUs cannot reach each other's memory: see nvidia-smi topo -m",
    700: "a kernel of this process used a wrong address; its CUDA context is lost: restart the "
    "process",
    801: "this GPU, driver or kind of memory cannot do that",
}


class CudaError(errors.TransferdError):
    """A call of the CUDA driver failed; ``reason`` is the name of its CUresult.

    Attributes:
        call: The call.
        result: Its CUresult.
    """

    reason = "CUDA_ERROR"

    def __init__(self, call: str, result: int, name: str, remedy: str = "") -> None:
        remedy = remedy or _REMEDIES.get(result, "")
        super().__init__(
            f"{call} failed with {name} ({result}){f': {remedy}' if remedy else ''}", reason=name
        )
        self.call = call
        self.result = result


class Pointer(NamedTuple):
    """What the driver knows of an address.

    Attributes:
        memory_type: MEMORY_DEVICE or MEMORY_HOST.
        device: Ordinal.
        buffer_id: Tells the allocation from any other of this process's life.
        legacy_ipc: Whether cuIpcGetMemHandle takes it: cudaMalloc, no pools, no VMM.
        managed: Whether it is managed memory.
    """

    memory_type: int
    device: int
    buffer_id: int
    legacy_ipc: bool
    managed: bool


class _AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("type", c_int), ("id", c_int), ("flags", c_int))


class Driver:
    """The calls. Those that need a context use the current one: see :meth:`entered`."""

    def __init__(self, library: Any) -> None:
        """Takes the loaded library; :func:`load` loads it."""
        self._functions: dict[str, Any] = {}
        for name, arguments in _CALLS.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = c_int
            self._functions[name] = function
        for name, arguments in _OPTIONAL.items():
            function = getattr(library, name, None)
            if function is not None:
                function.argtypes = arguments
                function.restype = c_int
                self._functions[name] = function
        self._pointer_get_attribute = ffi.cast("void *", self._entry("cuPointerGetAttribute"))
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        result = self._functions[name](*arguments)
        if result:
            raise self.error(name, result)

    def _get(self, kind: Any, name: str, *arguments: Any) -> int:
        """Calls what gives a number by its first parameter."""
        out = kind()
        self._call(name, byref(out), *arguments)
        return int(out.value or 0)

    def error(self, call: str, result: int, remedy: str = "") -> CudaError:
        """Makes the error for a result."""
        name = c_char_p()
        self._functions["cuGetErrorName"](result, byref(name))
        word = name.value.decode() if name.value else "CUDA_ERROR"
        return CudaError(call, result, word, remedy)

    def entry_points(self) -> dict[str, int]:
        """Tells the addresses for struct tfd_cuda_driver, by its fields."""
        return {field: self._entry(name) for field, name in ENTRY_POINTS.items()}

    def _entry(self, name: str) -> int:
        return ctypes.cast(self._functions[name], c_void_p).value or 0

    # ---- devices and contexts ----

    def version(self) -> int:
        """Tells the driver's CUDA version, as 13000."""
        return self._get(c_int, "cuDriverGetVersion")

    def device_count(self) -> int:
        """Tells how many devices this process may see."""
        return self._get(c_int, "cuDeviceGetCount")

    def device_uuid(self, device: int) -> bytes:
        """Tells a device's UUID, which is the same in every process."""
        out = ctypes.create_string_buffer(UUID_BYTES)
        self._call("cuDeviceGetUuid_v2", out, device)
        return out.raw

    def capability(self, device: int) -> tuple[int, int]:
        """Tells the compute capability, as (9, 0)."""
        return self._attribute(device, _CAPABILITY_MAJOR), self._attribute(
            device, _CAPABILITY_MINOR
        )

    def flush_needs(self, device: int) -> tuple[int, int]:
        """Tells GPU_DIRECT_RDMA_WRITES_ORDERING and GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS."""
        return self._attribute(device, _WRITES_ORDERING), self._attribute(device, _FLUSH_OPTIONS)

    def _attribute(self, device: int, attribute: int) -> int:
        return self._get(c_int, "cuDeviceGetAttribute", attribute, device)

    def context_retain(self, device: int) -> int:
        """Takes a reference to the device's primary context, making it if there is none."""
        return self._get(c_void_p, "cuDevicePrimaryCtxRetain", device)

    def context_release(self, device: int) -> None:
        """Gives a reference back."""
        self._call("cuDevicePrimaryCtxRelease_v2", device)

    @contextlib.contextmanager
    def entered(self, context: int) -> Iterator[None]:
        """Makes a context current for the calls inside."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            popped = c_void_p()
            self._functions["cuCtxPopCurrent_v2"](byref(popped))

    def current_device(self) -> int:
        """Tells the device of the current context; -1: there is none."""
        out = c_int()
        return -1 if self._functions["cuCtxGetDevice"](byref(out)) else out.value

    def peer_enable(self, context: int) -> None:
        """Lets the current context use the memory of another one's device; idempotent.

        Raises:
            CudaError: The two devices cannot reach each other.
        """
        result = self._functions["cuCtxEnablePeerAccess"](context, 0)
        if result not in (0, PEER_ACCESS_ALREADY_ENABLED):
            raise self.error("cuCtxEnablePeerAccess", result)

    # ---- memory ----

    def pointer(self, address: int) -> Pointer | None:
        """Tells what an address is; None: the driver does not know it, so it is plain memory."""
        count = len(_OF_POINTERS)
        found = (c_uint64 * count)()
        at = ctypes.addressof(found)
        places = (c_void_p * count)(*(at + 8 * i for i in range(count)))
        result = self._functions["cuPointerGetAttributes"](
            count, (c_int * count)(*_OF_POINTERS), places, address
        )
        # It succeeds with zeros for what is nobody's. Where it refuses,
        # each is asked for alone, and is 0 where the driver has no answer.
        if result in (INVALID_VALUE, INVALID_CONTEXT):
            for attribute, place in zip(_OF_POINTERS, places, strict=True):
                self._functions["cuPointerGetAttribute"](place, attribute, address)
        elif result:
            raise self.error("cuPointerGetAttributes", result)
        memory_type, device, buffer_id, legacy_ipc, managed = found
        if not memory_type:
            return None
        return Pointer(
            memory_type & 0xFFFFFFFF,
            device & 0xFFFFFFFF,
            buffer_id,
            bool(legacy_ipc & 0xFF),
            bool(managed & 0xFF),
        )

    def buffer_id(self, address: int) -> int:
        """Tells the buffer id alone; 0: the driver knows of none."""
        return int(lib.tfd_cuda_buffer_id(self._pointer_get_attribute, address))

    def sync_memops_set(self, address: int) -> None:
        """Has synchronous copies of an allocation be so for other devices too."""
        flag = c_uint(1)
        self._call("cuPointerSetAttribute", ctypes.addressof(flag), _SYNC_MEMOPS, address)

    def address_range(self, address: int) -> tuple[int, int]:
        """Tells base and bytes of an allocation; of VMM memory, of one mapped chunk."""
        base, size = c_uint64(), c_size_t()
        self._call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
        return int(base.value), int(size.value)

    def dmabuf(self, base: int, length: int) -> int:
        """Makes a dma-buf fd of an allocation of this process; whole pages."""
        out = c_int(-1)
        self._call(
            "cuMemGetHandleForAddressRange", ctypes.addressof(out), base, length, _DMA_BUF_FD, 0
        )
        return out.value

    def ipc_handle(self, base: int) -> bytes:
        """Makes the handle by which another process opens an allocation."""
        out = ctypes.create_string_buffer(HANDLE_BYTES)
        self._call("cuIpcGetMemHandle", out, base)
        return out.raw

    def ipc_open(self, handle: bytes) -> int:
        """Maps another process's allocation into the current context."""
        return _open_ipc(self, handle)

    def ipc_close(self, address: int) -> None:
        """Unmaps it."""
        self._call("cuIpcCloseMemHandle", address)

    def chunk_retain(self, address: int) -> int:
        """Finds the physical chunk behind a VMM address; to be given back by chunk_release."""
        return self._get(c_uint64, "cuMemRetainAllocationHandle", address)

    def chunk_export(self, chunk: int) -> int:
        """Makes an fd of a chunk."""
        out = c_int(-1)
        self._call("cuMemExportToShareableHandle", ctypes.addressof(out), chunk, _POSIX_FD, 0)
        return out.value

    def chunk_import(self, fd: int) -> int:
        """Takes a chunk from an fd, which stays the caller's."""
        return self._get(c_uint64, "cuMemImportFromShareableHandle", fd, _POSIX_FD)

    def chunk_release(self, chunk: int) -> None:
        """Gives a chunk back; it lives while it is mapped."""
        self._call("cuMemRelease", chunk)

    def reserve(self, length: int) -> int:
        """Reserves addresses."""
        return self._get(c_uint64, "cuMemAddressReserve", length, 0, 0, 0)

    def unreserve(self, address: int, length: int) -> None:
        """Gives reserved addresses back."""
        self._call("cuMemAddressFree", address, length)

    def chunk_map(self, address: int, length: int, chunk: int) -> None:
        """Maps a chunk."""
        self._call("cuMemMap", address, length, 0, chunk, 0)

    def chunk_unmap(self, address: int, length: int) -> None:
        """Unmaps whole chunks."""
        self._call("cuMemUnmap", address, length)

    def access_set(self, address: int, length: int, device: int) -> None:
        """Lets a device read and write mapped chunks."""
        access = _AccessDesc(_LOCATION_DEVICE, device, _READ_WRITE)
        self._call("cuMemSetAccess", address, length, ctypes.addressof(access), 1)

    def host_register(self, address: int, length: int) -> None:
        """Pins host memory, and lets all contexts use it."""
        self._call("cuMemHostRegister_v2", address, length, _PORTABLE_DEVICEMAP)

    def host_unregister(self, address: int) -> None:
        """Takes that back."""
        self._call("cuMemHostUnregister", address)

    def host_pointer(self, address: int) -> int:
        """Tells where the current context has registered host memory."""
        return self._get(c_uint64, "cuMemHostGetDevicePointer_v2", address, 0)

    # ---- streams ----

    def stream_create(self) -> int:
        """Makes a stream of the highest priority, which waits for no other stream."""
        least, greatest = c_int(), c_int()
        self._call("cuCtxGetStreamPriorityRange", byref(least), byref(greatest))
        return self._get(c_void_p, "cuStreamCreateWithPriority", _NON_BLOCKING, greatest.value)

    def stream_destroy(self, stream: int) -> None:
        """Ends it once its work is done; does not wait."""
        self._call("cuStreamDestroy_v2", stream)

    def stream_result(self, stream: int) -> int:
        """Asks for a stream's CUresult: 0 done, NOT_READY, else what went wrong. Never raises."""
        return int(self._functions["cuStreamQuery"](stream))

    def stream_context(self, stream: int) -> int:
        """Tells a stream's context."""
        out = c_void_p()
        self._call("cuStreamGetCtx", stream, byref(out))
        return int(out.value or 0)

    def stream_id(self, stream: int) -> int:
        """Tells the number that no other stream of this process ever has."""
        out = c_uint64()
        self._call("cuStreamGetId", stream, byref(out))
        return int(out.value)

    def stream_capturing(self, stream: int) -> bool:
        """Tells whether what is enqueued goes into a CUDA graph."""
        out = c_int()
        self._call("cuStreamIsCapturing", stream, byref(out))
        return bool(out.value)

    def captures_disregard(self) -> None:
        """Lets this thread call what would spoil a CUDA graph that another thread captures.

        That is so for calls on streams and memory that no capture has to do with, as all of ours.
        """
        mode = c_int(_CAPTURE_MODE_RELAXED)
        self._functions["cuThreadExchangeStreamCaptureMode"](byref(mode))

    def wait_value(self, stream: int, address: int, value: int, *, flush: bool = False) -> None:
        """Has a stream wait until a word is at least a value; flush: then for what NICs wrote."""
        self._call("cuStreamWaitValue64_v2", stream, address, value, _WAIT_FLUSH if flush else 0)

    @property
    def can_flush(self) -> bool:
        """Whether there is :meth:`flush_writes`."""
        return "cuFlushGPUDirectRDMAWrites" in self._functions

    def flush_writes(self) -> None:
        """Waits until what NICs wrote is visible to the current context's device."""
        self._call("cuFlushGPUDirectRDMAWrites", _CURRENT_CONTEXT, _TO_OWNER)

    # ---- kernels ----

    def module_load(self, image: bytes) -> int:
        """Loads a cubin into the current context."""
        return self._get(c_void_p, "cuModuleLoadData", image)

    def module_unload(self, module: int) -> None:
        """Unloads it."""
        self._call("cuModuleUnload", module)

    def function(self, module: int, name: str) -> int:
        """Finds a kernel, and loads it.

        With lazy loading the first launch would, for which the driver may wait for all streams of
        the context: for ever, if one of them waits for what that kernel does (CUDA C++ Programming
        Guide, Lazy Loading, Concurrent Execution).
        """
        function = self._get(c_void_p, "cuModuleGetFunction", module, name.encode())
        if "cuFuncLoad" in self._functions:
            self._functions["cuFuncLoad"](function)  # if it fails the launch tells
        return function

    def launch(self, function: int, stream: int, arguments: Sequence[Any]) -> None:
        """Launches one thread of a kernel; the arguments are ctypes values."""
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, stream, pointers, None)


class _IpcHandle(ctypes.Structure):
    """CUipcMemHandle, which goes by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


def _open_ipc(driver: Driver, handle: bytes) -> int:
    raw = _IpcHandle.from_buffer_copy(handle)
    return driver._get(c_uint64, "cuIpcOpenMemHandle_v2", raw, _LAZY_PEER_ACCESS)


_CALLS["cuIpcOpenMemHandle_v2"] = (_out(c_uint64), _IpcHandle, c_uint)

_loading = threading.Lock()  # guards _loaded
_loaded: list[Driver] = []  # of this process: the driver is opened once, and stays


def load() -> Driver:
    """Opens the CUDA driver.

    Raises:
        Unavailable: NO_CUDA, CUDA_TOO_OLD: there is none, or none that is of use; the message says
            what to do. Host memory works without it.
    """
    with _loading:
        if not _loaded:
            _loaded.append(_open())
        return _loaded[0]


def _open() -> Driver:
    try:
        library = ctypes.CDLL(os.environ.get(LIBRARY_VARIABLE) or LIBRARY)
    except OSError as error:
        raise errors.Unavailable(
            f"GPU memory needs the CUDA driver, which cannot be loaded ({error}): install NVIDIA's "
            "driver, or start the container with the GPU; host memory works without it",
            reason="NO_CUDA",
        ) from None
    version = c_int()
    library.cuDriverGetVersion(byref(version))
    if version.value < VERSION_MIN:
        raise errors.Unavailable(
            f"the driver here is of CUDA {version.value // 1000}.{version.value % 1000 // 10}; GPU "
            f"memory needs {VERSION_MIN // 1000}.0 or later: update NVIDIA's driver; host memory "
            "works without it",
            reason="CUDA_TOO_OLD",
        )
    try:
        return Driver(library)
    except AttributeError as error:
        raise errors.Unavailable(
            f"the CUDA driver here lacks a call ({error}): update NVIDIA's driver; host memory "
            "works without it",
            reason="CUDA_TOO_OLD",
        ) from None
    except CudaError as error:
        raise errors.Unavailable(f"no GPU can be used: {error}", reason="NO_CUDA") from None


def loaded() -> Driver | None:
    """Tells the driver if it is open already."""
    return _loaded[0] if _loaded else None
