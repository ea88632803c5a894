# SPDX-License-Identifier: Apache-2.0
"""The prefiller's machines: a pair with a decoder rank, a transfer, and a prefill."""

from __future__ import annotations

import enum

from transferd.kv.protocol.tables import Row, Table


class PairState(enum.Enum):
    """Of a pair."""

    OPEN = "OPEN"
    CLOSING = "CLOSING"
    GONE = "GONE"


class PairEvent(enum.Enum):
    """What moves a pair."""

    HELLO = "the same Hello again"
    OVER = "Hello of a later epoch, Bye, silence for its `timeout_ms`, mailbox dead, grants dead"
    EMPTY = "no job of it is under way"


PAIR: Table[PairState, PairEvent] = Table(
    "prefiller: pair",
    Row(PairState.OPEN, PairEvent.HELLO, PairState.OPEN, "the same Welcome again"),
    Row(PairState.OPEN, PairEvent.OVER, PairState.CLOSING, "its transfers stop; nothing is said"),
    Row(PairState.CLOSING, PairEvent.EMPTY, PairState.GONE, "its token means nothing any more"),
)


class State(enum.Enum):
    """Of a transfer."""

    WAITING = "WAITING"
    PUSHING = "PUSHING"
    STOPPING = "STOPPING"
    ENDED = "ENDED"


class Event(enum.Enum):
    """What moves a transfer."""

    PREFILL = "its prefill begins, or was there"
    MORE = "more tokens are computed"
    STOP = (
        "Cancel, deadline, a write failed, prefill aborted or too short, Request that differs, "
        "pair over"
    )
    IDLE = "the last job has ended"
    WHOLE = "all tokens and the tail are pushed, the last job has ended well"


TRANSFER: Table[State, Event] = Table(
    "prefiller: transfer",
    Row(State.WAITING, Event.PREFILL, State.PUSHING, "push of what is computed so far"),
    Row(State.WAITING, Event.STOP, State.STOPPING, "it has no job, so it ends at once"),
    Row(State.PUSHING, Event.MORE, State.PUSHING, "push of what is new; the tail with the last"),
    Row(State.PUSHING, Event.WHOLE, State.ENDED, "remembered as pushed; nothing is said"),
    Row(State.PUSHING, Event.STOP, State.STOPPING, "no more pushes; its jobs are cancelled"),
    Row(State.STOPPING, Event.IDLE, State.ENDED, "remembered; Cancelled where asked, else Failed"),
)


class PrefillState(enum.Enum):
    """Of a prefill."""

    COMPUTING = "COMPUTING"
    HELD = "HELD"
    ABORTED = "ABORTED"
    RELEASED = "RELEASED"


class PrefillEvent(enum.Enum):
    """What moves a prefill."""

    COMPUTED = "the engine has computed more"
    FINISHED = "the engine is through"
    ABORTED = "the engine gives it up"
    READ = "every decoder rank that wants it has ended its transfer, or declined"
    LEASE = "`lease_s` without a transfer"
    IDLE = "no job reads its pages"


_S, _E = PrefillState, PrefillEvent
PREFILL: Table[PrefillState, PrefillEvent] = Table(
    "prefiller: prefill",
    Row(_S.COMPUTING, _E.COMPUTED, _S.COMPUTING, "its transfers push"),
    Row(_S.COMPUTING, _E.FINISHED, _S.HELD, "its transfers push the rest and the tail"),
    Row(_S.COMPUTING, _E.ABORTED, _S.ABORTED, "its transfers stop: Failed"),
    Row(_S.HELD, _E.ABORTED, _S.ABORTED, "its transfers stop: Failed"),
    Row(_S.HELD, _E.READ, _S.RELEASED, "pages are free"),
    Row(_S.HELD, _E.LEASE, _S.RELEASED, "pages are free"),
    Row(_S.ABORTED, _E.IDLE, _S.RELEASED, "pages are free"),
)

TABLES = (PAIR, TRANSFER, PREFILL)
