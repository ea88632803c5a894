# SPDX-License-Identifier: Apache-2.0
"""The prefiller's core: messages of several parts."""

from __future__ import annotations

from transferd.kv.protocol import actions as act
from transferd.kv.protocol import fragments, messages
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.messages import (
    Cancel,
    Cancelled,
    Failed,
    Reason,
)
from transferd.kv.protocol.prefiller import PrefillerCore
from transferd.kv.protocol.prefiller_pairs import Terms

from support.kvcores import Prefiller, hello, kinds, pages, request, said, tokens


def failure(actions: list[act.Action]) -> tuple[Reason, str]:
    (failed,) = [message for message in said(actions) if isinstance(message, Failed)]
    return failed.reason, failed.detail


MANY = tuple(range(5000))


def wide(settings: Settings | None = None) -> Prefiller:
    """A prefiller of decoders with 5,000 pages."""
    p = Prefiller(settings)
    p.core = PrefillerCore(
        b"B" * 16,
        lambda hello: Terms((5000,), 1000),
        token=tokens(),
        settings=settings,
    )
    return p


def test_parts_in_any_order_twice() -> None:
    p = wide()
    pair = p.open()
    letters = p.letters(pair, request(groups=(pages(*MANY),)))
    assert len(letters) == 3
    for i in (2, 0, 2):
        assert p.core.receive(p.now, letters[i]) == []
    (arrived,) = p.core.receive(p.now, letters[1])
    assert isinstance(arrived, act.Arrived)
    assert arrived.request.groups == (pages(*MANY),)
    assert p.core.receive(p.now, letters[1]) == []
    assert p.core.partials() == 0


def test_parts_that_do_not_come() -> None:
    p = wide()
    pair = p.open(timeout_ms=600_000)
    letters = p.letters(pair, request(groups=(pages(*MANY),)))
    p.core.receive(p.now, letters[0])
    assert failure(p.wait(10.0))[0] is Reason.BAD_REQUEST
    assert p.core.receive(p.now, letters[1]) == []
    assert p.core.partials() == 0


def test_parts_of_a_request_that_is_cancelled() -> None:
    p = wide()
    pair = p.open()
    letters = p.letters(pair, request(groups=(pages(*MANY),)))
    p.core.receive(p.now, letters[0])
    assert said(p.hear(pair, Cancel(1))) == [Cancelled(1)]
    assert p.core.partials() == 0
    p.core.receive(p.now, letters[1])
    assert p.core.partials() == 0


def test_too_many_parts_at_once() -> None:
    p = wide(Settings(partials=2))
    pair = p.open()
    for number in (1, 2):
        p.core.receive(p.now, p.letters(pair, request(number, groups=(pages(*MANY),)))[0])
    made = p.core.receive(p.now, p.letters(pair, request(3, groups=(pages(*MANY),)))[0])
    assert failure(made)[0] is Reason.BUSY
    assert p.core.partials() == 2


def test_parts_that_disagree() -> None:
    p = wide()
    pair = p.open()
    p.core.receive(p.now, p.letters(pair, request(groups=(pages(*MANY),)))[0])
    p.core.receive(p.now, p.letters(pair, request(groups=(pages(*MANY[:2500]),)))[0])
    assert (p.core.statistics.malformed, p.core.partials()) == (1, 0)
    other = fragments.cut(
        messages.encode(request(2, groups=(pages(*MANY),))), to=p.tokens[pair], number=3
    )
    for letter in other:
        p.core.receive(p.now, letter)
    assert (p.core.statistics.malformed, len(p.core)) == (2, 0)


def test_a_long_hello() -> None:
    p = Prefiller(Settings(partials=2))
    letters = fragments.cut(
        messages.encode(hello(layout=bytes(100_000))), sender=b"D" * 16, number=1
    )
    assert len(letters) == 13
    for sender in (b"E", b"F", b"G"):  # strangers, who begin and do not go on
        first = fragments.cut(bytes(20_000), sender=sender * 16, number=1)[0]
        p.core.receive(p.now, first)
    for letter in reversed(letters):
        made = p.core.receive(p.now, letter)
    assert list(kinds(made)) == ["Open", "Welcome"]
    assert p.core.partials() == 1
    p.wait(20.0)
    assert (p.core.partials(), p.core.pairs(), p.core.due()) == (0, {}, None)
