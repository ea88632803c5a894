# SPDX-License-Identifier: Apache-2.0
"""Outgoing connections, one for each path of a lane: made, proven, destroyed, made anew.

A path that broke gets a new connection in the background, for as long as somebody uses its lane.
Jobs do not get it before the peer has answered by it: a rail whose cable is out takes a connection
and lets it wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
from typing import TYPE_CHECKING

import structlog

from transferd.daemon.errors import PeerLost, StalePeer, TimedOut, TransferdError
from transferd.daemon.peer import LOCAL_PROTOCOL, STAGED_LANE, LaneState, PathState
from transferd.daemon.plane import Detail, OpenPath, PlaneError
from transferd.daemon.tasks import settle
from transferd.daemon.wire import BATCH_MAX, Half

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transferd.daemon.peer import Lane, LanePath, Open, Peer
    from transferd.daemon.plane import Landed, Plane
    from transferd.daemon.wire import GrantKeys

log = structlog.get_logger("transferd.paths")

PAUSE_FIRST_S = 0.1  # before a path is made anew; doubled by each failure
PAUSE_MAX_S = 5.0
PROVE_S = 2.0  # a handshake, with one packet of it lost
TELL_AGAIN_S = 0.2
NO_ANSWER = {PeerLost.reason, StalePeer.reason, TimedOut.reason}
TELL_S = 6.0  # for an answer that says what has landed; without it jobs fail


class Paths:
    """All outgoing connections of the daemon."""

    def __init__(self, plane: Plane) -> None:
        """Takes the data plane."""
        self._plane = plane
        self._by_conn: dict[int, LanePath] = {}

    def __len__(self) -> int:
        return len(self._by_conn)

    def __iter__(self) -> Iterator[LanePath]:
        return iter(list(self._by_conn.values()))

    def find(self, conn: int) -> LanePath | None:
        """Finds the path of a connection that is not being destroyed."""
        return self._by_conn.get(conn)

    # ---- making ----

    async def make(self, peer: Peer, paths: Sequence[LanePath]) -> list[LanePath]:
        """Makes connections; after a failure :meth:`undo` takes back what there is of them.

        Returns:
            The paths that have one, at least one: of the others a rail takes none now, here or
            there.

        Raises:
            PlaneError: The data plane could not, by any of them, or the peer's address is none.
            TransferdError: The peer could not, or would not.
        """
        halves: dict[LanePath, Half] = {}
        refused = PlaneError(0, "no rail is up at its other end")
        for path in paths:
            path.proof = asyncio.get_running_loop().create_future()
            try:
                conn, address = await self._plane.conn_open(path.rail, peer.number, outgoing=True)
            except PlaneError as error:
                refused = error
                continue
            path.conn = conn
            self._by_conn[conn] = path  # from here on it may break
            protocol = self._plane.rails[path.rail].protocol
            halves[path] = Half(conn, path.remote_rail, protocol, address)
        if not halves:
            raise refused
        addresses = await peer.link.connect(peer.key.boot_epoch, list(halves.values()))
        started = []
        for path, address in zip(halves, addresses, strict=True):
            if not address:
                continue
            try:
                await self._plane.conn_start(path.conn, address)
            except PlaneError as error:
                if error.errno == errno.EPROTO:
                    raise
                refused = error
            else:
                started.append(path)
        if not started:
            raise refused
        return started

    async def undo(self, peer: Peer, paths: Sequence[LanePath]) -> None:
        """Destroys connections that no job has used."""
        conns = self._take(paths)
        await self._destroy_here(peer, conns, Detail.CONNECTION, [None] * len(conns))
        self._tell_later(peer, conns)

    def _take(self, paths: Sequence[LanePath]) -> list[int]:
        """Takes their connections away from paths."""
        conns = [path.conn for path in paths if path.conn]
        for path in paths:
            self._by_conn.pop(path.conn, None)
            path.conn = 0
        return conns

    # ---- destroying ----

    def close(self, peer: Peer, paths: Sequence[LanePath], detail: Detail) -> asyncio.Task[None]:
        """Destroys the connections of paths; what has not landed by them goes by other paths.

        Returns:
            A task that ends when nothing of them is in flight.
        """
        conns = self._take(paths)
        task = peer.tasks.spawn(self._close(peer, conns, detail), f"close {peer.address}")
        for path in paths:
            path.state = PathState.CLOSING
            path.closing = task
        return task

    async def _close(self, peer: Peer, conns: list[int], detail: Detail) -> None:
        # The far halves first: what this side has sent may still be on its way to them, and a job
        # may only end, or go on elsewhere, when no byte of it can land by them any more.
        landed = await self._tell(peer, conns)
        await self._destroy_here(peer, conns, detail, landed)

    async def _destroy_here(
        self, peer: Peer, conns: list[int], detail: Detail, landed: list[Landed | None]
    ) -> None:
        """Closes native halves; nothing on them is in flight afterwards."""
        calls = [
            functools.partial(self._plane.conn_close, conn, detail, far)
            for conn, far in zip(conns, landed, strict=True)
        ]
        for error in await settle(calls):
            log.error("closing a connection failed", peer=peer.address, error=str(error))

    async def _tell(self, peer: Peer, conns: list[int]) -> list[Landed | None]:
        """Has a living peer close its halves; tells what has landed by each, if it is known.

        Asks again for a while: a peer that is only slow remembers what it has answered.
        """
        until = asyncio.get_running_loop().time() + TELL_S
        while conns and not peer.is_lost:
            try:
                return await peer.link.disconnect(conns)
            except TransferdError as error:
                log.info("disconnect not delivered", peer=peer.address, error=error.message)
            if asyncio.get_running_loop().time() >= until:
                self._tell_later(peer, conns)
                break
            await asyncio.sleep(TELL_AGAIN_S)
        return [None] * len(conns)

    def _tell_later(self, peer: Peer, conns: list[int]) -> None:
        if not conns or peer.is_lost:
            return
        peer.untold += conns
        if peer.telling is None:
            peer.telling = peer.tasks.spawn(self._tell_all(peer), f"disconnect {peer.address}")

    async def _tell_all(self, peer: Peer) -> None:
        """Repeats it until the peer has heard: until then bytes may land by its halves."""
        try:
            while peer.untold and not peer.is_lost:
                batch = peer.untold[:BATCH_MAX]
                try:
                    await peer.link.disconnect(batch)
                except TransferdError:
                    await asyncio.sleep(TELL_AGAIN_S)
                    continue
                del peer.untold[: len(batch)]
        finally:
            peer.telling = None

    async def heard(self, peer: Peer, bound_s: float) -> None:
        """Waits until no byte can land by connections that are destroyed here.

        Raises:
            TimedOut: The peer has not heard of some within the bound.
        """
        if peer.telling is not None:
            await asyncio.wait([peer.telling], timeout=bound_s)
        if peer.untold:
            raise TimedOut(f"{len(peer.untold)} connections are not destroyed at both ends")

    # ---- making anew ----

    def restore(self, path: LanePath) -> None:
        """Gives a path that is down a new connection, in the background. Idempotent."""
        if path.state is PathState.DOWN and not path.restoring and _wanted(path.lane):
            path.restoring = True
            peer = path.lane.peer
            peer.tasks.background(self._restore(path), f"restore a path to {peer.address}")

    async def _restore(self, path: LanePath) -> None:
        try:
            while _wanted(path.lane) and path.state is PathState.DOWN:
                pause_s = min(PAUSE_FIRST_S * 2**path.failures, PAUSE_MAX_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await path.lane.over.wait()
                if _wanted(path.lane):
                    await self.attempt(path)
        finally:
            path.restoring = False

    async def attempt(self, path: LanePath) -> None:
        """Makes one connection for a path that is down; it is up or down afterwards."""
        peer = path.lane.peer
        path.state = PathState.CONNECTING
        try:
            if not await self.prove(await self.make(peer, [path])):
                raise PeerLost("no answer by it")
            peer.check()
            if path.lane.state is not LaneState.UP:
                raise PeerLost("its lane was closed")
        except (PlaneError, TransferdError) as error:
            # A staging pool that has no room is for an operator to mend, and says what to raise. A
            # peer that does not answer is told of by who loses it.
            mute = isinstance(error, TransferdError) and error.reason in NO_ANSWER
            told = path.lane.key == STAGED_LANE and not path.failures and not mute
            level = log.warning if told else log.debug
            level("path stays down", peer=peer.address, rail=path.rail, error=str(error))
            path.failures += 1
            await self.undo(peer, [path])
            path.state = PathState.DOWN
            return
        path.failures = 0
        path.state = PathState.UP
        log.info("path is up", peer=peer.address, rail=path.rail)
        self._give(path)

    def leads_to(self, path: LanePath, keys: GrantKeys) -> bool:
        """Tells whether jobs on a grant may go by a path.

        Within this daemon they all may: by its own rail device memory is counted, if not reached.
        """
        if path.remote_rail >= len(keys.rails):
            return False
        local = self._plane.rails[path.rail].protocol.startswith(LOCAL_PROTOCOL)
        return not keys.device or local or keys.reached_by(path.remote_rail)

    def _give(self, path: LanePath) -> None:
        """Jobs may go by it again: by all opens of its lane."""
        for opened in list(path.lane.opens):
            self.give(opened, path)

    def give(self, opened: Open, path: LanePath) -> None:
        """Jobs of an open may go by a path that is up."""
        keys = opened.grant.keys
        if not opened.live or keys is None or not self.leads_to(path, keys):
            return
        slot = opened.slots.get(path, len(opened.slots))
        try:
            self._plane.open_path_set(
                opened.session.handle, opened.handle, slot, native_path(path, keys)
            )
        except PlaneError as error:  # its session is being freed
            log.debug("giving an open a path", error=error.text)
            return
        opened.slots[path] = slot

    async def prove(self, paths: Sequence[LanePath]) -> list[LanePath]:
        """Waits, within a bound, until the peer has answered by new connections.

        Returns:
            Those by which it has.
        """
        proofs = {path: path.proof for path in paths if path.proof is not None}
        for path in paths:
            self._plane.conn_probe(path.conn)
        await asyncio.wait(proofs.values(), timeout=PROVE_S)
        return [path for path, proof in proofs.items() if proof.done() and proof.result()]

    def proven(self, conn: int) -> None:
        """TFD_EVENT_CONN_PROVEN."""
        path = self._by_conn.get(conn)
        if path is not None:
            path.answer(proven=True)


def native_path(path: LanePath, keys: GrantKeys) -> OpenPath:
    """Says how jobs on a grant go by a path."""
    rail = keys.rails[path.remote_rail]
    return OpenPath(path.conn, rail.key, rail.address)


def _wanted(lane: Lane) -> bool:
    return lane.state is LaneState.UP and any(opened.live for opened in lane.opens)
