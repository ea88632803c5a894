# SPDX-License-Identifier: Apache-2.0
"""The prefiller's core: each transition of its tables, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from transferd.client.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded
from transferd.kv.protocol import actions as act
from transferd.kv.protocol import bounds, fragments, messages
from transferd.kv.protocol.actions import Kind, SendKey, TransferKey
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.messages import (
    Ask,
    Bye,
    Cancel,
    Cancelled,
    Failed,
    Ping,
    Pong,
    Pushed,
    Reason,
    Refused,
    Request,
    Welcome,
)
from transferd.kv.protocol.prefiller import PrefillerCore
from transferd.kv.protocol.prefiller_tables import PairState

from support.kvcores import PAGES, Prefiller, hello, kinds, of, pages, request, said, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

ID = b"request"


def failure(actions: list[act.Action]) -> tuple[Reason, str]:
    (failed,) = [message for message in said(actions) if isinstance(message, Failed)]
    return failed.reason, failed.detail


def dead(p: Prefiller, pair: int) -> list[act.Action]:
    return p.core.undelivered(p.now, SendKey(pair, 0, Kind.OTHER, 0), dead=True)


# ---- pairs ----


def test_a_pair_begins() -> None:
    p = Prefiller()
    made = p.greet()
    assert list(kinds(made)) == ["Open", "Welcome"]
    (welcome,) = said(made)
    assert isinstance(welcome, Welcome)
    assert welcome.boot == b"B" * 16
    assert said(p.greet()) == [welcome]  # said again
    assert list(p.core.pairs().values()) == [PairState.OPEN]


@pytest.mark.parametrize(
    ("other", "reason", "text"),
    [
        ({"fingerprint": b"other"}, Reason.FINGERPRINT, "model: b'other'"),
        ({"imm_count": 2}, Reason.BAD_REQUEST, "2 immediates do not do for 2 stages"),
    ],
)
def test_refused(other: dict[str, Any], reason: Reason, text: str) -> None:
    p = Prefiller()
    (refused,) = said(p.greet(**other))
    assert isinstance(refused, Refused)
    assert refused.reason is reason
    assert text in refused.detail
    assert p.core.pairs() == {}
    assert p.core.due() is None


def test_too_many_pairs() -> None:
    p = Prefiller(Settings(pairs=1))
    p.open()
    (refused,) = said(p.greet(decoder=b"E" * 16))
    assert isinstance(refused, Refused)
    assert refused.reason is Reason.BUSY


def replaced(p: Prefiller, pair: int) -> list[act.Action]:
    return p.greet(epoch=2, token=b"U" * 16)


@pytest.mark.parametrize(
    "how",
    [
        replaced,
        dead,
        lambda p, pair: p.hear(pair, Bye()),
        lambda p, pair: p.wait(3.0),
        lambda p, pair: p.core.push_failed(p.now, TransferKey(pair, 1), 0, "REVOKED", dead=True),
    ],
    ids=["replaced", "mailbox dead", "bye", "silent", "grants dead"],
)
def test_a_pair_is_over(how: Callable[[Prefiller, int], list[act.Action]]) -> None:
    p = Prefiller()
    pair = p.open()
    first = p.push(pair)
    (second,) = of(act.Push, p.core.computed(p.now, ID, 32))
    made = how(p, pair)
    assert list(kinds(made))[:1] == ["Stop"]
    assert p.core.pairs()[pair] is PairState.CLOSING
    assert p.hear(pair, Cancel(1)) == []
    assert p.core.statistics.strangers == 1
    p.pushed(first)
    made = p.core.push_failed(p.now, second.key, second.unit, "CANCELLED", dead=False)
    assert list(kinds(made)) == ["Over", "Close"]
    assert pair not in p.core.pairs()
    assert list(kinds(p.finish())) == ["Release"]


def test_a_hello_of_an_earlier_epoch_comes_late() -> None:
    p = Prefiller()
    pair = p.open(epoch=2)
    assert p.greet(epoch=1, token=b"U" * 16) == []
    assert p.greet(epoch=2, token=b"U" * 16) == []
    assert p.core.pairs() == {pair: PairState.OPEN}
    assert p.core.statistics.unexpected == 2


def test_requests_to_an_earlier_pair_come_late() -> None:
    p = Prefiller()
    pair = p.open()
    letters = p.letters(pair, request())
    p.hear(pair, Cancel(1))
    p.wait(3.0)  # nothing is heard: all is forgotten
    again = p.open()
    for letter in letters:
        assert p.core.receive(p.now, letter) == []
    assert (again != pair, len(p.core)) == (True, 0)


def test_pings_are_answered_and_keep_a_pair_alive() -> None:
    p = Prefiller()
    pair = p.open()
    for number in range(1, 6):
        p.wait(2.0)
        assert said(p.hear(pair, Ping(number, 1))) == [Pong(number, draining=False)]
    assert p.core.pairs() == {pair: PairState.OPEN}


def test_a_decoder_that_pings_rarely_says_so() -> None:
    p = Prefiller()
    pair = p.open(timeout_ms=10_000)
    p.wait(9.0)
    assert p.core.pairs() == {pair: PairState.OPEN}
    p.wait(1.0)
    assert p.core.pairs() == {}


# ---- transfers ----


@pytest.mark.parametrize("first", ["request", "prefill"])
def test_layer_by_layer_whichever_is_first(first: str) -> None:
    p = Prefiller()
    pair = p.open()
    if first == "request":
        (arrived,) = p.hear(pair, request())
        assert isinstance(arrived, act.Arrived)
        assert p.core.prefill(p.now, ID) == []
    else:
        p.core.prefill(p.now, ID)
        assert list(kinds(p.hear(pair, request()))) == ["Arrived"]
    key = TransferKey(pair, 1)
    assert p.core.computed(p.now, ID, 16) == [act.Push(key, 0, 0, 16, False)]
    assert p.core.computed(p.now, ID, 16) == []
    assert p.core.computed(p.now, ID, 48) == [act.Push(key, 1, 16, 48, False)]
    assert p.core.pushed(p.now, key, 1) == []
    assert p.core.pushed(p.now, key, 1) == []  # once more
    assert p.core.finished(p.now, ID) == [act.Push(key, 2, 48, 48, True)]
    assert p.core.finished(p.now, ID) == []
    assert p.core.pushed(p.now, key, 2) == []
    made = p.core.pushed(p.now, key, 0)
    assert made == [act.Over(key, "PUSHED"), act.Release(ID, "read")]
    assert (len(p.core), p.core.prefills) == (0, 0)


def test_a_late_request_gets_all_at_once() -> None:
    p = Prefiller()
    pair = p.open()
    p.core.prefill(p.now, ID)
    p.finish()
    (push,) = of(act.Push, p.hear(pair, request(first_token=20, tokens=28)))
    assert (push.begin, push.end, push.tail) == (20, 48, True)


def test_tokens_that_nobody_wants_are_not_pushed() -> None:
    p = Prefiller()
    pair = p.open()
    p.hear(pair, request(first_token=20, tokens=10))
    p.core.prefill(p.now, ID)
    assert p.core.computed(p.now, ID, 16) == []
    assert of(act.Push, p.core.computed(p.now, ID, 40))[0].begin == 20
    (tail,) = of(act.Push, p.finish())
    assert (tail.begin, tail.end, tail.tail) == (30, 30, True)


def test_two_decoder_ranks_read_one_prefill() -> None:
    p = Prefiller()
    one, other = p.open(), p.open(decoder=b"E" * 16)
    p.core.prefill(p.now, ID)
    p.hear(one, request(readers=2))
    for push in of(act.Push, p.finish()):
        made = p.pushed(push)
    assert "Release" not in kinds(made)
    (push,) = of(act.Push, p.hear(other, request(readers=2)))
    assert list(kinds(p.pushed(push))) == ["Over", "Release"]


def test_the_lease() -> None:
    p = Prefiller()
    p.core.prefill(p.now, ID)
    p.wait(100.0)  # it computes as long as it likes
    p.finish()
    assert "Release" not in kinds(p.wait(29.0))
    assert p.wait(1.0) == [act.Release(ID, "lease")]
    assert failure(p.hear(p.open(), request())) == (Reason.RELEASED, "its prefill is gone")


def test_the_lease_waits_for_transfers() -> None:
    p = Prefiller()
    pair = p.open(timeout_ms=600_000)
    p.core.prefill(p.now, ID)
    p.finish()
    p.wait(29.0)
    (push,) = of(act.Push, p.hear(pair, request(readers=2, deadline_ms=100_000)))
    assert "Release" not in kinds(p.wait(60.0))
    p.pushed(push)
    assert p.wait(30.0) == [act.Release(ID, "lease")]


def test_the_lease_begins_when_the_last_transfer_has_ended() -> None:
    p = Prefiller()
    one, other = p.open(timeout_ms=600_000), p.open(decoder=b"E" * 16, timeout_ms=600_000)
    p.core.prefill(p.now, ID)
    for pair in (one, other):
        p.hear(pair, request(readers=3, deadline_ms=100_000))
    first, second = of(act.Push, p.finish())[-2:]
    made = p.core.pushed(p.now, TransferKey(one, 1), 0) + p.core.pushed(p.now, first.key, 1)
    assert "Over" in kinds(made)
    assert p.wait(60.0) == []
    p.core.pushed(p.now, second.key, 0)
    p.core.pushed(p.now, second.key, 1)
    assert p.wait(30.0) == [act.Release(ID, "lease")]


def test_cancel_is_answered_when_no_job_is_under_way() -> None:
    p = Prefiller()
    pair = p.open()
    push = p.push(pair)
    (second,) = of(act.Push, p.core.computed(p.now, ID, 32))
    assert list(kinds(p.hear(pair, Cancel(1)))) == ["Stop"]
    assert p.hear(pair, Cancel(1)) == []
    assert p.core.computed(p.now, ID, 48) == []
    assert p.pushed(push) == []
    made = p.core.push_failed(p.now, second.key, second.unit, "CANCELLED", dead=False)
    assert list(kinds(made)) == ["Over", "Cancelled"]
    assert said(p.hear(pair, Cancel(1))) == [Cancelled(1)]  # said again
    assert p.hear(pair, request()) == []  # late, for the second time
    assert list(kinds(p.core.finished(p.now, ID))) == ["Release"]


def test_cancel_overtakes_its_request() -> None:
    p = Prefiller()
    pair = p.open()
    assert said(p.hear(pair, Cancel(1))) == [Cancelled(1)]
    assert p.hear(pair, request()) == []
    assert len(p.core) == 0


def test_cancel_of_what_waits_or_is_pushed() -> None:
    p = Prefiller()
    pair = p.open()
    p.hear(pair, request())
    assert list(kinds(p.hear(pair, Cancel(1)))) == ["Over", "Cancelled"]
    p.core.prefill(p.now, ID)
    p.hear(pair, request(2))
    for push in of(act.Push, p.finish()):
        p.pushed(push)
    assert said(p.hear(pair, Cancel(2))) == [Cancelled(2)]


def test_cancel_of_what_fails_meanwhile_is_answered_as_such() -> None:
    p = Prefiller()
    pair = p.open()
    push = p.push(pair)
    p.core.aborted(p.now, ID, "")
    p.hear(pair, Cancel(1))
    assert list(kinds(p.pushed(push))) == ["Over", "Cancelled", "Release"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda p, push: p.core.aborted(p.now, ID, "preempted"), Reason.ABORTED),
        (lambda p, push: p.core.finished(p.now, ID), Reason.TOO_SHORT),
        (lambda p, push: p.hear(push.key.pair, request(imm=13)), Reason.CONFLICT),
    ],
)
def test_the_prefiller_ends_it(
    how: Callable[[Prefiller, act.Push], list[act.Action]], reason: Reason
) -> None:
    p = Prefiller()
    pair = p.open()
    push = p.push(pair)
    assert next(iter(kinds(how(p, push)))) == "Stop"
    made = p.core.push_failed(p.now, push.key, push.unit, "CANCELLED", dead=False)
    assert failure(made)[0] is reason
    assert list(kinds(made))[:2] == ["Over", "Failed"]
    assert p.hear(pair, request()) == []


def test_a_write_fails() -> None:
    p = Prefiller()
    push = p.push(p.open())
    made = p.core.push_failed(p.now, push.key, push.unit, "PEER_LOST", dead=False)
    assert failure(made) == (Reason.WRITE, "PEER_LOST")
    assert p.core.push_failed(p.now, push.key, push.unit, "PEER_LOST", dead=False) == []


def test_deadlines_of_what_waits_and_of_what_is_pushed() -> None:
    p = Prefiller()
    pair = p.open(timeout_ms=600_000)
    p.hear(pair, request(1, request_id=b"never", deadline_ms=1000))
    assert failure(p.wait(1.0))[0] is Reason.DEADLINE
    push = p.push(pair, 2)
    assert list(kinds(p.wait(20.0))) == ["Stop"]
    assert failure(p.pushed(push))[0] is Reason.DEADLINE


def test_an_aborted_prefill_takes_no_requests() -> None:
    p = Prefiller()
    pair, other = p.open(), p.open(decoder=b"E" * 16)
    push = p.push(pair)
    p.core.aborted(p.now, ID, "")
    assert failure(p.hear(other, request())) == (Reason.ABORTED, "its prefill is given up")
    assert list(kinds(p.pushed(push))) == ["Over", "Failed", "Release"]
    assert failure(p.hear(other, request(2)))[0] is Reason.ABORTED
    assert p.core.aborted(p.now, ID, "") == []


def test_a_held_prefill_can_be_aborted() -> None:
    p = Prefiller()
    p.core.prefill(p.now, ID)
    p.finish()
    assert p.core.aborted(p.now, ID, "") == [act.Release(ID, "aborted")]
    assert p.core.due() is None


def test_ask_is_answered_when_it_has_ended() -> None:
    p = Prefiller()
    pair = p.open()
    push = p.push(pair)
    assert p.hear(pair, Ask(1)) == p.hear(pair, Ask(2)) == []
    (last,) = [push for push in of(act.Push, p.finish()) if push.tail]
    p.pushed(push)
    p.core.pushed(p.now, push.key, 1)
    p.pushed(last)
    assert said(p.hear(pair, Ask(1))) == [Pushed(1)]
    p.hear(pair, Cancel(2))
    assert said(p.hear(pair, Ask(2))) == [Cancelled(2)]


def test_answers_that_were_not_delivered_are_said_again() -> None:
    p = Prefiller()
    pair = p.open()
    (sent,) = of(act.Send, p.hear(pair, Cancel(1)))
    assert p.core.undelivered(p.now, sent.key, dead=False) == []
    assert said(p.wait(0.3)) == [Cancelled(1)]
    (sent,) = of(act.Send, p.hear(pair, request(2, groups=())))
    p.core.undelivered(p.now, sent.key, dead=False)
    assert failure(p.wait(0.3)) == (Reason.BAD_REQUEST, "")
    p.core.undelivered(p.now, sent.key, dead=False)
    p.hear(pair, Ping(1, 3))  # the decoder has ended it
    assert said(p.wait(0.3)) == []
    assert p.core.undelivered(p.now, SendKey(0, 0, Kind.OTHER, 0), dead=True) == []


# ---- draining ----


def test_draining() -> None:
    p = Prefiller()
    pair = p.open(timeout_ms=600_000)
    push = p.push(pair)
    assert said(p.core.drain(p.now)) == [Bye()]
    assert p.core.drain(p.now) == []
    assert said(p.hear(pair, Ping(1, 1))) == [Pong(1, draining=True)]
    assert failure(p.hear(pair, request(2)))[0] is Reason.DRAINING
    (refused,) = said(p.greet(decoder=b"E" * 16))
    assert isinstance(refused, Refused)
    assert refused.reason is Reason.DRAINING
    made = p.finish()
    p.pushed(push)
    for unit in of(act.Push, made):
        made = p.pushed(unit)
    assert list(kinds(made)) == ["Over", "Release", "Drained"]
    assert list(kinds(p.hear(pair, Bye()))) == ["Close"]


def test_draining_of_nothing() -> None:
    p = Prefiller()
    assert p.core.drain(p.now) == [act.Drained()]
    assert p.wait(10.0) == []


# ---- bad input ----


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"groups": (pages(PAGES),)}, "page 100 is out of range; the cache has 100"),
        ({"groups": (pages(3, 3),)}, "page 3 is listed twice"),
        ({"groups": (pages(1), pages(2))}, "2 groups of pages; the layout has 1"),
        ({"groups": (b"123",)}, "has 3 bytes"),
        ({"imm": 9}, "imm is from 10 to 37, not 9"),
        ({"imm": 38}, "imm is from 10 to 37, not 38"),
        ({"tail_offset": 1001}, "tail_offset is at most 1000"),
    ],
)
def test_bad_requests(other: dict[str, Any], text: str) -> None:
    p = Prefiller()
    reason, detail = failure(p.hear(p.open(), request(**other)))
    assert reason is Reason.BAD_REQUEST
    assert text in detail
    assert len(p.core) == 0


def test_a_decoder_that_asks_twice() -> None:
    p = Prefiller()
    pair = p.open()
    p.hear(pair, request(1))
    assert p.hear(pair, request(1)) == []
    assert failure(p.hear(pair, request(2))) == (
        Reason.DUPLICATE,
        "transfer 1 is of the same request",
    )
    p.core.prefill(p.now, ID)
    assert failure(p.hear(pair, request(3)))[0] is Reason.DUPLICATE
    assert len(p.core) == 1


def test_too_many_transfers() -> None:
    p = Prefiller(Settings(transfers=1))
    pair = p.open()
    p.hear(pair, request(1))
    assert failure(p.hear(pair, request(2, request_id=b"other")))[0] is Reason.BUSY


def test_numbers_below_the_lowest_and_beyond_the_window() -> None:
    p = Prefiller()
    pair = p.open()
    p.hear(pair, Ping(1, 10))
    p.hear(pair, Ping(2, 5))  # goes back
    assert p.hear(pair, request(9)) == []
    assert p.hear(pair, Cancel(9)) == []
    assert p.hear(pair, Cancel(10 + bounds.WINDOW)) == []
    assert said(p.hear(pair, Cancel(9 + bounds.WINDOW))) == [Cancelled(9 + bounds.WINDOW)]
    p.hear(pair, Ping(3, bounds.NUMBER_MAX))
    assert p.hear(pair, Cancel(1000)) == []
    assert p.core.statistics.unexpected == 4


def test_messages_of_the_wrong_kind() -> None:
    p = Prefiller()
    pair = p.open()
    for message in (Cancelled(1), Pong(1, draining=False), hello(), Welcome(b"P" * 16, b"B" * 16)):
        assert p.hear(pair, message) == []
    assert p.core.statistics.unexpected == 4
    for data in (b"", b"\xff" * 9, fragments.cut(messages.encode(Bye()), sender=b"D" * 16)[0]):
        assert p.core.receive(p.now, data) == []
    other = fragments.cut(messages.encode(hello()), sender=b"E" * 16)
    assert p.core.receive(p.now, other[0]) == []
    assert p.core.statistics.malformed == 4


# ---- the engine's mistakes ----


def test_prefills_have_bounds() -> None:
    p = Prefiller(Settings(prefills=1, released=2))
    for request_id in (b"", bytes(257)):
        with pytest.raises(InvalidRequest, match="request_id"):
            p.core.prefill(p.now, request_id)
    p.core.prefill(p.now, ID)
    with pytest.raises(Conflict, match="already"):
        p.core.prefill(p.now, ID)
    with pytest.raises(QuotaExceeded):
        p.core.prefill(p.now, b"other")
    p.core.computed(p.now, ID, 10)
    for count in (9, -1, bounds.TOKENS_MAX + 1):
        with pytest.raises(InvalidRequest, match="tokens only grow"):
            p.core.computed(p.now, ID, count)
    with pytest.raises(NotFound):
        p.core.computed(p.now, b"other", 1)
    with pytest.raises(NotFound):
        p.core.finished(p.now, b"other")
    p.core.aborted(p.now, ID, "")
    for i in range(3):
        p.core.prefill(p.now, b"%d" % i)
        p.core.aborted(p.now, b"%d" % i, "")
    pair = p.open()
    assert list(kinds(p.hear(pair, request(1)))) == ["Arrived"]  # forgotten, so it waits
    assert failure(p.hear(pair, request(2, request_id=b"2")))[0] is Reason.ABORTED


def test_bad_boot() -> None:
    with pytest.raises(InvalidRequest, match="boot"):
        PrefillerCore(b"short", Prefiller.judge, token=tokens())


def test_request_of_a_prefill_that_is_begun_again() -> None:
    p = Prefiller()
    p.core.prefill(p.now, ID)
    p.core.aborted(p.now, ID, "")
    p.core.prefill(p.now, ID)
    assert isinstance(p.hear(p.open(), request())[0], act.Arrived)


def test_requests_are_equal_when_all_of_them_is() -> None:
    assert request() == request()
    assert request() != request(low=1, tokens=47)
    assert isinstance(request(), Request)
