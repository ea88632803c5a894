# SPDX-License-Identifier: Apache-2.0
"""Who serves a prompt: load, prefixes, leases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import transferd
from transferd.kv.router import policy
from transferd.kv.router.policy import DECODER, PREFILLER, Engine, Fleet, Load, prefix_hashes

PAGE = 4


def engine(name: str, role: str = PREFILLER, boot: int = 1, model: bytes = b"m") -> Engine:
    return Engine(name, role, bytes([boot]) * 16, model, page_tokens=PAGE)


def fleet_of(*engines: Engine) -> Fleet:
    fleet = Fleet(lease_s=2.0)
    for each in engines:
        fleet.join(each, 0.0)
    return fleet


def test_work_spreads_over_equals() -> None:
    fleet = fleet_of(engine("p0"), engine("p1"), engine("d0", DECODER), engine("d1", DECODER))
    chosen = [fleet.route(100, (), (), 0.5) for _ in range(4)]
    assert [c.prefiller.name for c in chosen] == ["p0", "p1", "p0", "p1"]
    assert [c.decoder.name for c in chosen] == ["d0", "d1", "d0", "d1"]


def test_a_report_takes_the_place_of_what_was_routed_before_the_last_one() -> None:
    fleet = Fleet(lease_s=2.0)
    member = fleet.join(engine("p0"), 0.0)
    fleet.join(engine("d0", DECODER), 0.0)
    fleet.route(100, (), (), 0.5)
    fleet.report(member, Load(waiting=7), 1.0)
    assert member.work == 107, "it may not have come yet when the report was sent"
    fleet.report(member, Load(waiting=30), 1.5)
    assert member.work == 30


def test_a_prefix_goes_where_it_was_until_that_one_has_too_much_to_do() -> None:
    fleet = fleet_of(engine("p0"), engine("p1"), engine("d0", DECODER))
    prompt = list(range(40))
    prefix = prefix_hashes(prompt, PAGE)
    first = fleet.route(40, prefix, (), 0.5)
    assert (first.prefiller.name, first.reused_tokens) == ("p0", 0)
    again = fleet.route(41, prefix, (), 0.6)
    assert (again.prefiller.name, again.reused_tokens) == ("p0", 40), "0 + 41 against 40 + 1"
    other = fleet.route(41, prefix, (), 0.7)
    assert other.prefiller.name == "p1" or other.reused_tokens == 40
    fleet.report(next(iter(fleet)), Load(), 1.0)  # d0
    busy = next(m for m in fleet if m.engine.name == "p0")
    fleet.report(busy, Load(waiting=1000), 1.0)
    assert fleet.route(41, prefix, (), 1.1).prefiller.name == "p1"


def test_only_the_beginning_counts() -> None:
    fleet = fleet_of(engine("p0"), engine("d0", DECODER))
    prompt = list(range(16))
    fleet.route(16, prefix_hashes(prompt, PAGE), (), 0.5)
    changed = [99, *prompt[1:]]
    assert fleet.route(16, prefix_hashes(changed, PAGE), (), 0.6).reused_tokens == 0


def test_an_engine_is_forgotten_after_its_lease() -> None:
    fleet = fleet_of(engine("p0"), engine("d0", DECODER))
    for member in fleet:
        fleet.report(member, Load(), 1.0)
    assert fleet.route(1, (), (), 2.9).prefiller.name == "p0"
    with pytest.raises(transferd.Unavailable) as raised:
        fleet.route(1, (), (), 3.0)
    assert raised.value.reason == "NO_DECODER"
    assert "none is registered" in str(raised.value)


def test_a_name_is_taken_while_its_engine_lives() -> None:
    fleet = fleet_of(engine("p0"))
    with pytest.raises(transferd.Conflict) as raised:
        fleet.join(engine("p0", boot=2), 1.0)
    assert raised.value.reason == "NAME_TAKEN"
    fleet.join(engine("p0", boot=2), 2.0)
    assert len(fleet) == 1


def test_the_stream_that_came_later_is_the_engine() -> None:
    fleet = Fleet(lease_s=2.0)
    old = fleet.join(engine("p0"), 0.0)
    new = fleet.join(engine("p0"), 0.5)
    fleet.leave(old)
    assert list(fleet) == [new]
    fleet.leave(new)
    assert not len(fleet)


def test_draining_and_excluded_engines_are_not_chosen() -> None:
    fleet = fleet_of(engine("p0"), engine("p1"), engine("p2"), engine("d0", DECODER))
    drained = next(m for m in fleet if m.engine.name == "p0")
    fleet.report(drained, Load(draining=True), 0.1)
    assert fleet.route(1, (), {"p1"}, 0.2).prefiller.name == "p2"
    with pytest.raises(transferd.Unavailable, match="3 known, 1 of them draining, 2 excluded"):
        fleet.route(1, (), {"p1", "p2"}, 0.2)


def test_pages_go_between_engines_of_one_model() -> None:
    fleet = fleet_of(
        engine("p0", model=b"a"), engine("p1", model=b"b"), engine("d0", DECODER, model=b"b")
    )
    assert fleet.route(1, (), (), 0.1).prefiller.name == "p1"


def test_a_decoder_without_free_pages_is_the_last_choice() -> None:
    fleet = fleet_of(engine("p0"), engine("d0", DECODER), engine("d1", DECODER))
    full = next(m for m in fleet if m.engine.name == "d0")
    fleet.report(full, Load(waiting=0, free_pages=0), 0.1)
    assert {fleet.route(1, (), (), 0.2).decoder.name for _ in range(3)} == {"d1"}


def test_remembered_prefixes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "PREFIXES_MAX", 8)
    fleet = fleet_of(engine("p0"), engine("d0", DECODER))
    member = next(m for m in fleet if m.engine.role == PREFILLER)
    for start in range(10):
        fleet.route(20, range(100 * start, 100 * start + 5), (), 0.1)
    assert len(member.prefixes) == 8
    assert member.hit(range(900, 905)) == 5, "the newest stay"


@given(
    st.lists(st.integers(0, 3), max_size=24),
    st.lists(st.integers(0, 3), max_size=24),
    st.integers(1, 5),
)
def test_hashes_agree_exactly_on_common_pages(
    one: list[int], other: list[int], page_tokens: int
) -> None:
    first, second = prefix_hashes(one, page_tokens), prefix_hashes(other, page_tokens)
    assert len(first) == len(one) // page_tokens
    for count in range(1, min(len(first), len(second)) + 1):
        equal = one[: count * page_tokens] == other[: count * page_tokens]
        assert (first[count - 1] == second[count - 1]) is equal
