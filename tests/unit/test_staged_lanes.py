# SPDX-License-Identifier: Apache-2.0
"""Staged paths: made with the first open that may need one, and shared by all opens of a peer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from transferd.daemon import cuda, errors, lanes, owner, paths, sessions, stagedpaths
from transferd.daemon.peer import STAGED_LANE, PathState
from transferd.daemon.plane import Detail, EventType
from transferd.daemon.wire import Half

from support import hosts
from support.fake_plane import PROTOCOL, rail
from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from transferd.daemon.peer import Lane
    from transferd.daemon.session import Session

TWIN = f"staged/{PROTOCOL}"
NICS = 2
BYTES = 65_536


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "PAUSE_FIRST_S", 0.002)
    monkeypatch.setattr(paths, "PAUSE_MAX_S", 0.01)
    monkeypatch.setattr(paths, "PROVE_S", 0.05)
    monkeypatch.setattr(lanes, "LINGER_S", 0.05)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    net = Network()
    yield net
    for host in list(net.hosts.values()):
        await host.aclose()
        host.assert_nothing_left()
        assert not host.plane.conns


def make_host(network: Network, port: int) -> Host:
    nics = [rail(f"m{i}") for i in range(NICS)]
    return Host(network, port, rails=[*nics, *(rail(f"staged/m{i}", TWIN) for i in range(NICS))])


@pytest.fixture
def near(network: Network) -> Host:
    return make_host(network, 7001)


@pytest.fixture
def far(network: Network) -> Host:
    return make_host(network, 7002)


async def on_gpu(host: Host, session: Session) -> Any:
    """Registers memory of a GPU that no NIC reaches."""
    share = cuda.Share(b"u" * 16, 1 << 40, BYTES, 1, b"h" * 64, (), dmabuf=False, flush=0)
    memory = host.sessions.add_cuda_memory(session, share, [])
    work = host.sessions.register(session, memory.memory_id, offset=0, length=0, name="gpu")
    return await session.ops.run(work, "register")


def granted(host: Host, region: Any) -> bytes:
    _, descriptor, _ = host.owner.create_grant(
        region, offset=0, length=0, rights=1, imm_first=0, imm_count=1, expires_ms=0
    )
    return descriptor


def staged(host: Host) -> list[int]:
    """Its connections by staged rails."""
    return [conn for conn in host.plane.conns if host.plane.rail_of[conn] >= NICS]


def lane_of(near: Host, far: Host) -> Lane:
    return near.peer(far).lanes[STAGED_LANE]


def conns_of(near: Host, one: Any) -> set[int]:
    native = near.plane.sessions[one.session.handle].opens[one.handle]
    return {path.conn for path in native.options.paths}


async def test_host_memory_has_none(near: Host, far: Host) -> None:
    owning = await far.session()
    for sealed in (True, False):
        _, descriptor = await far.grant(owning, imms=1, sealed=sealed)
        sender = await near.session()
        await near.region(sender, sealed=sealed)
        await near.open(sender, descriptor)
    assert len(near.plane.conns) == 4 * NICS // 2
    assert not staged(near)
    assert not staged(far)


async def test_all_opens_of_a_peer_share_them(near: Host, far: Host) -> None:
    region = await on_gpu(far, await far.session())
    made = []
    for i in range(4):
        sender = await near.session()
        await near.region(sender, sealed=i % 2 == 0)
        made += await near.open(sender, granted(far, region))
    assert len({one.lane for one in made}) == 3, "sessions that may not share have their own"
    assert len(staged(near)) == len(staged(far)) == NICS
    assert all(conns_of(near, one) == set(staged(near)) for one in made)
    for one in made[1:]:
        await near.end(one.session)
    assert set(staged(near)) == conns_of(near, made[0])
    await near.end(made[0].session)
    await eventually(lambda: not staged(near) and not staged(far))
    assert STAGED_LANE not in near.peer(far).lanes


async def test_opens_get_them_once_their_session_has_gpu_memory(near: Host, far: Host) -> None:
    sender, owning = await near.session(), await far.session()
    _, descriptor = await far.grant(owning, imms=1)
    (first,) = await near.open(sender, descriptor)
    (other,) = await near.open(await near.session(), descriptor)
    assert not staged(near)
    await on_gpu(near, sender)
    assert len(staged(near)) == NICS
    assert set(staged(near)) < conns_of(near, first)
    assert not set(staged(near)) & conns_of(near, other)
    _, descriptor = await far.grant(owning, imms=1)
    (second,) = await near.open(sender, descriptor)
    assert conns_of(near, second) == conns_of(near, first)
    await near.opener.close(sender, second.handle)
    await near.opener.close(sender, first.handle)
    await eventually(lambda: not staged(near))


async def test_whoever_registers_memory_does_not_wait_for_a_peer_that_hangs(
    network: Network, near: Host, far: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stagedpaths, "GIVE_S", 0.01)
    monkeypatch.setattr(hosts, "CALL_S", 600)
    sender = await near.session()
    (one,) = await near.open(sender, (await far.grant(await far.session(), imms=1))[1])
    connecting = network.hold("connect")
    try:
        async with asyncio.timeout(20):
            await on_gpu(near, sender)
        assert one.staged is None
    finally:
        connecting.set()
    await eventually(lambda: len(conns_of(near, one)) == 2 * NICS)
    assert len(staged(near)) == NICS


async def test_who_comes_and_goes_has_them_made_once(
    near: Host, far: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "LINGER_S", 600)
    descriptor = granted(far, await on_gpu(far, await far.session()))
    sender = await near.session()
    made = set()
    for _ in range(5):
        (one,) = await near.open(sender, descriptor)
        made |= conns_of(near, one)
        await near.opener.close(sender, one.handle)
    assert len(made) == NICS
    assert set(staged(near)) == made


async def test_a_lane_stays_after_the_last_of_its_opens(
    near: Host, far: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has used it between counts, too."""
    monkeypatch.setattr(lanes, "LINGER_S", 600)
    descriptor = granted(far, await on_gpu(far, await far.session()))
    sender = await near.session()
    ends = []
    for _ in range(2):
        (one,) = await near.open(sender, descriptor)
        await near.opener.close(sender, one.handle)
        timer = lane_of(near, far).lingers
        assert timer is not None
        ends.append(timer.when())
    assert ends[0] < ends[1]


async def test_mailboxes_need_none(near: Host, far: Host) -> None:
    sender, owning = await near.session(), await far.session()
    await on_gpu(near, sender)
    mailbox = far.owner.grant_mailbox(await far.region(owning), 1, 64)[1]
    far.plane.sessions[owning.handle].mailboxes[1] = []
    await near.open(sender, mailbox)
    assert not staged(near)


@pytest.mark.parametrize("side", ["near", "far"])
async def test_where_no_room_is_left(
    near: Host, far: Host, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full = near if side == "near" else far
    full.plane.full = set(range(NICS, 2 * NICS))
    sender = await near.session()
    (one,) = await near.open(sender, granted(far, await on_gpu(far, await far.session())))
    native = near.plane.sessions[sender.handle].opens[one.handle]
    assert native.options.unreached is Detail.STAGING
    assert not native.options.paths
    await eventually(lambda: min(path.failures for path in lane_of(near, far).paths) > 2)
    told = [line for line in capsys.readouterr().out.splitlines() if "[warning" in line]
    assert all("raise gpu.staging_bytes" in line for line in told), told
    assert len(told) == NICS + (side == "far"), "once each"
    full.plane.full.clear()
    await eventually(lambda: len(conns_of(near, one)) == NICS)
    assert one.live


async def test_a_peer_that_is_gone_is_no_pool_without_room(
    network: Network, near: Host, far: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    sender = await near.session()
    await near.open(sender, (await far.grant(await far.session(), imms=1))[1])
    network.dead.add(far.address)
    await on_gpu(near, sender)
    assert network.calls["connect"] > 1
    said = [line for line in capsys.readouterr().out.splitlines() if "path stays down" in line]
    assert said
    assert not [line for line in said if "[warning" in line]
    network.dead.clear()


async def test_all_of_them_may_break_and_come_back(near: Host, far: Host) -> None:
    (one,) = await near.open(
        await near.session(), granted(far, await on_gpu(far, await far.session()))
    )
    before = conns_of(near, one)
    near.plane.mute = set(range(NICS, 2 * NICS))
    for conn in before:
        near.plane.tell(EventType.CONN_LOST, conn)
    await eventually(lambda: min(path.failures for path in lane_of(near, far).paths) > 1)
    assert one.live
    near.plane.mute.clear()
    await eventually(lambda: all(p.state is PathState.UP for p in lane_of(near, far).paths))
    assert len(conns_of(near, one) - before) == NICS


def ends_without_rest(
    near: Host, session: Session, monkeypatch: pytest.MonkeyPatch
) -> asyncio.Task[None]:
    """Ends a session whose jobs rest when a test says so."""
    with monkeypatch.context() as patch:
        patch.setattr(near.plane, "session_end", near.plane.session_ends_without_rest)
        return near.sessions.end(session, clean=True, reason="TEST")


@pytest.mark.slow  # it lasts timeouts.quiet
async def test_jobs_that_do_not_rest_cost_others_nothing_before_the_data_plane_ends_them(
    near: Host, far: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "STAGED_S", 600)
    descriptor = granted(far, await on_gpu(far, await far.session()))
    sender, other = await near.session(), await near.session()
    await near.region(sender, sealed=False)
    (own,) = await near.open(sender, descriptor)
    (shared,) = await near.open(other, descriptor)
    before = conns_of(near, shared)
    ended = ends_without_rest(near, sender, monkeypatch)
    await eventually(lambda: not own.live)
    assert own.lane.closing is not None
    await asyncio.wait([own.lane.closing])
    assert shared.live
    assert conns_of(near, shared) == before == set(staged(near))
    near.plane.tell(EventType.SESSION_QUIET, sender.handle)
    await ended
    assert shared.live


@pytest.mark.slow  # it lasts timeouts.quiet
async def test_jobs_that_do_not_rest_lose_staged_connections_in_the_end(
    near: Host, far: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "STAGED_S", 0.01)
    sender = await near.session()
    await near.open(sender, granted(far, await on_gpu(far, await far.session())))
    ended = ends_without_rest(near, sender, monkeypatch)
    await eventually(lambda: not staged(near))
    near.plane.tell(EventType.SESSION_QUIET, sender.handle)
    await ended


async def test_memory_and_grants_at_once(near: Host, far: Host) -> None:
    owning, sender = await far.session(), await near.session()
    grants = [(await far.grant(owning, imms=1))[1] for _ in range(4)]
    opening = [asyncio.ensure_future(near.open(sender, one)) for one in grants]
    await asyncio.gather(*opening, on_gpu(near, sender))
    for done in opening:
        (one,) = done.result()
        assert len(conns_of(near, one)) == 2 * NICS


async def test_a_peer_has_no_more_than_its_share(near: Host, far: Host) -> None:
    await near.peers.ensure(far.key, far.address)
    peer = far.peer(near)
    most = owner.STAGED_PER_PAIR * NICS
    ask = [Half(number, NICS, TWIN, b"there") for number in range(1, most + 2)]
    with pytest.raises(errors.QuotaExceeded) as caught:
        await peer.tasks.run(far.owner.connect(peer, ask), "connect")
    assert caught.value.reason == "CONNECTIONS"
    await peer.tasks.run(far.owner.connect(peer, ask[1:]), "connect")
    plain = Half(100, 0, PROTOCOL, b"there")
    await peer.tasks.run(far.owner.connect(peer, [plain, *ask[1:]]), "connect")
    with pytest.raises(errors.QuotaExceeded):
        await peer.tasks.run(far.owner.connect(peer, ask[:1]), "connect")
