# SPDX-License-Identifier: Apache-2.0
"""The decoder's core: each transition of its tables, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from transferd.client.errors import Conflict, InvalidRequest, QuotaExceeded
from transferd.kv.protocol import actions as act
from transferd.kv.protocol import bounds, fragments, messages
from transferd.kv.protocol.actions import Outcome, PairEnd
from transferd.kv.protocol.decoder_tables import PAIR, PairEvent, PairState
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

from support.kvcores import PAGES, Decoder, kinds, of, pages, said, wanted

WELCOME = Welcome(b"P" * 16, b"B" * 16)


def outcome(actions: list[act.Action]) -> tuple[Outcome, str]:
    (ended,) = of(act.Ended, actions)
    return ended.outcome, ended.detail


def over(actions: list[act.Action]) -> tuple[PairEnd, bool]:
    (found,) = of(act.PairOver, actions)
    assert [type(action) for action in actions if isinstance(action, act.Revoke)] == [act.Revoke]
    return found.why, found.again


def test_a_transfer_completes_by_its_counts_alone() -> None:
    d = Decoder()
    pair = d.ready()
    made = d.core.start(d.now, [pair], wanted())
    started, sent = made[0], said(made)[0]
    assert started == act.Started(1, 10, (3, 3, 1))
    assert isinstance(sent, Request)
    assert (sent.imm, sent.groups, sent.tokens) == (10, (pages(1, 2, 3),), 48)
    assert d.core.counted(d.now, 10, 2) == []
    assert d.core.counted(d.now, 10, 3) == [act.Landed(1, 0)]
    assert d.core.counted(d.now, 10, 3) == []  # told twice
    assert d.core.counted(d.now, 10, 1) == []  # back
    assert d.core.counted(d.now, 9, 3) == d.core.counted(d.now, 1 << 40, 3) == []  # nobody's
    assert d.core.counted(d.now, 12, 1) == [act.Landed(1, 2)]
    made = d.core.counted(d.now, 11, 3)
    assert made == [act.Landed(1, 1), act.Ended(1, Outcome.COMPLETE, "")]
    assert (len(d.core), d.core.free_blocks) == (0, 2)


def test_the_next_use_of_an_immediate_counts_on() -> None:
    d = Decoder(blocks=1)
    pair = d.ready()
    d.land(d.start(pair))
    assert d.start(pair) == act.Started(2, 10, (6, 6, 2))


def test_stages_without_writes_are_here_at_once() -> None:
    d = Decoder()
    pair = d.ready()
    made = d.core.start(d.now, [pair], wanted(counts=(0, 4, 0)))
    assert of(act.Landed, made) == [act.Landed(1, 0), act.Landed(1, 2)]
    assert outcome(d.core.counted(d.now, 11, 4)) == (Outcome.COMPLETE, "")


def test_requests_wait_for_the_welcome() -> None:
    d = Decoder()
    pair = d.add()
    made = d.core.start(d.now, [pair], wanted())
    assert said(made) == []
    d.start(pair, indices=(4, 5))
    d.granted(pair)
    asked = [m.transfer for m in said(d.hear(pair, WELCOME)) if isinstance(m, Request)]
    assert asked == [1, 2]


def test_cancel_of_what_was_never_asked_for_needs_no_answer() -> None:
    d = Decoder()
    pair = d.add()
    d.start(pair)
    (fence,) = d.core.cancel(d.now, 1)
    assert fence == act.Fence(1, (), 10, (0, 0, 0))
    assert outcome(d.fenced(fence)) == (Outcome.CANCELLED, "")


def test_cancel_is_a_fence() -> None:
    d = Decoder(blocks=1)
    pair = d.ready()
    d.start(pair)
    d.core.counted(d.now, 10, 2)
    assert said(d.core.cancel(d.now, 1)) == [Cancel(1)]
    assert d.core.cancel(d.now, 1) == []
    assert d.core.counted(d.now, 10, 3) == []
    (fence,) = d.hear(pair, Cancelled(1))
    assert fence == act.Fence(1, (pair,), 10, (0, 0, 0))
    assert d.core.free_blocks == 0
    assert d.hear(pair, Cancelled(1)) == []
    with pytest.raises(InvalidRequest, match="values"):
        d.core.fenced(d.now, 1, (1, 1))
    assert outcome(d.core.fenced(d.now, 1, (3, 0, 0))) == (Outcome.CANCELLED, "")
    assert d.core.fenced(d.now, 1, (3, 0, 0)) == []
    assert d.start(pair).targets == (6, 3, 1)


def test_values_after_a_fence_do_not_go_back() -> None:
    d = Decoder(blocks=1)
    pair = d.ready()
    d.land(d.start(pair))
    d.start(pair)
    d.core.cancel(d.now, 2)
    d.hear(pair, Cancelled(2))
    with pytest.raises(InvalidRequest, match="not below"):
        d.core.fenced(d.now, 2, (3, 3, 0))
    assert outcome(d.core.fenced(d.now, 2, (3, 3, 1)))[0] is Outcome.CANCELLED


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_prefiller_has_to_be_quiet(order: tuple[int, int]) -> None:
    d = Decoder()
    both = [d.ready(), d.ready()]
    d.start(*both)
    assert said(d.core.cancel(d.now, 1)) == [Cancel(1)] * 2
    assert d.hear(both[order[0]], Cancelled(1)) == []
    (fence,) = of(act.Fence, d.hear(both[order[1]], Cancelled(1)))
    assert fence.pairs == tuple(both)


def test_failed_stops_the_others() -> None:
    d = Decoder()
    one, other = d.ready(), d.ready()
    d.start(one, other)
    made = d.hear(one, Failed(1, Reason.WRITE, "PEER_LOST"))
    assert said(made) == [Cancel(1)]
    assert [send.mailbox for send in of(act.Send, made)] == [b"mailbox of P"]
    (fence,) = d.hear(other, Failed(1, Reason.ABORTED, ""))
    assert isinstance(fence, act.Fence)
    assert outcome(d.fenced(fence)) == (Outcome.FAILED, "P1: WRITE: PEER_LOST")


def test_deadline() -> None:
    d = Decoder()
    pair = d.ready()
    d.start(pair, deadline_s=0.5)
    assert said(d.wait(0.6))[-1] == Cancel(1)
    (fence,) = d.hear(pair, Cancelled(1))
    assert isinstance(fence, act.Fence)
    assert outcome(d.fenced(fence))[0] is Outcome.DEADLINE


def test_a_prefiller_that_does_not_confirm_is_revoked_alone() -> None:
    d = Decoder(blocks=3)
    deaf, other = d.ready(), d.ready()
    d.start(deaf)
    d.start(deaf, indices=(4,))
    d.start(other, indices=(5,))
    d.core.cancel(d.now, 1)
    d.now += 1.0
    d.core.tick(d.now)
    for pair in (deaf, other):
        d.hear(pair, Pong(2, draining=False))
    made = d.wait(1.1)
    assert over(made) == (PairEnd.CANCEL_LATE, True)
    assert of(act.Fence, made) == []
    made = d.revoked(deaf)
    assert [(fence.transfer, fence.pairs) for fence in of(act.Fence, made)] == [(1, ()), (2, ())]
    assert outcome(d.fenced(of(act.Fence, made)[0])) == (Outcome.CANCELLED, "")
    assert outcome(d.fenced(of(act.Fence, made)[1])) == (Outcome.LOST, "P1: cancel late")
    assert len(d.core) == 1


def test_a_lost_pair_of_two() -> None:
    d = Decoder()
    lost, lives = d.ready(), d.ready()
    d.start(lost, lives)
    made = d.core.remove(d.now, lost)
    assert said(made) == [Bye(), Cancel(1)]
    assert d.hear(lives, Cancelled(1)) == []
    (fence,) = of(act.Fence, d.revoked(lost))
    assert fence.pairs == (lives,)


def test_a_fence_that_fails_costs_the_pair() -> None:
    d = Decoder()
    one, other = d.ready(), d.ready()
    d.start(one, other)
    d.core.cancel(d.now, 1)
    d.hear(one, Cancelled(1))
    d.hear(other, Cancelled(1))
    made = d.core.fence_failed(d.now, 1, one, "STILL_COPIED")
    assert over(made) == (PairEnd.FENCE, True)
    assert d.core.fence_failed(d.now, 1, one, "STILL_COPIED") == []
    (fence,) = of(act.Fence, d.revoked(one))
    assert fence.pairs == (other,)
    assert outcome(d.fenced(fence))[0] is Outcome.CANCELLED


def test_each_pair_fails_a_fence_once() -> None:
    d = Decoder()
    one, other = d.ready(), d.ready()
    d.start(one, other)
    d.core.cancel(d.now, 1)
    d.hear(one, Cancelled(1))
    d.hear(other, Cancelled(1))
    d.core.fence_failed(d.now, 1, one, "")
    d.revoked(one)
    d.granted(one)
    d.hear(one, Welcome(b"P" * 16, b"B" * 16))  # with new grants
    assert d.core.fence_failed(d.now, 1, one, "") == [act.Fence(1, (other,), 10, (0, 0, 0))]
    d.core.fence_failed(d.now, 1, other, "")
    (fence,) = of(act.Fence, d.revoked(other))
    assert fence.pairs == ()
    assert d.core.pairs() == {one: PairState.READY, other: PairState.GRANTING}


def test_a_fence_that_fails_on_a_pair_that_is_gone_is_done_again() -> None:
    d = Decoder()
    pair = d.ready()
    d.start(pair)
    d.core.cancel(d.now, 1)
    d.hear(pair, Cancelled(1))
    d.core.remove(d.now, pair)
    d.revoked(pair)
    (fence,) = d.core.fence_failed(d.now, 1, pair, "late")
    assert fence == act.Fence(1, (), 10, (0, 0, 0))


def test_more_than_was_asked_for() -> None:
    d = Decoder()
    pair = d.ready()
    d.start(pair)
    assert said(d.core.counted(d.now, 10, 4)) == [Cancel(1)]
    (fence,) = d.hear(pair, Cancelled(1))
    assert isinstance(fence, act.Fence)
    assert outcome(d.fenced(fence, 4))[0] is Outcome.OVERRUN


def test_a_fault_is_no_verdict() -> None:
    d = Decoder()
    pair = d.ready()
    started = d.start(pair)
    made = d.core.faulted(d.now, 11)
    assert made[0] == act.Acknowledge(11)
    assert said(made) == [Ask(1)]
    assert d.core.faulted(d.now, 10) == [act.Acknowledge(10)]
    assert Ask(1) in said(d.wait(1.0))  # again
    assert outcome(d.land(started))[0] is Outcome.COMPLETE
    assert Ask(1) not in said(d.wait(1.5))
    assert d.core.faulted(d.now, 11) == [act.Acknowledge(11)]  # nobody's


def test_counts_that_were_lost_here() -> None:
    d = Decoder()
    one, other = d.ready(), d.ready()
    d.start(one, other)
    assert d.hear(one, Pushed(1)) == []  # nobody asked
    d.core.faulted(d.now, 10)
    d.hear(one, Pushed(1))
    assert Cancel(1) not in said(d.wait(1.1))
    d.hear(other, Pushed(1))
    assert Cancel(1) in said(d.wait(1.0))
    d.hear(one, Cancelled(1))
    (fence,) = of(act.Fence, d.hear(other, Cancelled(1)))
    assert outcome(d.fenced(fence))[0] is Outcome.FAULTED


# ---- messages that may not have arrived ----


def test_what_was_not_delivered_is_said_again() -> None:
    d = Decoder()
    pair = d.ready()
    made = d.core.start(d.now, [pair], wanted())
    (first,) = of(act.Send, made)
    assert d.core.undelivered(d.now, first.key, dead=False) == []
    assert d.core.undelivered(d.now, first.key, dead=False) == []
    (again,) = of(act.Send, d.wait(0.3))
    assert again.letters == first.letters
    (cancel,) = of(act.Send, d.core.cancel(d.now, 1))
    d.core.undelivered(d.now, first.key, dead=False)  # of no use any more
    d.core.undelivered(d.now, cancel.key, dead=False)
    assert said(d.wait(0.3)) == [Cancel(1)]
    d.hear(pair, Cancelled(1))
    d.core.undelivered(d.now, cancel.key, dead=False)
    assert said(d.wait(0.3)) == []


def test_what_was_not_delivered_of_an_earlier_epoch() -> None:
    d = Decoder()
    pair = d.ready()
    (sent,) = of(act.Send, d.core.start(d.now, [pair], wanted()))
    d.wait(3.0)
    d.revoked(pair)
    assert d.core.undelivered(d.now, sent.key, dead=True) == []
    assert d.core.pairs() == {pair: PairState.GRANTING}


# ---- bad input ----


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"groups": (pages(1, PAGES),)}, "page 100 is out of range"),
        ({"groups": (pages(1, 2, 1),)}, "page 1 is listed twice"),
        ({"groups": (b"abc",)}, "has 3 bytes"),
        ({"groups": ()}, "0 groups of pages; the layout has 1"),
        ({"groups": (bytes(4 * 65_537),)}, "pages in all"),
        ({"counts": (1, 2)}, "counts are 3 numbers"),
        ({"counts": (1, 2, -1)}, "counts are 3 numbers"),
        ({"counts": (0, 0, 0)}, "not all 0"),
        ({"deadline_s": 0.0}, "deadline_s is above 0"),
        ({"deadline_s": 3601.0}, "deadline_s is above 0"),
        ({"deadline_s": float("nan")}, "deadline_s is above 0"),
        ({"request_id": b""}, "request_id has from 1 to 256 bytes, not 0"),
        ({"tokens": 0}, "tokens is from 1"),
        ({"first_token": -1}, "first_token is from 0"),
        ({"readers": 0}, "readers is from 1"),
        ({"tail_offset": -1}, "tail_offset is from 0"),
    ],
)
def test_bad_transfers(other: dict[str, Any], text: str) -> None:
    d = Decoder()
    pair = d.ready()
    with pytest.raises(InvalidRequest, match=text):
        d.core.start(d.now, [pair], wanted(**other))
    assert (len(d.core), d.core.free_blocks) == (0, 2)
    assert d.start(pair).transfer == 1


def test_bad_pairs_of_a_transfer() -> None:
    d = Decoder()
    pair = d.ready()
    for chosen in ([], [pair, pair], list(range(65))):
        with pytest.raises(InvalidRequest, match="different numbers"):
            d.core.start(d.now, chosen, wanted())
    with pytest.raises(Conflict, match="pair 9 is gone"):
        d.core.start(d.now, [9], wanted())
    d.core.remove(d.now, pair)
    with pytest.raises(Conflict, match="REVOKING"):
        d.core.start(d.now, [pair], wanted())


def test_no_immediates_left() -> None:
    d = Decoder(blocks=1)
    pair = d.ready()
    d.start(pair)
    with pytest.raises(QuotaExceeded) as caught:
        d.start(pair)
    assert caught.value.reason == "IMMS"


def test_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "WINDOW", 3)
    d = Decoder()
    pair = d.ready()
    d.start(pair)
    for _ in range(2):
        d.land(d.start(pair))
    with pytest.raises(QuotaExceeded) as caught:
        d.start(pair)
    assert caught.value.reason == "WINDOW"
    d.core.cancel(d.now, 1)
    (fence,) = of(act.Fence, d.hear(pair, Cancelled(1)))
    d.fenced(fence)
    assert d.start(pair).transfer == 4
    assert [ping.low for ping in said(d.wait(1.0)) if isinstance(ping, Ping)] == [4]


def test_bad_letters() -> None:
    d = Decoder()
    pair = d.ready()
    d.start(pair)
    token = d.tokens[pair]
    for letter in (
        b"",
        b"\xff" * 20,
        fragments.cut(b"\xff\xff", to=token)[0],
        fragments.cut(b"", to=token)[0],
        fragments.cut(messages.encode(Welcome(b"short", b"B" * 16)), to=token)[0],
        fragments.cut(bytes(9000), to=token, number=1)[0],
    ):
        assert d.core.receive(d.now, letter) == []
    assert d.core.statistics.malformed == 6
    d.core.receive(d.now, fragments.cut(messages.encode(Bye()), to=b"?" * 16)[0])
    d.core.receive(d.now, fragments.cut(messages.encode(Bye()), sender=b"?" * 16)[0])
    assert d.core.statistics.strangers == 2
    for message in (
        Cancelled(1),  # nobody cancelled
        Cancelled(77),
        Failed(77, Reason.BUSY, ""),
        Pushed(77),
        Refused(Reason.BUSY, ""),  # after the Welcome
        Ping(1, 1),  # the wrong way round
        Cancel(1),
    ):
        assert d.hear(pair, message) == []
    assert d.core.statistics.unexpected == 7
    assert len(d.core) == 1
    assert d.core.pairs() == {pair: PairState.READY}


def test_nobody_speaks_for_another_prefiller() -> None:
    d = Decoder()
    one, other = d.ready(), d.ready()
    d.start(one)
    assert d.hear(other, Failed(1, Reason.BUSY, "")) == []
    d.core.cancel(d.now, 1)
    assert d.hear(other, Cancelled(1)) == []
    assert list(kinds(d.hear(one, Cancelled(1)))) == ["Fence"]


def test_time_that_goes_back_stands_still() -> None:
    d = Decoder()
    pair = d.ready()
    d.start(pair, deadline_s=2.0)
    assert d.core.tick(d.now - 50) == []
    assert d.core.due() == d.now + 1.0


def test_close() -> None:
    d = Decoder()
    ready, greeting = d.ready(), d.greet()
    d.start(ready)
    made = d.core.close(d.now)
    assert len(of(act.Revoke, made)) == 2
    with pytest.raises(Conflict, match="closes"):
        d.add()
    made = d.revoked(ready) + d.revoked(greeting)
    (fence,) = of(act.Fence, made)
    assert outcome(d.fenced(fence))[0] is Outcome.CANCELLED
    assert (d.core.pairs(), len(d.core), d.core.due()) == ({}, 0, None)


def test_a_table_ignores_what_it_does_not_list() -> None:
    pair = type("Thing", (), {"state": PairState.GRANTING})()
    assert not PAIR.step(pair, PairEvent.WELCOME)
    assert pair.state is PairState.GRANTING
