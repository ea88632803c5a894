# SPDX-License-Identifier: Apache-2.0
"""Races between daemons: the real control plane, fake data planes, a network that can be held."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from transferd.daemon import errors
from transferd.daemon.descriptor import PeerKey, Sealer
from transferd.daemon.plane import Detail, EventType
from transferd.daemon.wire import Loss

from support.fake_plane import rail
from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from transferd.daemon.plane import Landed


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    net = Network()
    yield net
    for host in list(net.hosts.values()):
        await host.aclose()
        host.assert_nothing_left()


@pytest.fixture
def near(network: Network) -> Host:
    return Host(network, 7001)


@pytest.fixture
def far(network: Network) -> Host:
    return Host(network, 7002)


async def test_one_opening_serves_all_sessions(network: Network, near: Host, far: Host) -> None:
    _, descriptor = await far.grant(await far.session())
    sessions = [await near.session() for _ in range(3)]
    opens = await asyncio.gather(*(near.open(one, descriptor, descriptor) for one in sessions))
    assert network.calls["hello"] == 1
    assert network.calls["open_grants"] == 1
    assert network.calls["connect"] == 1
    assert all(first is second for first, second in opens)
    assert len({first.handle for first, _ in opens}) == 3


async def test_open_has_what_the_owner_granted(near: Host, far: Host) -> None:
    receiver = await far.session()
    grant, descriptor = await far.grant(receiver, imms=7)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    options = near.plane.sessions[sender.handle].opens[opened.handle].options
    assert (options.length, options.rights, options.imm_count) == (65_536, 1, 7)
    assert options.name_space == far.plane.session_name_space(receiver.handle)
    assert (
        options.paths[0].key == far.plane.region_keys(receiver.handle, grant.region.handle)[0].key
    )


async def test_own_daemon_is_reached_without_a_call(network: Network, near: Host) -> None:
    grant, descriptor = await near.grant(await near.session())
    sender = await near.session()
    await near.open(sender, descriptor)
    assert not network.calls
    assert len(near.plane.conns) == 2
    await near.owner.end_grants([grant])
    opens = near.plane.sessions[sender.handle].opens
    assert [one.refused for one in opens.values()] == [Detail.REVOKED]


async def test_forged_while_the_true_one_is_open(near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session())
    sender = await near.session()
    await near.open(sender, descriptor)
    forged = Sealer(far.key, far.address, b"a guess").seal(grant.grant_id)
    for session in (sender, await near.session()):
        with pytest.raises(errors.AccessDenied) as caught:
            await near.open(session, forged)
        assert caught.value.reason == "DESCRIPTOR_FORGED"


async def test_forged_and_true_at_once(network: Network, near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session())
    forged = Sealer(far.key, far.address, b"a guess").seal(grant.grant_id)
    liar, honest = await near.session(), await near.session()
    gate = network.hold("open_grants")
    bad = asyncio.ensure_future(near.open(liar, forged))
    await eventually(lambda: network.calls["open_grants"] == 1)
    good = asyncio.ensure_future(near.open(honest, descriptor))
    await asyncio.sleep(0.01)
    gate.set()
    with pytest.raises(errors.AccessDenied):
        await bad
    assert len(await good) == 1


async def test_revoke_overtakes_the_answer_to_an_open(
    network: Network, near: Host, far: Host
) -> None:
    grant, descriptor = await far.grant(await far.session())
    sender = await near.session()
    gate = network.hold("open_grants", answer=True)
    opening = asyncio.ensure_future(near.open(sender, descriptor))
    await eventually(lambda: bool(grant.openers))
    await far.owner.end_grants([grant])
    gate.set()
    with pytest.raises(errors.Conflict) as caught:
        await opening
    assert caught.value.reason == "GRANT_REVOKED"
    assert not sender.opens


async def test_open_during_a_revoke_is_refused(network: Network, near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session())
    await near.open(await near.session(), descriptor)
    gate = network.hold("revoke_grants")
    ending = asyncio.ensure_future(far.owner.end_grants([grant]))
    await eventually(lambda: network.calls["revoke_grants"] == 1)
    third = Host(network, 7003)
    with pytest.raises(errors.Conflict):
        await third.open(await third.session(), descriptor)
    again = asyncio.ensure_future(far.owner.end_grants([grant]))
    await asyncio.sleep(0.01)
    assert not again.done(), "the second revoke must not answer before the fence stands"
    gate.set()
    await asyncio.gather(ending, again)
    assert network.calls["revoke_grants"] == 1


async def test_revoke_waits_for_the_last_byte(near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session())
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    near.plane.busy_opens.add(opened.handle)
    ending = asyncio.ensure_future(far.owner.end_grants([grant]))
    await eventually(lambda: opened.quiet is not None)
    await asyncio.sleep(0.02)
    assert not ending.done()
    near.plane.make_quiet(sender.handle, opened.handle)
    await ending
    assert near.peer(far).state == "CONNECTED"


async def test_deaf_opener_is_lost_and_cannot_come_back(
    network: Network, near: Host, far: Host
) -> None:
    """The owner cuts it off; with what it still believes to have open it can do nothing."""
    receiver = await far.session()
    grant, descriptor = await far.grant(receiver)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    network.hold("revoke_grants")
    await far.owner.end_grants([grant])
    assert not [conn for conn, outgoing in far.plane.conns.items() if not outgoing]
    assert far.faults(receiver, 0) == 1
    near.plane.tell(EventType.CONN_LOST, opened.lane.paths[0].conn)
    await eventually(lambda: not opened.live)
    network.held.clear()

    async def open_again() -> None:
        for _ in range(100):  # while both find out that the relation is over
            with contextlib.suppress(errors.PeerLost):
                await near.open(sender, descriptor)
            await asyncio.sleep(0.01)

    with pytest.raises(errors.Conflict) as caught:
        await open_again()
    assert caught.value.reason == "GRANT_REVOKED"


async def test_both_greet_at_once(network: Network, near: Host, far: Host) -> None:
    _, there = await far.grant(await far.session())
    _, here = await near.grant(await near.session())
    gate = network.hold("hello")
    one = asyncio.ensure_future(near.open(await near.session(), there))
    two = asyncio.ensure_future(far.open(await far.session(), here))
    await eventually(lambda: network.calls["hello"] == 2)
    gate.set()
    await asyncio.gather(one, two)
    a, b = near.peer(far), far.peer(near)
    assert (a.own_token, a.their_token) == (b.their_token, b.own_token)
    assert near.plane.watches == {a.watch: (a.their_token, a.own_token)}
    assert far.plane.watches == {b.watch: (b.their_token, b.own_token)}
    assert not near.peers.table.losses
    assert not far.peers.table.losses


async def test_restarted_while_an_open_is_in_flight(
    network: Network, near: Host, far: Host
) -> None:
    _, old = await far.grant(await far.session())
    sender = await near.session()
    gate = network.hold("open_grants")
    opening = asyncio.ensure_future(near.open(sender, old))
    await eventually(lambda: network.calls["open_grants"] == 1)
    far.die()
    reborn = Host(network, 7002)
    network.dead.clear()
    gate.set()
    with pytest.raises(errors.StaleDescriptor):
        await opening
    _, fresh = await reborn.grant(await reborn.session())
    assert len(await near.open(sender, fresh)) == 1
    assert near.peers.table.get(far.key) is None


async def test_fresh_descriptor_ends_the_old_relation_at_once(
    network: Network, near: Host, far: Host
) -> None:
    """No heartbeat has to be missed first, and jobs by the old handle are told STALE."""
    _, old = await far.grant(await far.session())
    sender = await near.session()
    (stale,) = await near.open(sender, old)
    far.die()
    reborn = Host(network, 7002)
    network.dead.clear()
    _, fresh = await reborn.grant(await reborn.session())
    await near.open(sender, fresh)
    assert near.peers.table.get(far.key) is None
    await eventually(
        lambda: near.plane.sessions[sender.handle].opens[stale.handle].refused is Detail.STALE
    )


async def test_silence_closes_connections_before_it_faults(near: Host, far: Host) -> None:
    receiver = await far.session()
    _, descriptor = await far.grant(receiver)
    await near.open(await near.session(), descriptor)
    relation = far.peer(near)
    order: list[str] = []
    close, fault = far.plane.conn_close, far.plane.counters_fault

    async def closing(conn: int, detail: int, far_landed: Landed | None = None) -> Landed | None:
        await asyncio.sleep(0.01)
        landed = await close(conn, detail, far_landed)
        order.append("closed")
        return landed

    def faulting(
        session: int, first: int, count: int, lost: int, units: int = 0, peer: int = 0
    ) -> None:
        fault(session, first, count, lost, units, peer)
        order.append("faulted")

    far.plane.conn_close = closing  # type: ignore[method-assign]
    far.plane.counters_fault = faulting  # type: ignore[method-assign]
    far.plane.tell(EventType.PEER_SILENT, relation.watch)
    await eventually(lambda: len(order) == 2)
    assert order == ["closed", "faulted"]


async def test_forgotten_by_one_side_only(network: Network, near: Host, far: Host) -> None:
    """One side missed heartbeats, the other did not: the next contact makes both begin anew."""
    receiver = await far.session()
    _, descriptor = await far.grant(receiver)
    sender = await near.session()
    (before,) = await near.open(sender, descriptor)
    near.plane.tell(EventType.PEER_SILENT, near.peer(far).watch)
    await eventually(lambda: near.peers.table.get(far.key) is None)
    old = far.peer(near)
    (after,) = await near.open(sender, descriptor)
    assert after.handle != before.handle
    assert old.is_lost
    assert old.gone is not None
    await old.gone
    assert far.faults(receiver, 0) == 1
    assert len([1 for outgoing in far.plane.conns.values() if not outgoing]) == 1


async def test_hello_for_another_changes_nothing(near: Host, far: Host) -> None:
    """A damaged or old descriptor of one client must not disturb the relation of all."""
    _, descriptor = await far.grant(await far.session())
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    for wrong in (
        PeerKey(far.key.daemon_id, b"e" * 16),
        PeerKey(b"d" * 16, far.key.boot_epoch),
        PeerKey(b"d" * 16, b"e" * 16),
    ):
        with pytest.raises(errors.StaleDescriptor):
            await near.open(sender, Sealer(wrong, far.address, b"").seal(1))
    assert opened.live
    assert far.peer(near).state == "CONNECTED"
    assert near.peer(far).state == "CONNECTED"


async def test_session_ends_while_it_opens(network: Network, near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session())
    sender = await near.session()
    gate = network.hold("open_grants", answer=True)
    opening = asyncio.ensure_future(near.open(sender, descriptor))
    await eventually(lambda: bool(grant.openers))
    ending = asyncio.ensure_future(near.end(sender, clean=False))
    await asyncio.sleep(0.01)
    gate.set()
    with pytest.raises(errors.Unauthenticated):
        await opening
    await ending
    await eventually(lambda: not grant.openers)
    near.assert_nothing_left()


async def test_caller_goes_away_while_it_opens(network: Network, near: Host, far: Host) -> None:
    """The call is cancelled, the work is not: the session finds the grant open next time."""
    _, descriptor = await far.grant(await far.session())
    sender = await near.session()
    gate = network.hold("connect")
    opening = asyncio.ensure_future(near.open(sender, descriptor))
    await eventually(lambda: network.calls["connect"] == 1)
    opening.cancel()
    gate.set()
    await eventually(lambda: descriptor in sender.by_descriptor)
    await near.end(sender)
    near.assert_nothing_left()


async def test_unclean_end_faults_clean_end_does_not(near: Host, far: Host) -> None:
    receiver = await far.session()
    grant, descriptor = await far.grant(receiver)
    clean, dead = await near.session(), await near.session()
    await near.open(clean, descriptor)
    await near.end(clean, clean=True)
    assert (far.faults(receiver, 0), grant.openers) == (0, {})
    await near.open(dead, descriptor)
    await near.end(dead, clean=False)
    assert [far.faults(receiver, imm) for imm in range(4)] == [1, 1, 1, 1]
    assert not grant.openers


async def test_unclean_end_of_one_of_two_users(near: Host, far: Host) -> None:
    receiver = await far.session()
    grant, descriptor = await far.grant(receiver)
    dead, alive = await near.session(), await near.session()
    await near.open(dead, descriptor)
    (opened,) = await near.open(alive, descriptor)
    await near.end(dead, clean=False)
    await eventually(lambda: far.faults(receiver, 3) == 1)
    assert opened.live
    assert grant.openers


async def test_release_is_repeated_until_heard(network: Network, near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session())
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    network.hold("release_grants")
    await near.opener.close(sender, opened.handle)
    await eventually(lambda: network.calls["release_grants"] >= 2)
    assert grant.openers
    network.held.clear()
    await eventually(lambda: not grant.openers)


async def test_reopened_while_it_is_given_back(network: Network, near: Host, far: Host) -> None:
    """The release must not overtake the new opening: the owner has to know every opener."""
    grant, descriptor = await far.grant(await far.session())
    sender = await near.session()
    (first,) = await near.open(sender, descriptor)
    gate = network.hold("release_grants", answer=True)
    await near.opener.close(sender, first.handle)
    opening = asyncio.ensure_future(near.open(sender, descriptor))
    await asyncio.sleep(0.01)
    assert not opening.done()
    gate.set()
    (second,) = await opening
    assert second.live
    assert grant.openers


async def test_losses_are_told(near: Host, far: Host) -> None:
    receiver = await far.session()
    _, descriptor = await far.grant(receiver)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    for imm, count in ((1, 2), (1, 1), (2, 0), (9, 5)):  # 9 is not in the grant
        near.plane.tell(EventType.LOST, opened.handle, session=sender.handle, imm=imm, count=count)
    await eventually(lambda: far.faults(receiver, 2) > 0)
    state = far.plane.counter_read(receiver.handle, 1)
    assert state.lost == 3
    assert far.plane.counter_read(receiver.handle, 2).lost == 0
    assert far.faults(receiver, 0) == 0


async def test_units_are_told_once(near: Host, far: Host) -> None:
    receiver = await far.session()
    _, descriptor = await far.grant(receiver)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    taken: list[tuple[int, int, int]] = []
    fault = far.plane.counters_fault

    def faulting(
        session: int, first: int, count: int, lost: int, units: int = 0, peer: int = 0
    ) -> None:
        fault(session, first, count, lost, units, peer)
        taken.append((lost, units, peer))

    far.plane.counters_fault = faulting  # type: ignore[method-assign]
    for units in (4, 12):
        near.plane.tell(
            EventType.LOST, opened.handle, session=sender.handle, imm=1, count=1, units=units
        )
    await eventually(lambda: bool(taken))
    assert taken == [(2, 16, far.peer(near).number)]
    # Its answer was lost, and it comes again.
    far.owner.report_loss(far.peer(near), 1, [Loss(opened.grant.grant_id, 1, 2, 16)])
    assert len(taken) == 1


async def test_what_landed_is_handed_to_the_writer(near: Host, far: Host) -> None:
    _, descriptor = await far.grant(await far.session())
    (opened,) = await near.open(await near.session(), descriptor)
    far.plane.landed = (7, 0, 2)
    conn = opened.lane.paths[0].conn
    near.plane.tell(EventType.CONN_LOST, conn)
    await eventually(lambda: conn in near.plane.closed)
    assert near.plane.far_landed[conn] == (7, 0, 2)


async def test_broken_connection_is_replaced(near: Host, far: Host) -> None:
    _, descriptor = await far.grant(await far.session())
    sender, other = await near.session(), await near.session()
    (before,) = await near.open(sender, descriptor)
    await near.open(other, descriptor)
    conn = before.lane.paths[0].conn
    near.plane.tell(EventType.CONN_LOST, conn)
    await eventually(lambda: before.quiet is not None and before.quiet.done())
    assert near.plane.closed[conn] == Detail.CONNECTION
    assert near.plane.sessions[sender.handle].opens[before.handle].refused is Detail.CONNECTION
    (after,) = await near.open(sender, descriptor)
    assert after.lane.paths[0].conn != conn
    assert near.peer(far).state == "CONNECTED"
    incoming = [conn for conn, outgoing in far.plane.conns.items() if not outgoing]
    assert len(incoming) == 1, "the other half of the broken connection must be gone"


async def test_far_half_goes_first(network: Network, near: Host, far: Host) -> None:
    """What was sent may still arrive: a job may end only when the receiver has closed its half."""
    _, descriptor = await far.grant(await far.session())
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    conn = opened.lane.paths[0].conn
    gate = network.hold("disconnect")
    near.plane.tell(EventType.CONN_LOST, conn)
    await eventually(lambda: network.calls["disconnect"] == 1)
    await asyncio.sleep(0.01)
    assert conn in near.plane.conns
    gate.set()
    await eventually(lambda: conn not in near.plane.conns)


async def test_connection_breaks_while_it_is_made(network: Network, near: Host, far: Host) -> None:
    _, descriptor = await far.grant(await far.session())
    sender = await near.session()
    gate = network.hold("connect", answer=True)
    opening = asyncio.ensure_future(near.open(sender, descriptor))
    await eventually(lambda: bool(far.plane.conns))
    (conn,) = near.plane.conns
    near.plane.tell(EventType.CONN_LOST, conn)
    await asyncio.sleep(0.01)
    gate.set()
    (opened,) = await opening  # by the next attempt
    assert conn in near.plane.closed
    assert opened.lane.paths[0].conn in near.plane.conns


async def test_dead_peer_is_found_by_its_broken_connection(
    network: Network, near: Host, far: Host
) -> None:
    _, descriptor = await far.grant(await far.session())
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    far.die()
    near.plane.tell(EventType.CONN_LOST, opened.lane.paths[0].conn)
    await eventually(lambda: near.peers.table.get(far.key) is None)
    await eventually(lambda: not near.plane.conns)
    with pytest.raises(errors.PeerLost) as caught:
        await near.open(sender, descriptor)
    assert caught.value.reason == "PEER_UNREACHABLE"


async def test_expiry_is_a_fence(near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session(), expires_ms=240)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    options = near.plane.sessions[sender.handle].opens[opened.handle].options
    assert options.expires_ns <= grant.expires_ns
    await eventually(lambda: far.owner.grants.get(grant.grant_id) is None)
    assert near.plane.sessions[sender.handle].opens[opened.handle].refused is Detail.EXPIRED
    with pytest.raises(errors.Conflict) as caught:
        await near.open(sender, descriptor)
    assert caught.value.reason == "GRANT_EXPIRED"


async def test_memory_that_may_vanish_has_connections_of_its_own(near: Host, far: Host) -> None:
    receiver, sender = await far.session(), await near.session()
    _, sealed = await far.grant(receiver)
    grant, unsealed = await far.grant(receiver, sealed=False)
    common, own = await near.open(sender, sealed, unsealed)
    assert common.lane is not own.lane
    assert len(near.plane.conns) == 2
    await far.owner.end_grants([grant])
    await eventually(lambda: len(near.plane.conns) == 1)
    assert common.live


async def test_source_that_may_vanish_leaves_the_shared_connections(near: Host, far: Host) -> None:
    _, descriptor = await far.grant(await far.session())
    sender, other = await near.session(), await near.session()
    (shared,) = await near.open(sender, descriptor)
    (others,) = await near.open(other, descriptor)
    near.opener.isolate(sender)
    assert not shared.live
    (own,) = await near.open(sender, descriptor)
    assert own.lane is not others.lane
    assert others.live
    await near.end(sender)
    await eventually(lambda: len(near.plane.conns) == 1)


async def test_different_fabrics_are_refused_loudly(network: Network) -> None:
    a = Host(network, 7011, rails=[rail(protocol="libfabric/tcp/1.17")])
    b = Host(network, 7012, rails=[rail(protocol="libfabric/tcp/2.1")])
    _, descriptor = await b.grant(await b.session())
    with pytest.raises(errors.Conflict) as caught:
        await a.open(await a.session(), descriptor)
    assert caught.value.reason == "PROTOCOL_MISMATCH"
    assert "1.17" in caught.value.message


async def test_region_is_gone_when_deregister_answers(
    network: Network, near: Host, far: Host
) -> None:
    receiver = await far.session()
    grant, descriptor = await far.grant(receiver)
    sender = await near.session()
    await near.open(sender, descriptor)
    region = grant.region
    gate = network.hold("revoke_grants")
    work = far.sessions.deregister(receiver, region.handle)
    ending = asyncio.ensure_future(receiver.ops.run(work, "deregister"))
    await eventually(lambda: region.state == "ZOMBIE")
    await asyncio.sleep(0.01)
    assert region.handle in far.plane.sessions[receiver.handle].regions
    gate.set()
    await ending
    assert not far.plane.sessions[receiver.handle].regions
    assert not receiver.memories


async def test_a_thousand_sessions_leave_nothing(near: Host, far: Host) -> None:
    receiver = await far.session()
    _, descriptor = await far.grant(receiver)
    for i in range(300):
        sender = await near.session()
        _, back = await near.grant(sender)
        await near.open(sender, descriptor)
        await far.open(receiver, back)
        await near.end(sender, clean=i % 2 == 0)
        assert not near.plane.sessions
    near.assert_nothing_left()
    assert len(near.plane.conns) == 2
    assert len(near.peers.table) == len(far.peers.table) == 1


async def test_one_caller_cannot_greet_the_whole_net(network: Network, near: Host) -> None:
    sender = await near.session()
    gate = network.hold("hello")
    wrong = [
        Sealer(PeerKey(bytes([i]) * 16, bytes(16)), f"127.0.0.1:{8000 + i}", b"").seal(1)
        for i in range(60)
    ]
    opening = asyncio.ensure_future(near.open(sender, *wrong))
    await eventually(lambda: network.calls["hello"] == 16)
    await asyncio.sleep(0.02)
    assert network.calls["hello"] == 16
    gate.set()
    with pytest.raises(errors.PeerLost):
        await opening
    assert not len(near.peers.table)


async def test_other_hosts_are_not_spoken_to_without_keys(network: Network, near: Host) -> None:
    far_away = Sealer(PeerKey(b"d" * 16, b"e" * 16), "192.0.2.1:7471", b"").seal(1)
    with pytest.raises(errors.AccessDenied) as caught:
        await near.open(await near.session(), far_away)
    assert caught.value.reason == "DEVELOPMENT_MODE"
    assert not network.calls
