# SPDX-License-Identifier: Apache-2.0
"""What the cores ask of whoever runs them, to be carried out in the order of the list.

Each says which event has to follow, if any. All may take their time, but for the order between
:class:`MakeGrants` and :class:`Revoke` of one pair.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transferd.kv.protocol.messages import Decline, Hello, Request


@dataclass(slots=True)
class Statistics:
    """What a core has ignored.

    Attributes:
        malformed: Letters that were none, or out of bounds.
        strangers: Letters for no pair that lives.
        unexpected: Messages that fit no state: late, twice, or from a peer that breaks the rules.
    """

    malformed: int = 0
    strangers: int = 0
    unexpected: int = 0


class Kind(enum.Enum):
    """Of a message, as :class:`SendKey` has it."""

    HELLO = "hello"
    REQUEST = "request"
    CANCEL = "cancel"
    DECLINE = "decline"
    ANSWER = "answer"  # Cancelled, Failed, Pushed
    OTHER = "other"  # is said again anyhow, or need not arrive


class SendKey(NamedTuple):
    """Names a message in ``undelivered``.

    Attributes:
        pair: Number of the pair; 0: of none.
        epoch: Of the pair.
        kind: Of the message.
        transfer: That it is of; 0: of none.
        decline: A Decline itself, which is kept nowhere else.
    """

    pair: int
    epoch: int
    kind: Kind
    transfer: int
    decline: Decline | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Send these letters to a mailbox, in any order, each with a deadline of ``timeout_s``.

    Event: ``undelivered``, if any of them did not end with OK.
    """

    mailbox: bytes
    letters: tuple[bytes, ...]
    key: SendKey


# ---- decoder ----


class Outcome(enum.Enum):
    """How a transfer ended for the decoder."""

    COMPLETE = "complete"  # every page and the tail are here
    CANCELLED = "cancelled"  # by the caller
    DEADLINE = "deadline"
    FAILED = "failed"  # a prefiller said so: the reason is in the detail
    LOST = "lost"  # a prefiller of it is lost or gone
    FAULTED = "faulted"  # counts of what was pushed are missing
    OVERRUN = "overrun"  # more was counted than was asked for


class PairEnd(enum.Enum):
    """Why a decoder gives up a pair, or its epoch."""

    REMOVED = "removed"  # by the caller
    DRAINED = "drained"  # the prefiller leaves
    REFUSED = "refused"
    UNREACHABLE = "unreachable"  # no answer to any Hello
    DEAD = "dead"  # its mailbox is gone
    SILENT = "silent"  # no answer to a Ping in time
    CANCEL_LATE = "cancel late"  # no answer to a Cancel in time
    RESTARTED = "restarted"  # it made the pair anew, and knows nothing of the transfers
    FENCE = "fence"  # a fence on its grants failed
    GRANTS = "grants"  # the grants could not be made


@dataclass(frozen=True, slots=True)
class MakeGrants:
    """Grant each region of the cache to a prefiller, on all immediates. Event: ``granted``."""

    pair: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Revoke:
    """Revoke the grants of a pair's epoch, if there are any; where it fails, try again.

    Event: ``revoked``, once no byte can land by any of them.
    """

    pair: int
    epoch: int


@dataclass(frozen=True, slots=True)
class PairReady:
    """A prefiller answers, and takes requests."""

    pair: int


@dataclass(frozen=True, slots=True)
class PairOver:
    """A pair takes no requests; its transfers end.

    Attributes:
        pair: Which.
        why: Reason.
        detail: For people.
        again: It will be greeted anew; else its number is of no use any more.
    """

    pair: int
    why: PairEnd
    detail: str
    again: bool


@dataclass(frozen=True, slots=True)
class PairGone:
    """The grants of a pair that is over are revoked, and the number is forgotten."""

    pair: int


@dataclass(frozen=True, slots=True)
class Started:
    """Watch the counters of a transfer's immediates, from ``imm`` on, until its :class:`Ended`.

    Events: ``counted`` as they grow, ``faulted``.
    """

    transfer: int
    imm: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Landed:
    """A stage of a transfer is here; the last stage is the tail."""

    transfer: int
    stage: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Acknowledge the faults of a counter."""

    imm: int


@dataclass(frozen=True, slots=True)
class Fence:
    """Fence immediates on the grants of some pairs, then acknowledge and level their counters.

    Fencing a grant that has ended is done. Levelling: a counter's value is the highest that its sum
    has been, and what failed is taken out of the sum again. Writing counts to oneself until the
    value grows makes them equal; where it is still its base and no fault was there, they are.

    Event: ``fenced`` with the values after that, or ``fence_failed``.

    Attributes:
        transfer: Which.
        pairs: Whose grants; none: there is nothing to fence.
        imm: The first of the immediates.
        bases: Values of their counters when the transfer began.
    """

    transfer: int
    pairs: tuple[int, ...]
    imm: int
    bases: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """A transfer is over. No byte of it can land any more: its pages may be used, or reused."""

    transfer: int
    outcome: Outcome
    detail: str


# ---- prefiller ----


class TransferKey(NamedTuple):
    """Names a transfer at a prefiller: the pair, and the decoder's number of it."""

    pair: int
    transfer: int


@dataclass(frozen=True, slots=True)
class Open:
    """A decoder has presented itself: plan for its layout, open and connect ahead."""

    pair: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Close:
    """A pair is over and nothing of it is under way: forget it."""

    pair: int
    why: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request came; its prefill may be there, or come later."""

    key: TransferKey
    request: Request


@dataclass(frozen=True, slots=True)
class Push:
    """Write what belongs to some tokens, as it is computed.

    Events: ``pushed`` once all jobs of it have ended well, ``push_failed`` once all have ended, one
    of them otherwise.

    Attributes:
        key: The transfer.
        unit: Number of this push within the transfer.
        begin: First token.
        end: The token behind the last one.
        tail: Write the tail, too.
    """

    key: TransferKey
    unit: int
    begin: int
    end: int
    tail: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Cancel the jobs of a transfer. Each unit of it still ends by its event."""

    key: TransferKey


@dataclass(frozen=True, slots=True)
class Over:
    """A transfer has ended, and none of its jobs is under way."""

    key: TransferKey
    how: str


@dataclass(frozen=True, slots=True)
class Release:
    """The pages of a prefill are free."""

    request_id: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Drained:
    """A prefiller that drains has nothing left."""


Action = (
    Send
    | MakeGrants
    | Revoke
    | PairReady
    | PairOver
    | PairGone
    | Started
    | Landed
    | Acknowledge
    | Fence
    | Ended
    | Open
    | Close
    | Arrived
    | Push
    | Stop
    | Over
    | Release
    | Drained
)
