# SPDX-License-Identifier: Apache-2.0
"""The transition tables: each row is walked, others change nothing, README.md has them."""

from __future__ import annotations

import enum
import itertools
from typing import Any

import pytest

from transferd.kv.protocol import actions as act
from transferd.kv.protocol import decoder_tables, prefiller_tables, tables
from transferd.kv.protocol.messages import Bye, Cancel, Cancelled
from transferd.kv.protocol.tables import Row, Table

from support import tree
from support.kvcores import Decoder, Prefiller, of, request

ALL = (*decoder_tables.TABLES, *prefiller_tables.TABLES)
README = tree.ROOT / "client" / "kv" / "README.md"


def members(one: enum.Enum) -> list[enum.Enum]:
    return list(type(one))


def decoder_tour() -> None:
    d = Decoder(blocks=8)
    pair = d.ready()
    d.land(d.start(pair))
    d.start(pair)
    d.core.cancel(d.now, 2)
    (fence,) = of(act.Fence, d.hear(pair, Cancelled(2)))
    d.fenced(fence)
    d.start(pair)
    d.core.cancel(d.now, 3)
    d.hear(pair, Cancelled(3))
    d.core.fence_failed(d.now, 3, pair, "")
    d.revoked(pair)
    d.core.remove(d.now, pair)
    d.revoked(pair)
    d.hear(d.greet(), Bye())
    d.core.remove(d.now, d.greet())
    pair = d.ready()
    started = d.start(pair)
    d.hear(pair, Bye())
    d.land(started)
    pair = d.ready()
    d.start(pair)
    d.hear(pair, Bye())
    d.core.remove(d.now, pair)
    pair = d.ready()
    d.core.cancel(d.now, d.start(pair).transfer)
    d.wait(2.5)


def prefiller_tour() -> None:
    p = Prefiller()
    pair = p.open()
    p.greet()
    p.hear(pair, request(1))
    p.core.prefill(p.now, b"request")
    for push in of(act.Push, p.finish()):
        p.pushed(push)
    p.hear(pair, request(2, request_id=b"other"))
    p.hear(pair, Cancel(2))
    p.core.prefill(p.now, b"read by nobody")
    p.core.finished(p.now, b"read by nobody")
    p.wait(2.0)
    p.core.prefill(p.now, b"held")
    p.core.finished(p.now, b"held")
    p.core.aborted(p.now, b"held", "")
    p.hear(pair, request(3, request_id=b"more"))
    p.core.prefill(p.now, b"more")
    p.core.computed(p.now, b"more", 1)
    p.core.aborted(p.now, b"more", "")
    p.wait(40.0)
    p.core.pushed(p.now, act.TransferKey(pair, 3), 0)


@pytest.mark.parametrize(
    ("walked", "tour"),
    [(decoder_tables.TABLES, decoder_tour), (prefiller_tables.TABLES, prefiller_tour)],
    ids=["decoder", "prefiller"],
)
def test_every_row_is_walked(
    walked: tuple[Table[Any, Any], ...], tour: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {(table.name, row.state, row.event) for table in walked for row in table.rows}
    step = Table.step

    def record(self: Table[Any, Any], thing: Any, event: Any) -> bool:
        left.discard((self.name, thing.state, event))
        return step(self, thing, event)

    monkeypatch.setattr(tables.Table, "step", record)
    tour()
    assert left == set()


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.name)
def test_what_is_in_no_row_changes_nothing(table: Table[Any, Any]) -> None:
    rows = {(row.state, row.event): row.becomes for row in table.rows}
    states, events = members(table.rows[0].state), members(table.rows[0].event)
    for state, event in itertools.product(states, events):
        thing = type("Thing", (), {"state": state})()
        assert table.step(thing, event) == table.allows(thing, event) or (state, event) in rows
        assert thing.state is rows.get((state, event), state)


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.name)
def test_every_state_is_reached_and_left(table: Table[Any, Any]) -> None:
    first = table.rows[0].state
    states = members(first)
    assert {row.becomes for row in table.rows} | {first} == set(states)
    assert {row.state for row in table.rows} == set(states[:-1])
    assert {row.event for row in table.rows} == set(members(table.rows[0].event))


def test_a_row_twice() -> None:
    class State(enum.Enum):
        ON = "on"

    class Event(enum.Enum):
        PUSH = "push"

    row = Row(State.ON, Event.PUSH, State.ON, "")
    with pytest.raises(ValueError, match="listed twice"):
        Table("lamp", row, row)


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.name)
def test_readme_has_the_tables(table: Table[Any, Any]) -> None:
    text = "\n".join(table.markdown())
    assert text in README.read_text(), f"put the table of {table.name} there:\n{text}"
