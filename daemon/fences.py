# SPDX-License-Identifier: Apache-2.0
"""The opener's half of a fence on single immediates: their jobs end, the others go on."""

from __future__ import annotations

import asyncio
import errno
import itertools
from typing import TYPE_CHECKING

from transferd.daemon.errors import Internal, TimedOut
from transferd.daemon.plane import Detail, PlaneError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from transferd.daemon.peer import Open, Peer
    from transferd.daemon.plane import Event, Plane
    from transferd.daemon.wire import GrantFence


class OpenFences:
    """The fences that owners have asked for and that are not quiet yet."""

    def __init__(
        self, plane: Plane, quiet_s: float, settled: Callable[[Peer], Awaitable[None]]
    ) -> None:
        """Takes what it works with.

        Args:
            plane: The data plane.
            quiet_s: Longest wait for a fence.
            settled: Returns when nothing of what has ended lands at an owner, and he knows its
                losses so far.
        """
        self._plane = plane
        self._quiet_s = quiet_s
        self._settled = settled
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bool]] = {}  # whether no stream copies on

    async def fenced(self, peer: Peer, fences: Sequence[GrantFence]) -> set[int]:
        """The owner fences immediates; returns when nothing submitted before on them is in flight.

        Returns:
            Grants to which the stream of a client may be writing all the same.

        Raises:
            TimedOut: Something still was, when the bound passed.
        """
        waits: dict[asyncio.Future[bool], int] = {}
        for fence in fences:
            grant = peer.remote.get(fence.grant_id)
            # A grant lists its opens until they are quiet, also those that die.
            for opened in list(grant.opens) if grant is not None else ():
                waits[self._start(opened, fence.imms)] = fence.grant_id
        if waits:
            _, late = await asyncio.wait(waits, timeout=self._quiet_s)
            if late:
                raise TimedOut(f"{len(late)} opens did not become quiet in {self._quiet_s} s")
        await self._settled(peer)
        return {grant_id for quiet, grant_id in waits.items() if not quiet.result()}

    def _start(self, opened: Open, imms: Sequence[range]) -> asyncio.Future[bool]:
        number = next(self._numbers)
        quiet: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[number] = quiet
        try:
            self._plane.open_fence(opened.session.handle, opened.handle, imms, number)
        except PlaneError as error:
            del self._waiting[number]
            if error.errno != errno.ENOENT:
                raise Internal(f"fencing an open: {error.text}") from error
            quiet.set_result(True)  # it has been freed: nothing is in flight
        return quiet

    def on_quiet(self, event: Event) -> None:
        """TFD_EVENT_FENCE_QUIET."""
        quiet = self._waiting.pop(event.count, None)
        if quiet is not None:
            quiet.set_result(event.detail != Detail.STILL_COPIED)
