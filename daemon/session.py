# SPDX-License-Identifier: Apache-2.0
"""Sessions by number and by token. Sans-IO: time comes as an argument.

OPENING --data plane made it--> OPEN --socket closed, detach, lease over, broken ring, stop-->
ENDING --freed--> CLOSED
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transferd.daemon.errors import (
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    Unauthenticated,
)
from transferd.daemon.tasks import TaskOwner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd.daemon.descriptor import PeerKey
    from transferd.daemon.grant import Grant
    from transferd.daemon.mailboxes import Mailbox
    from transferd.daemon.peer import Open
    from transferd.daemon.policy import Tenant
    from transferd.daemon.region import Memory, Region

TOKEN_BYTES = 32
NAME_MAX = 64
LEASE_DEFAULT_MS = 30_000
LEASE_MIN_MS = 1_000
LEASE_MAX_MS = 600_000
ENDED_GRANTS_KEPT = 4096
OPENINGS_MAX = 16  # owners at which one session may open grants at a time


class SessionState(enum.StrEnum):
    """Life of a session."""

    OPENING = "OPENING"
    OPEN = "OPEN"
    ENDING = "ENDING"
    CLOSED = "CLOSED"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a session came from.

    Attributes:
        listener: The socket that it belongs to: its token works there only.
        lease_ms: 0 for a session of the fd socket.
    """

    listener: str
    name: str
    pid: int = 0
    uid: int = 0
    lease_ms: int = 0


@dataclass(slots=True, eq=False)
class Session:
    """One client's attachment, with everything that it owns.

    Attributes:
        handle: The data plane's name of it; 0 before it is open.
        used_ns: When its token was last used, monotonic.
        shared_lanes: It may use connections that other sessions use, too; not once it has
            registered memory that can be taken away in mid-flight.
        unreached: NICs, and other rails, by which some GPU memory of it does not go.
        openings: Bounds how many strange daemons one client can have greeted at a time.
        ops: Calls that change something; its end waits for them.
        ended: Done once nothing of it is left.
        quiet: Done once none of its jobs is in flight.
    """

    session_id: int
    tenant: Tenant
    origin: Origin
    token: bytes
    created_ns: int
    used_ns: int
    ops: TaskOwner
    handle: int = 0
    state: SessionState = SessionState.OPENING
    shared_lanes: bool = True
    unreached: set[int] = field(default_factory=set)
    next_memory: int = 1
    memories: dict[int, Memory] = field(default_factory=dict)
    regions: dict[int, Region] = field(default_factory=dict)
    grants: dict[int, Grant] = field(default_factory=dict)
    ended_grants: deque[int] = field(default_factory=lambda: deque(maxlen=ENDED_GRANTS_KEPT))
    mailboxes: dict[int, Mailbox] = field(default_factory=dict)
    opens: dict[int, Open] = field(default_factory=dict)
    live_opens: dict[tuple[PeerKey, int], Open] = field(default_factory=dict)
    by_descriptor: dict[bytes, Open] = field(default_factory=dict)
    openings: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(OPENINGS_MAX))
    quiet: asyncio.Future[None] | None = None
    ended: asyncio.Task[None] | None = None
    end_reason: str = ""
    end_message: str = ""

    @property
    def is_open(self) -> bool:
        """Whether calls may use it."""
        return self.state is SessionState.OPEN

    def check_open(self) -> None:
        """Refuses work for a session that is going away.

        Raises:
            Unauthenticated: It has ended.
        """
        if not self.is_open:
            raise Unauthenticated("the session has ended; attach again", reason="SESSION_ENDED")

    def region(self, handle: int, where: str) -> Region:
        """Finds a region of this session; NotFound names the field."""
        region = self.regions.get(handle)
        if region is None:
            raise NotFound(
                f"{where}: region {handle} is not registered in this session",
                reason="REGION_NOT_FOUND",
                field=where,
            )
        return region

    def grant(self, grant_id: int) -> Grant:
        """Finds a grant of this session."""
        grant = self.grants.get(grant_id)
        if grant is None:
            raise NotFound(
                f"grant_id: {grant_id} is no grant of this session", reason="GRANT_NOT_FOUND"
            )
        return grant


def check_name(name: str) -> str:
    """Checks a name that a client gives; it is shown to people."""
    if len(name.encode()) > NAME_MAX:
        raise InvalidRequest("name", f"longer than {NAME_MAX} bytes")
    if not name.isprintable():
        raise InvalidRequest("name", "has characters that cannot be printed")
    return name


def check_lease(lease_ms: int) -> int:
    """Checks a lease; 0 is the default."""
    lease_ms = lease_ms or LEASE_DEFAULT_MS
    if not LEASE_MIN_MS <= lease_ms <= LEASE_MAX_MS:
        raise InvalidRequest(
            "lease_ms", f"{lease_ms} is not within {LEASE_MIN_MS} to {LEASE_MAX_MS}"
        )
    return lease_ms


class SessionTable:
    """All sessions, living and ending."""

    def __init__(self, limit: int) -> None:
        """Takes the daemon's own limit, which stands above the tenants'."""
        self._limit = limit
        self._next = 1
        self._sessions: dict[int, Session] = {}
        self._by_token: dict[bytes, Session] = {}
        self._by_handle: dict[int, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def add(self, tenant: Tenant, origin: Origin, now_ns: int) -> Session:
        """Makes room for a session.

        Raises:
            QuotaExceeded: SESSIONS: the tenant or the daemon has as many as it may.
        """
        if len(self._sessions) >= self._limit:
            raise QuotaExceeded(
                f"the daemon has {self._limit} sessions; end some, or raise limits.sessions",
                reason="SESSIONS",
            )
        tenant.charge("sessions")
        session = Session(
            session_id=self._next,
            tenant=tenant,
            origin=origin,
            token=secrets.token_bytes(TOKEN_BYTES),
            created_ns=now_ns,
            used_ns=now_ns,
            ops=TaskOwner(f"session {self._next}"),
        )
        self._next += 1
        self._sessions[session.session_id] = session
        return session

    def opened(self, session: Session, handle: int) -> None:
        """The data plane has made it: its token works from now on."""
        session.handle = handle
        session.state = SessionState.OPEN
        self._by_token[session.token] = session
        self._by_handle[handle] = session

    def ending(self, session: Session) -> None:
        """Its token stops working."""
        session.state = SessionState.ENDING
        self._by_token.pop(session.token, None)

    def closed(self, session: Session) -> None:
        """Nothing of it is left."""
        session.state = SessionState.CLOSED
        self._by_handle.pop(session.handle, None)
        if self._sessions.pop(session.session_id, None) is not None:
            session.tenant.refund("sessions")

    def by_handle(self, handle: int) -> Session | None:
        """Finds the session of a data plane's event."""
        return self._by_handle.get(handle)

    def by_token(self, token_hex: str, listener: str, now_ns: int) -> Session:
        """Finds the session of a call and renews its lease.

        Args:
            token_hex: From the call's metadata.
            listener: The socket that the call came by.
            now_ns: Monotonic time.

        Returns:
            An open session.

        Raises:
            Unauthenticated: The token is no token, of no living session, or of another socket's.
        """
        try:
            session = self._by_token.get(bytes.fromhex(token_hex))
        except ValueError:
            session = None
        if session is None or session.origin.listener != listener:
            raise Unauthenticated(
                "the token names no living session of this socket; attach (or OpenSession) and "
                "send its token "
                'as metadata "authorization: Bearer <hex>"'
            )
        session.used_ns = now_ns
        return session

    def leases_over(self, now_ns: int) -> list[Session]:
        """Finds open sessions whose lease has passed."""
        return [
            session
            for session in self._by_token.values()
            if session.origin.lease_ms
            and now_ns - session.used_ns > session.origin.lease_ms * 1_000_000
        ]
