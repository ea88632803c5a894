# SPDX-License-Identifier: Apache-2.0
"""The fd socket against clients that mean harm: no fd, no session and no memory stays behind."""

from __future__ import annotations

import asyncio
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from transferd.daemon import fdsocket
from transferd.daemon.config import TenantConfig
from transferd.daemon.fdsocket import FdServer
from transferd.daemon.plane import EventType
from transferd.daemon.policy import Tenant
from transferd.v1 import attach_pb2 as pb

from support.fd_client import ATTACH, Client, open_fds
from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host(Network(), 7001)
    yield host
    await host.aclose()
    host.assert_nothing_left()


@pytest.fixture
async def path(host: Host, short_tmp: Path) -> AsyncIterator[Path]:
    path = short_tmp / "t.fd"
    server = FdServer(path, 0o600, "socket", host.tenant, host.sessions, host.plane)
    server.start()
    before = open_fds()
    yield path
    await eventually(lambda: not host.sessions.table._sessions)
    await eventually(lambda: open_fds() <= before)
    await server.aclose()
    assert not path.exists()


def memfd(size: int = 8192, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("m", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


async def test_whole_life(host: Host, path: Path) -> None:
    client = Client(path)
    attached = await client.ask(ATTACH)
    assert attached.request_id == 1
    assert len(attached.attach.token) == 32
    assert len(client.fds) == 3
    mapped = await client.ask(pb.FdRequest(request_id=2, mapped=pb.MappedRequest()))
    assert mapped.WhichOneof("body") == "mapped"
    fd = memfd()
    shared = await client.ask(
        pb.FdRequest(request_id=3, share_memory=pb.ShareMemoryRequest()), [fd]
    )
    os.close(fd)
    assert shared.share_memory.size_bytes == 8192
    detached = await client.ask(pb.FdRequest(request_id=4, detach=pb.DetachRequest()))
    assert detached.WhichOneof("body") == "detach"
    assert not len(host.sessions.table), "answered when nothing is left"
    assert await client.receive() is None
    client.close()


async def test_closing_ends_the_session_uncleanly(host: Host, path: Path) -> None:
    client = Client(path)
    await client.ask(ATTACH)
    (session,) = host.sessions.table
    client.close()
    await eventually(lambda: session.ended is not None)
    assert session.end_reason == "CONNECTION_CLOSED"


async def test_gone_before_the_answer(path: Path) -> None:
    for _ in range(20):
        client = Client(path)
        client.send(ATTACH.SerializeToString())
        client.close()


@pytest.mark.parametrize(
    "data", [b"\xff" * 10, b"\0", b"\x08\x96\x01", b"x" * fdsocket.PACKET_MAX, b"y" * 20_000]
)
async def test_garbage(path: Path, data: bytes) -> None:
    client = Client(path)
    client.send(data)
    response = await client.receive()
    assert response is not None
    assert response.error.reason == "INVALID_REQUEST"
    assert await client.receive() is None
    client.close()


async def test_empty_packet_ends_the_connection(path: Path) -> None:
    client = Client(path)
    client.send(b"")
    assert await client.receive() is None
    client.close()


@pytest.mark.parametrize("count", [1, 3, 17, 100])
async def test_fds_that_nobody_asked_for(path: Path, count: int) -> None:
    fd = memfd()
    for _ in range(5):
        client = Client(path)
        client.send(ATTACH.SerializeToString(), [fd] * count)
        response = await client.receive()
        assert response is not None
        assert response.error.reason == "INVALID_REQUEST"
        client.close()
    os.close(fd)


@pytest.mark.parametrize("count", [0, 2, 16, 50])
async def test_wrong_number_of_fds(host: Host, path: Path, count: int) -> None:
    fd = memfd()
    client = Client(path)
    await client.ask(ATTACH)
    request = pb.FdRequest(request_id=9, share_memory=pb.ShareMemoryRequest())
    client.send(request.SerializeToString(), [fd] * count)
    response = await client.receive()
    assert response is not None
    assert response.error.reason == "INVALID_REQUEST"
    os.close(fd)
    client.close()


async def test_fds_that_are_no_memory(path: Path, tmp_path: Path) -> None:
    client = Client(path)
    await client.ask(ATTACH)
    reading, writing = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    bad = [reading, os.open("/dev/null", os.O_RDWR), file, os.open("/", os.O_RDONLY)]
    bad += [os.eventfd(0), memfd(seals=fcntl.F_SEAL_GROW)]
    for fd in bad:
        request = pb.FdRequest(request_id=7, share_memory=pb.ShareMemoryRequest())
        response = await client.ask(request, [fd])
        assert response.request_id == 7
        assert response.error.reason == "INVALID_REQUEST"
        assert response.error.message.startswith("fd: ")
        os.close(fd)
    os.close(writing)
    client.close()


async def test_order_of_messages(path: Path) -> None:
    client = Client(path)
    response = await client.ask(pb.FdRequest(request_id=1, mapped=pb.MappedRequest()))
    assert response.error.reason == "NOT_ATTACHED"
    assert await client.receive() is None
    client.close()
    client = Client(path)
    await client.ask(ATTACH)
    response = await client.ask(ATTACH)
    assert response.error.reason == "ALREADY_ATTACHED"
    response = await client.ask(pb.FdRequest(request_id=3, mapped=pb.MappedRequest()))
    assert response.WhichOneof("body") == "mapped", "a refused request does not end the session"
    client.close()


@pytest.mark.parametrize(
    ("attach", "word"),
    [
        ({"abi_version": 2}, "abi_version"),
        ({"abi_version": 1, "record_count": 100}, "record_count"),
        ({"abi_version": 1, "record_count": 1 << 31}, "record_count"),
        ({"abi_version": 1, "counter_count": 1 << 31}, "counter_count"),
        ({"abi_version": 1, "name": "x" * 65}, "name"),
    ],
)
async def test_attach_that_asks_too_much(path: Path, attach: dict[str, int], word: str) -> None:
    client = Client(path)
    request = pb.FdRequest(request_id=5, attach=pb.AttachRequest(**attach))  # type: ignore[arg-type]
    response = await client.ask(request)
    assert response.request_id == 5
    assert word in response.error.message
    client.close()


async def test_client_that_sends_and_never_reads(host: Host, path: Path) -> None:
    """Its answers fill a buffer of the kernel's, not of the daemon's; then it is cut off."""
    client, other = Client(path), Client(path)
    await client.ask(ATTACH)
    request = pb.FdRequest(request_id=1, mapped=pb.MappedRequest()).SerializeToString()
    try:
        async with asyncio.timeout(10):
            while True:
                try:
                    client.send(request)
                except BlockingIOError:
                    await asyncio.sleep(0)
    except (ConnectionResetError, BrokenPipeError):
        pass
    await other.ask(ATTACH)
    await eventually(lambda: len(host.sessions.table) == 1)
    other.close()
    client.close()


async def test_client_that_never_attaches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fdsocket, "ATTACH_S", 0.05)
    client = Client(path)
    response = await client.receive()
    assert response is not None
    assert response.error.reason == "ATTACH_TIMEOUT"
    assert await client.receive() is None
    client.close()


async def test_crowd_that_never_attaches(host: Host, path: Path) -> None:
    honest = Client(path)
    await honest.ask(ATTACH)
    crowd = []
    for _ in range(fdsocket.WAITING_MAX + 40):
        crowd.append(Client(path))
        await asyncio.sleep(0)
    assert await crowd[-1].receive() is None
    assert len(host.sessions.table) == 1
    for client in crowd:
        client.close()
    honest.close()


async def test_broken_ring_is_told(host: Host, path: Path) -> None:
    client = Client(path)
    await client.ask(ATTACH)
    (session,) = host.sessions.table
    host.plane.tell(EventType.SESSION_BROKEN, session.handle, detail=9)
    response = await client.receive()
    assert response is not None
    assert response.session_ended.reason == "RING_BROKEN"
    assert await client.receive() is None
    client.close()


async def test_users_that_are_not_listed(host: Host, short_tmp: Path) -> None:
    path = short_tmp / "u.fd"
    tenant = Tenant(TenantConfig(name="others", uids=(os.getuid() + 1,)))
    server = FdServer(path, 0o600, "u", tenant, host.sessions, host.plane)
    server.start()
    client = Client(path)
    assert (await client.ask(ATTACH)).error.reason == "UID_NOT_ALLOWED"
    assert await client.receive() is None
    client.close()
    await server.aclose()
