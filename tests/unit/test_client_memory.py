# SPDX-License-Identifier: Apache-2.0
"""Regions: views, slices, grants' arguments, and adopting memory in place."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
from transferd.client.adopt import own_pages

from support.fake_daemon import FakeDaemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BIG = 64 << 20  # above glibc's largest mmap threshold


@pytest.fixture
def fake(short_tmp: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(short_tmp)
    yield daemon
    daemon.close()


@pytest.fixture
def client(fake: FakeDaemon) -> Iterator[transferd.Client]:
    with transferd.Client(fake.address, timeout_s=5) as made:
        yield made


def test_views_share_the_bytes(client: transferd.Client) -> None:
    with client.alloc(1000, name="kv") as region:
        assert len(region) == region.length == len(region.view) == 1000
        array = region.numpy("float32")
        assert array.shape == (250,)
        array[:] = 1.5
        assert bytes(region.view[:4]) == np.float32(1.5).tobytes()
        part = region[4:12]
        assert len(part) == 8
        assert part.numpy(np.float32).tolist() == [1.5, 1.5]
        part.view[:4] = bytes(4)
        assert array[1] == 0
        inner = part[4:]
        assert (inner.start, inner.length) == (8, 4)
        assert "kv" in repr(region)
        with pytest.raises(transferd.InvalidRequest, match="whole number"):
            region[0:7].numpy("int32")
        assert region[5:5].length == 0


def test_torch_is_optional(client: transferd.Client) -> None:
    region = client.alloc(16)
    torch = pytest.importorskip("torch")
    region.torch(torch.float32).fill_(2)
    assert region.numpy("float32").tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "part",
    [slice(0, 101), slice(101, None), slice(50, 10), slice(0, 10, 2), slice(-101, None), 5, "a"],
)
def test_slices_outside_are_refused(client: transferd.Client, part: Any) -> None:
    region = client.alloc(100)
    with pytest.raises(transferd.InvalidRequest):
        region[part]
    assert region[-10:].start == 90


@pytest.mark.parametrize("length", [0, -1, (1 << 40) + 1, 1.5, True, "1"])
def test_bad_lengths(client: transferd.Client, length: Any) -> None:
    with pytest.raises(transferd.InvalidRequest):
        client.alloc(length)


def test_near(client: transferd.Client) -> None:
    for near in (None, 0, "0", "numa:0"):
        client.alloc(1, near=near).close()
    for bad in (-1, "cuda:0", 4096, "numa:4096", 1.5, True):
        with pytest.raises(transferd.InvalidRequest, match="near"):
            client.alloc(1, near=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"rights": "write"},
        {"rights": set()},
        {"rights": {"read", "send"}},
        {"imms": [1, 3]},
        {"imms": range(0, 10, 2)},
        {"imms": [-1]},
        {"imms": [1 << 20]},
        {"expires_s": 0},
        {"expires_s": float("nan")},
        {"expires_s": float("inf")},
        {"offset": 101},
        {"offset": 0, "length": 101},
        {"offset": 100},
        {"length": 0},
        {"offset": -1},
        {"offset": 10, "length": -20},
        {"length": 1.0},
        {"offset": 1.0},
    ],
)
def test_bad_grants(client: transferd.Client, arguments: dict[str, Any]) -> None:
    region = client.alloc(100)
    with pytest.raises(transferd.InvalidRequest):
        region.grant(**arguments)


def test_grant(client: transferd.Client, fake: FakeDaemon) -> None:
    region = client.alloc(100)
    grant = region.grant(10, 20, imms=[5, 4, 6], expires_s=0.5)
    assert (grant.length, grant.imms) == (20, range(4, 7))
    assert (fake.grants[grant.descriptor].offset, fake.grants[grant.descriptor].length) == (10, 20)
    grant.revoke()
    grant.revoke()
    assert fake.calls.count("RevokeGrant") == 1
    region.close()
    region.close()
    with pytest.raises(transferd.InvalidRequest, match="closed"):
        region.grant()
    with pytest.raises(transferd.InvalidRequest, match="closed"):
        client.write(region, grant.descriptor, imm=4)


def test_fence(client: transferd.Client, fake: FakeDaemon) -> None:
    grant = client.alloc(100).grant(imms=range(10, 40))
    grant.fence([12, 11, 13, range(20, 30), 25, range(30, 31), 39])
    grant.fence(range(10, 40))
    grant.fence(range(10, 20, 4))
    grant.fence(np.array([10]))
    assert fake.fenced == [
        [(11, 3), (20, 11), (39, 1)],
        [(10, 30)],
        [(10, 1), (14, 1), (18, 1)],
        [(10, 1)],
    ]


@pytest.mark.parametrize(
    ("imms", "says"),
    [
        ([], "at least one"),
        (range(10, 10), "at least one"),
        (12, "a list"),
        ([9], r"range\(10, 40\)"),
        ([40], r"range\(10, 40\)"),
        (range(30, 41), r"range\(10, 40\)"),
        ([-1], r"range\(10, 40\)"),
        ([12, "13"], "'13'"),
        ([12.0], "12.0"),
        ([range(12, 20, 2)], "without gaps"),
    ],
)
def test_bad_fences(client: transferd.Client, fake: FakeDaemon, imms: Any, says: str) -> None:
    grant = client.alloc(100).grant(imms=range(10, 40))
    with pytest.raises(transferd.InvalidRequest, match=says):
        grant.fence(imms)
    assert not fake.fenced


def test_fence_of_several_grants(client: transferd.Client, fake: FakeDaemon) -> None:
    region = client.alloc(100)
    first, second = region.grant(imms=range(10, 40)), region.grant(imms=range(5))
    client.fence({first: [12, 11, range(20, 22)], second: range(5)})
    assert fake.fenced == [[(11, 2), (20, 2)], [(0, 5)]]
    assert fake.calls.count("FenceGrants") == 1


def test_fence_of_several_grants_tells_which_have_failed(
    client: transferd.Client, fake: FakeDaemon
) -> None:
    region = client.alloc(100)
    grants = [region.grant(imms=range(4)) for _ in range(4)]
    fake.fence_ends = {
        grants[1].id: "GRANT_REVOKED",
        grants[2].id: "GRANT_NOT_FOUND",
        grants[3].id: "STILL_COPIED",
    }
    with pytest.raises(transferd.Conflict, match="3 grants, the first: why") as caught:
        client.fence({grant: [1] for grant in grants})
    assert isinstance(caught.value, transferd.FencesFailed)
    assert caught.value.reason == "STILL_COPIED"  # the only one by which anything may land
    assert {grant: (type(e), e.reason) for grant, e in caught.value.failed.items()} == {
        grants[1]: (transferd.Conflict, "GRANT_REVOKED"),
        grants[2]: (transferd.NotFound, "GRANT_NOT_FOUND"),
        grants[3]: (transferd.Conflict, "STILL_COPIED"),
    }


def test_fence_of_more_than_one_call_takes(
    client: transferd.Client, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transferd.client.grant.FENCE_RANGES_MAX", 7)
    region = client.alloc(100)
    grants = [region.grant(imms=range(6)) for _ in range(4)]
    client.fence({grant: [0, 2, 4] for grant in grants})
    assert fake.fenced == [[(0, 1), (2, 1), (4, 1)]] * 4
    assert fake.calls.count("FenceGrants") == 2


def test_bad_fences_of_several_grants(client: transferd.Client, fake: FakeDaemon) -> None:
    region = client.alloc(100)
    grant, other = region.grant(imms=range(4)), region.grant(imms=range(4, 8))
    with transferd.Client(fake.address) as stranger:
        foreign = stranger.alloc(100).grant(imms=range(4))
        bad: list[tuple[Any, str]] = [
            ({}, "one grant at least"),
            ({grant: [1], other: [1]}, r"range\(4, 8\)"),
            ({grant: [1], other: []}, "at least one"),
            ({grant: [1], foreign: [1]}, "grants of this Client"),
            ({grant.id: [1]}, "grants of this Client"),
        ]
        for fences, says in bad:
            with pytest.raises(transferd.InvalidRequest, match=says):
                client.fence(fences)
    assert not fake.fenced


def test_adopt_in_place(client: transferd.Client, fake: FakeDaemon) -> None:
    array = np.arange(BIG // 8, dtype=np.int64)
    address = array.ctypes.data
    region = client.register(array, name="weights")
    assert array.ctypes.data == address
    assert (array == np.arange(BIG // 8)).all()
    assert region.length == array.nbytes
    assert 0 < region.start < mmap.PAGESIZE
    # What the daemon sees is the same memory.
    shared = fake.sessions[0].regions[region.handle]
    array[3] = 77
    assert shared[region.start + 24 : region.start + 32] == np.int64(77).tobytes()
    shared[region.start : region.start + 8] = np.int64(88).tobytes()
    assert array[0] == 88
    # Offsets count from the array's first byte.
    grant = region.grant(8, 16, imms=[1])
    assert fake.grants[grant.descriptor].offset == region.start + 8
    assert client.write(region[24:32], grant.descriptor, imm=1).wait(5) == 1
    assert array[1] == 77
    region.close()
    del region, array  # free() of a shared mapping


def test_adopt_refuses_what_it_would_share_with_others(client: transferd.Client) -> None:
    small = np.zeros(100)
    big = np.zeros(BIG // 8)
    region = client.alloc(8192)
    for memory, why in (
        (small, "shares its pages|heap"),
        (big[1000:], "shares its pages"),
        (big[::2], "contiguous"),
        (np.zeros(0), "empty"),
        (bytes(BIG), "read-only"),
        (region.view, "shared already"),
        (region.numpy(), "shared already"),
        (object(), "not object"),
    ):
        with pytest.raises(transferd.InvalidRequest, match=why):
            client.register(memory)
    with pytest.raises(transferd.InvalidRequest, match="alloc"):
        client.register(small)


def test_adopt_a_private_mapping(client: transferd.Client) -> None:
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:4] = b"abcd"
    try:
        region = client.register(memory)
    except transferd.InvalidRequest:
        pytest.skip("the kernel has merged it with a neighbour, so it cannot be told apart")
    assert region.start == 0
    assert bytes(region.view[:4]) == b"abcd"


def test_adopt_torch(client: transferd.Client) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(BIG // 4, dtype=torch.int32)
    region = client.register(tensor)
    assert region.numpy("int32")[:3].tolist() == [0, 1, 2]


def test_own_pages_cover_the_allocation() -> None:
    array = np.zeros(BIG, dtype=np.uint8)
    start, length = own_pages(array.ctypes.data, array.nbytes)
    assert start <= array.ctypes.data
    assert start + length >= array.ctypes.data + array.nbytes
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
