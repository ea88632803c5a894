# SPDX-License-Identifier: Apache-2.0
"""GPU memory in the SDK alone: what is given, what its allocation is, what a mapping takes."""

from __future__ import annotations

import ctypes
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from transferd.client import errors
from transferd.client.cuda import driver as drivers
from transferd.client.cuda.allocation import Allocations
from transferd.client.cuda.arrays import DeviceArray, device_array
from transferd.client.cuda.driver import CudaError
from transferd.client.cuda.flush import Flusher
from transferd.client.cuda.mapping import Mappings
from transferd.client.cuda.streams import to_stream
from transferd.v1 import attach_pb2

from support.fakecuda import CHUNK, DeviceBuffer, FakeCuda, installed
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIB = 1 << 20


class Session:
    """Answers as a daemon would, and notes what it was asked."""

    closed = False
    rails = 0

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.fds: list[int] = []
        self.answers: list[tuple[attach_pb2.FdResponse, list[int]]] = []
        self.removed: list[int] = []
        self.refuse: errors.TransferdError | None = None

    def ask(
        self, message: attach_pb2.FdRequest, fds: Sequence[int] = ()
    ) -> tuple[attach_pb2.FdResponse, list[int]]:
        body = message.WhichOneof("body")
        assert body is not None
        self.asked.append(getattr(message, body))
        self.fds += [os.fstat(fd).st_ino for fd in fds]
        if self.refuse is not None:
            raise self.refuse
        if body == "map":
            return self.answers.pop(0)
        return attach_pb2.FdResponse(share_memory=attach_pb2.ShareMemoryResponse(memory_id=77)), []

    def region_register(self, memory_id: int, length: int, name: str) -> Any:
        assert memory_id == 77
        return SimpleNamespace(region=4711, rails=self.rails)

    def region_remove(self, region: int) -> None:
        self.removed.append(region)

    def open(self, descriptor: bytes) -> int:
        return 5


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with installed(monkeypatch) as made:
        yield made


@pytest.fixture
def gpu(cuda: FakeCuda) -> Any:
    driver = drivers.load()
    made: Any = SimpleNamespace(
        driver=driver,
        session=Session(),
        daemon=b"life",
        context=cuda.context_of,
        device_of=lambda uuid: uuid[15] if uuid[15] < cuda.devices else -1,
    )
    made.flusher = Flusher(made)
    made.allocations = Allocations(made)
    return made


# ---- arrays ----


def found(memory: Any) -> DeviceArray:
    array = device_array(memory)
    assert array is not None
    return array


def test_arrays_by_the_interface(cuda: FakeCuda) -> None:
    buffer = DeviceBuffer(cuda, 4096, 64)
    assert device_array(buffer) == (4096, 64, -1, buffer)
    for host in (np.zeros(4), bytearray(4), [1], None):
        assert device_array(host) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": (2,)}, "not contiguous"),
        ({"data": (4096, True)}, "read-only"),
        ({"data": (0, False)}, "no address"),
        ({"shape": (0,)}, "empty"),
        ({"shape": (-1,)}, "empty"),
        ({"strides": (1, 1)}, "cannot be read"),
        ({"data": 7}, "cannot be read"),
        ({"typestr": "?"}, "cannot be read"),
    ],
)
def test_arrays_that_are_no_use(change: dict[str, Any], message: str) -> None:
    about = {"shape": (64,), "typestr": "|u1", "data": (4096, False), "version": 3, **change}
    with pytest.raises(errors.InvalidRequest, match=message):
        device_array(SimpleNamespace(__cuda_array_interface__=about))


def test_contiguous_strides_are_no_strides() -> None:
    about = {"shape": (2, 1, 3), "strides": (12, 99, 4), "typestr": "<f4", "data": (4096, False)}
    assert found(SimpleNamespace(__cuda_array_interface__=about)).length == 24


class Torch:
    """What we use of a tensor."""

    device = SimpleNamespace(type="cuda", index=1)
    contiguous = True

    def data_ptr(self) -> int:
        return 8192

    def is_contiguous(self) -> bool:
        return self.contiguous

    def numel(self) -> int:
        return 10

    def element_size(self) -> int:
        return 2


def test_tensors() -> None:
    tensor = Torch()
    assert device_array(tensor) == (8192, 20, 1, tensor)
    tensor.contiguous = False
    with pytest.raises(errors.InvalidRequest, match="not contiguous"):
        device_array(tensor)
    tensor.device = SimpleNamespace(type="cpu", index=None)
    assert device_array(tensor) is None


class Capsule:
    """DLPack of host memory that says it is of a device."""

    def __init__(self, device: tuple[int, int]) -> None:
        self.array = np.arange(12, dtype=np.int32)
        self.device = self.says = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.says

    def __dlpack__(self) -> Any:
        capsule = self.array.__dlpack__()
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        at = get(capsule, b"dltensor") + 8
        (ctypes.c_int32 * 2).from_address(at)[:] = list(self.device)
        return capsule


def test_dlpack() -> None:
    made = Capsule((2, 1))
    assert device_array(made) == (made.array.ctypes.data, 48, 1, made)
    assert device_array(Capsule((1, 0))) is None
    liar = Capsule((10, 0))
    liar.says = (2, 0)
    with pytest.raises(errors.InvalidRequest, match="type 10"):
        device_array(liar)


def test_streams() -> None:
    assert to_stream(7) == 7
    assert to_stream(SimpleNamespace(cuda_stream=8)) == 8
    assert to_stream(SimpleNamespace(ptr=9)) == 9
    assert to_stream(SimpleNamespace(handle=SimpleNamespace(value=10))) == 10
    for wrong in (-1, True, "x", None):
        with pytest.raises(errors.InvalidRequest, match="CUstream"):
            to_stream(wrong)


# ---- allocations ----


def take(gpu: Any, table: Allocations, address: int, length: int) -> Any:
    return table.take(found(DeviceBuffer(gpu, address, length)), "name")


def test_pointers_that_the_driver_answers_for_one_by_one(cuda: FakeCuda, gpu: Any) -> None:
    base = cuda.malloc(MIB, 1)
    told = gpu.driver.pointer(base + 100)
    assert told == (drivers.MEMORY_DEVICE, 1, 1000, True, False)
    cuda.fail("cuPointerGetAttributes", drivers.INVALID_VALUE, 2)
    assert gpu.driver.pointer(base + 100) == told
    assert gpu.driver.pointer(base + MIB) is None
    assert gpu.driver.pointer(base + MIB) is None
    cuda.fail("cuPointerGetAttributes", 700)
    with pytest.raises(CudaError, match="wrong address"):
        gpu.driver.pointer(base)


def test_an_allocation_is_shared_once(cuda: FakeCuda, gpu: Any) -> None:
    table = Allocations(gpu)
    base = cuda.malloc(MIB, 1)
    first = take(gpu, table, base + 100, 50)
    second = take(gpu, table, base, MIB)
    assert first is second
    (request,) = gpu.session.asked
    assert (request.base, request.size_bytes, request.buffer_id) == (base, MIB, 1000)
    assert request.device_uuid[15] == 1
    assert len(request.ipc_handle) == 64
    assert not request.dmabuf
    assert not request.chunk_bytes
    assert "cuPointerSetAttribute" in cuda.calls
    table.give_back(first)
    assert not gpu.session.removed
    table.give_back(second)
    assert gpu.session.removed == [4711]
    take(gpu, table, base, 10)
    assert len(gpu.session.asked) == 2


def test_an_address_that_came_back_is_another_allocation(cuda: FakeCuda, gpu: Any) -> None:
    table = Allocations(gpu)
    base = cuda.malloc(MIB)
    first = take(gpu, table, base, 64)
    cuda.memory[base].buffer_id += 500
    second = take(gpu, table, base, 64)
    assert first is not second
    assert [request.buffer_id for request in gpu.session.asked] == [1000, 1500]


def test_chunks_go_in_packets(cuda: FakeCuda, gpu: Any) -> None:
    table = Allocations(gpu)
    base = cuda.vmm(40)
    before = len(os.listdir("/proc/self/fd"))
    made = take(gpu, table, base + 3 * CHUNK + 5, 33 * CHUNK)
    assert (made.base, made.length) == (base + 3 * CHUNK, 34 * CHUNK)
    assert [len(request.chunk_bytes) for request in gpu.session.asked] == [15, 15, 4]
    assert [request.memory_id for request in gpu.session.asked] == [0, 77, 77]
    assert gpu.session.asked[0].size_bytes == 34 * CHUNK
    wanted = [os.fstat(fd).st_ino for fd, _ in cuda.chunks.values()][3:37]
    assert gpu.session.fds == wanted
    assert len(os.listdir("/proc/self/fd")) == before
    assert take(gpu, table, base + 20 * CHUNK, 64) is made
    assert take(gpu, table, base, 64) is not made


def test_memory_that_cannot_be_shared(cuda: FakeCuda, gpu: Any) -> None:
    table = Allocations(gpu)
    base = cuda.malloc(4096)
    pool = cuda.malloc(4096, legacy=False)
    for address, length, message in (
        (64, 10, "freed, or is host memory"),
        (base + 4000, 200, "ends 96 bytes on"),
        (pool, 10, "pool"),
    ):
        with pytest.raises(errors.InvalidRequest, match=message):
            take(gpu, table, address, length)
    cuda.memory[base].host = True
    with pytest.raises(errors.InvalidRequest, match="pinned host memory"):
        take(gpu, table, base, 10)
    cuda.memory[base].host = False
    array = found(DeviceBuffer(cuda, base, 10))._replace(device=1)
    with pytest.raises(errors.InvalidRequest, match="of device 0"):
        table.take(array, "")
    chunks = cuda.vmm(1)
    cuda.fail("cuMemExportToShareableHandle", 801)
    with pytest.raises(errors.InvalidRequest, match="POSIX_FILE_DESCRIPTOR"):
        take(gpu, table, chunks, 10)
    with pytest.raises(errors.InvalidRequest, match="ends 2097152 bytes on"):
        take(gpu, table, chunks, CHUNK + 1)
    pair = cuda.vmm(2)
    cuda.memory[pair + CHUNK].buffer_id = 0
    with pytest.raises(errors.InvalidRequest, match="freed while"):
        take(gpu, table, pair, 2 * CHUNK)
    assert not gpu.session.asked


def test_a_refusal_leaves_nothing_open(cuda: FakeCuda, gpu: Any) -> None:
    table = Allocations(gpu)
    gpu.session.refuse = errors.QuotaExceeded("full")
    chunks = cuda.vmm(2)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.QuotaExceeded):
        take(gpu, table, chunks, 2 * CHUNK)
    assert len(os.listdir("/proc/self/fd")) == before
    gpu.session.refuse = None
    assert take(gpu, table, chunks, 2 * CHUNK).users == 1


# ---- mappings ----


def map_answer(map_id: int, allocation: int, **more: Any) -> attach_pb2.FdResponse:
    told = {"device_uuid": b"fake-uuid-00000\0", "size_bytes": MIB, "length_bytes": 100, **more}
    return attach_pb2.FdResponse(
        map=attach_pb2.MapResponse(map_id=map_id, allocation=allocation, **told)
    )


def test_an_allocation_is_mapped_once(cuda: FakeCuda, gpu: Any) -> None:
    mappings = Mappings(gpu)
    base = cuda.malloc(MIB)
    handle = drivers.load().ipc_handle(base)
    gpu.session.answers = [
        (map_answer(1, 9, ipc_handle=handle, offset_bytes=10), []),
        (map_answer(2, 9, ipc_handle=handle, offset_bytes=20), []),
    ]
    one, other = mappings.find(b"one", 0), mappings.find(b"other", 0)
    assert one is not None
    assert other is not None
    assert mappings.find(b"one", 0) is one
    assert other.address - one.address == 10
    assert cuda.calls.count("cuIpcOpenMemHandle_v2") == 1
    cuda.bytes_at(one.address, 4)[:] = b"here"
    assert bytes(cuda.bytes_at(base + 10, 4)) == b"here"
    mappings.revoke(1)
    eventually(lambda: len(gpu.session.asked) == 3, "it is given back")
    assert gpu.session.asked[-1].map_id == 1
    assert "cuIpcCloseMemHandle" not in cuda.calls
    assert not mappings.begin([one])
    mappings.revoke(2)
    eventually(lambda: "cuIpcCloseMemHandle" in cuda.calls, "it is unmapped with its last grant")
    mappings.shut()
    mappings.close()


def test_chunks_are_mapped_side_by_side(cuda: FakeCuda, gpu: Any) -> None:
    mappings = Mappings(gpu)
    source = cuda.vmm(17)
    cuda.bytes_at(source + 16 * CHUNK, 4)[:] = b"last"
    fds = [os.dup(fd) for fd, _ in cuda.chunks.values()]
    sizes = [CHUNK] * 17
    gpu.session.answers = [
        (map_answer(1, 9, chunk_bytes=sizes[:15], chunk_count=17), fds[:15]),
        (map_answer(1, 9, chunk_bytes=sizes[15:], chunk_count=17), fds[15:]),
    ]
    mapped = mappings.find(b"one", 0)
    assert mapped is not None
    assert gpu.session.asked[1].first_chunk == 15
    assert bytes(cuda.bytes_at(mapped.address + 16 * CHUNK, 4)) == b"last"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fds[0])
    mappings.shut()
    mappings.close()
    assert len(cuda.reserved) == 1
    assert len(cuda.memory) == 17


def test_a_mapping_that_fails_is_given_back(cuda: FakeCuda, gpu: Any) -> None:
    mappings = Mappings(gpu)
    fds = [os.memfd_create("small"), os.memfd_create("small")]
    for fd in fds:
        os.ftruncate(fd, 4096)
    gpu.session.answers = [
        (map_answer(1, 9, chunk_bytes=[4096, 8192], chunk_count=2), list(fds)),
        (map_answer(2, 9, ipc_handle=bytes(64)), []),
        (map_answer(3, 9, ipc_handle=bytes(64), device_uuid=bytes(15) + b"\7"), []),
    ]
    for message in ("cuMemMap", "cuIpcOpenMemHandle", "CUDA_VISIBLE_DEVICES"):
        with pytest.raises(errors.TransferdError, match=message):
            mappings.find(b"one", 0)
    assert [request.map_id for request in gpu.session.asked if request.map_id] == [1, 2, 3]
    assert not cuda.reserved
    assert not cuda.memory


def test_memory_of_another_gpu(cuda: FakeCuda, gpu: Any) -> None:
    """Of this process: the devices have to reach each other; that is told before a kernel tries."""
    mappings = Mappings(gpu)
    answer = map_answer(1, 9, own_process=True, base=4096, device_uuid=bytes(15) + b"\1")
    gpu.session.answers = [(answer, [])] * 3
    cuda.fail("cuCtxEnablePeerAccess", 217)
    with pytest.raises(CudaError, match="cannot reach each other"):
        mappings.find(b"one", 0)
    cuda.fail("cuCtxEnablePeerAccess", drivers.PEER_ACCESS_ALREADY_ENABLED)
    assert mappings.find(b"one", 0) is not None
    calls = cuda.calls.count("cuCtxEnablePeerAccess")
    assert mappings.find(b"other", 1) is not None  # of the device that it is mapped for
    assert cuda.calls.count("cuCtxEnablePeerAccess") == calls == 2


def test_chunks_of_a_gpu_that_is_not_visible(cuda: FakeCuda, gpu: Any) -> None:
    mappings = Mappings(gpu)
    told = {"chunk_bytes": [CHUNK], "chunk_count": 1, "device_uuid": bytes(15) + b"\7"}
    fds = [os.memfd_create("chunk") for _ in range(2)]
    for fd in fds:
        os.ftruncate(fd, CHUNK)
    gpu.session.answers = [(map_answer(1, 9, **told), fds[:1]), (map_answer(2, 9, **told), fds[1:])]
    cuda.fail("cuMemImportFromShareableHandle", 101)
    with pytest.raises(errors.Unavailable, match="CUDA_VISIBLE_DEVICES") as caught:
        mappings.find(b"one", 0)
    assert caught.value.reason == "GPU_NOT_VISIBLE"
    assert not cuda.reserved
    assert mappings.find(b"one", 0) is not None  # a driver that can all the same
    mappings.shut()
    mappings.close()


def test_refusals_that_last_are_asked_once(cuda: FakeCuda, gpu: Any) -> None:
    mappings = Mappings(gpu)
    gpu.session.refuse = errors.AccessDenied("not here", reason="MAP_OTHER_HOST")
    for _ in range(2):
        assert mappings.find(b"one", 0) is None
    assert len(gpu.session.asked) == 1
    assert mappings.refusal(b"one") == "not here"
    gpu.session.refuse = errors.Conflict("over", reason="GRANT_REVOKED")
    for _ in range(2):
        assert mappings.find(b"two", 0) is None
    assert len(gpu.session.asked) == 3
    gpu.session.refuse = errors.QuotaExceeded("many", reason="MAPS")
    with pytest.raises(errors.QuotaExceeded):
        mappings.find(b"three", 0)


def test_what_is_taken_back_waits_for_its_users(cuda: FakeCuda, gpu: Any) -> None:
    mappings = Mappings(gpu)
    gpu.session.answers = [(map_answer(1, 9, own_process=True, base=4096), [])]
    mapped = mappings.find(b"one", 0)
    assert mapped is not None
    assert mappings.begin([mapped])
    assert mappings.pin(mapped)
    mappings.revoke(1)
    asked = len(gpu.session.asked)
    unpinned = threading.Thread(target=mappings.unpin, args=(mapped,))
    unpinned.start()
    unpinned.join(0.05)
    assert unpinned.is_alive()
    assert len(gpu.session.asked) == asked
    mappings.end([mapped], None, 0)
    unpinned.join(20)
    assert gpu.session.asked[-1].map_id == 1


def test_one_that_waits_for_streams_holds_up_no_other(cuda: FakeCuda, gpu: Any) -> None:
    mappings = Mappings(gpu)
    handle = drivers.load().ipc_handle(cuda.malloc(MIB))
    gpu.session.answers = [
        (map_answer(1, 9, ipc_handle=handle), []),
        (map_answer(2, 8, own_process=True, base=4096), []),
    ]
    for descriptor in (b"one", b"other"):
        assert mappings.find(descriptor, 0) is not None
    word = ctypes.c_uint64(0)
    stream = cuda.stream()
    drivers.load().wait_value(stream, ctypes.addressof(word), 1)
    mappings.revoke(1)
    eventually(lambda: "cuIpcCloseMemHandle" in cuda.calls, "it is about to be unmapped")
    mappings.revoke(2)
    eventually(lambda: gpu.session.asked[-1].map_id == 2, "the other is given back")
    word.value = 1
    eventually(lambda: gpu.session.asked[-1].map_id == 1, "and then the first")
    mappings.shut()
    mappings.close()


def test_one_that_is_taken_back_before_it_is_known(cuda: FakeCuda, gpu: Any) -> None:
    mappings = Mappings(gpu)
    mappings.revoke(1)
    gpu.session.answers = [(map_answer(1, 9, own_process=True, base=4096), [])]
    mapped = mappings.find(b"one", 0)
    assert mapped is not None
    assert not mappings.begin([mapped])
    eventually(lambda: len(gpu.session.asked) == 2, "it is given back")
    mappings.shut()
    mappings.close()


# ---- the driver ----


def test_errors_name_call_result_and_remedy(cuda: FakeCuda) -> None:
    cuda.fail("cuDeviceGetCount", 2)
    with pytest.raises(CudaError, match=r"cuDeviceGetCount failed .*\(2\).*free some") as caught:
        drivers.load().device_count()
    assert (caught.value.call, caught.value.result) == ("cuDeviceGetCount", 2)


def test_a_driver_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "_loaded", [])
    monkeypatch.setattr(drivers, "LIBRARY", "libnone.so.1")
    with pytest.raises(errors.Unavailable, match="host memory works") as caught:
        drivers.load()
    assert caught.value.reason == "NO_CUDA"
    for version, devices, reason in ((11_080, 1, "CUDA_TOO_OLD"), (13_000, 0, "NO_CUDA")):
        fake = FakeCuda(devices)
        fake.version = version
        monkeypatch.setattr(ctypes, "CDLL", lambda name, fake=fake: fake)
        with pytest.raises(errors.Unavailable) as caught:
            drivers.load()
        assert caught.value.reason == reason
        fake.close()
