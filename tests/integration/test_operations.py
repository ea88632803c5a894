# SPDX-License-Identifier: Apache-2.0
"""Every operation of the SDK: by the ring and by gRPC, to another daemon and to one's own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
import transferd.aio
from transferd.native.names import JobStatus

from support.daemon import keeps_writes_whole, provider_of_tests

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from transferd import Client, Grant, Region

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

WAIT_S = 20.0
LENGTH = 1 << 20
OK = JobStatus.OK


@pytest.fixture(params=["ring", "grpc"])
def shared_memory(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "ring")


def granted(client: Client, length: int = LENGTH, rights: Any = ("write",)) -> tuple[Region, Grant]:
    region = client.alloc(length)
    return region, region.grant(imms=range(16), rights=rights)


def filled(client: Client, seeded: random.Random, length: int = LENGTH) -> Region:
    region = client.alloc(length)
    region.view[:] = seeded.randbytes(length)
    return region


def exactly(client: Client, imm: int, value: int) -> None:
    """Waits for a count, and sees that it is not more."""
    counter = client.counter(imm)
    counter.wait(value, WAIT_S)
    assert counter.read() == (value, 0, 0, 0)


def expected_pages(
    source: Region, size: int, src: list[int], dst: list[int], strides: tuple[int, int], at: int
) -> bytearray:
    wanted = bytearray(LENGTH)
    for here, there in zip(src, dst, strict=True):
        to = at + there * strides[1]
        wanted[to : to + size] = source.view[7 + here * strides[0] :][:size]
    return wanted


@pytest.mark.parametrize("count", ["page", "job"])
@pytest.mark.parametrize("exact", [False, True])
def test_pages_land_whole_and_are_counted(
    request: pytest.FixtureRequest,
    sender: Client,
    receiver: Client,
    seeded: random.Random,
    count: str,
    exact: bool,
) -> None:
    provider = "local" if "same daemon" in request.node.name else provider_of_tests()
    source = filled(sender, seeded)
    sum_of_counts = 0
    for pages, size in ((1, 1), (3, 4096), (257, 1000), (500, 2048)):
        target, grant = granted(receiver)
        strides = (size + 3, size + 24)
        src = [seeded.randrange(pages) for _ in range(pages)]
        dst = seeded.sample(range(pages), pages)
        job = sender.write_pages(
            src=source, src_pages=src, dst=grant.descriptor, dst_pages=dst, page_bytes=size,
            src_stride=strides[0], dst_stride=strides[1], src_offset=7, dst_offset=11, imm=1,
            count=count, exact=exact,
        )  # fmt: skip
        assert job.wait(WAIT_S) is OK
        sum_of_counts += pages if count == "page" else 1
        exactly(receiver, 1, sum_of_counts)
        assert target.view == expected_pages(source, size, src, dst, strides, 11)
        assert job.result is not None
        assert (job.result.bytes, job.result.detail) == (pages * size, "")
        assert job.path is not None
        assert job.path.provider == provider
        assert job.path.rails >= 1


INDICES: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "int32": lambda pages: np.array(pages, dtype=np.int32),
    "int64": lambda pages: np.array(pages, dtype=np.int64),
    "uint32": lambda pages: np.array(pages, dtype=np.uint32),
    "uint64": lambda pages: np.array(pages, dtype=np.uint64),
    "column": lambda pages: np.array([pages, pages], dtype=np.int64).T[:, 1],
    "array": lambda pages: array("i", pages),
    "memoryview": lambda pages: memoryview(array("q", pages)),
    "every other": lambda pages: np.repeat(np.array(pages, dtype=np.int64), 2)[::2],
    "backwards": lambda pages: np.array(pages[::-1], dtype=np.int32)[::-1],
    "tensor": lambda pages: _tensor(pages),
}


def _tensor(pages: list[int]) -> Any:
    torch = pytest.importorskip("torch")
    return torch.tensor(pages, dtype=torch.int32)


@pytest.mark.parametrize("kind", INDICES)
def test_whatever_holds_the_indices(
    shared_pair: Pair, shared_memory: bool, seeded: random.Random, kind: str
) -> None:
    near, far = (one.socket for one in shared_pair)
    with (
        transferd.Client(near, shared_memory=shared_memory) as sender,
        transferd.Client(far, shared_memory=shared_memory) as receiver,
    ):
        source = filled(sender, seeded)
        target, grant = granted(receiver)
        src, dst = seeded.sample(range(100), 50), seeded.sample(range(100), 50)
        sender.write_pages(
            source, INDICES[kind](src), grant.descriptor, INDICES[kind](dst), 512, imm=1
        ).wait(WAIT_S)
        exactly(receiver, 1, 50)
        for here, there in zip(src, dst, strict=True):
            assert target.view[there * 512 :][:512] == source.view[here * 512 :][:512]


def test_no_pages(sender: Client, receiver: Client) -> None:
    source = sender.alloc(LENGTH)
    target, grant = granted(receiver)
    for imm, count in ((1, "page"), (2, "job")):
        job = sender.write_pages(source, [], grant.descriptor, [], 4096, imm=imm, count=count)
        assert job.wait(WAIT_S) is OK
    exactly(receiver, 2, 1)
    assert receiver.counter(1).value == 0
    for job in (sender.scatter(source, [], imm=1), sender.barrier([], imm=1)):
        assert job.wait(WAIT_S) is OK
    assert receiver.counter(1).value == 0
    assert not any(target.view)


def test_overlapping_destinations_and_a_repeated_source(
    sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    # Stride 0: every page goes to the same place, and any of them may be the last.
    sender.write_pages(
        source, range(64), grant.descriptor, range(64), 256, imm=1, dst_stride=0
    ).wait(WAIT_S)
    exactly(receiver, 1, 64)
    landed, pages = (
        bytes(target.view[:256]),
        [bytes(source.view[i * 256 :][:256]) for i in range(64)],
    )
    if keeps_writes_whole():
        assert landed in pages
    assert all(landed[i] in {page[i] for page in pages} for i in range(256))
    assert not any(target.view[256:])
    sender.write_pages(
        source, range(64), grant.descriptor, range(64), 256, imm=1, src_stride=0
    ).wait(WAIT_S)
    exactly(receiver, 1, 128)
    assert bytes(target.view[: 64 * 256]) == bytes(source.view[:256]) * 64


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64])
def test_scatter_from_an_array(
    shared_pair: Pair, shared_memory: bool, seeded: random.Random, dtype: Any
) -> None:
    near, far = (one.socket for one in shared_pair)
    with (
        transferd.Client(near, shared_memory=shared_memory) as sender,
        transferd.Client(far, shared_memory=shared_memory) as receiver,
    ):
        source = filled(sender, seeded)
        targets = [granted(receiver) for _ in range(3)]
        group = sender.peer_group([grant.descriptor for _, grant in targets])
        rows = np.array(
            [[i % 3, seeded.randrange(LENGTH // 2 - 1600), 700 * i, 600 - i] for i in range(90)],
            dtype,
        )
        wanted = [bytearray(LENGTH) for _ in targets]
        for member, here, there, length in rows.tolist():
            wanted[member][there : there + length] = source.view[1000 + here :][:length]
        # What is read is what was there at the call.
        job = sender.scatter(source[1000 : LENGTH // 2], rows, imm=4, group=group)
        rows[:] = 0
        assert job.wait(WAIT_S) is OK
        exactly(receiver, 4, 90)
        assert [region.view for region, _ in targets] == wanted
        assert sender.scatter(source, rows[:0], imm=4, group=group).wait(WAIT_S) is OK
        with pytest.raises(transferd.InvalidRequest, match=r"targets\[1\]: 1 \+ \d+ is past"):
            sender.scatter(source, np.array([[0, 0, 0, 1], [0, 1, 0, LENGTH]]), imm=4, group=group)
        beyond = sender.scatter(source, np.array([[0, 0, LENGTH, 1]]), imm=5, group=group)
        with pytest.raises(transferd.JobFailed):
            beyond.wait(WAIT_S)


def test_scatter_and_barrier(
    sender: Client, receiver: Client, shared_pair: Pair, seeded: random.Random
) -> None:
    source = filled(sender, seeded)
    with transferd.Client(shared_pair[0].socket) as third:
        targets = [granted(receiver), granted(third)]
        group = sender.peer_group([grant.descriptor for _, grant in targets])
        assert (len(group), list(group)) == (2, [grant.descriptor for _, grant in targets])
        table = [
            (i % 2 if i % 3 else group[i % 2], 13 * i, 20_000 * (i // 2), 600 * i)
            for i in range(30)
        ]
        assert sender.scatter(source, table, imm=4, group=group).wait(WAIT_S) is OK
        for number, client in enumerate((receiver, third)):
            exactly(client, 4, 15)
            wanted = bytearray(LENGTH)
            for i in range(number, 30, 2):
                at = 20_000 * (i // 2)
                wanted[at : at + 600 * i] = source.view[13 * i :][: 600 * i]
            assert targets[number][0].view == wanted
        job = sender.barrier(group, imm=5)
        assert job.wait(WAIT_S) is OK
        exactly(receiver, 5, 1)
        exactly(third, 5, 1)
        # A slice is a source of its own: offsets count from its beginning.
        part = source[1000:2000]
        sender.scatter(part, [(group[0], 1, 0, 999)], imm=6).wait(WAIT_S)
        assert targets[0][0].view[:999] == source.view[1001:2000]


def test_a_scatter_with_one_bad_target_sends_nothing(sender: Client, receiver: Client) -> None:
    source = sender.alloc(LENGTH)
    source.view[:] = b"x" * LENGTH
    target, grant = granted(receiver)
    good = (grant.descriptor, 0, 0, 4096)
    forged = bytearray(grant.descriptor)
    forged[-1] ^= 1
    bad: list[Any] = [
        (bytes(forged), 0, 0, 1),  # refused by its owner
        (b"nonsense", 0, 0, 1),
        (grant.descriptor, LENGTH, 0, 1),  # leaves the region
        (grant.descriptor, 0, LENGTH, 1),  # leaves the grant
        (grant.descriptor, 0, (1 << 64) - 1, 2),
        (grant.descriptor, 0, 0, (1 << 40) + 1),
        (grant.descriptor, -1, 0, 1),
        (0, 0, 0, 1),  # there is no group
        (grant.descriptor, 0, 0),
    ]
    for one in bad:
        with pytest.raises(transferd.TransferdError) as caught:
            sender.scatter(source, [good, good, one, good], imm=1).wait(WAIT_S)
        assert not isinstance(caught.value, transferd.Internal | transferd.WaitTimeout), one
    with pytest.raises(transferd.InvalidRequest, match="members 0 to 0"):
        sender.scatter(source, [(1, 0, 0, 1)], imm=1, group=sender.peer_group([grant.descriptor]))
    with pytest.raises(transferd.JobFailed):
        sender.scatter(source, [good, good], imm=99).wait(WAIT_S)
    sender.imm(grant.descriptor, 2).wait(WAIT_S)
    exactly(receiver, 2, 1)
    assert receiver.counter(1).value == 0
    assert not any(target.view)


def test_read(sender: Client, receiver: Client, seeded: random.Random) -> None:
    there, grant = granted(receiver, rights={"read"})
    there.view[:] = seeded.randbytes(LENGTH)
    here = sender.alloc(LENGTH + 64)
    for length in (0, 1, 4095, 16_385, LENGTH - 77):
        here.view[:] = bytes(LENGTH + 64)
        job = sender.read(src=grant.descriptor, dst=here[5 : 5 + length], src_offset=77)
        assert job.wait(WAIT_S) is OK
        assert here.view[5 : 5 + length] == there.view[77 : 77 + length]
        assert not any(here.view[:5])
        assert not any(here.view[5 + length : 69 + length])
        assert job.result is not None
        assert job.result.bytes == length
    assert receiver.counter(0).value == 0
    for job, detail in (
        (sender.read(grant.descriptor, here, 64), "DESTINATION_BOUNDS"),
        (sender.write(here[:1], grant.descriptor, imm=1), "RIGHTS"),
        (sender.read(there.grant(imms=[1]).descriptor, here[:1]), "RIGHTS"),
    ):
        with pytest.raises(transferd.JobFailed) as caught:
            job.wait(WAIT_S)
        assert caught.value.detail == detail


def test_all_of_them_in_one_batch(sender: Client, receiver: Client, seeded: random.Random) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver, rights={"read", "write"})
    dst = grant.descriptor
    jobs = sender.submit(
        [
            transferd.Write(src=source[:100], dst=dst, imm=1, exact=True),
            transferd.Imm(dst=dst, imm=1),
            transferd.WritePages(
                src=source, src_pages=range(40), dst=dst, dst_pages=range(40), page_bytes=512,
                dst_offset=4096, imm=1,
            ),
            transferd.Scatter(
                src=source, targets=[(dst, 0, 65_536, 5), (dst, 5, 65_541, 5)], imm=1
            ),
            transferd.Barrier(group=[dst, dst, dst], imm=1),
            transferd.Read(src=dst, dst=source[LENGTH - 10 :], src_offset=LENGTH - 10),
        ]
    )  # fmt: skip
    assert {job.wait(WAIT_S) for job in jobs} == {OK}
    exactly(receiver, 1, 1 + 1 + 40 + 2 + 3)
    assert target.view[:100] == source.view[:100]
    assert target.view[4096 : 4096 + 40 * 512] == source.view[: 40 * 512]
    assert target.view[65_536:65_546] == source.view[:10]
    assert not any(source.view[LENGTH - 10 :])
    # One that is wrong, and nothing of the batch is sent.
    before = receiver.counter(1).value
    with pytest.raises(transferd.InvalidRequest, match=r"jobs\[1\]\.\S*pages"):
        sender.submit(
            [
                transferd.Imm(dst=dst, imm=1),
                transferd.WritePages(
                    src=source, src_pages=[0], dst=dst, dst_pages=[1 << 20], page_bytes=512, imm=1
                ),
            ]
        )
    sender.imm(dst, 2).wait(WAIT_S)
    exactly(receiver, 2, 1)
    assert receiver.counter(1).value == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"src_pages": [0, 1]}, "as many"),
        ({"src_pages": [-1]}, r"src_pages\[0\] is -1"),
        ({"dst_pages": [-1]}, r"dst_pages\[0\] is -1"),
        ({"src_pages": [256]}, r"src_pages\[0\] is 256.* pages 0 to 255"),
        ({"dst_pages": [256]}, r"256.*255"),
        ({"src_pages": [1 << 32]}, r"src_pages\[0\] is 4294967296"),
        ({"dst_pages": [(1 << 63) - 1]}, r"dst_pages\[0\]"),
        ({"dst_pages": [1 << 64]}, "above 64 bits"),
        ({"src_pages": [0.5]}, "int32 or int64"),
        ({"src_pages": None}, "int32 or int64"),
        ({"src_pages": np.zeros(1, dtype=np.int16)}, "format 'h'"),
        ({"src_pages": np.zeros(1)}, "format 'd': convert it to int64"),
        ({"src_pages": np.ones(1, dtype=bool)}, "of a mask pass numpy.flatnonzero"),
        ({"dst_pages": np.zeros(1, dtype=">i8")}, "big-endian"),
        ({"dst_pages": np.array([1 << 32])}, r"dst_pages\[0\] is 4294967296"),
        (
            {"dst_pages": np.array([(1 << 64) - 1], dtype=np.uint64)},
            r"dst_pages\[0\] is 1844674407",
        ),
        ({"dst_pages": np.array([-1], dtype=np.int32)}, r"dst_pages\[0\] is -1"),
        ({"src_pages": np.zeros((1, 1), dtype=np.int32)}, "2 dimensions"),
        ({"src_pages": b"\0\0\0\0"}, "format 'B'"),
        ({"page_bytes": 0}, "page_bytes"),
        ({"page_bytes": (1 << 40) + 1}, "page_bytes"),
        ({"page_bytes": LENGTH + 1}, "no page"),
        ({"count": "pages"}, "count"),
        ({"src_stride": -1}, "src_stride"),
        ({"src_pages": [1], "src_stride": (1 << 64) - 1}, r"src_pages\[0\] is 1"),
        ({"dst_pages": [2], "dst_stride": 1 << 63}, "pages"),
        ({"src_offset": LENGTH + 1}, "src_offset"),
        ({"src_offset": LENGTH - 1}, "no page"),
        ({"dst_offset": (1 << 64) - 1}, "pages"),
        ({"imm": 1 << 20}, "imm"),
        ({"deadline_s": -1.0}, "deadline_s"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_wrong_pages_are_named(
    shared_pair: Pair, shared_memory: bool, fields: dict[str, Any], message: str
) -> None:
    with transferd.Client(shared_pair[0].socket, shared_memory=shared_memory) as client:
        region, grant = granted(client)
        good: dict[str, Any] = {"src_pages": [0], "dst_pages": [0], "page_bytes": 4096, "imm": 1}
        with pytest.raises(transferd.InvalidRequest, match=message):
            client.write_pages(src=region, dst=grant.descriptor, **good | fields)
        assert client.counter(1).value == 0


def test_lengths_above_the_limits(sender: Client, receiver: Client) -> None:
    source = sender.alloc(4096)
    _, grant = granted(receiver)
    with pytest.raises(transferd.InvalidRequest, match="a job has at most"):
        sender.write_pages(
            source, np.zeros(300_000, np.int32), grant.descriptor, np.zeros(300_000, np.int64), 1,
            imm=1,
        )  # fmt: skip
    with pytest.raises(transferd.InvalidRequest, match="at most 4096"):
        sender.scatter(source, [(grant.descriptor, 0, 0, 1)] * 4097, imm=1)
    with pytest.raises(transferd.InvalidRequest, match="at most 4096"):
        sender.barrier([grant.descriptor] * 4097, imm=1)
    assert sender.barrier([grant.descriptor] * 4096, imm=1).wait(WAIT_S) is OK
    exactly(receiver, 1, 4096)


def test_many_large_tables_wait_for_room(
    shared_pair: Pair, shared_memory: bool, seeded: random.Random
) -> None:
    near, far = (one.socket for one in shared_pair)
    with (
        transferd.Client(near, shared_memory=shared_memory) as sender,
        transferd.Client(far, shared_memory=shared_memory) as receiver,
    ):
        source = filled(sender, seeded)
        _, grant = granted(receiver)
        pages, rounds = (100_000, 12) if shared_memory else (20_000, 3)
        index = np.zeros(pages, dtype=np.int32)
        jobs = [
            sender.write_pages(source, index, grant.descriptor, index, 1, imm=1, count="job")
            for _ in range(rounds)
        ]
        jobs += sender.submit(
            [
                transferd.WritePages(
                    src=source, src_pages=index, dst=grant.descriptor, dst_pages=index,
                    page_bytes=1, imm=1, count="job",
                )
                for _ in range(rounds)
            ]
        )  # fmt: skip
        assert {job.wait(WAIT_S) for job in jobs} == {OK}
        exactly(receiver, 1, 2 * rounds)


def test_callbacks_cancel_and_wait(sender: Client, receiver: Client) -> None:
    length = 64 << 20
    source = sender.alloc(length)
    _, grant = granted(receiver, length, rights={"read", "write"})
    dst = grant.descriptor
    group = sender.peer_group([dst])
    pages = np.arange(1024, dtype=np.int32)

    def all_of_them(**options: Any) -> list[transferd.Job]:
        return [
            sender.write_pages(source, pages, dst, pages[::-1], 65_536, imm=1, **options),
            sender.scatter(source, [(0, 0, 0, length)], imm=1, group=group, **options),
            sender.read(dst, source, **options),
            sender.barrier(group, imm=1, **options),
        ]

    called = threading.Semaphore(0)
    jobs = all_of_them()
    for job in jobs:
        job.add_done_callback(lambda _: called.release())
    assert {job.wait(WAIT_S) for job in jobs} == {OK}
    for _ in jobs:
        assert called.acquire(timeout=WAIT_S)
    jobs = [job for _ in range(3) for job in all_of_them()]
    ends = [job.cancel(WAIT_S) for job in reversed(jobs)]
    assert JobStatus.CANCELLED in ends
    assert set(ends) <= {OK, JobStatus.CANCELLED}
    assert jobs[0].cancel(WAIT_S) is jobs[0].status  # one that has ended
    jobs = [job for _ in range(4) for job in all_of_them(deadline_s=0.002)]
    for job in jobs:
        with contextlib.suppress(transferd.JobFailed):
            job.wait(WAIT_S)
    assert {job.status for job in jobs} <= {OK, JobStatus.DEADLINE}
    assert JobStatus.DEADLINE in {job.status for job in jobs}


def test_asyncio_has_them_too(
    shared_pair: Pair, shared_memory: bool, seeded: random.Random
) -> None:
    async def main() -> None:
        async with (
            transferd.aio.Client(shared_pair[0].socket, shared_memory=shared_memory) as a,
            transferd.aio.Client(shared_pair[1].socket, shared_memory=shared_memory) as b,
        ):
            source, target = await a.alloc(LENGTH), await b.alloc(LENGTH)
            source.view[:] = seeded.randbytes(LENGTH)
            grant = await target.grant(imms=range(4), rights={"read", "write"})
            dst = grant.descriptor
            group = await a.peer_group([dst, dst])
            index = np.arange(100, dtype=np.int64)
            jobs = [
                await a.write_pages(source, index, dst, index, 1024, imm=1),
                await a.write(source[:10], dst, 200_000, imm=1, exact=True),
                await a.scatter(source, [(1, 5, 300_000, 7)], imm=1, group=group),
                await a.barrier(group, imm=1),
            ]
            jobs += await a.submit([transferd.Barrier(group=group, imm=1)])
            assert await asyncio.gather(*jobs) == [OK] * 5
            counter = await b.counter(1)
            await counter.wait(100 + 1 + 1 + 2 + 2, WAIT_S)
            assert target.view[: 100 * 1024] == source.view[: 100 * 1024]
            assert target.view[300_000:300_007] == source.view[5:12]
            assert await (await a.read(dst, source[: 100 * 1024], 1)) is OK
            assert source.view[: 100 * 1024] == target.view[1 : 100 * 1024 + 1]
            with pytest.raises(transferd.InvalidRequest):
                await a.write_pages(source, [LENGTH], dst, [0], 1, imm=1)

    asyncio.run(main())


@pytest.mark.parametrize("far", [0, 1])
def test_offsets_above_4_gib(shared_pair: Pair, far: int) -> None:
    """Of the pages of the region only those are touched that are looked at."""
    with (
        transferd.Client(shared_pair[0].socket) as sender,
        transferd.Client(shared_pair[far].socket) as receiver,
    ):
        length = (5 << 30) + 17
        source, (target, grant) = sender.alloc(1 << 20), granted(receiver, length)
        source.view[:4] = b"last"
        end = length - 4
        sender.write(source[:4], grant.descriptor, end, imm=1).wait(WAIT_S)
        exactly(receiver, 1, 1)
        assert bytes(target.view[end:]) == b"last"
        target.view[end:] = bytes(4)
        sender.write_pages(
            source, [1, 0], grant.descriptor, [0, 5 << 18], 4, dst_stride=4096, dst_offset=13, imm=2
        ).wait(WAIT_S)
        exactly(receiver, 2, 2)
        assert bytes(target.view[end:]) == b"last"
