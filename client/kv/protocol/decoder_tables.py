# SPDX-License-Identifier: Apache-2.0
"""The decoder's machines: a pair with a prefiller rank, and a transfer."""

from __future__ import annotations

import enum

from transferd.kv.protocol.tables import Row, Table


class PairState(enum.Enum):
    """Of a pair."""

    GRANTING = "GRANTING"
    GREETING = "GREETING"
    READY = "READY"
    DRAINING = "DRAINING"
    REVOKING = "REVOKING"
    GONE = "GONE"


class PairEvent(enum.Enum):
    """What moves a pair."""

    GRANTED = "grants are made"
    WELCOME = "Welcome"
    BYE = "Bye, or Pong that says so"
    LOST = "lost, refused, or removed"
    EMPTY = "its last transfer ended"
    REVOKED_AGAIN = "grants revoked, it may live"
    REVOKED = "grants revoked, it will not be back"


_P, _E = PairState, PairEvent
PAIR: Table[PairState, PairEvent] = Table(
    "decoder: pair",
    Row(_P.GRANTING, _E.GRANTED, _P.GREETING, "Hello, said again until it is answered"),
    Row(_P.GRANTING, _E.LOST, _P.REVOKING, "its transfers end"),
    Row(_P.GREETING, _E.WELCOME, _P.READY, "requests that wait go out; Pings from now on"),
    Row(_P.GREETING, _E.BYE, _P.REVOKING, "its transfers end"),
    Row(_P.GREETING, _E.LOST, _P.REVOKING, "its transfers end"),
    Row(_P.READY, _E.BYE, _P.DRAINING, "new transfers are refused, others go on"),
    Row(_P.READY, _E.LOST, _P.REVOKING, "its transfers end, others live; grants are revoked"),
    Row(_P.DRAINING, _E.EMPTY, _P.REVOKING, "Bye"),
    Row(_P.DRAINING, _E.LOST, _P.REVOKING, "its transfers end"),
    Row(
        _P.REVOKING,
        _E.REVOKED_AGAIN,
        _P.GRANTING,
        "its transfers are quiet; new grants, a new epoch",
    ),
    Row(_P.REVOKING, _E.REVOKED, _P.GONE, "its transfers are quiet"),
)


class State(enum.Enum):
    """Of a transfer."""

    ACTIVE = "ACTIVE"
    STOPPING = "STOPPING"
    FENCING = "FENCING"
    ENDED = "ENDED"


class Event(enum.Enum):
    """What moves a transfer."""

    WHOLE = "all counters are at their targets"
    END = "cancelled by the caller, deadline, Failed, pair lost, counts missing or too many"
    QUIET = "every prefiller is quiet: Cancelled, Failed, grants revoked, or never asked"
    LATE = "`cancel_s` passed"
    FENCED = "fenced, counters level"
    UNFENCED = "the fence failed on a pair"


TRANSFER: Table[State, Event] = Table(
    "decoder: transfer",
    Row(State.ACTIVE, Event.WHOLE, State.ENDED, "complete; immediates and pages are free"),
    Row(State.ACTIVE, Event.END, State.STOPPING, "Cancel to every prefiller that was asked"),
    Row(State.STOPPING, Event.QUIET, State.FENCING, "fence on the grants of the pairs that live"),
    Row(State.STOPPING, Event.LATE, State.STOPPING, "pairs that are not quiet are lost"),
    Row(State.FENCING, Event.FENCED, State.ENDED, "immediates and pages are free"),
    Row(State.FENCING, Event.UNFENCED, State.STOPPING, "that pair is lost"),
)

TABLES = (PAIR, TRANSFER)
