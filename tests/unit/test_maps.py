# SPDX-License-Identifier: Apache-2.0
"""Mappings of GPU memory: who gets one; whoever takes memory back knows who still has it."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from transferd.daemon import cuda, maps
from transferd.daemon.config import TenantConfig
from transferd.daemon.errors import TransferdError
from transferd.daemon.fdsocket import FdServer
from transferd.daemon.grant import RIGHT_MAP, RIGHT_WRITE
from transferd.daemon.policy import Tenant
from transferd.daemon.session import Origin
from transferd.v1 import attach_pb2 as pb

from support.fake_plane import rail
from support.fd_client import ATTACH, Client, open_fds
from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from transferd.daemon.grant import Grant
    from transferd.daemon.region import Region
    from transferd.daemon.session import Session

BASE = 0x7F00_0000_0000
SIZE = 1 << 20
BOUND_S = 0.05
ALL = RIGHT_WRITE | RIGHT_MAP


class World:
    """A host with an owner of GPU memory, and what was asked back."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.maps = host.sessions.maps
        self.maps._bound_s = BOUND_S
        self.told: list[tuple[Session, list[int]]] = []
        self.maps.on_revoked.append(lambda session, ids: self.told.append((session, list(ids))))
        host.sessions.is_chunk = lambda fd: True

    async def region(self, session: Session, chunks: int = 0) -> Region:
        """Registers an allocation from 4 KiB on."""
        fds = [os.memfd_create("c") for _ in range(chunks)]
        sizes = (SIZE // chunks,) * chunks if chunks else ()
        handle = b"" if chunks else b"h" * 64
        memory = self.host.sessions.add_cuda_memory(
            session, self.share(sizes[:15], handle), fds[:15]
        )
        for start in range(15, chunks, 15):
            part = slice(start, start + 15)
            self.host.sessions.add_chunks(session, memory.memory_id, sizes[part], fds[part])
        return await self.host.sessions.register(
            session, memory.memory_id, offset=4096, length=0, name="g"
        )

    @staticmethod
    def share(sizes: tuple[int, ...], handle: bytes) -> cuda.Share:
        return cuda.Share(b"u" * 16, BASE, SIZE, 5, handle, sizes, dmabuf=False, flush=0)

    def grant(self, region: Region, rights: int = ALL, **values: Any) -> tuple[Grant, bytes]:
        given = {"offset": 64, "length": 128, "imm_first": 0, "imm_count": 1, "expires_ms": 0}
        grant, descriptor, _ = self.host.owner.create_grant(region, rights=rights, **given | values)
        return grant, descriptor

    async def mapped(self, owner: Session, mapper: Session) -> tuple[Grant, maps.Mapping]:
        grant, descriptor = self.grant(await self.region(owner))
        (opened,) = await self.host.open(mapper, descriptor)
        return grant, self.maps.add(mapper, opened.handle, time.monotonic_ns())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    host = Host(Network(), 7001)
    world = World(host)
    yield world
    await host.aclose()
    host.assert_nothing_left()
    assert not len(world.maps)
    assert not world.maps._by_grant
    assert not world.maps._by_region


async def refusal(world: World, session: Session, handle: int) -> str:
    with pytest.raises(TransferdError) as caught:
        world.maps.add(session, handle, time.monotonic_ns())
    return caught.value.reason


async def test_who_gets_none(world: World) -> None:
    owner, mapper, other = [await world.host.session(name) for name in "omx"]
    region = await world.region(owner)
    (without,) = await world.host.open(mapper, world.grant(region, RIGHT_WRITE)[1])
    grant, descriptor = world.grant(region)
    (opened,) = await world.host.open(mapper, descriptor)
    assert await refusal(world, mapper, without.handle) == "MAP_NOT_GRANTED"
    assert await refusal(world, mapper, opened.handle + 1000) == "OPEN_NOT_FOUND"
    assert await refusal(world, other, opened.handle) == "OPEN_NOT_FOUND", "somebody else's handle"
    await world.host.owner.end_grants([grant])
    assert await refusal(world, mapper, opened.handle) == "GRANT_REVOKED"
    late, descriptor = world.grant(region, expires_ms=1000)
    (opened,) = await world.host.open(mapper, descriptor)
    with pytest.raises(TransferdError) as caught:
        world.maps.add(mapper, opened.handle, late.expires_ns)
    assert caught.value.reason == "GRANT_EXPIRED"
    for session in (owner, mapper, other):
        await world.host.end(session)


async def test_another_tenant(world: World) -> None:
    owner = await world.host.session()
    tenant = Tenant(TenantConfig(name="others"))
    session, fds = await world.host.sessions.open(tenant, Origin("socket", "x"))
    for fd in (fds.segment, fds.doorbell, fds.event):
        os.close(fd)
    (opened,) = await world.host.open(session, world.grant(await world.region(owner))[1])
    assert await refusal(world, session, opened.handle) == "MAP_OTHER_TENANT"
    await world.host.end(owner)
    await world.host.end(session)


async def test_another_host() -> None:
    network = Network()
    far = World(Host(network, 7001))
    near = World(Host(network, 7002))
    owner, mapper = await far.host.session(), await near.host.session()
    region = await far.region(owner)
    (opened,) = await near.host.open(mapper, far.grant(region)[1])
    options = near.host.plane.sessions[mapper.handle].opens[opened.handle].options
    assert options.device
    assert options.paths == (), "no rail of its owner reaches it"
    assert await refusal(near, mapper, opened.handle) == "MAP_OTHER_HOST"
    for world, session in ((far, owner), (near, mapper)):
        await world.host.end(session)
    for world in (far, near):
        await world.host.aclose()
        world.host.assert_nothing_left()


async def test_on_this_host_it_is_counted_by_the_local_rail() -> None:
    host = Host(Network(), 7001, rails=[rail(), rail("local", "local/0123")])
    world = World(host)
    owner, mapper = await host.session(), await host.session()
    region = await world.region(owner)
    (opened,) = await host.open(mapper, world.grant(region)[1])
    options = host.plane.sessions[mapper.handle].opens[opened.handle].options
    assert options.device
    assert [path.key for path in options.paths] == [0]
    assert host.sessions.rails_of(region) == 0
    await host.end(owner)
    await host.end(mapper)
    await host.aclose()


async def test_unmapped_in_time(world: World) -> None:
    owner, mapper = await world.host.session(), await world.host.session()
    grant, mapping = await world.mapped(owner, mapper)
    assert not mapping.own_process
    assert world.maps.count(grant.region) == 1
    await world.host.owner.end_grants([grant])
    assert world.told == [(mapper, [mapping.map_id])]
    waiting = asyncio.create_task(world.maps.unmapped(grant.grant_id))
    await asyncio.sleep(0)
    world.maps.remove(mapper, mapping.map_id)
    await waiting
    world.maps.remove(mapper, mapping.map_id)  # twice is as good as once
    assert world.maps.count(grant.region) == 0
    await world.host.end(owner)
    await world.host.end(mapper)


async def test_still_mapped(world: World) -> None:
    owner, mapper = await world.host.session(), await world.host.session()
    grant, mapping = await world.mapped(owner, mapper)
    await world.host.owner.end_grants([grant])
    for _ in range(2):
        with pytest.raises(TransferdError) as caught:
            await world.maps.unmapped(grant.grant_id)
        assert caught.value.reason == "STILL_MAPPED"
    assert world.host.owner.grants.get(grant.grant_id) is None, "ended for jobs all the same"
    with pytest.raises(TransferdError) as caught:
        await world.host.sessions.deregister(owner, grant.region.handle)
    assert caught.value.reason == "STILL_MAPPED"
    assert len(world.told) == 1, "asked once"
    world.maps.remove(mapper, mapping.map_id)
    await world.maps.unmapped(grant.grant_id)
    await world.host.sessions.deregister(owner, grant.region.handle)
    await world.host.end(owner)
    await world.host.end(mapper)


async def test_the_mapper_ends_while_it_is_waited_for(world: World) -> None:
    owner, mapper = await world.host.session(), await world.host.session()
    grant, _ = await world.mapped(owner, mapper)
    world.maps._bound_s = 10.0
    await world.host.owner.end_grants([grant])
    async with asyncio.timeout(5):
        waiting = asyncio.create_task(world.maps.unmapped(grant.grant_id))
        await asyncio.sleep(0)
        await world.host.end(mapper, clean=False)
        await waiting
    await world.host.end(owner)


async def test_the_owner_ends(world: World) -> None:
    """Its chunks are let go of at once, and whoever has mapped them is asked to do the same."""
    owner, mapper = await world.host.session(), await world.host.session()
    before = open_fds()
    region = await world.region(owner, chunks=16)
    grant, descriptor = world.grant(region)
    (opened,) = await world.host.open(mapper, descriptor)
    mapping = world.maps.add(mapper, opened.handle, time.monotonic_ns())
    assert mapping.memory.chunk_fds[mapping.chunks(15)] == mapping.memory.chunk_fds[15:]
    ended = world.host.sessions.end(owner, clean=False, reason="TEST")
    assert world.told == [(mapper, [mapping.map_id])]
    assert mapping.memory.chunk_fds == []
    with pytest.raises(TransferdError) as caught:
        mapping.chunks(15)
    assert caught.value.reason == "GRANT_REVOKED"
    await asyncio.shield(ended)
    assert open_fds() <= before
    assert len(world.maps) == 1, "the mapper has not said anything"
    world.maps.remove(mapper, mapping.map_id)
    assert len(world.maps) == 0
    assert world.host.owner.grants.get(grant.grant_id) is None
    await world.host.end(mapper)


async def test_too_many(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MAPS_MAX", 3)
    owner, mapper = await world.host.session(), await world.host.session()
    (opened,) = await world.host.open(mapper, world.grant(await world.region(owner))[1])
    for _ in range(3):
        world.maps.add(mapper, opened.handle, time.monotonic_ns())
    assert await refusal(world, mapper, opened.handle) == "MAPS"
    assert len(world.maps) == 3
    await world.host.end(owner)
    assert len(world.told) == 1, "all of one session in one message"
    await world.host.end(mapper)


# ---- over the fd socket ----


@pytest.fixture
async def path(world: World, short_tmp: Path) -> AsyncIterator[Path]:
    path = short_tmp / "m.fd"
    host = world.host
    server = FdServer(path, 0o600, "socket", host.tenant, host.sessions, host.plane)
    server.start()
    yield path
    await eventually(lambda: not len(host.sessions.table))
    await server.aclose()


async def mapper_of(world: World, path: Path, descriptor: bytes) -> tuple[Client, int]:
    """Attaches by the socket and opens a grant; gives the handle."""
    client = Client(path)
    attached = await client.ask(ATTACH)
    number = attached.attach.session_id
    session = next(one for one in world.host.sessions.table if one.session_id == number)
    (opened,) = await world.host.open(session, descriptor)
    return client, opened.handle


async def test_chunks_come_in_several_answers(world: World, path: Path) -> None:
    owner = await world.host.session()
    grant, descriptor = world.grant(await world.region(owner, chunks=32))
    client, handle = await mapper_of(world, path, descriptor)
    inodes = [os.fstat(fd).st_ino for fd in grant.region.memory.chunk_fds]  # type: ignore[attr-defined]
    got: list[int] = []
    map_id = 0
    while len(got) < 32:
        ask = pb.MapRequest(map_id=map_id, first_chunk=len(got), handle=0 if map_id else handle)
        first = len(client.fds)
        answer = (await client.ask(pb.FdRequest(request_id=7, map=ask))).map
        map_id = answer.map_id
        assert (answer.chunk_count, answer.size_bytes, answer.owner_pid) == (32, SIZE, 0)
        assert (answer.offset_bytes, answer.length_bytes) == (4096 + 64, 128)
        assert (answer.buffer_id, answer.own_process, answer.ipc_handle) == (5, False, b"")
        assert len(answer.chunk_bytes) == len(client.fds) - first <= 15
        got += [os.fstat(fd).st_ino for fd in client.fds[first:]]
    assert got == inodes
    for wrong in (
        pb.MapRequest(map_id=map_id, first_chunk=32),
        pb.MapRequest(map_id=map_id, handle=handle),
        pb.MapRequest(handle=handle, first_chunk=1),
        pb.MapRequest(map_id=map_id + 1),
        pb.MapRequest(),
    ):
        response = await client.ask(pb.FdRequest(request_id=8, map=wrong))
        assert response.WhichOneof("body") == "error", wrong
    await world.host.owner.end_grants([grant])
    revoked = await client.receive()
    assert revoked is not None
    assert (revoked.request_id, list(revoked.map_revoked.map_ids)) == (0, [map_id])
    response = await client.ask(pb.FdRequest(request_id=9, unmap=pb.UnmapRequest(map_id=map_id)))
    assert response.WhichOneof("body") == "unmap"
    await world.maps.unmapped(grant.grant_id)
    client.close()
    await world.host.end(owner)


async def test_the_owners_own_process(world: World, path: Path) -> None:
    origin = Origin("socket", "o", pid=os.getpid())
    owner, fds = await world.host.sessions.open(world.host.tenant, origin)
    for fd in (fds.segment, fds.doorbell, fds.event):
        os.close(fd)
    _, descriptor = world.grant(await world.region(owner, chunks=2))
    client, handle = await mapper_of(world, path, descriptor)
    count = len(client.fds)
    answer = (await client.ask(pb.FdRequest(map=pb.MapRequest(handle=handle)))).map
    assert (answer.own_process, answer.base, answer.owner_pid) == (True, BASE, os.getpid())
    assert (answer.chunk_count, answer.ipc_handle, len(client.fds)) == (0, b"", count)
    client.close()
    await world.host.end(owner)


async def test_a_mapper_that_does_not_listen(world: World, path: Path) -> None:
    """It is cut off, so that the daemon need not remember what it was to be told."""
    owner = await world.host.session()
    region = await world.region(owner)
    grants, descriptors = zip(*(world.grant(region) for _ in range(600)), strict=True)
    client, _ = await mapper_of(world, path, descriptors[0])
    session = next(one for one in world.host.sessions.table if one is not owner)
    for descriptor in descriptors:
        (opened,) = await world.host.open(session, descriptor)
        world.maps.add(session, opened.handle, time.monotonic_ns())
    for grant in grants:
        await world.host.owner.end_grants([grant])
    await eventually(lambda: len(world.maps) == 0)
    client.close()
    await world.host.end(owner)
