# SPDX-License-Identifier: Apache-2.0
"""Lanes: the paths that all opens of a peer share. Made on first use.

A path whose connection breaks is taken out of its lane alone, and comes back (:mod:`.paths`); the
lane ends with the last of them, or when nobody wants it. The staged lane has no last path: opens
on it have paths of another lane, too. Every change runs as a task of the peer, to its end; who
waits for it may be cancelled, the work is not.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

import structlog

from transferd.daemon.errors import Conflict, PeerLost
from transferd.daemon.paths import Paths
from transferd.daemon.peer import (
    STAGED_LANE,
    Lane,
    LaneKey,
    LanePath,
    LaneState,
    PathState,
    pair_rails,
    pair_staged,
)
from transferd.daemon.plane import Detail, PlaneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.daemon.peer import Open, Peer
    from transferd.daemon.plane import Plane

log = structlog.get_logger("transferd.lanes")

LINGER_S = 10.0  # of a staged lane: whoever comes and goes has the worker make it once


class Lanes:
    """All lanes of the daemon.

    Attributes:
        paths: Their connections.
        on_broken: Told of a peer whose connection broke by itself, to find out whether it lives.
        on_hide: Told of opens that no new work may find, before their connections are destroyed.
        on_dead: Told of them again afterwards, to stop their native half.
    """

    def __init__(self, plane: Plane) -> None:
        """Takes the data plane; the callbacks are set by who wires the daemon."""
        self._plane = plane
        self.paths = Paths(plane)
        self.on_broken: Callable[[Peer], None] = lambda peer: None
        self.on_hide: Callable[[Open], None] = lambda opened: None
        self.on_dead: Callable[[Open, Detail], object] = lambda opened, detail: None

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
            connect = self._connect_staged if key == STAGED_LANE else self._connect
            lane.ready = peer.tasks.spawn(connect(lane), f"connect {peer.address}")
        assert lane.ready is not None
        await asyncio.shield(lane.ready)
        return lane

    def stages(self, peer: Peer) -> bool:
        """Whether there are staged paths to a peer."""
        return bool(pair_staged(self._protocols(), peer.protocols))

    def _protocols(self) -> tuple[str, ...]:
        return tuple(rail.protocol for rail in self._plane.rails)

    async def _connect_staged(self, lane: Lane) -> None:
        """Tries each path of a new staged lane once; what is down then comes back as any does."""
        pairs = pair_staged(self._protocols(), lane.peer.protocols)
        lane.paths = tuple(LanePath(lane, *pair, state=PathState.DOWN) for pair in pairs)
        lane.state = LaneState.UP
        await asyncio.gather(*(self.paths.attempt(path) for path in lane.paths))

    async def _connect(self, lane: Lane) -> None:
        """Makes the connections of a new lane, or removes it."""
        peer = lane.peer
        try:
            pairs = pair_rails(self._protocols(), peer.protocols)
            lane.paths = tuple(LanePath(lane, *pair) for pair in pairs)
            proven = await self.paths.prove(await self.paths.make(peer, lane.paths))
            peer.check()
            if lane.state is LaneState.CLOSED:  # closed by a session's end while it was on its way
                raise PeerLost(f"the connection to {peer.address} was given up; try again")
            if not proven:
                raise PeerLost(f"{peer.address} does not answer by any rail; try again")
        except PlaneError as error:
            await self._undo(lane)
            text = f"connecting to {peer.address}: {error.text}"
            if error.errno == errno.EPROTO:
                raise Conflict(text, reason="PROTOCOL_MISMATCH") from error
            raise PeerLost(text) from error
        except BaseException:
            await self._undo(lane)
            raise
        for path in lane.paths:
            path.state = PathState.UP
        lane.state = LaneState.UP
        log.debug("connected", peer=peer.address, paths=len(proven))
        for path in lane.paths:
            if path not in proven:
                log.warning("no answer by a rail", peer=peer.address, rail=path.rail)
                self._take_out(path)

    async def _undo(self, lane: Lane) -> None:
        self._end(lane)
        await self.paths.undo(lane.peer, lane.paths)

    @staticmethod
    def _end(lane: Lane) -> None:
        lane.state = LaneState.CLOSED
        lane.over.set()
        for path in lane.paths:  # whoever waits for one need not wait longer
            path.answer(proven=False)
        if lane.peer.lanes.get(lane.key) is lane:
            del lane.peer.lanes[lane.key]

    # ---- closing ----

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
        self._end(lane)
        if lane.lingers is not None:
            lane.lingers.cancel()
        for opened in lane.opens:
            self.on_hide(opened)
        # A path that is being made anew is undone by who makes it: no job has used it.
        if up := lane.paths_up():
            self.paths.close(lane.peer, up, conn_detail)
        lane.closing = lane.peer.tasks.spawn(
            self._close(lane, open_detail or conn_detail), f"close lane {lane.peer.address}"
        )
        return lane.closing

    async def _close(self, lane: Lane, open_detail: Detail) -> None:
        # The connections first, which ends the jobs with PEER_LOST; then the opens, because
        # stopping them would end the jobs as cancelled.
        waits = [path.closing for path in lane.paths if path.closing is not None]
        if waits:
            await asyncio.wait(waits)
        for opened in list(lane.opens):
            self.on_dead(opened, open_detail)

    def drop_idle(self, lane: Lane) -> None:
        """Closes a lane once nothing uses it, a staged one a while later; the common one stays."""
        if lane.key == LaneKey() or lane.opens or lane.state is not LaneState.UP:
            return
        if lane.key != STAGED_LANE:
            self.close(lane, Detail.CONNECTION)
            return
        if lane.lingers is not None:
            lane.lingers.cancel()
        loop = asyncio.get_running_loop()
        lane.lingers = loop.call_later(LINGER_S, self._drop_staged, lane)

    def _drop_staged(self, lane: Lane) -> None:
        lane.lingers = None
        if not lane.opens:
            self.close(lane, Detail.CONNECTION)

    def peer_lost(self, peer: Peer, detail: Detail) -> None:
        """Destroys all lanes of a lost peer, as tasks of it."""
        for lane in list(peer.lanes.values()):
            self.close(lane, detail, Detail.STALE)

    # ---- single paths ----

    def conn_lost(self, conn: int) -> bool:
        """The provider reported a connection broken; False if it is none of ours."""
        path = self.paths.find(conn)
        if path is None:
            return False
        peer = path.lane.peer
        if path.state is PathState.CONNECTING:  # whoever makes it finds out
            path.answer(proven=False)
            return True
        log.warning("connection broke", peer=peer.address, rail=path.rail)
        self._take_out(path)
        self.on_broken(peer)
        return True

    def _take_out(self, path: LanePath) -> None:
        """Takes a broken path out of its lane; with the last one the lane ends, if not staged."""
        lane = path.lane
        if path.state is not PathState.UP:  # the lane was closed meanwhile
            return
        if lane.paths_up() == [path] and lane.key != STAGED_LANE:
            self.close(lane, Detail.CONNECTION)
            return
        closing = self.paths.close(lane.peer, [path], Detail.CONNECTION)
        lane.peer.tasks.background(self._taken_out(path, closing), f"replace {lane.peer.address}")

    async def _taken_out(self, path: LanePath, closing: asyncio.Task[None]) -> None:
        await asyncio.wait([closing])
        path.closing = None
        path.state = PathState.DOWN
        self.paths.restore(path)

    def wanted(self, lane: Lane) -> None:
        """A lane has got an open: its paths are worth making anew."""
        for path in lane.paths:
            self.paths.restore(path)
