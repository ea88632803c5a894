# SPDX-License-Identifier: Apache-2.0
"""Messages of KV-cache transfer: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferd.client.errors import InvalidRequest
from transferd.kv.protocol import bounds, fragments, messages
from transferd.kv.protocol.bounds import Settings
from transferd.kv.protocol.decoder import DecoderCore
from transferd.kv.protocol.decoder_pairs import Identity
from transferd.kv.protocol.fragments import Partials
from transferd.kv.protocol.messages import (
    Ask,
    BadMessageError,
    Bye,
    Cancel,
    Cancelled,
    Decline,
    Failed,
    Ping,
    Pong,
    Pushed,
    Reason,
    Refused,
    Welcome,
)
from transferd.kv.protocol.timers import Timers
from transferd.kv.v1 import protocol_pb2 as wire

from support.kvcores import hello, pages, request

if TYPE_CHECKING:
    from transferd.kv.protocol.messages import Message

TOKEN = b"T" * 16

EVERY: list[Message] = [
    hello(layout=b"layout"),
    request(5, low=2),
    Cancel(1),
    Decline(b"request", 2),
    Ask(1),
    Ping(1, 2),
    Welcome(TOKEN, TOKEN),
    Refused(Reason.FINGERPRINT, "dtype of k: float16 here, bfloat16 there"),
    Cancelled(1),
    Failed(1, Reason.WRITE, "ü"),
    Pushed(1),
    Pong(1, draining=True),
    Bye(),
]


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_what_goes_in_comes_out(message: Message) -> None:
    assert messages.decode(messages.encode(message)) == message


def test_every_kind_is_tried() -> None:
    kinds = {field.name for field in wire.Message.DESCRIPTOR.fields}
    assert {type(message).__name__.lower() for message in EVERY} == kinds
    assert {int(reason) for reason in Reason} == {
        value.number for value in wire.Reason.DESCRIPTOR.values if value.number
    }


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (hello(decoder=b"short"), "decoder has from 16 to 16 bytes, not 5"),
        (hello(token=b""), "token has"),
        (hello(epoch=0), "epoch is from 1"),
        (hello(mailbox=b""), "mailbox has"),
        (hello(mailbox=bytes(1025)), "mailbox has"),
        (hello(grants=()), "grants is from 1"),
        (hello(grants=(("", b"g"),)), "region has"),
        (hello(grants=(("x" * 65, b"g"),)), "region has"),
        (hello(grants=(("x", b""),)), "descriptor has"),
        (hello(grants=(("x", b"g"), ("x", b"h"))), "named twice"),
        (hello(imm_first=1 << 20), "imm_first is from"),
        (hello(imm_first=10, imm_count=(1 << 20) - 9), "imm_count is from 1 to 1048566"),
        (hello(imm_count=0), "imm_count is from"),
        (hello(stages=0), "stages is from"),
        (hello(stages=257), "stages is from"),
        (hello(fingerprint=b""), "fingerprint has"),
        (hello(layout=bytes(131_073)), "layout has"),
        (hello(timeout_ms=0), "timeout_ms is from"),
        (request(0), "transfer is from 1"),
        (request(1 << 63), "transfer is from 1"),
        (request(5, low=0), "low is from"),
        (request(5, low=6), "low is from 1 to 5"),
        (request(70_000, low=1), "low is from 4465 to 70000"),
        (request(groups=(b"",) * 65), "groups is from"),
        (request(groups=(bytes(4 * 65_537),)), "pages in all"),
        (request(imm=1 << 20), "imm is from"),
        (request(tokens=0), "tokens is from"),
        (request(first_token=(1 << 31) + 1), "first_token is from"),
        (request(deadline_ms=0), "deadline_ms is from"),
        (request(readers=1025), "readers is from"),
        (request(tail_offset=1 << 63), "tail_offset is from"),
        (Cancel(0), "transfer is from"),
        (Decline(b"", 1), "request_id has"),
        (Decline(bytes(257), 1), "request_id has"),
        (Decline(b"request", 0), "readers is from"),
        (Decline(b"request", 1025), "readers is from"),
        (Ping(0, 1), "number is from"),
        (Ping(1, 0), "low is from"),
        (Pong(0, draining=False), "number is from"),
        (Welcome(b"", TOKEN), "token has"),
        (Welcome(TOKEN, b""), "boot has"),
        (Failed(1, Reason.WRITE, "x" * 513), "detail has"),
    ],
)
def test_out_of_bounds(message: Message, text: str) -> None:
    with pytest.raises(BadMessageError, match=text):
        messages.decode(messages.encode(message))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"",
        wire.Message(refused=wire.Refused()).SerializeToString(),
        b"\x4a\x04\x08\x01\x10\x63",  # Failed, reason 99
        b"\xfa\x07\x00",  # a kind of the future
        b"\x3a\x05\x08\x01\x12\x01\xff",  # text that is no UTF-8
    ],
)
def test_no_message(data: bytes) -> None:
    with pytest.raises(BadMessageError):
        messages.decode(data)


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    for read in (messages.decode, fragments.read):
        with contextlib.suppress(BadMessageError):
            read(data)


@given(st.sampled_from(EVERY), st.data())
def test_damaged_messages(message: Message, data: Any) -> None:
    damaged = bytearray(messages.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadMessageError):
        found = messages.decode(bytes(damaged))
        assert messages.decode(messages.encode(found)) == found


def test_details_are_clipped_between_characters() -> None:
    clipped = messages.clip("x" * 511 + "ü")
    assert clipped == "x" * 511
    failed = Failed(1, Reason.WRITE, messages.clip("\udcff" * 600))
    assert messages.decode(messages.encode(failed)) == failed


# ---- letters ----


@given(st.integers(0, 30_000), st.randoms())
def test_letters_fit_and_find_together_in_any_order(size: int, random: Any) -> None:
    data = random.randbytes(size)
    letters = fragments.cut(data, to=TOKEN, number=bounds.NUMBER_MAX)
    assert all(len(letter) <= bounds.LETTER_BYTES_MAX for letter in letters)
    read = [fragments.read(letter) for letter in letters] * 2
    random.shuffle(read)
    if len(letters) == 1:
        assert read[0].payload == data
        return
    partials = Partials(1, size, 10.0)
    found = []
    for letter in read:
        assert partials.fits(1, letter)
        whole = partials.add(0.0, 1, letter)
        if whole is not None:
            found.append(whole)
            break
    assert found == [data]
    assert len(partials) == 0


def test_the_longest_message_and_a_longer_one() -> None:
    letters = fragments.cut(bytes(fragments.MESSAGE_BYTES_MAX), to=TOKEN, number=1)
    assert len(letters) == bounds.FRAGMENTS_MAX
    with pytest.raises(BadMessageError, match="at most"):
        fragments.cut(bytes(fragments.MESSAGE_BYTES_MAX + 1), to=TOKEN, number=1)
    longest = request(bounds.NUMBER_MAX, low=bounds.NUMBER_MAX, groups=(bytes(4 * 65_536),))
    assert len(fragments.cut(messages.encode(longest), to=TOKEN, number=1)) < 40


@pytest.mark.parametrize(
    "letter",
    [
        wire.Letter(),
        wire.Letter(to=b"short"),
        wire.Letter(to=TOKEN, sender=TOKEN),
        wire.Letter(to=TOKEN, index=1),
        wire.Letter(to=TOKEN, number=1, index=2, count=2),
        wire.Letter(to=TOKEN, number=1, index=0, count=41),
        wire.Letter(to=TOKEN, number=0, index=0, count=2),
        wire.Letter(to=TOKEN, number=1 << 63, index=0, count=2),
        wire.Letter(to=TOKEN, payload=bytes(8193)),
    ],
)
def test_bad_letters(letter: wire.Letter) -> None:
    with pytest.raises(BadMessageError):
        fragments.read(letter.SerializeToString())


def test_partials_are_bounded_and_expire() -> None:
    partials = Partials(2, 20_000, 10.0)
    one = [fragments.read(data) for data in fragments.cut(bytes(20_000), to=TOKEN, number=1)]
    assert partials.fits("a", one[0])
    partials.add(0.0, "a", one[0])
    partials.add(1.0, "b", one[0])
    assert not partials.fits("c", one[2])  # too many
    assert not partials.fits("b", one[1])  # too much
    assert partials.fits("a", one[2])
    assert partials.due() == 10.0
    assert list(partials.expire(9.9)) == []
    assert list(partials.expire(10.0)) == ["a"]
    assert partials.fits("b", one[1])
    assert partials.drop_oldest()
    assert not partials.drop_oldest()
    assert partials.due() is None


# ---- pages ----


@given(st.lists(st.lists(st.integers(0, 12), max_size=8), max_size=4))
def test_pages_are_checked_as_sets_say(groups: list[list[int]]) -> None:
    good = all(len(set(group)) == len(group) and max(group, default=0) < 10 for group in groups)
    limits = [10] * len(groups)
    raw = [pages(*group) for group in groups]
    if good:
        messages.check_pages(raw, limits)
    else:
        with pytest.raises(BadMessageError, match=r"out of range|listed twice"):
            messages.check_pages(raw, limits)


# ---- times ----


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"heartbeat_s": 0}, "heartbeat_s is a number above 0"),
        ({"cancel_s": -1.0}, "cancel_s is a number above 0"),
        ({"cancel_s": float("nan")}, "cancel_s is a number above 0"),
        ({"lease_s": "1"}, "lease_s is a number"),
        ({"pairs": True}, "pairs is a number"),
        ({"heartbeat_s": 2.0}, "at least twice heartbeat_s"),
        ({"timeout_s": 601.0}, "at most 600"),
    ],
)
def test_bad_settings(other: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        Settings(**other)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"decoder": b"short"}, "decoder has"),
        ({"mailbox": b""}, "mailbox has"),
        ({"fingerprint": b""}, "fingerprint has"),
        ({"layout": bytes(1 << 20)}, "layout has"),
        ({"stages": 0}, "stages is from"),
        ({"stages": 9}, "10 immediates do not do|9 immediates do not do"),
    ],
)
def test_bad_identities(other: dict[str, Any], text: str) -> None:
    values: dict[str, Any] = {
        "decoder": TOKEN,
        "mailbox": b"m",
        "imms": range(9),
        "stages": 2,
        "fingerprint": b"f",
    }
    with pytest.raises(InvalidRequest, match=text):
        DecoderCore(Identity(**(values | other)), (10,), token=lambda: TOKEN)


@given(
    st.lists(
        st.tuples(st.sampled_from(["set", "cancel", "due"]), st.integers(0, 5), st.integers(0, 9)),
        max_size=300,
    )
)
def test_timers_are_as_a_dictionary(steps: list[tuple[str, int, int]]) -> None:
    timers, model = Timers(), dict[int, int]()
    for what, key, when in steps:
        if what == "set":
            timers.set(key, when)
            model[key] = when
        elif what == "cancel":
            timers.cancel(key)
            model.pop(key, None)
        else:
            found = [model.pop(taken) for taken in timers.due(when)]  # type: ignore[call-overload]
            assert found == sorted(found)
            assert all(due <= when for due in found)
            assert all(due > when for due in model.values())
        assert timers.next() == min(model.values(), default=None)
        assert len(timers) == len(model)
        assert all(key in timers for key in model)
        assert len(timers._heap) <= 2 * len(model) + 65


def test_what_is_set_while_taking_waits_for_the_next_time() -> None:
    timers = Timers()
    timers.set("a", 1)
    for key in timers.due(5):
        timers.set(key, 2)
    assert timers.next() == 2
    assert list(timers.due(5)) == ["a"]
