# SPDX-License-Identifier: Apache-2.0
"""Lanes of several paths: one that breaks is taken out alone, comes back, and races with ends."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from transferd.client.ctl.main import paths_text
from transferd.daemon import errors, paths
from transferd.daemon.metrics import Snapshot
from transferd.daemon.peer import LaneState, PathCount, PathState, count_paths
from transferd.daemon.plane import Detail, EventType, RailState
from transferd.daemon.topology import Choice
from transferd.daemon.wire import GrantFence

from support.fake_plane import rail
from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from transferd.daemon.peer import Lane, LanePath
    from transferd.daemon.services.admin import Facts
    from transferd.daemon.session import Session

RAILS = 3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "PAUSE_FIRST_S", 0.002)
    monkeypatch.setattr(paths, "PAUSE_MAX_S", 0.01)
    monkeypatch.setattr(paths, "PROVE_S", 0.05)
    monkeypatch.setattr(paths, "TELL_AGAIN_S", 0.005)
    monkeypatch.setattr(paths, "TELL_S", 0.0)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    net = Network()
    yield net
    net.held.clear()
    for host in list(net.hosts.values()):
        await host.aclose()
        host.assert_nothing_left()
        assert not host.plane.conns


@pytest.fixture
def near(network: Network) -> Host:
    return Host(network, 7001, rails=[rail(f"m{i}") for i in range(RAILS)])


@pytest.fixture
def far(network: Network) -> Host:
    return Host(network, 7002, rails=[rail(f"m{i}") for i in range(RAILS)])


async def opened(near: Host, far: Host, session: Session | None = None) -> Any:
    _, descriptor = await far.grant(await far.session())
    (one,) = await near.open(session or await near.session(), descriptor)
    return one


def lose(near: Host, path: LanePath) -> int:
    conn = path.conn
    near.plane.tell(EventType.CONN_LOST, conn)
    return conn


def conns_of(near: Host, one: Any) -> list[int]:
    """Connections of an open's native paths."""
    native = near.plane.sessions[one.session.handle].opens[one.handle]
    return [path.conn for path in native.options.paths]


def states(lane: Lane) -> list[PathState]:
    return [path.state for path in lane.paths]


async def test_broken_path_is_taken_out_alone(network: Network, near: Host, far: Host) -> None:
    one = await opened(near, far)
    far.plane.landed = (9,)
    near.plane.mute.add(1)
    conn = lose(near, one.lane.paths[1])
    await eventually(lambda: conn in near.plane.closed)
    assert near.plane.far_landed[conn] == (9,)
    assert one.live
    assert one.lane.state is LaneState.UP
    assert [path.state for path in one.lane.paths if path.rail != 1] == [PathState.UP] * 2
    assert near.peer(far).state == "CONNECTED"
    assert network.calls["disconnect"] >= 1
    second = await opened(near, far)  # meanwhile: by what is left
    assert second.lane is one.lane
    assert len(conns_of(near, second)) == RAILS - 1


async def test_far_half_goes_before_the_near_one(network: Network, near: Host, far: Host) -> None:
    one = await opened(near, far)
    gate = network.hold("disconnect")
    conn = lose(near, one.lane.paths[0])
    await eventually(lambda: network.calls["disconnect"] == 1)
    await asyncio.sleep(0.01)
    assert conn in near.plane.conns
    assert one.lane.paths[0].state is PathState.CLOSING
    gate.set()
    await eventually(lambda: conn not in near.plane.conns)
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)


async def test_path_comes_back_and_opens_get_it(near: Host, far: Host) -> None:
    one = await opened(near, far)
    near.plane.mute.add(2)
    old = lose(near, one.lane.paths[2])
    await eventually(lambda: one.lane.paths[2].failures >= 3)
    later = await opened(near, far)
    assert old in conns_of(near, one), "nothing that is not proven takes its place"
    near.plane.mute.clear()
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)
    new = one.lane.paths[2].conn
    assert conns_of(near, one)[2] == new
    assert conns_of(near, later)[2] == new, "one more, in an open that was made without"
    assert one.lane.paths[2].failures == 0
    # What was made in vain is gone at both ends.
    assert sorted(near.plane.conns) == sorted(path.conn for path in one.lane.paths)
    await eventually(lambda: len(far.plane.conns) == RAILS)
    lose(near, one.lane.paths[2])
    await eventually(lambda: one.lane.paths[2].conn not in (new, 0))
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)
    assert conns_of(near, later)[2] == conns_of(near, one)[2] == one.lane.paths[2].conn


async def test_paths_that_are_down_are_shown(near: Host, far: Host) -> None:
    one = await opened(near, far)
    near.plane.mute.add(2)
    lose(near, one.lane.paths[2])
    await eventually(lambda: one.lane.paths[2].failures > 0)
    counts = count_paths(near.peers.all())
    assert counts == {0: PathCount(1, 0), 1: PathCount(1, 0), 2: PathCount(0, 1)}
    choice = Choice((), (), (), "", "memory")
    facts = cast("Facts", SimpleNamespace(provider="memory", tls=False, rails=choice))
    snapshot = Snapshot(
        "1",
        facts,
        near.plane,
        near.sessions,
        near.owner,
        near.opener,
        near.peers,
        near.lanes,
        near.staging,
    )
    samples = {
        (sample.labels["rail"], sample.labels["state"]): sample.value
        for metric in snapshot.take()
        if metric.name == "transferd_rail_paths"
        for sample in metric.samples
    }
    assert samples == {
        ("m0", "up"): 1, ("m0", "down"): 0,
        ("m1", "up"): 1, ("m1", "down"): 0,
        ("m2", "up"): 0, ("m2", "down"): 1,
    }  # fmt: skip
    near.plane.rail_becomes(1, RailState.GONE)
    (up,) = [metric for metric in snapshot.take() if metric.name == "transferd_rail_up"]
    assert [sample.value for sample in up.samples] == [1, 0, 1]
    assert paths_text({"paths_up": 3, "paths_down": 1}) == "3 up, 1 down"
    assert paths_text({"paths_up": 3, "paths_down": 0}) == "3 up"


async def test_last_path_ends_the_lane(near: Host, far: Host) -> None:
    one = await opened(near, far)
    near.plane.mute.update(range(RAILS))
    for number in (1, 0):
        lose(near, one.lane.paths[number])
        await eventually(lambda: one.lane.paths[number].failures > 0)  # noqa: B023
    assert one.live
    lose(near, one.lane.paths[2])
    await eventually(lambda: one.quiet is not None and one.quiet.done())
    assert one.lane.state is LaneState.CLOSED
    native = near.plane.sessions[one.session.handle].opens[one.handle]
    assert native.refused is Detail.CONNECTION
    near.plane.mute.clear()
    await eventually(lambda: not near.plane.conns)
    again = await opened(near, far)
    assert again.lane is not one.lane
    assert states(again.lane) == [PathState.UP] * RAILS


async def test_all_paths_at_once(near: Host, far: Host) -> None:
    one = await opened(near, far)
    conns = [lose(near, path) for path in one.lane.paths]
    await eventually(lambda: one.quiet is not None and one.quiet.done())
    assert set(conns) <= near.plane.closed.keys()
    assert near.peer(far).state == "CONNECTED"
    again = await opened(near, far)
    assert again.live


async def test_all_but_one_at_once(near: Host, far: Host) -> None:
    one = await opened(near, far)
    for path in one.lane.paths[1:]:
        lose(near, path)
    await eventually(lambda: one.lane.paths[1].state is not PathState.UP)
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)
    assert one.live


async def test_far_daemon_does_not_answer(network: Network, near: Host, far: Host) -> None:
    """What became of the traffic is unknown then; the far half goes as soon as it can be told."""
    one = await opened(near, far)
    far.plane.landed = (4,)
    near.plane.mute.add(1)
    gate = network.hold("disconnect")
    conn = lose(near, one.lane.paths[1])
    await eventually(lambda: conn in near.plane.closed)
    assert near.plane.far_landed[conn] is None
    assert one.live
    peer = near.peer(far)
    assert conn in peer.untold
    assert conn in far.peer(near).incoming
    gate.set()
    network.held.clear()
    await eventually(lambda: conn not in far.peer(near).incoming)
    await eventually(lambda: conn not in peer.untold)


@pytest.mark.parametrize("answer", [False, True])
async def test_far_daemon_is_slow(
    network: Network, near: Host, far: Host, monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    """It is asked again, and says what it would have said; also if only its answer was lost."""
    monkeypatch.setattr(paths, "TELL_S", 60.0)
    one = await opened(near, far)
    far.plane.landed = (4,)
    near.plane.mute.add(1)
    gate = network.hold("disconnect", answer=answer)
    conn = lose(near, one.lane.paths[1])
    await eventually(lambda: network.calls["disconnect"] >= 2)
    assert conn not in near.plane.closed
    (network.held_answers if answer else network.held).clear()
    gate.set()
    await eventually(lambda: conn in near.plane.closed)
    assert near.plane.far_landed[conn] == (4,)
    assert not near.peer(far).untold


async def unheard(network: Network, near: Host, far: Host) -> tuple[Any, Any]:
    """Breaks a path of which the far daemon cannot be told; gives an open and its grant there."""
    grant, descriptor = await far.grant(await far.session())
    (one,) = await near.open(await near.session(), descriptor)
    near.plane.mute.add(1)
    network.hold("disconnect")
    conn = lose(near, one.lane.paths[1])
    await eventually(lambda: conn in near.plane.closed)
    return one, grant


def let_hear(network: Network) -> None:
    network.held.pop("disconnect").set()


@pytest.mark.slow
@pytest.mark.parametrize("fence", ["revoke", "fence"])
async def test_fence_waits_for_the_far_half(
    network: Network, near: Host, far: Host, fence: str
) -> None:
    """Bytes that were sent before the connection broke may land until the owner has closed it."""
    _, grant = await unheard(network, near, far)
    peer = near.peer(far)

    async def asked() -> None:
        if fence == "revoke":
            await near.opener.revoked(peer, [grant.grant_id])
        else:
            await near.opener.fences.fenced(peer, [GrantFence(grant.grant_id, (range(4),))])

    with pytest.raises(errors.TimedOut):
        await asked()
    let_hear(network)
    await asked()


async def test_grant_is_not_given_back_before(network: Network, near: Host, far: Host) -> None:
    """The owner may give its immediates and memory to others once it has no opener."""
    one, grant = await unheard(network, near, far)
    await near.opener.close(one.session, one.handle)
    await asyncio.sleep(0.02)
    assert grant.openers
    assert not network.calls["release_grants"]
    let_hear(network)
    await eventually(lambda: not grant.openers)


async def test_own_break_while_it_is_made_anew(near: Host, far: Host) -> None:
    one = await opened(near, far)
    near.plane.mute.add(1)
    path = one.lane.paths[1]
    lose(near, path)
    await eventually(lambda: path.state is PathState.CONNECTING and path.conn in near.plane.conns)
    conn = lose(near, path)
    await eventually(lambda: conn in near.plane.closed)
    near.plane.mute.clear()
    await eventually(lambda: path.state is PathState.UP)


@pytest.mark.parametrize("method", ["connect", "disconnect"])
async def test_peer_is_lost_meanwhile(network: Network, near: Host, far: Host, method: str) -> None:
    one = await opened(near, far)
    peer = near.peer(far)
    gate = network.hold(method)
    lose(near, one.lane.paths[1])
    await eventually(lambda: network.calls[method] == (2 if method == "connect" else 1))
    gone = near.peers.lose(peer, "no heartbeat", Detail.HEARTBEAT)
    gate.set()
    await gone
    assert not near.plane.conns
    assert not len(peer.tasks)
    assert near.plane.sessions[one.session.handle].opens[one.handle].refused is Detail.STALE


async def test_peer_is_lost_while_a_path_is_proven(near: Host, far: Host) -> None:
    one = await opened(near, far)
    near.plane.mute.add(0)
    lose(near, one.lane.paths[0])
    await eventually(lambda: one.lane.paths[0].state is PathState.CONNECTING)
    await near.peers.lose(near.peer(far), "no heartbeat", Detail.HEARTBEAT)
    assert not near.plane.conns
    near.plane.tell(EventType.CONN_PROVEN, one.lane.paths[0].conn)
    await asyncio.sleep(0.01)
    assert not near.plane.conns


@pytest.mark.parametrize("method", ["connect", "disconnect"])
async def test_session_ends_meanwhile(network: Network, near: Host, far: Host, method: str) -> None:
    """The path comes back for the others; nobody's open gets lost in it."""
    ending = await near.session()
    one = await opened(near, far, ending)
    stays = await opened(near, far)
    gate = network.hold(method)
    lose(near, one.lane.paths[1])
    await eventually(lambda: network.calls[method] == (2 if method == "connect" else 1))
    await near.end(ending)
    gate.set()
    network.held.clear()
    await eventually(lambda: states(stays.lane) == [PathState.UP] * RAILS)
    assert conns_of(near, stays) == [path.conn for path in stays.lane.paths]


async def test_nobody_left_to_use_it(network: Network, near: Host, far: Host) -> None:
    """A path is made anew for those who have opens; without them the relation may end."""
    session = await near.session()
    one = await opened(near, far, session)
    lane = one.lane
    near.plane.mute.add(1)
    lose(near, lane.paths[1])
    await eventually(lambda: lane.paths[1].failures > 0)
    await near.end(session)
    await eventually(lambda: not lane.paths[1].restoring)
    assert lane.paths[1].state is PathState.DOWN
    calls = network.calls["connect"]
    near.plane.mute.clear()
    await asyncio.sleep(0.03)
    assert network.calls["connect"] == calls
    again = await opened(near, far)
    assert again.lane is lane
    await eventually(lambda: states(lane) == [PathState.UP] * RAILS)
    assert len(conns_of(near, again)) == RAILS


async def test_own_lane_of_a_session_ends_while_a_path_is_down(near: Host, far: Host) -> None:
    session = await near.session()
    near.opener.isolate(session)
    one = await opened(near, far, session)
    near.plane.mute.add(1)
    lose(near, one.lane.paths[1])
    await eventually(lambda: one.lane.paths[1].state is PathState.CONNECTING)
    await near.end(session)
    await eventually(lambda: not near.plane.conns)
    assert one.lane.state is LaneState.CLOSED


async def test_one_rail_breaks_while_a_lane_is_made(
    network: Network, near: Host, far: Host
) -> None:
    gate = network.hold("connect", answer=True)
    opening = asyncio.ensure_future(opened(near, far))
    await eventually(lambda: len(far.plane.conns) == RAILS)
    conn = min(near.plane.conns)
    near.plane.tell(EventType.CONN_LOST, conn)
    await asyncio.sleep(0.01)
    gate.set()
    network.held_answers.clear()
    one = await opening
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)
    assert conn in near.plane.closed
    assert sorted(conns_of(near, one)) == sorted(path.conn for path in one.lane.paths)


async def test_dead_rail_is_left_out_from_the_start(near: Host, far: Host) -> None:
    near.plane.mute.add(1)
    one = await opened(near, far)
    assert len(conns_of(near, one)) == RAILS - 1
    await eventually(lambda: one.lane.paths[1].failures > 0)
    near.plane.mute.clear()
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)
    assert conns_of(near, one)[-1] == one.lane.paths[1].conn


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("state", [RailState.DOWN, RailState.GONE])
async def test_rail_that_is_not_up_is_left_out(
    near: Host, far: Host, state: RailState, *, there: bool
) -> None:
    side = far if there else near
    side.plane.rail_becomes(1, state)
    one = await opened(near, far)
    assert len(conns_of(near, one)) == RAILS - 1
    assert one.lane.paths[1].rail == one.lane.paths[1].remote_rail == 1
    await eventually(lambda: one.lane.paths[1].failures > 1)
    assert len(near.plane.conns) <= RAILS  # the others are left alone
    side.plane.rail_becomes(1, RailState.UP)
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)
    assert conns_of(near, one)[-1] == one.lane.paths[1].conn


@pytest.mark.parametrize("there", [False, True])
async def test_no_rail_is_up(near: Host, far: Host, *, there: bool) -> None:
    side = far if there else near
    for number in range(RAILS):
        side.plane.rail_becomes(number, RailState.DOWN)
    _, descriptor = await far.grant(await far.session())
    with pytest.raises(errors.PeerLost, match="is not up"):
        await near.open(await near.session(), descriptor)
    assert near.peer(far).state == "CONNECTED"
    assert not near.plane.conns
    await eventually(lambda: not far.plane.conns)
    for number in range(RAILS):
        side.plane.rail_becomes(number, RailState.UP)
    assert (await opened(near, far)).live


async def test_no_rail_answers(near: Host, far: Host) -> None:
    near.plane.mute.update(range(RAILS))
    _, descriptor = await far.grant(await far.session())
    with pytest.raises(errors.PeerLost):
        await near.open(await near.session(), descriptor)
    assert near.peer(far).state == "CONNECTED"
    assert not near.plane.conns
    await eventually(lambda: not far.plane.conns)
    near.plane.mute.clear()
    assert (await opened(near, far)).live


async def test_peer_is_lost_while_a_lane_is_proven(near: Host, far: Host) -> None:
    near.plane.mute.add(1)
    opening = asyncio.ensure_future(opened(near, far))
    await eventually(lambda: len(near.plane.conns) == RAILS)
    await asyncio.sleep(0.01)
    await near.peers.lose(near.peer(far), "no heartbeat", Detail.HEARTBEAT)
    assert not near.plane.conns
    with contextlib.suppress(errors.TransferdError):  # unless by a new relation
        await opening


async def test_incoming_half_that_breaks_goes_alone(near: Host, far: Host) -> None:
    """Its writer finds out by the connection, and is told what had landed when it asks."""
    one = await opened(near, far)
    far.plane.landed = (5,)
    incoming = far.peer(near).incoming
    path = one.lane.paths[1]
    half = incoming[path.conn]
    far.plane.tell(EventType.CONN_LOST, half.conn)
    await eventually(lambda: half.conn in far.plane.closed)
    assert len(incoming) == RAILS - 1
    assert far.peer(near).state == near.peer(far).state == "CONNECTED"
    conn = lose(near, path)
    await eventually(lambda: conn in near.plane.closed)
    assert near.plane.far_landed[conn] == (5,)
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)


async def test_relation_with_itself_loses_a_path(near: Host) -> None:
    one = await opened(near, near)
    before = len(near.plane.conns)
    conn = lose(near, one.lane.paths[1])
    await eventually(lambda: conn in near.plane.closed)
    await eventually(lambda: states(one.lane) == [PathState.UP] * RAILS)
    assert one.live
    assert len(near.plane.conns) == before
