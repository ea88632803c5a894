# SPDX-License-Identifier: Apache-2.0
"""Requests for connections that are repeated, replayed, late or wrong: nothing breaks or stays."""

from __future__ import annotations

import asyncio
import errno
import itertools
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from transferd.daemon import errors, owner
from transferd.daemon.plane import Detail, EventType, PlaneError
from transferd.daemon.wire import Half

from support.fake_plane import PROTOCOL, rail
from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from transferd.daemon.peer import Peer

VERBS, TCP, COPIES = "verbs/roce2/1", "tcp/1", "local/2f6a"
TWIN = f"staged/{COPIES}"


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    net = Network()
    yield net
    for host in list(net.hosts.values()):
        await host.aclose()
        host.assert_nothing_left()
        assert not host.plane.conns


@pytest.fixture
def near(network: Network) -> Host:
    return Host(network, 7001)


@pytest.fixture
def far(network: Network) -> Host:
    return Host(
        network,
        7002,
        rails=[rail("m0"), rail("m1"), rail("local", COPIES), rail("staged/local", TWIN)],
    )


@pytest.fixture
async def peer(near: Host, far: Host) -> Peer:
    """What far knows of near; they have no connection yet."""
    await near.peers.ensure(far.key, far.address)
    return far.peer(near)


def half(number: int, *, address: bytes = b"there", to: int = 0, speaks: str = PROTOCOL) -> Half:
    return Half(number, to, speaks, address)


async def ask(far: Host, peer: Peer, *halves: Half) -> list[bytes]:
    """Asks as the gRPC service does."""
    return await peer.tasks.run(far.owner.connect(peer, halves), "connect")


def reason(error: pytest.ExceptionInfo[errors.TransferdError]) -> str:
    return error.value.reason


# ---- repeated ----


async def test_asked_again_it_is_answered_as_before(far: Host, peer: Peer) -> None:
    first = await ask(far, peer, half(1), half(2, to=1))
    assert await ask(far, peer, half(1), half(2, to=1)) == first
    assert await ask(far, peer, half(2, to=1), half(3)) != first
    assert len(far.plane.conns) == len(peer.incoming) == 3
    assert not far.plane.closed


async def test_asked_twice_at_once_it_is_made_once(far: Host, peer: Peer) -> None:
    one, two = await asyncio.gather(ask(far, peer, half(1)), ask(far, peer, half(1)))
    assert one == two
    assert len(far.plane.conns) == 1


@pytest.mark.parametrize("other", [half(1, address=b"elsewhere"), half(1, to=1)])
async def test_a_number_that_is_taken_leaves_what_stands(
    far: Host, peer: Peer, other: Half
) -> None:
    await ask(far, peer, half(1))
    with pytest.raises(errors.Conflict) as caught:
        await ask(far, peer, half(2), other)
    assert reason(caught) == "CONNECTION_EXISTS"
    assert list(peer.incoming) == [1]
    assert len(far.plane.conns) == 1


async def test_lost_answer_leaves_nothing(network: Network, near: Host, far: Host) -> None:
    _, descriptor = await far.grant(await far.session())
    sender = await near.session()
    gate = network.hold("connect", answer=True)
    with pytest.raises(errors.TimedOut):
        await near.open(sender, descriptor)
    gate.set()
    network.held_answers.clear()
    await eventually(lambda: not near.plane.conns and not far.plane.conns)
    assert (await near.open(sender, descriptor))[0].live
    assert near.peer(far).state == "CONNECTED"


# ---- replayed ----


async def test_a_number_is_used_once(far: Host, peer: Peer) -> None:
    await ask(far, peer, half(1))
    await far.owner.disconnect(peer, [1])
    with pytest.raises(errors.Conflict) as caught:
        await ask(far, peer, half(2), half(1))
    assert reason(caught) == "CONNECTION_OVER"
    assert not peer.incoming
    assert not far.plane.conns


async def test_one_that_broke_is_not_made_again(far: Host, peer: Peer) -> None:
    await ask(far, peer, half(1))
    far.plane.tell(EventType.CONN_LOST, peer.incoming[1].conn)
    await eventually(lambda: not far.plane.conns)
    with pytest.raises(errors.Conflict, match="is over"):
        await ask(far, peer, half(1))


async def test_disconnect_that_overtakes_its_connect(
    far: Host, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, make = asyncio.Event(), far.plane.conn_open

    async def slow(rail: int, peer: int, *, outgoing: bool) -> tuple[int, bytes]:
        await gate.wait()
        return await make(rail, peer, outgoing=outgoing)

    monkeypatch.setattr(far.plane, "conn_open", slow)
    asking = asyncio.ensure_future(ask(far, peer, half(1)))
    await eventually(peer.connecting.locked)
    assert await far.owner.disconnect(peer, [1]) == [None]
    gate.set()
    with pytest.raises(errors.Conflict) as caught:
        await asking
    assert reason(caught) == "CONNECTION_OVER"
    await eventually(lambda: not far.plane.conns)


async def test_one_that_breaks_while_others_are_made(
    far: Host, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, starts = far.plane.conn_start, itertools.count()

    async def breaking(conn: int, address: bytes) -> None:
        if next(starts) == 1:
            far.owner.conn_lost(peer.incoming[1].conn, 0)
        await start(conn, address)

    monkeypatch.setattr(far.plane, "conn_start", breaking)
    with pytest.raises(errors.Conflict, match="connection 1 of"):
        await ask(far, peer, half(1), half(2))
    await eventually(lambda: not far.plane.conns)
    assert not peer.incoming


async def test_numbers_are_forgotten_in_the_end(
    far: Host, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "SPENT_KEPT", 3)
    await far.owner.disconnect(peer, list(range(10)))
    assert list(peer.spent) == [7, 8, 9]


async def test_of_a_relation_that_is_over(network: Network, near: Host, far: Host) -> None:
    await near.peers.ensure(far.key, far.address)
    link = near.peer(far).link
    gate = network.hold("connect")
    asking = asyncio.ensure_future(link.connect(far.key.boot_epoch, [half(1)]))
    await eventually(lambda: network.calls["connect"] == 1)
    far.die()
    again = Host(network, 7002)
    network.dead.clear()
    gate.set()
    with pytest.raises(errors.StalePeer):
        await asking
    assert not again.plane.conns
    assert near.peers.table.get(far.key) is None, "it has heard that the other has restarted"
    await far.aclose()


async def test_a_peer_that_is_lost_meanwhile(
    far: Host, peer: Peer, near: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, make = asyncio.Event(), far.plane.conn_open

    async def slow(rail: int, peer: int, *, outgoing: bool) -> tuple[int, bytes]:
        made = await make(rail, peer, outgoing=outgoing)
        await gate.wait()
        return made

    monkeypatch.setattr(far.plane, "conn_open", slow)
    asking = [asyncio.ensure_future(ask(far, peer, half(number))) for number in (1, 2)]
    await eventually(lambda: len(far.plane.conns) == 1)
    gone = far.peers.lose(peer, "no heartbeat", Detail.HEARTBEAT)
    gate.set()
    for one in asking:
        with pytest.raises(errors.PeerLost):
            await one
    await gone
    assert not far.plane.conns


# ---- wrong ----


@pytest.mark.parametrize(
    ("bad", "field", "said", "word"),
    [
        (half(1), "connections[1].connection_id", "1 is there twice", "INVALID_REQUEST"),
        (half(2, to=4), "connections[1].callee_rail", "has 4", "PROTOCOL_MISMATCH"),
        (
            half(2, to=2, speaks=COPIES),
            "connections[1].callee_rail",
            "rail 2 copies within this daemon",
            "INVALID_REQUEST",
        ),
        (
            half(2, to=3, speaks=TWIN),
            "connections[1].callee_rail",
            "rail 3 copies within this daemon",
            "INVALID_REQUEST",
        ),
        (half(2, to=1 << 31), "connections[1].callee_rail", "no rail 2147", "PROTOCOL_MISMATCH"),
        (half(2, speaks=VERBS), "connections[1].protocol", VERBS, "PROTOCOL_MISMATCH"),
        (half(2, speaks=""), "connections[1].protocol", PROTOCOL, "PROTOCOL_MISMATCH"),
        (half(2, address=b""), "connections[1].address", "0 bytes", "INVALID_REQUEST"),
        (half(2, address=bytes(257)), "connections[1].address", "257 bytes", "INVALID_REQUEST"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_made(
    far: Host, peer: Peer, bad: Half, field: str, said: str, word: str
) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        await ask(far, peer, half(1), bad)
    assert (caught.value.field, reason(caught)) == (field, word)
    assert said in caught.value.problem
    assert not far.plane.conns
    assert not far.plane.closed


async def test_an_address_that_is_none_takes_the_others_along(
    far: Host, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = far.plane.conn_start

    async def reading(conn: int, address: bytes) -> None:
        if address == b"nonsense":
            raise PlaneError(errno.EPROTO, "not an address of a verbs rail")
        await start(conn, address)

    monkeypatch.setattr(far.plane, "conn_start", reading)
    with pytest.raises(errors.InvalidRequest, match="not an address") as caught:
        await ask(far, peer, half(1), half(2, address=b"nonsense"))
    assert reason(caught) == "PROTOCOL_MISMATCH"
    assert not peer.incoming
    await eventually(lambda: not far.plane.conns)


async def test_an_answer_that_is_no_address(
    near: Host, far: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(conn: int, address: bytes) -> None:
        raise PlaneError(errno.EPROTO, "not an address of a verbs rail")

    monkeypatch.setattr(near.plane, "conn_start", refuse)
    _, descriptor = await far.grant(await far.session())
    with pytest.raises(errors.Conflict, match="not an address") as caught:
        await near.open(await near.session(), descriptor)
    assert reason(caught) == "PROTOCOL_MISMATCH"
    await eventually(lambda: not near.plane.conns and not far.plane.conns)


async def test_there_is_an_end_of_connections(
    far: Host, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "CONNECTIONS_PER_PEER", 3)
    await ask(far, peer, half(1), half(2))
    with pytest.raises(errors.QuotaExceeded) as caught:
        await ask(far, peer, half(3), half(4))
    assert reason(caught) == "CONNECTIONS"
    assert len(far.plane.conns) == 2
    await ask(far, peer, half(1), half(2), half(3))  # two of them stand already


# ---- both at once, and not the same fabric ----


async def test_both_sides_connect_at_once(near: Host, far: Host) -> None:
    sides = []
    for one, other in ((near, far), (far, near)):
        _, descriptor = await other.grant(await other.session())
        sides.append(one.open(await one.session(), descriptor))
    (there,), (back,) = await asyncio.gather(*sides)
    assert there.live
    assert back.live
    assert len(near.peers.table) == len(far.peers.table) == 1
    assert len(near.plane.conns) == len(far.plane.conns) == 4  # 2 rails there: 2 paths each way


@pytest.mark.parametrize("greeter", ["verbs", "tcp"])
async def test_another_fabric_is_refused_by_name_at_both_sides(
    network: Network, greeter: str
) -> None:
    by_name = {
        "verbs": Host(network, 7011, rails=[rail(protocol=VERBS), rail("local", "local/1")]),
        "tcp": Host(network, 7012, rails=[rail(protocol=TCP), rail("local", "local/2")]),
    }
    greeting = by_name.pop(greeter)
    (greeted,) = by_name.values()
    _, descriptor = await greeted.grant(await greeted.session())
    with capture_logs() as logs, pytest.raises(errors.Conflict) as caught:
        await greeting.open(await greeting.session(), descriptor)
    assert reason(caught) == "PROTOCOL_MISMATCH"
    message = caught.value.message
    assert f"127.0.0.1:7011 speaks ['{VERBS}']" in message
    assert f"127.0.0.1:7012 speaks ['{TCP}']" in message
    told = {log["peer"] for log in logs if log["event"] == "peer refused"}
    assert told == {greeting.address, greeted.address}
    assert not len(greeting.peers.table)
    assert not len(greeted.peers.table)
