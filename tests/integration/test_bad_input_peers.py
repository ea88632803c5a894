# SPDX-License-Identifier: Apache-2.0
"""Peers that ask for connections, or answer such requests, with what makes no sense.

Daemons authenticate each other; a broken one of them still must not take another along.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transferd
from transferd.peer.v1 import peer_pb2 as pb
from transferd.v1 import admin_pb2, admin_pb2_grpc

from support.bystander import Bystander
from support.strange_peer import StrangePeer
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

GARBAGE = bytes(range(64))


@pytest.fixture(scope="module", autouse=True)
def bystander(shared_pair: Pair) -> Iterator[Bystander]:
    """Work of the same daemons, which goes on all the while."""
    with Bystander(*shared_pair) as bystander:
        yield bystander


@pytest.fixture
def peer(shared_pair: Pair) -> Iterator[StrangePeer]:
    """Troubles the first daemon."""
    with StrangePeer(shared_pair[0]) as peer:
        yield peer


@pytest.fixture
def sender(shared_pair: Pair) -> Iterator[transferd.Client]:
    with transferd.Client(shared_pair[0].socket) as client:
        yield client


def connections(daemon: DaemonProcess, peer: StrangePeer) -> int:
    """Counts those that a daemon has with the strange peer."""
    with daemon.channel() as channel:
        stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
        peers = stub.ListPeers(admin_pb2.ListPeersRequest(), timeout=5).peers
    return sum(each.connections for each in peers if each.daemon_id == peer.key.daemon_id)


def refusal(call: Any, *arguments: Any, **fields: Any) -> tuple[grpc.StatusCode, str]:
    """Makes a call that has to be refused; tells how."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **fields)
    error: Any = caught.value
    return error.code(), error.details()


def used(sender: transferd.Client, peer: StrangePeer) -> transferd.TransferdError:
    """Uses the strange peer's descriptor; tells how that failed."""
    with pytest.raises(transferd.TransferdError) as caught:
        sender.imm(peer.descriptor, 1).wait(WAIT_S)
    return caught.value


@pytest.fixture
def address(peer: StrangePeer, sender: transferd.Client) -> bytes:
    """The address of a half of the daemon's own provider, which can be told to it again."""
    peer.addresses = []
    used(sender, peer)
    return peer.connects[0].connections[0].address


# ---- what it asks ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"daemon_id": b""}, "daemon_id: is not 16 bytes"),
        ({"boot_epoch": bytes(17)}, "boot_epoch: is not 16 bytes"),
        ({"address": "nowhere"}, "address: write host:port"),
        ({"rail_protocols": []}, "rail_protocols: 0 of them; send 1 to 64"),
        ({"rail_protocols": ["x"] * 65}, "rail_protocols: 65 of them; send 1 to 64"),
        ({"rail_protocols": ["x" * 64]}, "rail_protocols[0]: has 64 bytes"),
        ({"rail_protocols": [""]}, "rail_protocols[0]: has 0 bytes"),
        ({"heartbeat_token": b"short"}, "heartbeat_token: is not 16 bytes"),
        ({"heartbeat_port": 70_000}, "heartbeat_port: 70000 is no port"),
    ],
)
def test_introductions_that_make_no_sense(
    peer: StrangePeer, changes: dict[str, Any], said: str
) -> None:
    code, details = refusal(peer.greet, **changes)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in details


def test_another_fabric_is_refused_by_name(shared_pair: Pair, peer: StrangePeer) -> None:
    code, details = refusal(peer.greet, rail_protocols=["verbs/roce2/1", "local/elsewhere"])
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert f"the one at {peer.address} speaks ['verbs/roce2/1']" in details
    assert f"at {shared_pair[0].peer_address} speaks ['{peer.protocols[0]}']" in details
    assert "peer refused" in shared_pair[0].log()


def test_requests_for_connections_that_make_no_sense(shared_pair: Pair, peer: StrangePeer) -> None:
    peer.greet()
    one = peer.half(1, GARBAGE)
    local = pb.HalfConnection(
        connection_id=1, callee_rail=1, protocol=shared_pair[0].rails()[1].protocol, address=GARBAGE
    )
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for halves, said in (
        ([], "connections: 0 of them; send 1 to 64"),
        ([peer.half(i, GARBAGE) for i in range(65)], "connections: 65 of them"),
        ([one, one], "connections[1].connection_id: 1 is there twice"),
        ([peer.half(1, GARBAGE, rail=9)], "connections[0].callee_rail: there is no rail 9"),
        ([local], "connections[0].callee_rail: rail 1 copies within this daemon"),
        ([peer.half(1, b"")], "connections[0].address: has 0 bytes"),
        ([peer.half(1, bytes(257))], "connections[0].address: has 257 bytes"),
        ([peer.half(1, bytes(1 << 20))], "connections[0].address: has 1048576 bytes"),
        ([pb.HalfConnection(connection_id=1, address=GARBAGE)], "connections[0].protocol: rail 0"),
        ([one], "connections.address"),
    ):
        code, details = refusal(peer.connect, *halves)
        assert (code, said in details) == (invalid, True), (said, details)
    assert connections(shared_pair[0], peer) == 0


def test_requests_of_another_life(peer: StrangePeer) -> None:
    stale = grpc.StatusCode.FAILED_PRECONDITION
    half = peer.half(1, GARBAGE)
    code, details = refusal(peer.connect, half)
    assert (code, "send Hello first" in details) == (stale, True)
    peer.greet()
    for changes in (
        {"boot_epoch": secrets.token_bytes(16)},  # its own earlier one
        {"callee_epoch": secrets.token_bytes(16)},  # the daemon's
    ):
        code, details = refusal(peer.connect, half, **changes)
        assert (code, "send Hello first" in details) == (stale, True), changes


def test_repeated_and_replayed(shared_pair: Pair, peer: StrangePeer, address: bytes) -> None:
    daemon = shared_pair[0]
    peer.greet()
    first = peer.connect(peer.half(1, address), peer.half(2, address))
    assert peer.connect(peer.half(1, address), peer.half(2, address)) == first
    assert connections(daemon, peer) == 2
    code, details = refusal(peer.connect, peer.half(3, address), peer.half(2, address[::-1]))
    assert (code, "connection 2 stands" in details) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        True,
    )
    assert connections(daemon, peer) == 2, "nor was the third made"
    bye = pb.DisconnectRequest(**peer.me, connection_ids=[2, 7])
    assert len(peer.stub.Disconnect(bye, timeout=10).landed) == 2
    for number in (2, 7):
        code, details = refusal(peer.connect, peer.half(number, address))
        assert f"connection {number} of {peer.address} is over" in details
    for ids in (range(0), range(4097)):
        bye = pb.DisconnectRequest(**peer.me, connection_ids=ids)
        code, _ = refusal(peer.stub.Disconnect, bye, timeout=10)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert connections(daemon, peer) == 1


def test_addresses_of_any_bytes(shared_pair: Pair, peer: StrangePeer, address: bytes) -> None:
    """Every one is an address or is refused; the daemon goes on."""
    token = peer.greet().heartbeat_token
    numbers = iter(range(1, 1 << 20))

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        st.one_of(
            st.binary(min_size=1, max_size=256),
            st.tuples(st.integers(0, len(address) - 1), st.integers(0, 255)).map(
                lambda at: address[: at[0]] + bytes([at[1]]) + address[at[0] + 1 :]
            ),
        )
    )
    def ask(raw: bytes) -> None:
        number = next(numbers)
        try:
            peer.connect(peer.half(number, raw))
        except grpc.RpcError as error:
            told: Any = error
            assert told.code() in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.UNAVAILABLE,
            ), told.details()
        bye = pb.DisconnectRequest(**peer.me, connection_ids=[number])
        peer.stub.Disconnect(bye, timeout=10)

    ask()
    assert connections(shared_pair[0], peer) == 0
    assert peer.greet().heartbeat_token == token, "the relation has stood all the while"


# ---- what it answers ----


@pytest.mark.parametrize(
    "changes",
    [
        {"rail_protocols": []},
        {"rail_protocols": ["x"] * 65},
        {"rail_protocols": ["x" * 64]},
        {"heartbeat_token": b""},
        {"heartbeat_port": 0},
    ],
)
def test_answers_to_hello_that_make_no_sense(
    shared_pair: Pair, peer: StrangePeer, sender: transferd.Client, changes: dict[str, Any]
) -> None:
    for name, value in changes.items():
        peer.hello.ClearField(name)
        if isinstance(value, list):
            getattr(peer.hello, name).extend(value)
        else:
            setattr(peer.hello, name, value)
    assert "answered Hello" in str(used(sender, peer))
    assert connections(shared_pair[0], peer) == 0


def test_another_fabric_is_told_to_the_client(peer: StrangePeer, sender: transferd.Client) -> None:
    peer.hello.rail_protocols[:] = ["verbs/roce2/1"]
    error = used(sender, peer)
    assert error.reason == "PROTOCOL_MISMATCH"
    assert "verbs/roce2/1" in str(error)
    assert peer.protocols[0] in str(error)


def test_peer_whose_rail_takes_no_connection(
    shared_pair: Pair, peer: StrangePeer, sender: transferd.Client
) -> None:
    """An empty address says so: it may take one later."""
    peer.addresses = [b""]
    error = used(sender, peer)
    assert isinstance(error, transferd.PeerLost)
    assert "no rail is up at its other end" in str(error)
    eventually(lambda: connections(shared_pair[0], peer) == 0, "nothing of it is left")


@pytest.mark.parametrize(
    "addresses",
    [[], [GARBAGE] * 9, [bytes(257)], [bytes(1 << 20)], [GARBAGE], [bytes(256)]],
    ids=["none", "nine", "long", "huge", "garbage", "zeros"],
)
def test_answers_to_connect_that_make_no_sense(
    shared_pair: Pair, peer: StrangePeer, sender: transferd.Client, addresses: list[bytes]
) -> None:
    peer.addresses = addresses
    used(sender, peer)
    assert len(peer.connects) == 1
    eventually(lambda: connections(shared_pair[0], peer) == 0, "nothing of it is left")
