# SPDX-License-Identifier: Apache-2.0
"""Mailboxes of sessions here: their making, their end, and receiving for clients without memory.

A mailbox lives as long as its grant, by which others send to it: ending that is the fence.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transferd.daemon.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded, Unavailable
from transferd.daemon.plane import (
    MAILBOX_SLOTS_MAX,
    MESSAGE_BYTES_MAX,
    PlaneError,
    mailbox_bytes,
)

if TYPE_CHECKING:
    from transferd.daemon.grant import Grant
    from transferd.daemon.owner import Owner
    from transferd.daemon.plane import Plane
    from transferd.daemon.region import Region
    from transferd.daemon.session import Session
    from transferd.daemon.sessions import Sessions
    from transferd.daemon.transfers import Transfers


@dataclass(frozen=True, slots=True, eq=False)
class Mailbox:
    """A mailbox of a session.

    Attributes:
        number: The data plane's; never used twice.
        counter: Slot of its counter in the session's segment.
        first: That counter's value when it was made.
        own: Its memory is the daemon's and goes with it.
    """

    number: int
    counter: int
    first: int
    grant: Grant
    descriptor: bytes
    own: bool


class Mailboxes:
    """All mailboxes of the daemon."""

    def __init__(
        self, plane: Plane, sessions: Sessions, owner: Owner, transfers: Transfers
    ) -> None:
        self._plane = plane
        self._sessions = sessions
        self._owner = owner
        self._transfers = transfers

    async def create(
        self, session: Session, region: int, *, slots: int, slot_bytes: int
    ) -> Mailbox:
        """Makes a mailbox. To be run by the session's ops.

        Args:
            session: Whose.
            region: For its memory, of the session; 0: memory of the daemon's own.
            slots: Messages that it holds.
            slot_bytes: Of the longest message.

        Raises:
            InvalidRequest: Names the field.
            Conflict: REGION_IN_USE, REGION_ENDING.
            QuotaExceeded: GRANTS, COUNTERS, MAILBOX_SLOTS, REGIONS,
                REGISTERED_BYTES or SHARED_FILES.
        """
        session.check_open()
        if not 1 <= slots <= MAILBOX_SLOTS_MAX:
            raise InvalidRequest("slots", f"{slots} is not 1 to {MAILBOX_SLOTS_MAX}")
        if not 1 <= slot_bytes <= MESSAGE_BYTES_MAX:
            raise InvalidRequest("slot_bytes", f"{slot_bytes} is not 1 to {MESSAGE_BYTES_MAX}")
        if region:
            return self._create(session.region(region, "region"), slots, slot_bytes, own=False)
        memory = await self._memory(session, mailbox_bytes(slots, slot_bytes))
        try:
            return self._create(memory, slots, slot_bytes, own=True)
        except BaseException:
            await self._sessions.deregister(session, memory.handle)
            raise

    async def _memory(self, session: Session, size: int) -> Region:
        fd = os.memfd_create("transferd-mailbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = self._sessions.add_memory(session, fd)
        except BaseException:
            os.close(fd)
            raise
        try:
            return await self._sessions.register(
                session, memory.memory_id, offset=0, length=size, name="mailbox"
            )
        except BaseException:
            self._sessions.drop_memory(session, memory)
            raise

    def _create(self, region: Region, slots: int, slot_bytes: int, *, own: bool) -> Mailbox:
        """Awaits nothing, so that its region cannot begin to end in between."""
        session = region.session
        region.check_active()
        _check_free(region)
        try:
            info = self._plane.mailbox_add(session.handle, region.handle, slots, slot_bytes)
        except PlaneError as error:
            if error.errno == errno.ENOSPC:
                raise QuotaExceeded(
                    f"slots: {error.text}; attach with a larger counter_count", reason="COUNTERS"
                ) from error
            if error.errno == errno.EDQUOT:
                raise QuotaExceeded(
                    f"slots: {error.text}; close some, or make smaller ones", reason="MAILBOX_SLOTS"
                ) from error
            if error.errno == errno.EINVAL:
                raise InvalidRequest("region", error.text) from error
            raise Unavailable(f"making a mailbox: {error.text}") from error
        try:
            grant, descriptor = self._owner.grant_mailbox(region, info.mailbox, slot_bytes)
        except BaseException:
            self._plane.mailbox_remove(session.handle, info.mailbox)
            raise
        mailbox = Mailbox(info.mailbox, info.counter, info.first, grant, descriptor, own)
        session.mailboxes[mailbox.number] = mailbox
        return mailbox

    async def close(self, session: Session, number: int) -> None:
        """Ends a mailbox: a fence. To be run by the session's ops.

        Raises:
            NotFound: MAILBOX_NOT_FOUND.
        """
        mailbox = _find(session, number)
        await self._owner.end_grants([mailbox.grant])
        if mailbox.own and mailbox.grant.region.handle in session.regions:
            await self._sessions.deregister(session, mailbox.grant.region.handle)

    async def receive(
        self, session: Session, number: int, limit: int, timeout_s: float
    ) -> list[bytes]:
        """Takes messages, oldest first; waits for the first, at most for a while.

        Raises:
            NotFound: MAILBOX_NOT_FOUND: there is none, or it was closed meanwhile.
        """
        messages: list[bytes] = []

        def some_came() -> bool:
            _find(session, number)
            while len(messages) < limit:
                message = self._plane.mailbox_take(session.handle, number)
                if message is None:
                    break
                messages.append(message)
            return bool(messages)

        await self._transfers.wait(session, some_came, timeout_s)
        return messages


def _check_free(region: Region) -> None:
    """Refuses a second mailbox in one region: their messages would lie on each other."""
    for mailbox in region.session.mailboxes.values():
        if mailbox.grant.region is region:
            raise Conflict(
                f"region: region {region.handle} holds mailbox {mailbox.number}; give each mailbox "
                "a region of its own",
                reason="REGION_IN_USE",
            )


def _find(session: Session, number: int) -> Mailbox:
    mailbox = session.mailboxes.get(number)
    if mailbox is None:
        raise NotFound(
            f"mailbox: {number} is no mailbox of this session, or was closed",
            reason="MAILBOX_NOT_FOUND",
        )
    return mailbox
