# SPDX-License-Identifier: Apache-2.0
"""The decoder's core: its pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from transferd.client.errors import Conflict, InvalidRequest, QuotaExceeded
from transferd.kv.protocol import actions as act
from transferd.kv.protocol.actions import Kind, Outcome, PairEnd, SendKey
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.decoder_tables import PairState
from transferd.kv.protocol.messages import (
    Bye,
    Failed,
    Hello,
    Pong,
    Reason,
    Refused,
    Welcome,
)

from support.kvcores import GRANTS, WIDTH, Decoder, kinds, of, said

if TYPE_CHECKING:
    from collections.abc import Callable

WELCOME = Welcome(b"P" * 16, b"B" * 16)


def outcome(actions: list[act.Action]) -> tuple[Outcome, str]:
    (ended,) = of(act.Ended, actions)
    return ended.outcome, ended.detail


def over(actions: list[act.Action]) -> tuple[PairEnd, bool]:
    (found,) = of(act.PairOver, actions)
    assert [type(action) for action in actions if isinstance(action, act.Revoke)] == [act.Revoke]
    return found.why, found.again


def test_a_pair_begins() -> None:
    d = Decoder()
    pair = d.add()
    assert d.core.pairs() == {pair: PairState.GRANTING}
    (hello,) = said(d.granted(pair))
    assert isinstance(hello, Hello)
    assert (hello.grants, hello.imm_first, hello.imm_count) == (GRANTS, 10, 2 * WIDTH)
    assert d.core.pairs() == {pair: PairState.GREETING}
    made = d.hear(pair, WELCOME)
    assert list(kinds(made)) == ["PairReady", "Ping"]
    assert d.core.pairs() == {pair: PairState.READY}
    assert d.hear(pair, WELCOME) == []  # once more


def test_hello_is_said_again_until_it_is_answered() -> None:
    d = Decoder()
    pair = d.greet()
    assert list(kinds(d.wait(4.0))) == ["Hello"] * 3  # after 0.5, 1.5, 3.5 s
    d.hear(pair, WELCOME)
    assert "Hello" not in kinds(d.wait(1.0))


def no_answer(d: Decoder, pair: int) -> list[act.Action]:
    return d.wait(40.0)


def removed(d: Decoder, pair: int) -> list[act.Action]:
    return d.core.remove(d.now, pair)


def dead(d: Decoder, pair: int) -> list[act.Action]:
    key = SendKey(pair, d.epochs[pair], Kind.OTHER, 0)
    return d.core.undelivered(d.now, key, dead=True)


@pytest.mark.parametrize(
    ("begin", "how", "why", "again"),
    [
        (Decoder.add, removed, PairEnd.REMOVED, False),
        (
            Decoder.add,
            lambda d, pair: d.core.granted(d.now, pair, d.epochs[pair], ()),
            PairEnd.GRANTS,
            False,
        ),
        (
            Decoder.add,
            lambda d, pair: d.core.granted(d.now, pair, d.epochs[pair], (("", b"g"),)),
            PairEnd.GRANTS,
            False,
        ),
        (
            Decoder.add,
            lambda d, pair: d.core.granted(
                d.now, pair, d.epochs[pair], tuple((str(i), b"g" * 1000) for i in range(1000))
            ),
            PairEnd.GRANTS,
            False,
        ),
        (Decoder.greet, removed, PairEnd.REMOVED, False),
        (Decoder.greet, dead, PairEnd.DEAD, False),
        (Decoder.greet, no_answer, PairEnd.UNREACHABLE, False),
        (Decoder.greet, lambda d, pair: d.hear(pair, Bye()), PairEnd.DRAINED, False),
        (
            Decoder.greet,
            lambda d, pair: d.hear(pair, Refused(Reason.FINGERPRINT, "k")),
            PairEnd.REFUSED,
            False,
        ),
        (Decoder.ready, removed, PairEnd.REMOVED, False),
        (Decoder.ready, dead, PairEnd.DEAD, False),
        (
            Decoder.ready,
            lambda d, pair: d.hear(pair, Welcome(b"Q" * 16, b"B" * 16)),
            PairEnd.RESTARTED,
            True,
        ),
        (
            Decoder.ready,
            lambda d, pair: d.hear(pair, Welcome(b"P" * 16, b"C" * 16)),
            PairEnd.RESTARTED,
            True,
        ),
        (Decoder.ready, lambda d, pair: d.wait(3.0), PairEnd.SILENT, True),
    ],
)
def test_a_pair_is_over(
    begin: Callable[[Decoder], int],
    how: Callable[[Decoder, int], list[act.Action]],
    why: PairEnd,
    again: bool,
) -> None:
    d = Decoder()
    pair = begin(d)
    token = d.tokens.get(pair)
    assert over(how(d, pair)) == (why, again)
    assert d.core.pairs() == {pair: PairState.REVOKING}
    if token is not None:
        d.hear(pair, WELCOME)
        assert d.core.statistics.strangers == 1  # nobody hears that token any more
    assert d.core.granted(d.now, pair, d.epochs[pair], GRANTS) == []
    assert d.core.revoked(d.now, pair, d.epochs[pair] + 1) == []  # of another epoch
    made = d.revoked(pair)
    assert list(kinds(made)) == (["MakeGrants"] if again else ["PairGone"])
    assert d.core.pairs() == ({pair: PairState.GRANTING} if again else {})
    if again:
        d.granted(pair)
        assert d.tokens[pair] != token
        assert list(kinds(d.hear(pair, WELCOME))) == ["PairReady", "Ping"]
    else:
        assert d.core.due() is None
        assert d.core.remove(d.now, pair) == []


def test_a_pair_drains() -> None:
    d = Decoder()
    pair = d.ready()
    started = d.start(pair)
    assert d.hear(pair, Bye()) == []
    assert d.core.pairs() == {pair: PairState.DRAINING}
    with pytest.raises(Conflict) as caught:
        d.start(pair)
    assert caught.value.reason == "DRAINING"
    made = d.land(started)
    assert outcome(made)[0] is Outcome.COMPLETE
    assert over(made) == (PairEnd.DRAINED, False)
    assert Bye() in said(made)
    assert list(kinds(d.revoked(pair))) == ["PairGone"]


def test_a_pair_that_drains_may_be_lost() -> None:
    d = Decoder()
    pair = d.ready()
    d.start(pair)
    d.hear(pair, Pong(1, draining=True))  # the Bye was lost
    assert over(d.wait(4.0)) == (PairEnd.SILENT, False)


def test_bye_of_a_pair_without_transfers() -> None:
    d = Decoder()
    pair = d.ready()
    assert over(d.hear(pair, Bye())) == (PairEnd.DRAINED, False)


def test_a_pair_that_is_removed_while_it_is_revoked_is_not_greeted_anew() -> None:
    d = Decoder()
    pair = d.ready()
    d.wait(3.0)
    d.core.remove(d.now, pair)
    assert list(kinds(d.revoked(pair))) == ["PairGone"]


def test_a_prefiller_that_comes_back_has_a_later_epoch() -> None:
    d = Decoder()
    first = d.core.add(d.now, "P", b"mailbox")[0]
    with pytest.raises(Conflict, match="already"):
        d.core.add(d.now, "P", b"mailbox")
    assert isinstance(first, act.MakeGrants)
    d.core.remove(d.now, first.pair)
    second = d.core.add(d.now, "P", b"mailbox")[0]
    assert isinstance(second, act.MakeGrants)
    assert second.epoch > first.epoch
    assert second.pair > first.pair


def test_pongs_keep_a_pair_alive() -> None:
    d = Decoder()
    pair = d.ready()
    for number in range(1, 20):
        assert "PairOver" not in kinds(d.wait(1.0))
        d.hear(pair, Pong(number, draining=False))
    d.hear(pair, Pong(1, draining=False))  # late, for the second time
    d.hear(pair, Pong(1 << 40, draining=False))  # never sent
    assert d.core.statistics.unexpected == 2
    assert over(d.wait(3.0)) == (PairEnd.SILENT, True)


def test_other_messages_are_no_sign_that_it_hears_us() -> None:
    d = Decoder()
    pair = d.ready()
    d.wait(2.9)
    d.hear(pair, WELCOME)
    d.hear(pair, Failed(77, Reason.BUSY, ""))
    assert over(d.wait(0.2)) == (PairEnd.SILENT, True)


def test_limits_of_pairs() -> None:
    d = Decoder(settings=Settings(pairs=1))
    d.add()
    with pytest.raises(QuotaExceeded) as caught:
        d.add()
    assert caught.value.reason == "PAIRS"
    with pytest.raises(InvalidRequest, match="descriptor"):
        Decoder().core.add(0.0, "P", b"")
