# SPDX-License-Identifier: Apache-2.0
"""Relations without IO: which of them an introduction proves dead, which rails are joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferd.daemon import errors
from transferd.daemon.descriptor import PeerKey
from transferd.daemon.peer import Peer, PeerState, PeerTable, pair_rails, pair_staged
from transferd.daemon.plane import MAX_PARTS, MAX_PATHS

if TYPE_CHECKING:
    from transferd.daemon.wire import Link

ADDRESS = "127.0.0.1:1"


def key(daemon: int, life: int) -> PeerKey:
    return PeerKey(bytes([daemon]) * 16, bytes([life]) * 16)


def peer(who: PeerKey, address: str = ADDRESS, token: bytes = b"t" * 16) -> Peer:
    made = Peer(who, address, cast("Link", None), PeerState.CONNECTED)
    made.their_token = token
    return made


@pytest.mark.parametrize(
    ("who", "address", "token", "dead"),
    [
        (key(1, 1), ADDRESS, b"t" * 16, False),  # the same introduction again
        (key(1, 1), "127.0.0.1:9", b"t" * 16, False),  # by another of its addresses
        (key(1, 1), ADDRESS, b"u" * 16, True),  # it has forgotten us
        (key(1, 2), "127.0.0.1:9", b"u" * 16, True),  # a new life of it
        (key(2, 2), ADDRESS, b"u" * 16, True),  # another daemon in its place
        (key(2, 2), "127.0.0.1:9", b"u" * 16, False),  # somebody else
    ],
)
def test_what_an_introduction_proves(who: PeerKey, address: str, token: bytes, dead: bool) -> None:
    table = PeerTable(10)
    known = peer(key(1, 1))
    table.add(known)
    assert table.superseded(who, address, token) == ([known] if dead else [])


def test_greeting_in_flight_is_not_proven_dead_by_the_same_life() -> None:
    table = PeerTable(10)
    greeting = peer(key(1, 1), token=b"")
    greeting.state = PeerState.GREETING
    table.add(greeting)
    assert table.superseded(key(1, 1), ADDRESS, b"t" * 16) == []
    assert table.superseded(key(1, 2), ADDRESS, b"t" * 16) == []


def test_lost_once() -> None:
    table = PeerTable(10)
    one = peer(key(1, 1))
    table.add(one)
    assert table.lost(one, count=True)
    assert not table.lost(one, count=True)
    assert table.losses == {ADDRESS: 1}
    again = peer(key(1, 1))
    table.add(again)
    assert not table.lost(one, count=True)
    assert table.get(key(1, 1)) is again
    with pytest.raises(errors.PeerLost):
        one.check()


def test_limit() -> None:
    table = PeerTable(1)
    table.add(peer(key(1, 1)))
    with pytest.raises(errors.QuotaExceeded) as caught:
        table.add(peer(key(2, 1)))
    assert caught.value.reason == "PEERS"


def test_tokens_are_never_shared() -> None:
    assert len({peer(key(1, 1)).own_token for _ in range(100)}) == 100


@given(st.integers(1, 12), st.integers(1, 12))
def test_every_rail_of_both_sides_is_used(local: int, remote: int) -> None:
    pairs = pair_rails(["p"] * local, ["p"] * remote)
    assert len(pairs) == len(set(pairs)) == min(max(local, remote), MAX_PARTS)
    assert {here for here, _ in pairs} == set(range(min(local, MAX_PARTS)))
    assert {there for _, there in pairs} == set(range(min(remote, MAX_PARTS)))


def test_within_one_daemon_nothing_but_copies() -> None:
    rails = ["p", "q", "local/1"]
    assert pair_rails(rails, rails) == [(2, 2)]


@given(st.integers(1, 12), st.integers(1, 12))
def test_the_rail_that_copies_joins_no_other_daemon(local: int, remote: int) -> None:
    pairs = pair_rails(["p"] * local + ["local/1"], ["p"] * remote + ["local/2"])
    assert pairs == pair_rails(["p"] * local, ["p"] * remote)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_only_rails_that_speak_alike_are_joined(local: list[str], remote: list[str]) -> None:
    if not set(local) & set(remote):
        with pytest.raises(errors.Conflict) as caught:
            pair_rails(local, remote)
        assert caught.value.reason == "PROTOCOL_MISMATCH"
        return
    pairs = pair_rails(local, remote)
    assert pairs
    assert all(local[here] == remote[there] for here, there in pairs)


@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_staged_rails_are_paired_as_their_twins_are(local: int, remote: int, copying: bool) -> None:
    here, there = (
        ("p",) * n + (f"local/{name}",) + ("staged/p",) * n + (f"staged/local/{name}s",)
        for n, name in ((local, "1"), (local if copying else remote, "1" if copying else "2"))
    )
    plain, staged = pair_rails(here, there), list(pair_staged(here, there))
    if copying:
        assert (plain, staged) == ([(local, local)], [(2 * local + 1, 2 * local + 1)])
        return
    assert plain == pair_rails(["p"] * local, ["p"] * remote)
    assert len(plain) + len(staged) == 2 * len(plain) <= MAX_PATHS
    assert [(i - local - 1, j - remote - 1) for i, j in staged] == plain
    assert {(here[i], there[j]) for i, j in staged} == {("staged/p", "staged/p")}


def test_to_a_peer_that_stages_nothing_there_are_no_staged_paths() -> None:
    here, there = ("p", "local/1", "staged/p", "staged/local/2"), ("p", "local/3")
    assert pair_rails(here, there) == [(0, 0)]
    assert not pair_staged(here, there)
