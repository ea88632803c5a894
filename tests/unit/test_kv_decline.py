# SPDX-License-Identifier: Apache-2.0
"""Requests that a decoder rank does not want: what it says, and what a prefiller makes of it."""

from __future__ import annotations

import pytest

from transferd.client.errors import InvalidRequest
from transferd.kv.protocol import actions as act
from transferd.kv.protocol import bounds
from transferd.kv.protocol.actions import Kind
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.declined import Declined
from transferd.kv.protocol.messages import Bye, Cancel, Cancelled, Decline, Request, Welcome

from support.kvcores import Decoder, Prefiller, kinds, of, request, said

ID = b"request"
WELCOME = Welcome(b"P" * 16, b"B" * 16)
READ = act.Release(ID, "read")


def compute(p: Prefiller) -> list[act.Action]:
    """The engine computes the request, from begin to end."""
    p.core.prefill(p.now, ID)
    return p.finish()


# ---- prefiller ----


def test_declined_before_the_prefill_begins() -> None:
    p = Prefiller()
    assert p.hear(p.open(), Decline(ID, 1)) == []
    assert compute(p) == [READ]
    assert (p.core.prefills, len(p.core._declined)) == (0, 0)


def test_declined_while_it_is_computed() -> None:
    p = Prefiller()
    pair = p.open()
    p.core.prefill(p.now, ID)
    assert p.hear(pair, Decline(ID, 1)) == []
    assert p.finish() == [READ]


def test_declined_when_it_is_held() -> None:
    p = Prefiller()
    pair = p.open()
    assert compute(p) == []
    assert p.hear(pair, Decline(ID, 1)) == [READ]
    assert p.hear(pair, Decline(ID, 1)) == []  # once more
    assert len(p.core._declined) == 0
    assert p.core.statistics.unexpected == 0


@pytest.mark.parametrize("first", ["declines", "reads"])
def test_one_of_two_declines(first: str) -> None:
    p = Prefiller()
    one, other = p.open(), p.open(decoder=b"E" * 16)
    if first == "declines":
        p.hear(one, Decline(ID, 2))
    p.core.prefill(p.now, ID)
    p.hear(other, request(readers=2))
    pushes = of(act.Push, p.finish())
    for push in pushes[:-1]:
        p.pushed(push)
    if first == "declines":
        assert list(kinds(p.pushed(pushes[-1]))) == ["Over", "Release"]
        return
    assert list(kinds(p.pushed(pushes[-1]))) == ["Over"]
    assert p.hear(other, Decline(ID, 2)) == []  # it has read: that counts once
    assert p.hear(one, Decline(ID, 2)) == [READ]


def test_nothing_is_released_that_is_read() -> None:
    p = Prefiller()
    one, other = p.open(), p.open(decoder=b"E" * 16)
    p.core.prefill(p.now, ID)
    p.hear(one, request(readers=2))
    pushes = of(act.Push, p.finish())
    assert p.hear(other, Decline(ID, 2)) == []
    assert p.hear(one, Decline(ID, 2)) == []  # it reads, whatever it says
    made: list[act.Action] = []
    for push in pushes:
        assert made == []
        made = p.pushed(push)
    assert list(kinds(made)) == ["Over", "Release"]


def test_the_lease_goes_on() -> None:
    p = Prefiller()
    pair = p.open(timeout_ms=600_000)
    compute(p)
    p.wait(29.0)
    for _ in range(3):
        assert p.hear(pair, Decline(ID, 2)) == []
    assert p.wait(1.0) == [act.Release(ID, "lease")]


def test_who_asks_after_all_is_waited_for() -> None:
    p = Prefiller()
    pair = p.open()
    p.hear(pair, Decline(ID, 1))
    p.hear(pair, request())
    (push,) = [push for push in of(act.Push, compute(p)) if push.tail]
    p.core.pushed(p.now, push.key, 0)
    assert list(kinds(p.pushed(push))) == ["Over", "Release"]


def test_a_request_that_is_cancelled_before_its_prefill() -> None:
    p = Prefiller()
    pair = p.open()
    p.hear(pair, request())
    assert said(p.hear(pair, Cancel(1))) == [Cancelled(1)]
    assert compute(p) == [READ]


def test_a_request_that_its_cancel_has_overtaken() -> None:
    p = Prefiller()
    pair = p.open()
    p.hear(pair, Cancel(1))
    compute(p)
    assert p.hear(pair, request()) == [READ]


def test_a_prefill_that_is_begun_again() -> None:
    p = Prefiller()
    pair = p.open()
    p.core.prefill(p.now, ID)
    p.hear(pair, Decline(ID, 2))
    assert p.core.aborted(p.now, ID, "preempted") == [act.Release(ID, "aborted")]
    p.hear(p.open(decoder=b"E" * 16), Decline(ID, 2))
    assert compute(p) == [READ]


def test_declines_of_what_is_not_known_are_bounded() -> None:
    p = Prefiller(Settings(declined=3))
    one, other = p.open(), p.open(decoder=b"E" * 16)
    for pair in (one, other):
        p.hear(pair, Decline(ID, 2))
    for number in range(2):
        p.hear(one, Decline(b"%d" % number, 1))
    assert len(p.core._declined) == 2
    assert compute(p) == []  # it is forgotten, so the lease decides


def test_who_has_declined_what() -> None:
    declined = Declined(10)
    for decoder in (b"D", b"E", b"D"):
        declined.add(ID, decoder, 3)
    declined.add(ID, b"E", 2)
    declined.discard(ID, b"F")
    declined.discard(b"other", b"D")
    assert len(declined) == 2
    declined.discard(ID, b"D")
    known = declined.take(ID)
    assert (known.wanted, known.read, len(declined)) == (3, {b"E"}, 0)
    declined.add(ID, b"D", 3)
    declined.discard(ID, b"D")
    assert declined.take(ID).wanted == 0


def test_a_prefiller_that_drains_lets_go() -> None:
    p = Prefiller()
    pair = p.open()
    compute(p)
    p.core.drain(p.now)
    assert p.hear(pair, Decline(ID, 1)) == [READ, act.Drained()]


# ---- decoder ----


def test_said_at_once_to_who_is_there() -> None:
    d = Decoder()
    pair = d.ready()
    assert said(d.core.decline(d.now, pair, ID, 2)) == [Decline(ID, 2)]


def test_kept_until_the_welcome() -> None:
    d = Decoder(settings=Settings(declined=2))
    pair = d.add()
    for request_id in (b"a", b"b", b"a", b"c"):
        assert d.core.decline(d.now, pair, request_id) == []
    d.granted(pair)
    made = d.hear(pair, WELCOME)
    assert list(kinds(made)) == ["PairReady", "Ping", "Decline", "Decline"]
    assert said(made)[1:] == [Decline(b"b", 1), Decline(b"c", 1)]  # the oldest is forgotten
    assert d.hear(pair, WELCOME) == []


def test_kept_while_a_pair_is_made_anew() -> None:
    d = Decoder()
    pair = d.ready()
    d.wait(3.0)  # silence
    assert d.core.decline(d.now, pair, ID) == []
    d.revoked(pair)
    d.granted(pair)
    assert Decline(ID, 1) in said(d.hear(pair, WELCOME))


def test_not_said_to_who_is_gone() -> None:
    d = Decoder()
    pair = d.ready()
    d.core.remove(d.now, pair)
    assert d.core.decline(d.now, pair, ID) == []
    d.revoked(pair)
    assert d.core.decline(d.now, pair, ID) == []


def test_said_to_who_drains() -> None:
    d = Decoder()
    pair = d.ready()
    d.start(pair)
    d.hear(pair, Bye())
    assert said(d.core.decline(d.now, pair, ID)) == [Decline(ID, 1)]


def test_said_again_if_it_may_be_lost() -> None:
    d = Decoder()
    pair = d.ready()
    (sent,) = of(act.Send, d.core.decline(d.now, pair, ID, 2))
    assert sent.key.kind is Kind.DECLINE
    for _ in range(2):
        assert d.core.undelivered(d.now, sent.key, dead=False) == []
        (sent,) = of(act.Send, d.wait(0.3))
        assert said([sent]) == [Decline(ID, 2)]
    d.core.undelivered(d.now, sent.key, dead=False)
    d.core.remove(d.now, pair)
    assert d.wait(0.3) == []


def test_what_was_never_asked_for_is_declined() -> None:
    d = Decoder()
    there, late = d.ready(), d.greet()
    started = d.start(there, late, readers=3)
    assert said(d.core.cancel(d.now, started.transfer)) == [Cancel(1)]
    made = said(d.hear(late, WELCOME))
    assert made[1:] == [Decline(ID, 3)]
    assert not [message for message in made if isinstance(message, Request)]


@pytest.mark.parametrize(
    ("request_id", "readers", "text"),
    [
        (b"", 1, "request_id has from 1 to 256 bytes, not 0"),
        (bytes(257), 1, "request_id has"),
        (ID, 0, "readers is from"),
        (ID, bounds.READERS_MAX + 1, "readers is from"),
    ],
)
def test_bad_declines(request_id: bytes, readers: int, text: str) -> None:
    d = Decoder()
    with pytest.raises(InvalidRequest, match=text):
        d.core.decline(d.now, d.ready(), request_id, readers)
