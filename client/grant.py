# SPDX-License-Identifier: Apache-2.0
"""Grants: the right to write into part of a region, or to read it."""

from __future__ import annotations

import contextlib
import operator
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.session import IMM_COUNT
from transferd.v1 import region_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transferd.client.session import Session

RIGHTS = frozenset({"write", "read", "map"})
EXPIRES_MAX_S = 10 * 366 * 86_400.0
FENCE_RANGES_MAX = 4096  # of one call


def to_rights(rights: Iterable[str]) -> frozenset[str]:
    """Checks the rights of a grant."""
    if isinstance(rights, str):
        raise errors.InvalidRequest(f'rights is a set of words, as {{"write"}}, not {rights!r}')
    given = frozenset(rights)
    if not given or given - RIGHTS:
        raise errors.InvalidRequest(
            f'rights is a set of "write", "read" and "map", not {set(given) or "empty"!r}'
        )
    return given


def to_imms(imms: Iterable[int]) -> range:
    """Checks the immediates of a grant: numbers below 2^20 without a gap."""
    try:
        numbers = imms if isinstance(imms, range) else sorted(set(imms))
    except TypeError:
        raise errors.InvalidRequest(
            f"imms is a range, as range(0, 64), or a list of numbers, not {imms!r}"
        ) from None
    if not numbers:
        return range(0)
    chosen = range(numbers[0], numbers[-1] + 1)
    if len(numbers) != len(chosen) or chosen.start < 0 or chosen.stop > IMM_COUNT:
        raise errors.InvalidRequest(
            f"imms is a range without gaps below {IMM_COUNT}, as range(0, 64), not {imms!r}"
        )
    return chosen


def to_fence(imms: Iterable[int | range], granted: range) -> list[range]:
    """Checks the immediates of a fence, numbers or ranges of them; joins what is adjacent."""
    whole = isinstance(imms, range) and imms.step == 1 and len(imms) > 0
    try:
        parts = [imms] if whole else list(imms)
    except TypeError:
        raise errors.InvalidRequest(f"imms of a fence are a list, as [7], not {imms!r}") from None
    merged: list[range] = []
    for part in sorted(map(_to_range, parts), key=lambda part: part.start):
        if part.start not in granted or part[-1] not in granted:
            raise errors.InvalidRequest(
                f"imms of a fence are the grant's, which has {granted}, not {part}",
                reason="IMM_RANGE",
            )
        if merged and part.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, part.stop))
        else:
            merged.append(part)
    if not merged:
        raise errors.InvalidRequest("imms of a fence are at least one, as [7]; got none")
    return merged


def _to_range(part: object) -> range:
    """Reads a number or a range without gaps."""
    if isinstance(part, range) and part and part.step == 1:
        return part
    try:
        first = operator.index(part)  # type: ignore[arg-type]
    except TypeError:
        raise errors.InvalidRequest(
            f"imms of a fence are numbers and ranges without gaps, as [7, range(16, 32)], not "
            f"{part!r}"
        ) from None
    return range(first, first + 1)


def to_expires_ms(expires_s: float | None) -> int:
    """Checks how long a grant lasts; 0: for ever."""
    if expires_s is None:
        return 0
    if not 0 < expires_s <= EXPIRES_MAX_S:
        raise errors.InvalidRequest(
            f"expires_s is above 0 and at most {EXPIRES_MAX_S:.0f}, or None, not {expires_s!r}"
        )
    return max(1, round(expires_s * 1000))


class BaseGrant:
    """What both faces of a grant have.

    Attributes:
        id: Number; never used twice by this daemon.
        descriptor: Opaque bytes that name the grant. Whoever holds them may use it: hand them over
            by any channel.
        imms: Immediates that the holders may bump.
        length: Bytes of the granted range.
    """

    __slots__ = ("_revoked", "_session", "descriptor", "id", "imms", "length")

    def __init__(
        self, session: Session, grant_id: int, descriptor: bytes, imms: range, length: int
    ) -> None:
        self._session = session
        self._revoked = False
        self.id = grant_id
        self.descriptor = descriptor
        self.imms = imms
        self.length = length

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {self.length} bytes, immediates {self.imms}>"

    def _revoke(self) -> None:
        if self._revoked:
            return
        with contextlib.suppress(errors.NotFound):  # by another thread, or with its region
            self._session.grant_revoke(self.id)
        self._revoked = True

    def _fence(self, imms: Iterable[int | range]) -> None:
        self._session.grant_fence(self.id, to_fence(imms, self.imms))


def fence_all(session: Session, fences: Mapping[Any, Iterable[int | range]]) -> None:
    """Fences immediates of several grants of one session."""
    if not fences:
        raise errors.InvalidRequest("a fence is on one grant at least, as {grant: [7]}; got none")
    for grant in fences:
        if not isinstance(grant, BaseGrant) or grant._session is not session:
            raise errors.InvalidRequest(f"a fence is on grants of this Client, not on {grant!r}")
    parts = {grant: to_fence(imms, grant.imms) for grant, imms in fences.items()}
    failed: dict[BaseGrant, errors.TransferdError] = {}
    batch: list[BaseGrant] = []
    ranges = 0
    for grant, imms in parts.items():
        if batch and ranges + len(imms) > FENCE_RANGES_MAX:
            failed.update(_fence_some(session, {one: parts[one] for one in batch}))
            batch, ranges = [], 0
        batch.append(grant)
        ranges += len(imms)
    failed.update(_fence_some(session, {one: parts[one] for one in batch}))
    if failed:
        raise errors.FencesFailed(failed)


def _fence_some(
    session: Session, fences: Mapping[BaseGrant, Sequence[range]]
) -> Iterator[tuple[BaseGrant, errors.TransferdError]]:
    """Makes one call; gives the grants of which more is to be said."""
    rows = [
        region_pb2.FenceGrantRequest(grant_id=grant.id, imms=map(_to_message, imms))
        for grant, imms in fences.items()
    ]
    regions = session.control.regions
    request = region_pb2.FenceGrantsRequest(fences=rows)
    answer = session.control.call(regions.FenceGrants, request)
    for grant, result in zip(fences, answer.results, strict=True):
        if result.reason:
            yield grant, errors.from_result(result.reason, result.message)


def _to_message(imms: range) -> region_pb2.ImmRange:
    return region_pb2.ImmRange(first=imms.start, count=len(imms))


class Grant(BaseGrant):
    """A grant of a :class:`transferd.Client`."""

    __slots__ = ()

    def revoke(self) -> None:
        """Takes the grant back: a fence. No byte can land by it afterwards. Idempotent."""
        self._revoke()

    def fence(self, imms: Iterable[int | range]) -> None:
        """Ends what others have submitted on some immediates, and waits until it is quiet.

        No byte of it can land afterwards; what was not complete counts as lost, and faults its
        counter. The grant lives on: jobs submitted after this call go on. So whoever writes on
        these immediates has to stop submitting first. Cheap: about a round trip.

        Args:
            imms: Immediates of the grant: numbers, or ranges of them.

        Raises:
            InvalidRequest: None, or one that is not the grant's.
            Conflict: The grant has ended; nothing can land by it. STILL_COPIED: a stream of a
                writer's is still copying to GPU memory after half a second, and may write yet;
                :meth:`revoke` takes the memory back.
        """
        self._fence(imms)
