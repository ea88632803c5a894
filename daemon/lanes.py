# SPDX-License-Identifier: Apache-2.0
"""Outgoing connections: made on first use, shared by all opens of a peer, destroyed together.

Every change to a lane runs as a task of its peer, to its end; who waits for it may be cancelled,
the work is not.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

import structlog

from transferd.daemon.errors import Internal, PeerLost, TransferdError
from transferd.daemon.peer import Lane, LanePath, LaneState, pair_rails
from transferd.daemon.plane import Detail, PlaneError
from transferd.daemon.tasks import settle
from transferd.daemon.wire import Half

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.daemon.opens import Open
    from transferd.daemon.peer import LaneKey, Peer
    from transferd.daemon.plane import Plane

log = structlog.get_logger("transferd.lanes")


class Lanes:
    """All outgoing connections of the daemon.

    Attributes:
        on_broken: Told of a peer whose connection broke by itself, to find out whether it lives.
        on_hide: Told of opens that no new work may find, before their connections are destroyed.
        on_dead: Told of them again afterwards, to stop their native half.
    """

    def __init__(self, plane: Plane) -> None:
        """Takes the data plane; the callbacks are set by who wires the daemon."""
        self._plane = plane
        self._by_conn: dict[int, Lane] = {}
        self.on_broken: Callable[[Peer], None] = lambda peer: None
        self.on_hide: Callable[[Open], None] = lambda opened: None
        self.on_dead: Callable[[Open, Detail], object] = lambda opened, detail: None

    def __len__(self) -> int:
        return len(self._by_conn)

    async def get(self, peer: Peer, key: LaneKey) -> Lane:
        """Gives a lane that is up, connecting it if needed.

        Args:
            peer: Whom it leads to.
            key: Which lane.

        Returns:
            A lane; it may be closed again by the time the caller runs.

        Raises:
            TransferdError: The peer is lost, refuses, or does not speak our fabric protocol.
        """
        peer.check()
        lane = peer.lanes.get(key)
        if lane is None:
            lane = Lane(key, peer)
            peer.lanes[key] = lane
            lane.ready = peer.tasks.spawn(self._connect(lane), f"connect {peer.address}")
        assert lane.ready is not None
        await asyncio.shield(lane.ready)
        return lane

    async def _connect(self, lane: Lane) -> None:
        """Makes the connections of a new lane, or removes it."""
        made: list[LanePath] = []
        try:
            await self._make(lane, made)
            lane.peer.check()
            if lane.state is LaneState.CLOSED:  # closed by a session's end while it was on its way
                raise PeerLost(f"the connection to {lane.peer.address} was given up; try again")
        except PlaneError as error:
            await self._undo(lane, made)
            raise PeerLost(f"connecting to {lane.peer.address}: {error.text}") from error
        except BaseException:
            await self._undo(lane, made)
            raise
        lane.paths = tuple(made)
        lane.state = LaneState.UP
        log.debug("connected", peer=lane.peer.address, paths=len(made))

    async def _make(self, lane: Lane, made: list[LanePath]) -> None:
        """Opens, exchanges and starts the halves; `made` tells what there is to undo."""
        peer = lane.peer
        local = [rail.protocol for rail in self._plane.rails]
        halves = []
        for here, there in pair_rails(local, peer.protocols):
            conn, address = await self._plane.conn_open(here, peer.number, outgoing=True)
            made.append(LanePath(conn, there))
            self._by_conn[conn] = lane  # from here on it may break
            halves.append(Half(conn, there, local[here], address))
        addresses = await peer.link.connect(peer.key.boot_epoch, halves)
        if len(addresses) != len(halves):
            raise Internal(f"{peer.address} answered {len(addresses)} of {len(halves)} connections")
        for path, address in zip(made, addresses, strict=True):
            await self._plane.conn_start(path.conn, address)

    async def _undo(self, lane: Lane, made: list[LanePath]) -> None:
        lane.state = LaneState.CLOSED
        if lane.peer.lanes.get(lane.key) is lane:
            del lane.peer.lanes[lane.key]
        conns = [path.conn for path in made]
        for conn in conns:
            self._by_conn.pop(conn, None)
        await self._destroy_here(lane.peer, conns, Detail.CONNECTION, [None] * len(conns))
        await self._tell(lane.peer, conns)

    async def _destroy_here(
        self, peer: Peer, conns: list[int], detail: Detail, landed: list[int | None]
    ) -> None:
        """Closes native halves; nothing on them is in flight afterwards."""
        calls = [
            functools.partial(self._plane.conn_close, conn, detail, far)
            for conn, far in zip(conns, landed, strict=True)
        ]
        for error in await settle(calls):
            log.error("closing a connection failed", peer=peer.address, error=str(error))

    async def _tell(self, peer: Peer, conns: list[int]) -> list[int | None]:
        """Has a living peer close its halves; tells what has landed by each, if it is known."""
        if conns and not peer.is_lost:
            try:
                return await peer.link.disconnect(conns)
            except TransferdError as error:
                log.debug("disconnect not delivered", peer=peer.address, error=error.message)
        return [None] * len(conns)

    def close(
        self, lane: Lane, conn_detail: Detail, open_detail: Detail | None = None
    ) -> asyncio.Task[None]:
        """Destroys a lane. Idempotent.

        Args:
            lane: What to destroy.
            conn_detail: Why; its jobs end with PEER_LOST and this.
            open_detail: How later jobs on its opens end; the same if it is left out.

        Returns:
            A task that ends when nothing of the lane is in flight.
        """
        if lane.closing is not None:
            return lane.closing
        was_up = lane.state is LaneState.UP
        lane.state = LaneState.CLOSED
        if lane.peer.lanes.get(lane.key) is lane:
            del lane.peer.lanes[lane.key]
        for path in lane.paths:
            self._by_conn.pop(path.conn, None)
        for opened in lane.opens:
            self.on_hide(opened)
        lane.closing = lane.peer.tasks.spawn(
            self._close(lane, conn_detail, open_detail or conn_detail, was_up=was_up),
            f"close lane {lane.peer.address}",
        )
        return lane.closing

    async def _close(
        self, lane: Lane, conn_detail: Detail, open_detail: Detail, *, was_up: bool
    ) -> None:
        if was_up:
            conns = [path.conn for path in lane.paths]
            # The far halves first: what this side has sent may still be on its way to them, and a
            # job may only end when no byte of it can land. Then our halves, which ends the jobs
            # with PEER_LOST; the opens last, because stopping them would end the jobs as cancelled.
            landed = await self._tell(lane.peer, conns)
            await self._destroy_here(lane.peer, conns, conn_detail, landed)
        for opened in list(lane.opens):
            self.on_dead(opened, open_detail)

    def conn_lost(self, conn: int) -> bool:
        """The provider reported a connection broken; False if it is none of ours."""
        lane = self._by_conn.get(conn)
        if lane is None:
            return False
        log.warning("connection broke", peer=lane.peer.address)
        self.close(lane, Detail.CONNECTION)
        self.on_broken(lane.peer)
        return True

    def drop_idle(self, lane: Lane) -> None:
        """Closes a lane of its own once nothing uses it; the common lane stays."""
        own = lane.key.isolation or lane.key.session_id
        if own and not lane.opens and lane.state is LaneState.UP:
            self.close(lane, Detail.CONNECTION)

    def peer_lost(self, peer: Peer, detail: Detail) -> None:
        """Destroys all lanes of a lost peer, as tasks of it."""
        for lane in list(peer.lanes.values()):
            self.close(lane, detail, Detail.STALE)
