# SPDX-License-Identifier: Apache-2.0
"""Other daemons, and what this one holds of them. Sans-IO.

A :class:`Peer` is one *relation*: it ends when either side loses it and is never used again; the
next contact makes a new one. So whoever comes back from an await with a Peer in hand only has to
look whether it is LOST.

    GREETING --Hello answered, or the peer's own Hello came--> CONNECTED --silent, restarted,
    refused, stop--> LOST
"""

from __future__ import annotations

import asyncio
import enum
import functools
import itertools
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from transferd.daemon.errors import Conflict, PeerLost, QuotaExceeded
from transferd.daemon.plane import MAX_PARTS
from transferd.daemon.tasks import TaskOwner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from transferd.daemon.descriptor import PeerKey
    from transferd.daemon.errors import TransferdError
    from transferd.daemon.plane import Landed
    from transferd.daemon.session import Session
    from transferd.daemon.wire import GrantKeys, Half, Link

LOCAL_PROTOCOL = "local/"  # of the rail that copies within a domain group; then its random name
STAGED_PROTOCOL = "staged/"  # of a rail that goes through host memory; then that of the other
TOKEN_BYTES = 16


class PeerState(enum.StrEnum):
    """Life of a relation."""

    GREETING = "GREETING"
    CONNECTED = "CONNECTED"
    LOST = "LOST"


class LaneKey(NamedTuple):
    """Which connections: those that all share (0, 0), or those of one region or session alone."""

    isolation: int = 0
    session_id: int = 0
    staged: bool = False


# Connections through host memory: one lane for all opens, because what they hold of the staging
# pools is for good, and memory that vanishes in mid-flight breaks none of them.
STAGED_LANE = LaneKey(staged=True)


class LaneState(enum.StrEnum):
    """Life of a lane; a closed one is never used again."""

    CONNECTING = "CONNECTING"
    UP = "UP"
    CLOSED = "CLOSED"


class PathState(enum.StrEnum):
    """Life of a path; a connection that broke is never used again, its path gets a new one."""

    CONNECTING = "CONNECTING"
    UP = "UP"
    CLOSING = "CLOSING"
    DOWN = "DOWN"


@dataclass(slots=True, eq=False)
class LanePath:
    """A pair of rails, one here and one there, and the connection between them.

    Attributes:
        conn: The connection, outgoing; 0 while there is none.
        failures: Connections in a row that did not come up.
        proof: Of a connection that is being made: True once the peer has answered by it, False once
            it has broken.
        closing: Destroys the connection that broke.
        restoring: Somebody is making a new one, again and again.
    """

    lane: Lane
    rail: int
    remote_rail: int
    state: PathState = PathState.CONNECTING
    conn: int = 0
    failures: int = 0
    proof: asyncio.Future[bool] | None = None
    closing: asyncio.Task[None] | None = None
    restoring: bool = False

    def answer(self, *, proven: bool) -> None:
        """Tells who makes its connection what came of it; only the first answer counts."""
        if self.proof is not None and not self.proof.done():
            self.proof.set_result(proven)


@dataclass(slots=True, eq=False)
class Lane:
    """Paths to a peer that opens share. It lives as long as one of its paths is up.

    The staged one is made with the first open that may need it, and lives as long as one does,
    whatever comes of its paths.

    Attributes:
        opens: Opens on it that may still have bytes in flight.
        ready: Connects it.
        over: Set once it is closed: nobody makes its paths anew any more.
        closing: Destroys it.
        lingers: Of a staged one without opens: will close it.
    """

    key: LaneKey
    peer: Peer
    state: LaneState = LaneState.CONNECTING
    paths: tuple[LanePath, ...] = ()
    opens: set[Open] = field(default_factory=set)
    ready: asyncio.Task[None] | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    closing: asyncio.Task[None] | None = None
    lingers: asyncio.TimerHandle | None = None

    def paths_up(self) -> list[LanePath]:
        """Paths that jobs may use."""
        return [path for path in self.paths if path.state is PathState.UP]


class RemoteState(enum.StrEnum):
    """Life of a grant at its opener."""

    OPENING = "OPENING"
    OPEN = "OPEN"
    RELEASING = "RELEASING"
    ENDED = "ENDED"


@dataclass(slots=True, eq=False)
class RemoteGrant:
    """A grant of a peer that this daemon has opened, shared by its sessions.

    Attributes:
        raw: Its descriptor; a grant has exactly one, so any other that names it is forged.
        holders: Sessions that want it; with the last it goes back to its owner.
        opens: Native opens of it that may still have bytes in flight.
        work: What opens or releases it at the moment.
        error: Why it could not be opened.
    """

    grant_id: int
    raw: bytes
    peer: Peer
    state: RemoteState = RemoteState.OPENING
    keys: GrantKeys | None = None
    expires_ns: int = 0
    holders: set[int] = field(default_factory=set)
    opens: set[Open] = field(default_factory=set)
    work: asyncio.Task[None] | None = None
    error: TransferdError | None = None


@dataclass(slots=True, eq=False)
class Open:
    """A grant as one session may use it.

    Attributes:
        handle: Native name, also what the client's jobs say.
        live: Jobs may use it.
        quiet: Done once no byte on it can land; made when it is stopped.
        forget: Remove it from the data plane once it is quiet.
        slots: Which of its native paths each path of its lanes is.
        staged: The lane of its staged paths; None: it has not needed them.

    Its grant and its lane list it until it is quiet, so that a fence waits for opens that died a
    moment before.
    """

    handle: int
    session: Session
    grant: RemoteGrant
    lane: Lane
    live: bool = True
    quiet: asyncio.Future[None] | None = None
    forget: bool = False
    slots: dict[LanePath, int] = field(default_factory=dict)
    staged: Lane | None = None

    @property
    def lanes(self) -> list[Lane]:
        """All that its paths are of."""
        return [self.lane] if self.staged is None else [self.lane, self.staged]


@dataclass(slots=True, eq=False)
class Incoming:
    """The receiving half of a peer's connection.

    Attributes:
        half: The peer's half of it.
        address: What the peer was told of ours.
    """

    conn: int
    peer: Peer
    half: Half
    address: bytes
    closing: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class Peer:
    """One relation with another daemon (or, as `loopback`, with this one).

    Attributes:
        own_token: What its heartbeats to us carry.
        their_token: What ours to it carry; empty until it has told.
        incoming: Its connections to us, by its own numbers.
        closing: Destroys connections of it to us.
        lanes: Our connections to it.
        remote: Its grants that we have opened.
        opened_here: Our grants that it has opened.
        revoked_early: Grants that it took back while we were opening some.
        number: Names the relation in the data plane.
        losses: Writes to it that will not land and that it has not been told of: known lost, and
            eighths to be taken out again, by (grant, imm).
        reports_sent: Reports of losses to it.
        reports_taken: The number of its last report to us.
        landed: What had landed by connections of it that are destroyed, by its own numbers.
        spent: Its numbers of connections that are over; each is used once.
        connecting: Its requests for connections are dealt with one after the other.
        untold: Connections of ours that are destroyed here, and it has not heard of it.
        telling: Tells it.
        told_full: It was refused a connection for want of room, and that was logged.
        gone: Done once nothing of the relation is left; set when it is lost.
    """

    key: PeerKey
    address: str
    link: Link
    state: PeerState = PeerState.GREETING
    loopback: bool = False
    own_token: bytes = field(default_factory=lambda: secrets.token_bytes(TOKEN_BYTES))
    their_token: bytes = b""
    protocols: tuple[str, ...] = ()
    watch: int = 0
    incoming: dict[int, Incoming] = field(default_factory=dict)
    closing: set[asyncio.Task[None]] = field(default_factory=set)
    lanes: dict[LaneKey, Lane] = field(default_factory=dict)
    remote: dict[int, RemoteGrant] = field(default_factory=dict)
    opened_here: set[int] = field(default_factory=set)
    openings: int = 0
    revoked_early: set[int] = field(default_factory=set)
    number: int = field(default_factory=itertools.count(1).__next__)
    losses: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    reports_sent: int = 0
    reports_taken: int = 0
    landed: dict[int, Landed | None] = field(default_factory=dict)
    spent: dict[int, None] = field(default_factory=dict)
    connecting: asyncio.Lock = field(default_factory=asyncio.Lock)
    untold: list[int] = field(default_factory=list)
    telling: asyncio.Task[None] | None = None
    told_full: bool = False
    reporting: asyncio.Task[None] | None = None
    greeting: asyncio.Task[None] | None = None
    probing: asyncio.Task[None] | None = None
    gone: asyncio.Task[None] | None = None
    idle_since_ns: int = 0
    tasks: TaskOwner = field(default_factory=lambda: TaskOwner("peer"))

    @property
    def is_lost(self) -> bool:
        """Whether the relation has ended."""
        return self.state is PeerState.LOST

    def check(self) -> None:
        """Raises PeerLost if the relation has ended."""
        if self.is_lost:
            raise PeerLost(f"the daemon at {self.address} was lost; try again")

    @property
    def holds_something(self) -> bool:
        """Whether either side has something of the other that matters to a session."""
        return bool(self.remote or self.opened_here)


class PeerTable:
    """The living relations, and how often each address was lost."""

    def __init__(self, limit: int) -> None:
        """Takes the most peers at a time."""
        self._limit = limit
        self._peers: dict[PeerKey, Peer] = {}
        self.losses: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, key: PeerKey) -> Peer | None:
        """Finds the living relation with a daemon in one of its lives."""
        return self._peers.get(key)

    def by_watch(self, watch: int) -> Peer | None:
        """Finds the relation of a heartbeat watch."""
        return next((peer for peer in self._peers.values() if peer.watch == watch), None)

    def add(self, peer: Peer) -> None:
        """Takes in a new relation; QuotaExceeded if there are too many."""
        if len(self._peers) >= self._limit:
            raise QuotaExceeded(
                f"the daemon knows {self._limit} peers; raise limits.peers", reason="PEERS"
            )
        self._peers[peer.key] = peer

    def superseded(self, key: PeerKey, address: str, token: bytes) -> list[Peer]:
        """Finds the relations that an introduction proves dead.

        Args:
            key: Who introduces itself.
            address: Where it serves peers.
            token: Its heartbeat token.

        Returns:
            Earlier lives of the same daemon; others at the same address; and the relation with this
            very life if the token is a new one: the other side has forgotten it.
        """
        return [
            peer
            for peer in self._peers.values()
            if (
                peer.their_token not in (b"", token)
                if peer.key == key
                else peer.state is PeerState.CONNECTED
                and (peer.key.daemon_id == key.daemon_id or peer.address == address)
            )
        ]

    def lost(self, peer: Peer, *, count: bool) -> bool:
        """Ends a relation; False if it had ended before."""
        if peer.state is PeerState.LOST:
            return False
        peer.state = PeerState.LOST
        if self._peers.get(peer.key) is peer:
            del self._peers[peer.key]
        if count:
            self.losses[peer.address] = self.losses.get(peer.address, 0) + 1
        return True


class PathCount(NamedTuple):
    """How many paths can be used, and how many cannot."""

    up: int = 0
    down: int = 0


def count_paths(peers: Iterable[Peer]) -> dict[int, PathCount]:
    """Counts the paths to some peers, by the rail here that they begin at."""
    counts: dict[int, PathCount] = {}
    for peer in peers:
        for lane in peer.lanes.values():
            for path in lane.paths:
                up, down = counts.get(path.rail, PathCount())
                is_up = path.state is PathState.UP
                counts[path.rail] = PathCount(up + is_up, down + (not is_up))
    return counts


def fabrics(protocols: Iterable[str]) -> list[str]:
    """Lists what rails speak to other daemons; the one that copies, and staged ones, do not."""
    return sorted({name for name in protocols if is_nic(name)})


def is_nic(protocol: str) -> bool:
    """Whether a rail is a NIC's, and no staged twin of one."""
    return not _copies(protocol) and not is_staged(protocol)


def leads_nowhere_else(protocol: str) -> bool:
    """Whether a rail copies within one domain group, or is that one's staged twin."""
    return _copies(_inner(protocol))


def pair_rails(local: Sequence[str], remote: Sequence[str]) -> list[tuple[int, int]]:
    """Chooses the connections of a lane.

    Within one daemon the rail that copies is all that is needed: its protocol is that of one domain
    group alone. Else every rail of either side is used, as far as both speak the same fabric
    protocol.

    Args:
        local: Protocol of each rail here.
        remote: Protocol of each rail there.

    Returns:
        Pairs of (rail here, rail there), at most 8, none of them staged.

    Raises:
        Conflict: PROTOCOL_MISMATCH: no rail of the two speaks the same protocol.
    """
    pairs = _pair(local, remote, _copies) or _pair(local, remote, is_nic)
    if not pairs:
        raise Conflict(
            f"no common fabric protocol: here {fabrics(local)}, there {fabrics(remote)}; "
            "use the same provider, and of libfabric the same version, on both hosts",
            reason="PROTOCOL_MISMATCH",
        )
    return pairs


@functools.lru_cache(maxsize=256)  # every grant that is opened asks
def pair_staged(local: tuple[str, ...], remote: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Chooses the connections of the staged lane: as :func:`pair_rails`, of the twins.

    Returns:
        Pairs of (rail here, rail there), at most 8; none: one of the two does not stage.
    """
    kind = _copies if _pair(local, remote, _copies) else is_nic
    return tuple(_pair(local, remote, lambda name: is_staged(name) and kind(_inner(name))))


def _copies(protocol: str) -> bool:
    return protocol.startswith(LOCAL_PROTOCOL)


def is_staged(protocol: str) -> bool:
    """Whether a rail is a twin that goes through host memory."""
    return protocol.startswith(STAGED_PROTOCOL)


def _inner(protocol: str) -> str:
    return protocol.removeprefix(STAGED_PROTOCOL)


def _pair(
    local: Sequence[str], remote: Sequence[str], wanted: Callable[[str], bool]
) -> list[tuple[int, int]]:
    """Pairs the rails that are wanted, side by side as far as that goes."""
    near = [i for i, name in enumerate(local) if wanted(name)]
    far = [i for i, name in enumerate(remote) if wanted(name)]
    count = min(max(len(near), len(far)), MAX_PARTS) if near and far else 0
    pairs = []
    for i in range(count):
        here, there = near[i % len(near)], far[i % len(far)]
        if local[here] != remote[there]:
            # Not side by side: any partner that speaks it will do.
            there = next((j for j in far if remote[j] == local[here]), -1)
        if there >= 0 and (here, there) not in pairs:
            pairs.append((here, there))
    return pairs
