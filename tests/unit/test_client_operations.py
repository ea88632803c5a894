# SPDX-License-Identifier: Apache-2.0
"""Operations of the SDK against a fake daemon: indices, room for tables, batches, lost peers."""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
from transferd.client.indices import to_indices
from transferd.client.tables import PAGE_BYTES
from transferd.native.client_half import ffi, lib
from transferd.native.names import Detail, JobStatus

from support.fake_daemon import ARENA_BYTES, FakeDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGES_MAX = ARENA_BYTES // PAGE_BYTES


@pytest.fixture
def fake(short_tmp: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(short_tmp)
    yield daemon
    daemon.close()


@pytest.fixture
def client(fake: FakeDaemon) -> Iterator[transferd.Client]:
    with transferd.Client(fake.address, timeout_s=5) as one:
        yield one


@pytest.fixture
def pair(client: transferd.Client) -> tuple[transferd.Region, bytes]:
    region = client.alloc(8192)
    return region, region.grant(4096, 4096, imms=range(16)).descriptor


class Device:
    """Where a tensor is."""

    def __init__(self, name: str) -> None:
        self.type = name

    def __str__(self) -> str:
        return f"{self.type}:0"


class Tensor:
    """What the SDK uses of a torch tensor; the real one is tested where torch is installed."""

    def __init__(self, numbers: Any, device: str = "cpu") -> None:
        self._numbers = np.array(numbers)
        self.device = Device(device)

    def data_ptr(self) -> int:
        return int(self._numbers.ctypes.data)

    def detach(self) -> Tensor:
        return self

    def numpy(self) -> Any:
        return self._numbers


class Interface:
    """Has ``__array_interface__`` and no buffer, as arrays of other libraries."""

    def __init__(self, numbers: Any, **changes: Any) -> None:
        self._numbers = np.asarray(numbers)
        self.__array_interface__ = self._numbers.__array_interface__ | changes

    def __iter__(self) -> Iterator[Any]:
        return iter(self._numbers.tolist())


class Dlpack:
    """Has DLPack and no buffer."""

    def __init__(self, numbers: Any, device: int = 1) -> None:
        self._numbers = np.array(numbers)
        self._device = device

    def __dlpack__(self, **options: Any) -> Any:
        return self._numbers.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device, 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self._numbers.tolist())


def test_indices_are_not_copied() -> None:
    numbers = np.arange(10, dtype=np.int64)
    indices = to_indices("pages", numbers)
    assert int(ffi.cast("uintptr_t", indices.pointer)) == numbers.ctypes.data
    assert (indices.form, indices.count) == (lib.TFD_INDEX_I64, 10)
    indices = to_indices("pages", Interface(numbers))
    assert int(ffi.cast("uintptr_t", indices.pointer)) == numbers.ctypes.data
    indices = to_indices("pages", Dlpack(numbers))
    assert list(indices.view) == list(range(10))


def test_what_has_no_buffer_lives_as_long_as_its_indices() -> None:
    owner = Interface(np.arange(10))
    gone = weakref.ref(owner)
    indices = to_indices("pages", owner)
    del owner
    assert gone() is not None
    del indices
    assert gone() is None


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ([3, 1, 2], "I64"),
        ((3, 1, 2), "I64"),
        (range(3), "I64"),
        (array("i", [3, 1, 2]), "I32"),
        (array("l", [3, 1, 2]), "I64"),
        (array("I", [3, 1, 2]), "U32"),
        (array("Q", [3, 1, 2]), "U64"),
        (np.array([3, 1, 2], dtype=np.intc), "I32"),
        (np.array([3, 9, 1, 9, 2], dtype=np.int32)[::2], "I32"),
        (memoryview(struct.pack("3i", 3, 1, 2)).cast("i"), "I32"),
        (Tensor(np.array([3, 1, 2], dtype=np.int32)), "I32"),
        (np.array([3, 1, 2], dtype=np.longlong), "I64"),
        (np.array([3, 1, 2], dtype="<u8"), "U64"),
        (np.arange(12, dtype=np.int64).reshape(3, 4)[:, 2], "I64"),
        (np.arange(5, dtype=np.uint32)[::-1], "U32"),
        (memoryview(array("q", range(9)))[::4], "I64"),
        ((ctypes.c_int32 * 3)(3, 1, 2), "I32"),
        (Interface(np.array([3, 1, 2], dtype=np.int32)), "I32"),
        (Interface(np.array([3, 1, 2], dtype=np.uint64)), "U64"),
        (Interface(np.zeros(0, dtype=np.int64)), "I64"),
        (Dlpack(np.array([3, 1, 2], dtype=np.int32)), "I32"),
        (Dlpack(np.arange(9, dtype=np.int64)[::2]), "I64"),
        ([], "I64"),
        (np.zeros(0, dtype=np.int32), "I32"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_forms_of_indices(value: Any, form: str) -> None:
    indices = to_indices("pages", value)
    assert indices.form == getattr(lib, f"TFD_INDEX_{form}")
    wanted = value.numpy().tolist() if isinstance(value, Tensor) else list(value)
    assert list(indices.view) == wanted
    assert indices.count == len(wanted)
    kind = "int32_t *" if form.endswith("32") else "int64_t *"
    assert ffi.unpack(ffi.cast(kind, indices.pointer), indices.count) == wanted


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "NoneType"),
        (7, "int"),
        ("012", "str"),
        (b"0123", "format 'B'"),
        ([1.5], "float"),
        ([None], "NoneType"),
        ([1 << 63], "above 64 bits"),
        (np.zeros(3), "format 'd'"),
        (np.zeros(3, dtype=np.int8), "format 'b'"),
        (np.zeros(3, dtype=">i4"), "format '>i', which is big-endian: convert it to int64"),
        (np.zeros(3, dtype=">u8"), "which is big-endian"),
        (np.zeros(3, dtype=np.float32), "format 'f': convert it to int64"),
        (np.zeros(3, dtype=bool), r"of a mask pass numpy.flatnonzero\(pages\)"),
        (np.zeros(3, dtype=object), "format 'O'"),
        (np.ma.array([0, 1], mask=[False, True]), r"masked array: pass pages.compressed\(\)"),
        (np.zeros(3, dtype="M8[s]"), "format '<M8.s.'"),
        (np.zeros((2, 2), dtype=np.int32), r"2 dimensions: pass pages.ravel\(\)"),
        (Interface(np.zeros(3)), "format '<f8': convert it to int64"),
        (Interface(np.zeros(3, dtype=bool)), "of a mask"),
        (Interface(np.zeros(3, dtype=">i8")), "big-endian"),
        (Interface(np.zeros((2, 2), dtype=np.int32)), "2 dimensions"),
        (Interface(np.arange(9)[::2]), "with gaps between its items"),
        (Interface(np.arange(9), data=None), "tells no address"),
        (Dlpack(np.zeros(3)), "format 'd'"),
        (Dlpack(np.zeros(3), device=2), "on a device .DLPack type 2."),
        ({1, 2}, "set"),
        (np.int64(3), "0 dimensions"),
        (Tensor([1], "cuda"), r"on cuda:0: pass pages\.cpu\(\)"),
        (Tensor([1.5]), "format 'd'"),
    ],
    ids=str,
)
def test_what_is_no_array_of_indices(value: Any, words: str) -> None:
    with pytest.raises(transferd.InvalidRequest, match=words):
        to_indices("pages", value)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("wrap", [np.asarray, np.asfortranarray, Interface, Dlpack, Tensor])
def test_targets_as_an_array(
    fake: FakeDaemon, client: transferd.Client, dtype: Any, wrap: Callable[[Any], Any]
) -> None:
    region = client.alloc(8192)
    members = [region.grant(i * 64, 64, imms=range(16)).descriptor for i in range(3)]
    group = client.peer_group(members)
    rows = np.array([[2, 7, 8, 9], [0, 0, 0, 0], [2, 1000, 1 << 30, 24], [1, 1, 2, 3]], dtype)
    fake.hold.add(1)
    job = client.scatter(region[1024:2048], wrap(rows), imm=1, group=group)
    entry = fake.taken_entry(job.id)
    assert (entry.op, entry.dst_grant, entry.table_count) == (lib.TFD_OP_SCATTER, 0, 4)
    found = np.frombuffer(fake.table(entry, 4 * 32), np.uint64).reshape(4, 4)
    handles = fake.sessions[0].handles
    assert [handles[int(grant)] for grant in found[:, 0]] == [members[i] for i in rows[:, 0]]
    assert found[:, 1:].tolist() == (rows[:, 1:] + np.array([1024, 0, 0], dtype)).tolist()
    job = client.scatter(region, wrap(rows[:0]), imm=1, group=group)
    assert fake.taken_entry(job.id).table_count == 0
    fake.release()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([3, 0, 0, 0], r"targets\[1\]: the group has members 0 to 2, not 3"),
        ([-1, 0, 0, 0], "members 0 to 2, not -1"),
        ([0, -1, 0, 0], "from 0 on, not -1 and 0"),
        ([0, 4097, 0, 0], r"4097 \+ 0 is past the 4096 bytes"),
        ([0, 4000, 0, 97], r"4000 \+ 97 is past the 4096 bytes"),
        ([0, 0, -5, 1], "dst_offset is a number of bytes from 0 on, not -5"),
        ([0, 0, 0, -1], "from 0 on, not 0 and -1"),
        ([0, 0, 0, (1 << 40) + 1], "length is at most 2.40, not 1099511627777"),
        ([0, (1 << 63) - 1, 0, (1 << 63) - 1], "is past the 4096 bytes"),
    ],
    ids=str,
)
def test_wrong_targets_of_an_array_are_named(
    fake: FakeDaemon, client: transferd.Client, row: list[int], words: str
) -> None:
    region = client.alloc(8192)
    group = client.peer_group([region.grant(imms=range(16)).descriptor] * 3)
    rows = np.array([[0, 0, 0, 64], row, [9, 9, 9, 9]])
    with pytest.raises(transferd.InvalidRequest, match=words):
        client.scatter(region[:4096], rows, imm=1, group=group)
    scatter = transferd.Scatter(src=region[:4096], targets=rows, imm=1, group=group)
    with pytest.raises(transferd.InvalidRequest, match=r"jobs\[1\]\.targets\[1\]: "):
        client.submit([transferd.Imm(dst=group[0], imm=1), scatter])
    assert not fake.entries_taken


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (np.zeros((2, 3), dtype=np.int64), r"shape \(n, 4\): member.* not \(2, 3\)"),
        (np.zeros(8, dtype=np.int64), r"shape \(n, 4\) of int32 or int64, not 1 dimensions"),
        (np.zeros((2, 4)), "convert it to int64"),
        (np.zeros((4097, 4), dtype=np.int32), "at most 4096 targets"),
        (b"0123", "format 'B'"),
    ],
    ids=["three columns", "one dimension", "floats", "too many", "bytes"],
)
def test_what_is_no_array_of_targets(client: transferd.Client, targets: Any, words: str) -> None:
    region = client.alloc(4096)
    group = client.peer_group([region.grant(imms=range(2)).descriptor])
    with pytest.raises(transferd.InvalidRequest, match=words):
        client.scatter(region, targets, imm=1, group=group)


def test_an_array_of_targets_needs_a_group(client: transferd.Client) -> None:
    region = client.alloc(4096)
    with pytest.raises(transferd.InvalidRequest, match="no group="):
        client.scatter(region, np.zeros((1, 4), dtype=np.int64), imm=1)


def test_tables_reach_the_arena(
    fake: FakeDaemon, client: transferd.Client, pair: tuple[transferd.Region, bytes]
) -> None:
    region, dst = pair
    fake.hold.add(1)
    job = client.write_pages(
        region[1024:], np.array([2, 0], dtype=np.int32), dst, [5, 9], 100, imm=1,
        src_stride=200, dst_stride=300, src_offset=10, dst_offset=20, count="job", exact=True,
        priority="latency",
    )  # fmt: skip
    entry = fake.taken_entry(job.id)
    assert (entry.op, entry.flags, entry.priority) == (
        lib.TFD_OP_WRITE_PAGES, lib.TFD_FLAG_EXACT | lib.TFD_FLAG_COUNT_JOB, 1,
    )  # fmt: skip
    assert (entry.src_offset, entry.dst_offset, entry.length) == (1034, 20, 100)
    assert (entry.src_stride, entry.dst_stride, entry.table_count) == (200, 300, 2)
    assert fake.table(entry, 2 * PAGE_BYTES) == struct.pack("<4I", 2, 5, 0, 9)
    job = client.scatter(region, [(dst, 7, 8, 9)], imm=1)
    entry = fake.taken_entry(job.id)
    assert (entry.op, entry.dst_grant, entry.table_count) == (lib.TFD_OP_SCATTER, 0, 1)
    grant, *numbers = struct.unpack("<4Q", fake.table(entry, 32))
    assert fake.sessions[0].handles[grant] == dst
    assert numbers == [7, 8, 9]
    job = client.read(dst, region[3:13], 5)
    entry = fake.taken_entry(job.id)
    assert (entry.op, entry.src_offset, entry.dst_offset, entry.length) == (
        lib.TFD_OP_READ, 3, 5, 10,
    )  # fmt: skip
    fake.release()


def test_a_full_arena_is_back_pressure(
    fake: FakeDaemon, client: transferd.Client, pair: tuple[transferd.Region, bytes]
) -> None:
    region, dst = pair
    fake.hold.add(1)
    index = [0] * (PAGES_MAX // 2)
    jobs = [client.write_pages(region, index, dst, index, 1, imm=1) for _ in range(2)]
    with pytest.raises(transferd.WaitTimeout, match="no room") as full:
        client.write_pages(region, [0], dst, [0], 1, imm=2, timeout_s=0.01)
    assert full.value.reason == "RING_FULL"
    with pytest.raises(transferd.WaitTimeout) as full:
        client.submit(
            [transferd.Imm(dst=dst, imm=2), transferd.Barrier(group=[dst], imm=2)], timeout_s=0.01
        )
    assert full.value.jobs == []  # type: ignore[attr-defined]
    assert client.imm(dst, 2).wait(5) is JobStatus.OK  # which needs no room there
    assert client.write_pages(region, [], dst, [], 1, imm=2).wait(5) is JobStatus.OK
    fake.release()
    # Results that are kept do not keep the room.
    more = [client.write_pages(region, index, dst, index, 1, imm=2) for _ in range(20)]
    assert {job.wait(5) for job in jobs + more} == {JobStatus.OK}


def test_what_has_no_room_at_all(
    client: transferd.Client, pair: tuple[transferd.Region, bytes]
) -> None:
    region, dst = pair
    index = np.zeros(PAGES_MAX + 1, dtype=np.int32)
    for call in (
        lambda: client.write_pages(region, index, dst, index, 1, imm=1),
        lambda: client.submit(
            [
                transferd.Imm(dst=dst, imm=1),
                transferd.WritePages(
                    src=region, src_pages=index, dst=dst, dst_pages=index, page_bytes=1, imm=1
                ),
            ]
        ),
    ):
        with pytest.raises(transferd.InvalidRequest, match=f"at most {PAGES_MAX}") as caught:
            call()
        assert caught.value.reason == "TABLE"
    assert client.counter(1).value == 0
    assert client.write_pages(region, index[1:], dst, index[1:], 1, imm=1).wait(5) is JobStatus.OK


def test_a_batch_is_cut_where_its_tables_have_no_room(
    fake: FakeDaemon, client: transferd.Client, pair: tuple[transferd.Region, bytes]
) -> None:
    region, dst = pair
    index = [0] * (PAGES_MAX // 4)
    one = transferd.WritePages(
        src=region, src_pages=index, dst=dst, dst_pages=index, page_bytes=1, imm=1
    )
    jobs = client.submit([one] * 10)
    assert {job.wait(5) for job in jobs} == {JobStatus.OK}
    fake.hold.add(1)
    with pytest.raises(transferd.WaitTimeout) as full:
        client.submit([one] * 10, timeout_s=0.05)
    assert len(full.value.jobs) == 4  # type: ignore[attr-defined]
    fake.release()


def test_lost_members_of_a_group_are_opened_anew(
    fake: FakeDaemon, client: transferd.Client, pair: tuple[transferd.Region, bytes]
) -> None:
    region, first = pair
    second = region.grant(0, 100, imms=range(16)).descriptor
    group = client.peer_group([first, second])
    assert fake.calls.count("OpenDescriptors") == 1
    client.barrier(group, imm=1).wait(5)
    assert fake.calls.count("OpenDescriptors") == 1
    before = {dst: handle for handle, dst in fake.sessions[0].handles.items()}
    fake.refuse[2] = (JobStatus.PEER_LOST, Detail.HEARTBEAT)
    with pytest.raises(transferd.PeerLost):
        client.barrier(group, imm=2).wait(5)
    # The daemon finds one of them lost, and the other as it was.
    fake.reopened[first] = before[first]
    client.barrier(group, imm=1).wait(5)
    assert fake.calls.count("OpenDescriptors") == 2
    assert fake.closed_handles == [before[second]]


def test_groups_that_are_none(
    client: transferd.Client, pair: tuple[transferd.Region, bytes]
) -> None:
    region, dst = pair
    cases: list[tuple[Any, str]] = [
        (lambda: client.peer_group([dst, "x"]), "descriptor"),  # type: ignore[list-item]
        (lambda: client.peer_group([dst] * 4097), "at most 4096"),
        (lambda: client.barrier(dst, imm=1), "PeerGroup"),  # type: ignore[arg-type]
        (lambda: client.scatter(region, [7], imm=1), r"targets\[0\]"),
        (lambda: client.scatter(region, [(0, 0, 0, 1)], imm=1), "group="),
        (lambda: client.scatter(region, [(dst, 1, 0, 8192)], imm=1), "past the 8192"),
        (lambda: client.scatter(region, [(dst, 0, 0, 1 << 41)], imm=1), r"2\^40"),
    ]
    for call, words in cases:
        with pytest.raises(transferd.InvalidRequest, match=words):
            call()
    group = client.peer_group([dst])
    assert (len(group), group[0], list(group)) == (1, dst, [dst])


def test_what_is_no_region_batch_or_range_is_named(
    client: transferd.Client, pair: tuple[transferd.Region, bytes]
) -> None:
    region, dst = pair
    array = np.zeros(4096, np.uint8)
    one = transferd.Imm(dst=dst, imm=1)
    calls: list[tuple[Any, str]] = [
        (lambda: client.write(array, dst, imm=1), "src is a region"),  # type: ignore[arg-type]
        (
            lambda: client.write(array, dst, imm=1, exact=True),  # type: ignore[arg-type]
            "src is a region.*not ndarray",
        ),
        (
            lambda: client.write_pages(array, [0], dst, [0], 8, imm=1),  # type: ignore[arg-type]
            "src is a region",
        ),
        (
            lambda: client.scatter(array, [(dst, 0, 0, 8)], imm=1),  # type: ignore[arg-type]
            "src is a region",
        ),
        (lambda: client.read(dst, array), "dst is a region"),  # type: ignore[arg-type]
        (lambda: client.peer_group(dst), "a list"),  # type: ignore[arg-type]
        (lambda: client.submit(one), r"\[Imm"),  # type: ignore[arg-type]
        (lambda: client.submit([one, "imm"]), "not str"),  # type: ignore[list-item]
        (lambda: region.grant(imms=7), "range"),  # type: ignore[arg-type]
    ]
    for call, words in calls:
        with pytest.raises(transferd.InvalidRequest, match=words):
            call()
