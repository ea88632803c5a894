# SPDX-License-Identifier: Apache-2.0
"""Relations with other daemons: introduced on first use, watched by heartbeats, ended alone.

Both sides may introduce themselves at once: a relation's token is made with the Peer, before any
message, so whichever Hello or answer comes first carries the same one. A peer that was lost here
and comes back makes a new Peer with a new token, by which the other side learns to forget, too.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING

import structlog

from transferd.daemon.config import is_loopback, split_host_port
from transferd.daemon.errors import (
    AccessDenied,
    Conflict,
    InvalidRequest,
    PeerLost,
    StaleDescriptor,
    StalePeer,
    TimedOut,
    TransferdError,
)
from transferd.daemon.loopback import LoopbackLink
from transferd.daemon.peer import Peer, PeerState, PeerTable, fabrics
from transferd.daemon.plane import Detail, PlaneError
from transferd.daemon.tasks import TaskOwner
from transferd.daemon.wire import Hello, HelloReply

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.daemon.descriptor import PeerKey
    from transferd.daemon.lanes import Lanes
    from transferd.daemon.opens import Opener
    from transferd.daemon.owner import Owner
    from transferd.daemon.plane import Plane
    from transferd.daemon.wire import Link

    LinkFactory = Callable[[str, Callable[[TransferdError], None]], Link]

log = structlog.get_logger("transferd.peers")

PROBE_PAUSE_S = 0.05  # a broken TCP connection is made anew within this
IDLE_S = 60.0  # a relation in which neither side holds anything ends after this


class Peers:
    """All relations of the daemon."""

    def __init__(
        self,
        plane: Plane,
        *,
        own: PeerKey,
        address: str,
        heartbeat_port: int,
        limit: int,
        loopback_only: bool,
        make_link: LinkFactory,
    ) -> None:
        """Takes what it works with.

        Args:
            plane: The data plane, its rails open.
            own: This daemon.
            address: host:port that others reach it at.
            heartbeat_port: UDP port of its heartbeats.
            limit: Most relations at a time.
            loopback_only: Development mode: other hosts are not spoken to.
            make_link: Makes a link to (address), which reports failed calls to its second argument.
        """
        self._plane = plane
        self.own = own
        self.address = address
        self._port = heartbeat_port
        self._loopback_only = loopback_only
        self._make_link = make_link
        self.table = PeerTable(limit)
        self._loop_peer: Peer | None = None
        self._burying: set[Peer] = set()
        self.tasks = TaskOwner("peers")
        self._opener: Opener
        self._owner: Owner
        self._lanes: Lanes

    def wire(self, opener: Opener, owner: Owner, lanes: Lanes) -> None:
        """Joins the two sides that relations serve."""
        self._opener = opener
        self._owner = owner
        self._lanes = lanes
        lanes.on_broken = self.probe
        owner.on_deaf = lambda peer: self.lose(peer, "does not answer", Detail.CONNECTION)

    def all(self) -> list[Peer]:
        """Every living relation, also the one with itself."""
        own = [self._loop_peer] if self._loop_peer is not None else []
        return own + list(self.table)

    # ---- introducing ----

    async def ensure(self, key: PeerKey, address: str) -> Peer:
        """Gives a connected peer, introducing this daemon if needed.

        Args:
            key: Whom a descriptor names.
            address: Where the descriptor says it is.

        Returns:
            A connected peer; it may be lost again by the time the caller runs.

        Raises:
            StaleDescriptor: Another daemon, or another life of it, answers there.
            PeerLost: PEER_UNREACHABLE.
            AccessDenied: Development mode, and not this host.
        """
        if key == self.own:
            return self._loopback()
        if key.daemon_id == self.own.daemon_id:
            raise StaleDescriptor(
                "the descriptor is of an earlier life of this daemon; get a new one from its owner"
            )
        peer = self.table.get(key)
        if peer is None:
            peer = self._new(key, address)
            peer.greeting = peer.tasks.spawn(self._greet(peer), f"greet {address}")
        if peer.greeting is not None:
            await asyncio.shield(peer.greeting)
        if peer.state is not PeerState.CONNECTED:
            raise PeerLost(f"the daemon at {address} was lost while it was greeted; try again")
        return peer

    def _loopback(self) -> Peer:
        """The relation with itself; made anew when it was lost."""
        if self._loop_peer is None:
            link = LoopbackLink(self._owner, self._opener)
            peer = Peer(self.own, self.address, link, PeerState.CONNECTED, loopback=True)
            peer.protocols = tuple(rail.protocol for rail in self._plane.rails)
            link.peer = peer
            self._loop_peer = peer
        return self._loop_peer

    def _new(self, key: PeerKey, address: str) -> Peer:
        host, _ = split_host_port(address)
        if self._loopback_only and not is_loopback(host):
            raise AccessDenied(
                f"the grant's owner is at {address}, but this daemon runs in development mode "
                "and speaks to "
                "loopback only; give both daemons a tls section",
                reason="DEVELOPMENT_MODE",
            )
        peers: list[Peer] = []
        link = self._make_link(address, lambda error: self._call_failed(peers[0], error))
        peer = Peer(key, address, link)
        peers.append(peer)
        self.table.add(peer)
        return peer

    def _hello(self, peer: Peer) -> Hello:
        return Hello(
            key=self.own,
            address=self.address,
            protocols=tuple(rail.protocol for rail in self._plane.rails),
            token=peer.own_token,
            port=self._port,
        )

    async def _greet(self, peer: Peer) -> None:
        """Introduces this daemon; the relation is connected or lost afterwards."""
        try:
            reply = await peer.link.hello(self._hello(peer), peer.key)
            if reply.key != peer.key:
                raise StalePeer(f"{peer.address} is daemon {reply.key}")
            await self._join(peer, peer.address, reply.protocols, reply.token, reply.port)
        except TransferdError as error:
            if peer.state is not PeerState.CONNECTED:  # its own Hello may have come in between
                _log_refusal(peer, error)
                self.lose(peer, error.message, Detail.CONNECTION)
                raise _not_reached(peer, error) from None
        finally:
            peer.greeting = None

    async def greeted(self, hello: Hello, callee: PeerKey) -> HelloReply:
        """Another daemon introduces itself.

        Raises:
            StalePeer: It means another daemon than this.
        """
        # The whole identity: whom a Hello means comes from a descriptor, which nobody has checked
        # yet. One that is damaged must not replace the relation that the two daemons have.
        if callee != self.own:
            raise StalePeer(f"the daemon at {self.address} is {self.own} now")
        if hello.key == self.own:
            raise InvalidRequest("daemon_id", "is this daemon's own")
        for old in self.table.superseded(hello.key, hello.address, hello.token):
            self.lose(old, "introduced itself anew", Detail.STALE)
        peer = self.table.get(hello.key) or self._new(hello.key, hello.address)
        work = self._accept(peer, hello)
        if peer.greeting is None and peer.state is PeerState.GREETING:
            peer.greeting = peer.tasks.spawn(work, "accept")
            await asyncio.shield(peer.greeting)
        else:
            await peer.tasks.run(work, "accept")
        return HelloReply(
            self.own,
            tuple(rail.protocol for rail in self._plane.rails),
            peer.own_token,
            self._port,
        )

    async def _accept(self, peer: Peer, hello: Hello) -> None:
        """Takes another's introduction; the relation is connected or lost afterwards."""
        mine = peer.greeting
        try:
            await self._join(peer, hello.address, hello.protocols, hello.token, hello.port)
        except TransferdError as error:
            if peer.state is PeerState.GREETING:
                _log_refusal(peer, error)
                self.lose(peer, error.message, Detail.CONNECTION)
            raise
        finally:
            if peer.greeting is mine:
                peer.greeting = None

    async def _join(
        self, peer: Peer, address: str, protocols: tuple[str, ...], token: bytes, port: int
    ) -> None:
        """Both sides know each other's token: starts the heartbeats. Idempotent."""
        self._check_fabrics(address, protocols)
        numeric = await _numeric(split_host_port(address)[0], port)
        peer.check()
        if peer.state is PeerState.CONNECTED:
            if peer.their_token != token:
                self.lose(peer, "answered with two tokens", Detail.CONNECTION)
                peer.check()
            return
        for old in self.table.superseded(peer.key, address, token):
            if old is not peer:
                self.lose(old, "another daemon is at its address", Detail.STALE)
        try:
            peer.watch = self._plane.peer_watch(numeric, port, token, peer.own_token)
        except PlaneError as error:
            raise PeerLost(f"heartbeats with {address}: {error.text}") from error
        peer.their_token = token
        peer.protocols = protocols
        peer.state = PeerState.CONNECTED
        peer.idle_since_ns = time.monotonic_ns()
        log.info("peer connected", peer=address, daemon=str(peer.key))

    def _check_fabrics(self, address: str, protocols: tuple[str, ...]) -> None:
        """Refuses a daemon whose rails no rail here can talk to; both sides say so.

        Raises:
            Conflict: PROTOCOL_MISMATCH, in words that are true at either side.
        """
        here = fabrics(rail.protocol for rail in self._plane.rails)
        there = fabrics(protocols)
        if set(here).isdisjoint(there):
            message = (
                f"no common fabric protocol: the daemon at {self.address} speaks {here}, the one "
                f"at {address} speaks {there}; use the same provider on both hosts, of libfabric "
                "in the same version, of verbs on the same kind of network"
            )
            raise Conflict(message, reason="PROTOCOL_MISMATCH")

    def caller(self, key: PeerKey) -> Peer:
        """Finds the relation of a daemon that calls.

        Raises:
            StalePeer: There is none; the caller has to introduce itself (again).
        """
        peer = self.table.get(key)
        if peer is None or peer.state is not PeerState.CONNECTED:
            raise StalePeer(f"daemon {key} is not introduced here; send Hello first")
        return peer

    async def buried(self, key: PeerKey) -> None:
        """Waits until nothing is left of lost relations with a daemon."""
        gone = [p.gone for p in self._burying if p.key == key and p.gone is not None]
        if gone:
            await asyncio.wait(gone)

    # ---- losing ----

    def lose(self, peer: Peer, why: str, detail: Detail) -> asyncio.Task[None]:
        """Ends a relation at once; idempotent.

        Args:
            peer: Which.
            why: For the log, after the address.
            detail: How jobs in flight are told to have been lost.

        Returns:
            A task that ends when no byte of the relation can land on either side.
        """
        held = bool(peer.holds_something or peer.lanes or peer.incoming)
        if not self.table.lost(peer, count=held):
            assert peer.gone is not None
            return peer.gone
        level = log.warning if held else log.info
        level("peer lost", peer=peer.address, daemon=str(peer.key), why=why)
        if peer is self._loop_peer:
            self._loop_peer = None
        self._opener.peer_lost(peer)
        self._lanes.peer_lost(peer, detail)
        if peer.watch:
            self._plane.peer_unwatch(peer.watch)
        self._burying.add(peer)
        peer.gone = self.tasks.spawn(self._bury(peer), f"bury {peer.address}")
        return peer.gone

    async def _bury(self, peer: Peer) -> None:
        """Waits for every task of a lost relation; then tells who waits for its writes."""
        try:
            await peer.link.aclose()
            await self._owner.cut_off(peer)
            await peer.tasks.idle()
            await self._owner.peer_lost(peer)
        finally:
            self._burying.discard(peer)

    def silent(self, watch: int) -> None:
        """TFD_EVENT_PEER_SILENT."""
        peer = self.table.by_watch(watch)
        if peer is not None:
            self.lose(peer, "no heartbeat", Detail.HEARTBEAT)

    def _call_failed(self, peer: Peer, error: TransferdError) -> None:
        """A call to a peer failed: finds out whether the relation still stands."""
        if peer.state is not PeerState.CONNECTED:
            return
        if isinstance(error, StalePeer):
            self.lose(peer, "has forgotten this daemon, or restarted", Detail.STALE)
        elif isinstance(error, PeerLost):
            self.probe(peer)

    def probe(self, peer: Peer) -> None:
        """A connection broke: asks whether the peer lives, sooner than heartbeats would tell."""
        if peer.loopback or peer.state is not PeerState.CONNECTED or peer.probing is not None:
            return
        peer.probing = peer.tasks.spawn(self._probe(peer), f"probe {peer.address}")

    async def _probe(self, peer: Peer) -> None:
        try:
            for attempt in (1, 2):
                try:
                    reply = await peer.link.hello(self._hello(peer), peer.key)
                except TimedOut:
                    return  # busy or cut off: heartbeats decide
                except (PeerLost, StalePeer) as error:
                    if isinstance(error, StalePeer) or attempt == 2:
                        self.lose(peer, error.message, Detail.CONNECTION)
                        return
                    await asyncio.sleep(PROBE_PAUSE_S)
                    continue
                if reply.token != peer.their_token:
                    self.lose(peer, "has begun anew", Detail.STALE)
                return
        except TransferdError as error:
            log.info("probing a peer failed", peer=peer.address, error=error.message)
        finally:
            peer.probing = None

    # ---- housekeeping ----

    def sweep(self, now_ns: int) -> None:
        """Ends relations in which neither side has held anything for a while."""
        for peer in self.table:
            if peer.state is not PeerState.CONNECTED or peer.holds_something or len(peer.tasks):
                peer.idle_since_ns = now_ns
            elif now_ns - peer.idle_since_ns > IDLE_S * 1e9:
                self.lose(peer, "idle", Detail.CONNECTION)

    async def aclose(self) -> None:
        """Ends all relations."""
        for peer in self.all():
            self.lose(peer, "this daemon stops", Detail.CONNECTION)
        await self.tasks.idle()


def _log_refusal(peer: Peer, error: TransferdError) -> None:
    """Other reasons pass by themselves; this one stays until somebody sees it."""
    if error.reason == "PROTOCOL_MISMATCH":
        log.warning("peer refused", peer=peer.address, why=error.message)


def _not_reached(peer: Peer, error: TransferdError) -> TransferdError:
    """Says to a client why an owner could not be greeted."""
    if isinstance(error, StalePeer):
        return StaleDescriptor(
            f"the daemon that made the descriptor is no longer at {peer.address}; get a new one "
            "from its owner"
        )
    if isinstance(error, (PeerLost, TimedOut)):
        return PeerLost(
            f"the grant's owner at {peer.address} cannot be reached: {error.message}; is its "
            "daemon running?"
        )
    return error


async def _numeric(host: str, port: int) -> str:
    """Resolves a host for the heartbeat socket; PeerLost if its name is unknown."""
    try:
        loop = asyncio.get_running_loop()
        info = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise PeerLost(f"{host}: {error.strerror or error}") from error
    return str(info[0][4][0])
