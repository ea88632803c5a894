# SPDX-License-Identifier: Apache-2.0
"""GPU memory by the fd socket, from clients that mean harm: no fd of theirs stays."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Any

import pytest

from transferd.daemon import cuda
from transferd.daemon.config import QuotaConfig, TenantConfig
from transferd.daemon.cuda import CudaMemory
from transferd.daemon.errors import Conflict, InvalidRequest
from transferd.daemon.fdsocket import FdServer
from transferd.daemon.grant import RIGHT_MAP, RIGHT_WRITE, check_grant
from transferd.v1 import attach_pb2 as pb

from support.fd_client import ATTACH, Client, open_fds
from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

BASE = 0x7F00_0000_0000
SIZE = 1 << 20
CHUNK = SIZE // 4


def share(**fields: Any) -> pb.ShareCudaMemoryRequest:
    """Makes a request that is in order but for what is given."""
    given: dict[str, Any] = {
        "device_uuid": b"u" * 16,
        "base": BASE,
        "size_bytes": SIZE,
        "buffer_id": 77,
        "ipc_handle": b"h" * 64,
    }
    return pb.ShareCudaMemoryRequest(**given | fields)


def memfd(name: str = "m", size: int = SIZE) -> int:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host(Network(), 7001)
    yield host
    await host.aclose()
    host.assert_nothing_left()
    assert not len(host.sessions.maps)


@pytest.fixture
async def path(host: Host, short_tmp: Path) -> AsyncIterator[Path]:
    path = short_tmp / "t.fd"
    server = FdServer(path, 0o600, "socket", host.tenant, host.sessions, host.plane)
    server.start()
    before = open_fds()
    yield path
    await eventually(lambda: not len(host.sessions.table))
    await eventually(lambda: open_fds() <= before)
    await server.aclose()


async def attached(path: Path) -> Client:
    client = Client(path)
    await client.ask(ATTACH)
    return client


async def hand_over(client: Client, request: pb.ShareCudaMemoryRequest, *fds: int) -> pb.FdResponse:
    """Sends fds, which are closed here then."""
    response = await client.ask(pb.FdRequest(request_id=9, share_cuda_memory=request), list(fds))
    for fd in fds:
        os.close(fd)
    return response


def held(host: Host) -> list[CudaMemory]:
    (session,) = host.sessions.table
    return [one for one in session.memories.values() if isinstance(one, CudaMemory)]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"device_uuid": b""}, "device_uuid"),
        ({"device_uuid": b"u" * 15}, "device_uuid"),
        ({"base": 0}, "base"),
        ({"base": BASE + 8}, "base"),
        ({"base": (1 << 64) - 16}, "base"),
        ({"size_bytes": 0}, "size_bytes"),
        ({"size_bytes": (1 << 40) + 1}, "size_bytes"),
        ({"size_bytes": (1 << 64) - 1}, "size_bytes"),
        ({"buffer_id": 0}, "buffer_id"),
        ({"ipc_handle": b"h" * 63}, "ipc_handle: truncated"),
        ({"ipc_handle": b"h" * 65}, "ipc_handle"),
        ({"ipc_handle": b""}, "ipc_handle: missing"),
        ({"dmabuf": True}, "fd: 0 fds"),
        ({"chunk_bytes": [CHUNK]}, "fd: 0 fds"),
        ({"chunk_bytes": [1] * 16}, "chunk_bytes"),
        ({"chunk_bytes": [1] * 1000}, "chunk_bytes"),
        ({"memory_id": 5}, "memory_id"),
    ],
)
async def test_numbers_that_cannot_be(path: Path, fields: dict[str, Any], word: str) -> None:
    client = await attached(path)
    response = await hand_over(client, share(**fields))
    assert response.error.reason == "INVALID_REQUEST"
    assert response.error.message.startswith(word)
    response = await hand_over(client, share())
    assert response.share_memory.size_bytes == SIZE, "a refused request does not end the session"
    client.close()


async def test_fds_that_nobody_asked_for(path: Path) -> None:
    client = await attached(path)
    response = await hand_over(client, share(), memfd())
    assert response.error.message.startswith("fd: 1 fds came")
    client.close()


def flagged(flush: int = cuda.Flush.NOT_NEEDED, **fields: Any) -> pb.ShareCudaMemoryRequest:
    return share(dmabuf=True, flush=flush, **fields)


async def test_a_dmabuf(host: Host, path: Path) -> None:
    client = await attached(path)
    response = await hand_over(client, flagged(ipc_handle=b""), memfd("dmabuf"))
    assert response.share_memory.size_bytes == SIZE
    (memory,) = held(host)
    assert (memory.base, memory.buffer_id, memory.chunk_fds) == (BASE, 77, [])
    assert os.fstat(memory.fd).st_size == SIZE
    client.close()


@pytest.mark.parametrize(
    ("request_", "fd", "word"),
    [
        (flagged(), ("m", SIZE), "fd: not a dma-buf"),
        (flagged(), ("dmabuf", SIZE - 1), "size_bytes"),
        (flagged(flush=cuda.Flush.UNSPECIFIED), ("dmabuf", SIZE), "flush: 0"),
        (flagged(flush=99), ("dmabuf", SIZE), "flush: 99"),
        (flagged(flush=cuda.Flush.IMPOSSIBLE), ("dmabuf", SIZE), "flush: CUDA_FLUSH_IMPOSSIBLE"),
        (flagged(base=BASE + 512), ("dmabuf", SIZE), "base"),
    ],
)
async def test_a_dmabuf_that_is_refused(
    path: Path, request_: pb.ShareCudaMemoryRequest, fd: tuple[str, int], word: str
) -> None:
    client = await attached(path)
    response = await hand_over(client, request_, memfd(*fd))
    assert response.error.message.startswith(word)
    client.close()


async def test_chunks_are_the_drivers(path: Path) -> None:
    """With the check that a daemon has: nothing that can be had here is a chunk."""
    client = await attached(path)
    request = share(ipc_handle=b"", size_bytes=CHUNK, chunk_bytes=[CHUNK])
    for fd in (memfd(), os.eventfd(0), os.open("/dev/null", os.O_RDWR), os.open("/", os.O_RDONLY)):
        response = await hand_over(client, request, fd)
        assert response.error.message.startswith("fd: that of chunk 0 is none of the NVIDIA")
    client.close()


async def test_chunks_in_several_packets(host: Host, path: Path) -> None:
    host.sessions.is_chunk = lambda fd: True
    client = await attached(path)
    first = share(ipc_handle=b"", size_bytes=20 * CHUNK, chunk_bytes=[CHUNK] * 15)
    response = await hand_over(client, first, *(memfd() for _ in range(15)))
    memory_id = response.share_memory.memory_id
    (memory,) = held(host)
    with pytest.raises(Conflict) as caught:
        cuda.check_range(memory, 0, 0)
    assert caught.value.reason == "CHUNKS_MISSING"

    def more(count: int, **fields: Any) -> pb.ShareCudaMemoryRequest:
        return pb.ShareCudaMemoryRequest(memory_id=memory_id, chunk_bytes=[CHUNK] * count, **fields)

    response = await hand_over(client, more(6), *(memfd() for _ in range(6)))
    assert response.error.message.startswith("chunk_bytes: add up to")
    response = await hand_over(client, more(5, base=BASE), *(memfd() for _ in range(5)))
    assert response.error.message.startswith("memory_id: with it only")
    response = await hand_over(client, more(5), *(memfd() for _ in range(4)))
    assert response.error.message.startswith("fd: 4 fds came")
    assert (len(memory.chunk_bytes), len(memory.chunk_fds)) == (15, 15)
    response = await hand_over(client, more(5), *(memfd() for _ in range(5)))
    assert response.share_memory.memory_id == memory_id
    assert cuda.check_range(memory, 0, 0) == 20 * CHUNK
    response = await hand_over(client, more(1), memfd())
    assert response.error.message.startswith("chunk_bytes: add up to")
    client.close()


async def test_chunks_of_no_size_or_no_memory(host: Host, path: Path) -> None:
    host.sessions.is_chunk = lambda fd: True
    client = await attached(path)
    response = await hand_over(client, share(chunk_bytes=[CHUNK, 0]), memfd(), memfd())
    assert response.error.message.startswith("chunk_bytes[1]")
    response = await hand_over(client, share())
    memory_id = response.share_memory.memory_id
    for wrong, reason in ((memory_id, "INVALID_REQUEST"), (memory_id + 1, "MEMORY_NOT_FOUND")):
        request = pb.ShareCudaMemoryRequest(memory_id=wrong, chunk_bytes=[CHUNK])
        assert (await hand_over(client, request, memfd())).error.reason == reason
    client.close()


async def test_more_chunks_than_the_quota(short_tmp: Path) -> None:
    host = Host(Network(), 7001)
    quotas = QuotaConfig(per_session_chunks=16)
    host.tenant.config = TenantConfig(name="few", quotas=quotas)
    host.sessions.is_chunk = lambda fd: True
    path = short_tmp / "q.fd"
    server = FdServer(path, 0o600, "socket", host.tenant, host.sessions, host.plane)
    server.start()
    client = await attached(path)
    request = share(chunk_bytes=[1] * 10)
    for reason in ("", "CHUNKS"):
        response = await hand_over(client, request, *(memfd() for _ in range(10)))
        assert response.error.reason == reason
    client.close()
    await eventually(lambda: not len(host.sessions.table))
    await server.aclose()
    await host.aclose()
    host.assert_nothing_left()


async def test_more_fds_than_there_is_room_for(path: Path) -> None:
    client = await attached(path)
    client.send(pb.FdRequest(share_cuda_memory=share()).SerializeToString(), [0] * 40)
    response = await client.receive()
    assert response is not None
    assert response.error.message.startswith("fds: more fds")
    assert await client.receive() is None
    client.close()


def test_ranges_of_an_allocation() -> None:
    given = cuda.Share(b"u" * 16, BASE, SIZE, 1, b"h" * 64, (), dmabuf=False, flush=0)
    memory = cuda.receive(1, 1, given, [], dmabuf_size=lambda fd: 0, is_chunk=lambda fd: False)
    assert cuda.check_range(memory, 16, 0) == SIZE - 16
    assert cuda.check_range(memory, SIZE - 16, 3) == 3
    for offset, length, field in (
        (8, 0, "offset_bytes"),
        (SIZE, 0, "offset_bytes"),
        (1 << 63, 0, "offset_bytes"),
        (16, SIZE - 15, "length_bytes"),
        (0, (1 << 64) - 1, "length_bytes"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            cuda.check_range(memory, offset, length)
        assert caught.value.field == field


async def test_the_right_is_for_gpu_memory(host: Host) -> None:
    session = await host.session()
    region = await host.region(session)
    with pytest.raises(InvalidRequest) as caught:
        check_grant(region, 0, 0, RIGHT_WRITE | RIGHT_MAP, 0, 0)
    assert caught.value.field == "rights"
    await host.end(session)
