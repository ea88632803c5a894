# SPDX-License-Identifier: Apache-2.0
"""A transfer as the decoder rank has it, and what its caller wants of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transferd.client.errors import InvalidRequest
from transferd.kv.protocol import bounds, messages
from transferd.kv.protocol.actions import Outcome
from transferd.kv.protocol.decoder_tables import State
from transferd.kv.protocol.messages import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

SENT = 1  # of a part: its Request is, or may be, at the prefiller
QUIET = 2  # it writes nothing, and will not
REVOKED = 8  # so are the grants that it had: no fence is needed, and none can fail
PUSHED = 4  # it says that all is acknowledged


@dataclass(slots=True, eq=False)
class Transfer:
    """One request's pages, from some prefiller ranks.

    Attributes:
        request: What they are asked for.
        block: Which immediates it has.
        parts: SENT, QUIET, REVOKED, PUSHED of each pair, by number.
        left: Stages that are not here yet.
        landed: Stages that are, a bit each.
        targets: What each counter has to reach.
        suspect: A counter of it was faulted: counts may be missing, or it was another's fault.
    """

    request: Request
    block: int
    parts: dict[int, int]
    targets: tuple[int, ...]
    left: int = 0
    landed: int = 0
    state: State = State.ACTIVE
    suspect: bool = False
    outcome: Outcome = Outcome.COMPLETE
    detail: str = ""

    @property
    def number(self) -> int:
        """By which both sides name it."""
        return self.request.transfer


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a transfer is to bring. Numbers as in the Request of protocol.proto.

    Attributes:
        request_id: By which the prefillers know the prefill; a new one for each attempt.
        tokens: How many, from ``first_token`` on.
        groups: Page indices of each group, 32 bits each, little-endian.
        counts: Writes that will count for each stage, and for the tail, of all prefillers together.
        readers: How many decoder ranks ask each of these prefiller ranks for this request.
        deadline_s: All of it has to be here by then.
    """

    request_id: bytes
    tokens: int
    groups: tuple[bytes, ...]
    counts: Sequence[int]
    deadline_s: float
    first_token: int = 0
    tail_offset: int = 0
    readers: int = 1

    def request(
        self, transfer: int, low: int, imm: int, width: int, limits: Sequence[int]
    ) -> Request:
        """Makes the Request, checked as the prefiller will check it.

        Args:
            transfer: Its number.
            low: The lowest that has not ended.
            imm: Its first immediate.
            width: How many it has.
            limits: Pages that the cache has, of each group.

        Raises:
            InvalidRequest: Names the field and the value.
        """
        counts = self.counts
        if len(counts) != width or min(counts) < 0 or not any(counts):
            raise InvalidRequest(
                f"counts are {width} numbers, not all 0, the last one the tail's; got "
                f"{list(counts)!r}"
            )
        if not 0 < self.deadline_s <= bounds.DEADLINE_MAX_MS / 1000:
            raise InvalidRequest(
                f"deadline_s is above 0 and at most {bounds.DEADLINE_MAX_MS // 1000}, not "
                f"{self.deadline_s!r}"
            )
        request = Request(
            transfer=transfer,
            low=low,
            request_id=self.request_id,
            first_token=self.first_token,
            tokens=self.tokens,
            groups=tuple(self.groups),
            imm=imm,
            tail_offset=self.tail_offset,
            deadline_ms=max(1, round(self.deadline_s * 1000)),
            readers=self.readers,
        )
        try:
            messages.check_request(request)
            messages.check_pages(request.groups, limits)
        except messages.BadMessageError as error:
            raise InvalidRequest(str(error)) from None
        return request
