# SPDX-License-Identifier: Apache-2.0
"""GPU memory of one process, mapped by another of the same host: asked for, asked back. Sans-IO.

    asked for --given--> MAPPED --grant ends, owner dies: told--> WANTED BACK --unmapped, mapper
    dies--> gone

The daemon maps nothing itself. It checks that the grant allows it, passes handle and fds on, and
keeps who has them: a mapping cannot be limited to the granted range nor taken back by force, so
whoever takes memory back has to be told whether somebody still reaches it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from transferd.daemon.cuda import FDS_MAX, CudaMemory
from transferd.daemon.errors import AccessDenied, Conflict, InvalidRequest, NotFound, QuotaExceeded
from transferd.daemon.grant import RIGHT_MAP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transferd.daemon.grant import Grant, GrantTable
    from transferd.daemon.region import Region
    from transferd.daemon.session import Session

log = structlog.get_logger("transferd.maps")

MAPS_MAX = 4096  # of one session


@dataclass(slots=True, eq=False)
class Mapping:
    """One grant's memory, as one session has it.

    Attributes:
        told: Its session was asked to unmap it.
        gone: Done once it is unmapped.
    """

    map_id: int
    session: Session
    grant: Grant
    memory: CudaMemory
    gone: asyncio.Future[None]
    told: bool = False

    @property
    def own_process(self) -> bool:
        """Whether owner and mapper are one process, as far as the kernel told."""
        owner, mapper = self.grant.session, self.session
        same_pid = owner.origin.pid == mapper.origin.pid != 0
        return owner is mapper or same_pid

    def chunks(self, first: int) -> slice:
        """Chooses the chunks of one answer.

        Raises:
            InvalidRequest: There is none with that number.
            Conflict: GRANT_REVOKED: its owner has taken it back meanwhile.
        """
        if self.told:
            raise _over(self.grant)
        if first and first >= len(self.memory.chunk_bytes):
            raise InvalidRequest(
                "first_chunk", f"{first} is past the last of {len(self.memory.chunk_bytes)} chunks"
            )
        return slice(first, first + FDS_MAX)


class Maps:
    """All mappings of the daemon.

    Attributes:
        on_revoked: Told which mappings of one session are wanted back.
    """

    def __init__(self, grants: GrantTable, bound_s: float) -> None:
        """Takes what it works with.

        Args:
            grants: Of this daemon's sessions.
            bound_s: How long mappers may take to unmap.
        """
        self._grants = grants
        self._bound_s = bound_s
        self._next = 1
        self._by_session: dict[Session, dict[int, Mapping]] = {}
        self._by_grant: dict[int, dict[int, Mapping]] = {}
        self._by_region: dict[int, dict[int, Mapping]] = {}
        self.on_revoked: list[Callable[[Session, Sequence[int]], None]] = []

    def __len__(self) -> int:
        return sum(len(mappings) for mappings in self._by_session.values())

    def has(self, grant_id: int) -> bool:
        """Tells whether anybody has the memory of a grant."""
        return grant_id in self._by_grant

    def count(self, region: Region) -> int:
        """Counts the sessions that have a region's memory."""
        return len({one.session for one in self._of_region(region)})

    def _of_grant(self, grant_id: int) -> list[Mapping]:
        return list(self._by_grant.get(grant_id, {}).values())

    def _of_region(self, region: Region) -> list[Mapping]:
        return list(self._by_region.get(region.number, {}).values())

    # ---- the mapper's side ----

    def add(self, session: Session, handle: int, now_ns: int) -> Mapping:
        """Gives a session the memory of a grant that it has opened.

        Raises:
            NotFound: OPEN_NOT_FOUND.
            AccessDenied: MAP_NOT_GRANTED, MAP_OTHER_HOST, MAP_OTHER_TENANT.
            Conflict: GRANT_REVOKED, GRANT_EXPIRED.
            QuotaExceeded: MAPS.
        """
        session.check_open()
        grant = self._granted(session, handle, now_ns)
        memory = grant.region.memory
        assert isinstance(memory, CudaMemory)  # no other region gives the right
        mine = self._by_session.setdefault(session, {})
        if len(mine) >= MAPS_MAX:
            raise QuotaExceeded(
                f"the session has {MAPS_MAX} mappings; unmap some", reason="MAPS", limit=MAPS_MAX
            )
        gone = asyncio.get_running_loop().create_future()
        mapping = Mapping(self._next, session, grant, memory, gone)
        self._next += 1
        mine[mapping.map_id] = mapping
        for index, key in self._indices(mapping):
            index.setdefault(key, {})[mapping.map_id] = mapping
        return mapping

    def _granted(self, session: Session, handle: int, now_ns: int) -> Grant:
        opened = session.opens.get(handle)
        if opened is None:
            raise NotFound(f"handle: {handle} is not open in this session", reason="OPEN_NOT_FOUND")
        keys = opened.grant.keys
        if keys is None or not keys.rights & RIGHT_MAP:
            raise AccessDenied(
                f"handle: {handle} does not allow mapping; have its owner grant the right map",
                reason="MAP_NOT_GRANTED",
            )
        if not opened.grant.peer.loopback:
            raise AccessDenied(
                f"handle: {handle} is of memory of another host, which cannot be mapped here",
                reason="MAP_OTHER_HOST",
            )
        grant = self._grants.usable(opened.grant.grant_id, now_ns)
        if grant.session.tenant is not session.tenant:
            raise AccessDenied(
                f"handle: {handle} is of tenant {grant.session.tenant.name}; memory is mapped "
                "within one tenant only, because all of the allocation can be reached by it",
                reason="MAP_OTHER_TENANT",
            )
        if not grant.session.is_open:
            raise _over(grant)
        return grant

    def find(self, session: Session, map_id: int) -> Mapping:
        """Finds a mapping of a session.

        Raises:
            NotFound: MAP_NOT_FOUND.
        """
        mapping = self._by_session.get(session, {}).get(map_id)
        if mapping is None:
            raise NotFound(f"map_id: {map_id} is not mapped here", reason="MAP_NOT_FOUND")
        return mapping

    def remove(self, session: Session, map_id: int) -> None:
        """A session says that it has unmapped; idempotent."""
        mapping = self._by_session.get(session, {}).pop(map_id, None)
        if mapping is not None:
            self._gone(mapping)

    def _gone(self, mapping: Mapping) -> None:
        for index, key in self._indices(mapping):
            del index[key][mapping.map_id]
            if not index[key]:
                del index[key]
        mapping.gone.set_result(None)

    def _indices(self, mapping: Mapping) -> Iterable[tuple[dict[int, dict[int, Mapping]], int]]:
        grant = mapping.grant
        return (self._by_grant, grant.grant_id), (self._by_region, grant.region.number)

    # ---- taking back ----

    def revoke(self, grants: Iterable[Grant]) -> None:
        """Asks for the memory of grants that end; who was asked before is not asked again."""
        told: dict[Session, list[int]] = {}
        for grant in grants:
            for mapping in self._of_grant(grant.grant_id):
                if not mapping.told:
                    mapping.told = True
                    told.setdefault(mapping.session, []).append(mapping.map_id)
        for session, map_ids in told.items():
            for listener in self.on_revoked:
                listener(session, map_ids)

    async def unmapped(self, grant_id: int) -> None:
        """Waits, within the bound, until nobody has the memory of a grant that has ended.

        Raises:
            Conflict: STILL_MAPPED: somebody has, all the same.
        """
        await self._unmapped(self._of_grant(grant_id))

    async def region_unmapped(self, region: Region) -> None:
        """The same for all grants that there were on a region."""
        await self._unmapped(self._of_region(region))

    async def _unmapped(self, mappings: list[Mapping]) -> None:
        if not mappings:
            return
        await asyncio.wait([one.gone for one in mappings], timeout=self._bound_s)
        left = {one.session for one in mappings if not one.gone.done()}
        if left:
            pids = ", ".join(str(session.origin.pid) for session in left)
            log.warning("memory is still mapped", pids=pids)
            raise Conflict(
                f"{len(left)} processes (pid {pids}) did not unmap the memory within "
                f"{self._bound_s:g} s; no job can use the grant any more, but they still reach "
                "the memory: ask again, or end them",
                reason="STILL_MAPPED",
            )

    def session_ending(self, session: Session) -> None:
        """A session ends: what it mapped counts as unmapped; its own memory is wanted back."""
        for mapping in self._by_session.pop(session, {}).values():
            self._gone(mapping)
        self.revoke(list(session.grants.values()))
        for memory in session.memories.values():
            if isinstance(memory, CudaMemory):
                memory.close_chunks()


def _over(grant: Grant) -> Conflict:
    return Conflict(
        f"grant {grant.grant_id} was taken back by its owner; ask for a new one",
        reason="GRANT_REVOKED",
    )
