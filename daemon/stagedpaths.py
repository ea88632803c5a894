# SPDX-License-Identifier: Apache-2.0
"""Which opens have staged paths: those whose jobs may need them, and no others.

What a staged connection holds of the staging pools, at both ends, it holds for as long as it lives.
So it is made with the first open that may need it, and is one for all opens of a peer, also of
sessions whose other connections are their own: a piece that cannot be copied fails alone.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from transferd.daemon.errors import TransferdError
from transferd.daemon.grant import RIGHT_SEND
from transferd.daemon.peer import STAGED_LANE, LaneState
from transferd.daemon.plane import Detail

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transferd.daemon.lanes import Lanes
    from transferd.daemon.peer import Lane, Open, Peer, RemoteGrant
    from transferd.daemon.session import Session

ATTEMPTS = 3  # the lane may end between two steps
GIVE_S = 1.0  # whoever registers memory waits so long for peers; one that hangs takes longer


class StagedPaths:
    """Joins opens to the staged lanes of their peers."""

    def __init__(self, lanes: Lanes) -> None:
        """Takes the connections."""
        self._lanes = lanes

    def wanted(self, session: Session, grant: RemoteGrant | None, lanes: Iterable[Lane]) -> bool:
        """Whether jobs of a session on a grant may need staged paths, and there are such.

        That is: by some path of the lanes, memory of a GPU is not reached at one of its ends.
        """
        keys = grant.keys if grant is not None else None
        if grant is None or keys is None or keys.rights & RIGHT_SEND:
            return False
        unreached = any(
            path.rail in session.unreached
            or (keys.device and not keys.reached_by(path.remote_rail))
            for lane in lanes
            for path in lane.paths
        )
        return unreached and self._lanes.stages(grant.peer)

    def unreached(self, peer: Peer, *, partial: bool) -> Detail:
        """Says why a job that none of its open's paths carries was not carried.

        Args:
            peer: Whose grant it is.
            partial: A path that could is down.
        """
        if self._lanes.stages(peer):
            return Detail.STAGING
        return Detail.CONNECTION if partial else Detail.DEVICE_MEMORY

    def join(self, opened: Open, staged: Lane) -> None:
        """Gives an open the staged paths that are up, and the others once they are. Idempotent."""
        if opened.staged is staged:
            return
        opened.staged = staged
        staged.opens.add(opened)
        for path in staged.paths_up():
            self._lanes.paths.give(opened, path)
        self._lanes.wanted(staged)

    async def give(self, session: Session) -> None:
        """The session has got memory of a GPU: its opens that may need staged paths get them.

        What cannot be connected now is left for later: jobs that need it say so. What takes longer
        than the bound goes on as a task of its peer.
        """
        giving = [
            peer.tasks.spawn(self._give_at(session, peer), f"give staged paths to {peer.address}")
            for peer in {opened.grant.peer for opened in self._waiting(session)}
        ]
        if giving:
            await asyncio.wait(giving, timeout=GIVE_S)

    def _waiting(self, session: Session) -> list[Open]:
        """Its opens that may need staged paths, and have no lane of them."""
        return [
            opened
            for opened in session.live_opens.values()
            if opened.staged is None and self.wanted(session, opened.grant, [opened.lane])
        ]

    async def _give_at(self, session: Session, peer: Peer) -> None:
        for _ in range(ATTEMPTS):
            waiting = [one for one in self._waiting(session) if one.grant.peer is peer]
            if not waiting:
                return
            try:
                staged = await self._lanes.get(peer, STAGED_LANE)
            except TransferdError:
                return
            for opened in waiting:
                if opened.live and staged.state is LaneState.UP:
                    self.join(opened, staged)
            self._lanes.drop_idle(staged)
