# SPDX-License-Identifier: Apache-2.0
"""The double of libcuda (native/tests/softcuda) in this process: memory of a GPU that is none."""

from __future__ import annotations

import contextlib
import ctypes
import os
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.native_programs import make

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIB = 1 << 20
CHUNK = 2 * MIB
ILLEGAL_ADDRESS = 700
OUT_OF_MEMORY = 2


def library() -> str:
    """Builds the double; tells its path."""
    return str(make("softcuda") / "tests" / "libsoftcuda.so")


def uuid(device: int = 0) -> bytes:
    """UUID of a GPU that is none."""
    return b"softcuda-uuid-%02x" % device


class _Handle(ctypes.Structure):
    _fields_ = (("raw", c_char * 64),)


class _What(ctypes.Structure):
    """CUmemAllocationProp, as far as it is looked at."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location_type", c_int),
        ("device", c_int),
        ("attributes", c_void_p),
        ("flags", c_uint64),
    )


class SoftCuda:
    """What an application calls of its driver."""

    def __init__(self, device: int = 0) -> None:
        self.path = library()
        self.device = device
        self._cuda = ctypes.CDLL(self.path)
        self._context = c_void_p()
        self._do("cuInit", 0)
        self._do("cuDevicePrimaryCtxRetain", byref(self._context), device)

    def _do(self, name: str, *arguments: object) -> None:
        if name not in ("cuInit", "cuDevicePrimaryCtxRetain"):
            self._cuda.cuCtxSetCurrent(self._context)
        result = getattr(self._cuda, name)(*arguments)
        assert result == 0, f"{name}: {result}"

    def malloc(self, length: int) -> int:
        """As cudaMalloc."""
        out = c_uint64()
        self._do("cuMemAlloc_v2", byref(out), c_size_t(length))
        return out.value

    def free(self, address: int) -> None:
        """As cudaFree."""
        self._do("cuMemFree_v2", c_uint64(address))

    def handle(self, address: int) -> bytes:
        """What another process opens it by."""
        out = _Handle()
        self._do("cuIpcGetMemHandle", byref(out), c_uint64(address))
        return bytes(out)

    def chunks(self, count: int, length: int = CHUNK) -> tuple[int, list[int]]:
        """Maps chunks one behind the other; their address, and an fd of each."""
        base, chunk = c_uint64(), c_uint64()
        what = _What(1, 1, 1, self.device)
        self._do("cuMemAddressReserve", byref(base), c_size_t(count * length), 0, 0, 0)
        fds = []
        for i in range(count):
            fd = c_int()
            self._do("cuMemCreate", byref(chunk), c_size_t(length), byref(what), 0)
            at = c_uint64(base.value + i * length)
            self._do("cuMemMap", at, c_size_t(length), c_size_t(0), chunk, c_uint64(0))
            self._do("cuMemExportToShareableHandle", byref(fd), chunk, 1, 0)
            self._do("cuMemRelease", chunk)
            fds.append(fd.value)
        return base.value, fds

    def unmap(self, base: int, length: int, fds: Sequence[int]) -> None:
        """Takes chunks back."""
        self._do("cuMemUnmap", c_uint64(base), c_size_t(length))
        self._do("cuMemAddressFree", c_uint64(base), c_size_t(length))
        for fd in fds:
            os.close(fd)

    @staticmethod
    def bytes_at(address: int, length: int) -> memoryview:
        """What a kernel would see."""
        return memoryview((c_char * length).from_address(address)).cast("B")

    def error_name(self, result: int) -> str:
        """As the driver says it."""
        out = c_char_p()
        self._do("cuGetErrorName", result, byref(out))
        return (out.value or b"").decode()


class SoftBuffer:
    """What an application has: an array with ``__cuda_array_interface__``."""

    def __init__(self, cuda: SoftCuda, length: int) -> None:
        self._cuda = cuda
        self.length = length
        self.address = cuda.malloc(length)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.length,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }

    @property
    def view(self) -> memoryview:
        """Its bytes."""
        return self._cuda.bytes_at(self.address, self.length)

    def free(self) -> None:
        """Gives it back."""
        self._cuda.free(self.address)


class Faults:
    """A directory of failures, of the processes that have it in their environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that shall meet them."""
        return {"SOFTCUDA_FAULTS": str(self.directory)}

    def set(self, call: str, result: int, *, always: bool = False) -> None:
        """Has the next call, or all from now on, fail."""
        made = self.directory / f".{call}"
        made.write_text(f"{result} always" if always else str(result))
        made.rename(self.directory / call)  # no process sees half of it

    def clear(self, call: str) -> None:
        """Takes it back."""
        (self.directory / call).unlink(missing_ok=True)

    def left(self) -> list[str]:
        """Those that nobody has met."""
        return sorted(path.name for path in self.directory.iterdir())


def mapped_by(pid: int) -> int:
    """Counts the mappings of GPU memory that a process has."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/maps").read_text().count("memfd:softcuda")
    return 0


@contextlib.contextmanager
def allocated(cuda: SoftCuda, length: int) -> Iterator[int]:
    """Memory for a while."""
    address = cuda.malloc(length)
    try:
        yield address
    finally:
        cuda.free(address)
