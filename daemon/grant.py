# SPDX-License-Identifier: Apache-2.0
"""Grants of this daemon's sessions, and who has opened them. Sans-IO.

    ACTIVE --revoke, expire, end of region or session--> ENDING --every opener quiet or cut off-->
    gone

A grant that is ENDING is refused to new openers from that moment on, so the set of openers only
shrinks and the fence ends.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transferd.daemon.errors import Conflict, InvalidRequest
from transferd.daemon.plane import IMM_COUNT
from transferd.daemon.region import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transferd.daemon.peer import Peer
    from transferd.daemon.region import Region
    from transferd.daemon.session import Session

RIGHT_WRITE = 1
RIGHT_READ = 2
RIGHT_SEND = 4
RIGHT_MAP = 8
IMM_RANGES_MAX = 4096  # of one fence
FENCES_MAX = 8  # of one grant at a time: each job of it that ends is looked up in all of them
EXPIRED_KEPT = 65_536  # numbers of expired grants, to tell them from revoked ones


class GrantState(enum.StrEnum):
    """Life of a grant."""

    ACTIVE = "ACTIVE"
    ENDING = "ENDING"
    ENDED = "ENDED"


@dataclass(slots=True, eq=False)
class Grant:
    """Permission on part of a region.

    Attributes:
        expires_ns: On the monotonic clock; 0: never.
        openers: Daemons that may write by it now.
        ended: Set once no byte can land by it any more.
        timer: Runs the fence at expiry.
        fencing: Bounds the fences on single immediates; more of them wait.
        mailbox: The data plane's number of the mailbox that it is for; 0: it is for memory.
    """

    grant_id: int
    session: Session
    region: Region
    offset: int
    length: int
    rights: int
    imm_first: int
    imm_count: int
    expires_ns: int
    state: GrantState = GrantState.ACTIVE
    expired: bool = False
    openers: dict[Peer, None] = field(default_factory=dict)
    ended: asyncio.Future[None] | None = None
    timer: asyncio.TimerHandle | None = None
    fencing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FENCES_MAX))
    mailbox: int = 0


class GrantTable:
    """All grants of the daemon by number; none is used twice in one life of the daemon."""

    def __init__(self) -> None:
        self._grants: dict[int, Grant] = {}
        self._expired: dict[int, None] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._grants)

    def __iter__(self) -> Iterator[Grant]:
        return iter(list(self._grants.values()))

    def get(self, grant_id: int) -> Grant | None:
        """Finds a grant that has not ended."""
        return self._grants.get(grant_id)

    def add(
        self, region: Region, offset: int, length: int, rights: int, imms: range, expires_ns: int
    ) -> Grant:
        """Makes a grant; the range and the imms are checked before."""
        grant = Grant(
            grant_id=self._next,
            session=region.session,
            region=region,
            offset=offset,
            length=length,
            rights=rights,
            imm_first=imms.start,
            imm_count=len(imms),
            expires_ns=expires_ns,
        )
        self._next += 1
        self._grants[grant.grant_id] = grant
        region.grants[grant.grant_id] = grant
        region.session.grants[grant.grant_id] = grant
        return grant

    def usable(self, grant_id: int, now_ns: int) -> Grant:
        """Finds the grant that a genuine descriptor names.

        Args:
            grant_id: From a descriptor whose MAC was checked: such a grant has existed.
            now_ns: Monotonic time.

        Returns:
            A grant that may be opened now.

        Raises:
            Conflict: GRANT_EXPIRED or GRANT_REVOKED.
        """
        grant = self._grants.get(grant_id)
        over = grant is not None and (grant.expired or 0 < grant.expires_ns <= now_ns)
        if over or grant_id in self._expired:
            raise Conflict(
                f"grant {grant_id} has expired; ask its owner for a new one", reason="GRANT_EXPIRED"
            )
        if grant is None or grant.state is not GrantState.ACTIVE:
            raise Conflict(
                f"grant {grant_id} was taken back by its owner; ask for a new one",
                reason="GRANT_REVOKED",
            )
        return grant

    def remove(self, grant: Grant) -> None:
        """Forgets a grant whose openers are quiet."""
        grant.state = GrantState.ENDED
        if grant.expired:
            self._expired[grant.grant_id] = None
            while len(self._expired) > EXPIRED_KEPT:
                del self._expired[next(iter(self._expired))]
        if grant.timer is not None:
            grant.timer.cancel()
        for peer in grant.openers:
            peer.opened_here.discard(grant.grant_id)
        grant.openers.clear()
        self._grants.pop(grant.grant_id, None)
        grant.region.grants.pop(grant.grant_id, None)
        grant.session.grants.pop(grant.grant_id, None)


def check_grant(
    region: Region, offset: int, length: int, rights: int, imm_first: int, imm_count: int
) -> int:
    """Checks what a client wants to grant.

    Args:
        region: On what.
        offset: Bytes into it.
        length: 0: up to its end.
        rights: RIGHT_*.
        imm_first: First immediate.
        imm_count: How many.

    Returns:
        The length in bytes.

    Raises:
        InvalidRequest: Names the field.
    """
    if rights & RIGHT_WRITE and not region.memory.writable:
        raise InvalidRequest(
            "region", f"{region.handle} was handed over read-only; others cannot write to it"
        )
    if rights & RIGHT_MAP and region.memory.kind is not Kind.CUDA:
        raise InvalidRequest(
            "rights",
            f"RIGHT_MAP is for GPU memory; region {region.handle} is {region.memory.kind}: give "
            "RIGHT_WRITE, RIGHT_READ or both",
        )
    if offset > region.length:
        raise InvalidRequest(
            "offset_bytes", f"{offset} is past the region's end at {region.length}"
        )
    length = length or region.length - offset
    if length > region.length - offset:
        raise InvalidRequest(
            "length_bytes", f"{offset} + {length} is past the region's end at {region.length}"
        )
    if imm_first >= IMM_COUNT:
        raise InvalidRequest("imm_first", f"{imm_first} needs more than 20 bits")
    if imm_count > IMM_COUNT - imm_first:
        raise InvalidRequest("imm_count", f"{imm_first} + {imm_count} needs more than 20 bits")
    return length


def still_copied(grant_id: int) -> Conflict:
    """Makes the error for a fence that cannot say that all is quiet."""
    return Conflict(
        f"grant {grant_id}: a client's stream was not through in time with copies that were "
        "cancelled, and may write yet: revoke() the grant, which waits until the memory is "
        "unmapped, or ask again on other imms",
        reason="STILL_COPIED",
    )


def grant_over(grant_id: int) -> Conflict:
    """Makes the error for a fence on a grant that has ended."""
    return Conflict(
        f"grant {grant_id} has ended; nothing can land by it any more", reason="GRANT_REVOKED"
    )


def check_fence(
    grant: Grant, ranges: Sequence[tuple[int, int]], field: str = "imms"
) -> tuple[range, ...]:
    """Checks the immediates of a fence.

    Args:
        grant: Which.
        ranges: First and count of each.
        field: Path of the ranges in the request.

    Returns:
        The same immediates in ranges that ascend and do not touch.

    Raises:
        InvalidRequest: Names the range.
    """
    if not 1 <= len(ranges) <= IMM_RANGES_MAX:
        raise InvalidRequest(field, f"{len(ranges)} ranges; send 1 to {IMM_RANGES_MAX}")
    end = grant.imm_first + grant.imm_count
    for i, (first, count) in enumerate(ranges):
        if not count:
            raise InvalidRequest(f"{field}[{i}].count", "0; a range has at least one immediate")
        if first < grant.imm_first or first + count > end:
            has = f"{grant.imm_first} to {end - 1}" if grant.imm_count else "none"
            raise InvalidRequest(
                f"{field}[{i}]",
                f"{first} to {first + count - 1} are not all of grant {grant.grant_id}, which "
                f"has {has}",
                reason="IMM_RANGE",
            )
    merged: list[range] = []
    for first, count in sorted(ranges):
        if merged and first <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, first + count))
        else:
            merged.append(range(first, first + count))
    return tuple(merged)
