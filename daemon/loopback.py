# SPDX-License-Identifier: Apache-2.0
"""The link of a daemon to itself: sessions of one host write to each other by the same rules."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from transferd.daemon.errors import Internal, TimedOut

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from transferd.daemon.descriptor import PeerKey
    from transferd.daemon.opens import Opener
    from transferd.daemon.owner import Owner
    from transferd.daemon.peer import Peer
    from transferd.daemon.plane import Landed
    from transferd.daemon.wire import GrantFence, GrantKeys, Half, Hello, HelloReply, Loss, Refusal

T = TypeVar("T")


class LoopbackLink:
    """Calls the owner's and the opener's side of this daemon directly."""

    peer: Peer

    def __init__(self, owner: Owner, opener: Opener) -> None:
        self._owner = owner
        self._opener = opener

    async def hello(self, hello: Hello, callee: PeerKey) -> HelloReply:
        """A daemon knows itself."""
        raise Internal("a daemon does not introduce itself to itself")

    async def connect(self, callee_epoch: bytes, halves: Sequence[Half]) -> list[bytes]:
        """Makes the receiving halves."""
        return await self._owner.tasks.run(self._owner.connect(self.peer, halves), "connect")

    async def disconnect(self, connection_ids: Sequence[int]) -> list[Landed | None]:
        """Destroys the receiving halves."""
        return await self._owner.disconnect(self.peer, connection_ids)

    async def open_grants(self, descriptors: Sequence[bytes]) -> list[GrantKeys | Refusal]:
        """Opens grants of sessions here."""
        return self._owner.open_for(self.peer, descriptors)

    async def release_grants(self, grant_ids: Sequence[int], *, abandoned: bool) -> None:
        """Gives them back."""
        self._owner.release(self.peer, grant_ids, abandoned=abandoned)

    async def revoke_grants(self, grant_ids: Sequence[int], timeout_s: float) -> None:
        """Stops the sessions here that use them."""
        await _bounded(self._opener.revoked(self.peer, grant_ids), timeout_s)

    async def fence_grants(self, fences: Sequence[GrantFence], timeout_s: float) -> set[int]:
        """Stops what sessions here have submitted on these imms."""
        return await _bounded(self._opener.fences.fenced(self.peer, fences), timeout_s)

    async def report_loss(self, number: int, losses: Sequence[Loss]) -> None:
        """Faults counters of sessions here."""
        self._owner.report_loss(self.peer, number, losses)

    async def aclose(self) -> None:
        """Nothing to end."""


async def _bounded(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise TimedOut(f"jobs of this host did not stop in {timeout_s} s") from None
