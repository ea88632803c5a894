# SPDX-License-Identifier: Apache-2.0
"""Transition tables as data: the machines step by them, README.md shows them.

A pair of state and event that is not in a table changes nothing: the event came late, twice, or
from a peer that does not keep the protocol.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

State = TypeVar("State", bound=enum.Enum)
Event = TypeVar("Event", bound=enum.Enum)


class Row(NamedTuple, Generic[State, Event]):
    """One transition.

    Attributes:
        state: Before.
        event: What came.
        becomes: Afterwards.
        does: For README.md.
    """

    state: State
    event: Event
    becomes: State
    does: str


class HasState(Protocol[State]):
    """What a table moves."""

    state: State


class Table(Generic[State, Event]):
    """The transitions of one machine."""

    def __init__(self, name: str, *rows: Row[State, Event]) -> None:
        """Takes the rows, in the order in which people read them."""
        self.name = name
        self.rows = rows
        self._becomes = {(row.state, row.event): row.becomes for row in rows}
        if len(self._becomes) != len(rows):
            raise ValueError(f"{name}: a state and an event are listed twice")

    def step(self, thing: HasState[State], event: Event) -> bool:
        """Moves a thing; False: the event means nothing in its state."""
        becomes = self._becomes.get((thing.state, event))
        if becomes is None:
            return False
        thing.state = becomes
        return True

    def allows(self, thing: HasState[State], event: Event) -> bool:
        """Tells whether an event means something in the state of a thing."""
        return (thing.state, event) in self._becomes

    def markdown(self) -> Iterator[str]:
        """Writes the table as README.md has it, line by line."""
        yield "| state | by | becomes | what happens |"
        yield "| --- | --- | --- | --- |"
        for row in self.rows:
            yield f"| {row.state.value} | {row.event.value} | {row.becomes.value} | {row.does} |"
