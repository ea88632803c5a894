# SPDX-License-Identifier: Apache-2.0
"""transferd.v1.RegionService."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transferd.daemon.errors import InvalidRequest, TransferdError
from transferd.daemon.grant import (
    IMM_RANGES_MAX,
    RIGHT_MAP,
    RIGHT_READ,
    RIGHT_SEND,
    RIGHT_WRITE,
    check_fence,
    grant_over,
)
from transferd.daemon.session import check_name
from transferd.v1 import region_pb2 as pb
from transferd.v1 import region_pb2_grpc, types_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc.aio

    from transferd.daemon.grant import Grant
    from transferd.daemon.opens import Opener
    from transferd.daemon.owner import Owner
    from transferd.daemon.peer import Open
    from transferd.daemon.services.auth import Authenticator
    from transferd.daemon.session import Session
    from transferd.daemon.sessions import Sessions

    Context = grpc.aio.ServicerContext[Any, Any]

DESCRIPTORS_MAX = 4096
EXPIRES_MAX_MS = (
    10 * 365 * 24 * 3600 * 1000
)  # ten years: what asyncio's timers and the clock can carry
_RIGHTS = {
    types_pb2.RIGHT_WRITE: RIGHT_WRITE,
    types_pb2.RIGHT_READ: RIGHT_READ,
    types_pb2.RIGHT_MAP: RIGHT_MAP,
}
_OPENED_RIGHTS = {**_RIGHTS, types_pb2.RIGHT_SEND: RIGHT_SEND}  # that only mailboxes give


class RegionService(region_pb2_grpc.RegionServiceServicer):
    """Regions, grants and descriptors of the calling session."""

    def __init__(
        self, sessions: Sessions, owner: Owner, opener: Opener, auth: Authenticator
    ) -> None:
        self._sessions = sessions
        self._owner = owner
        self._opener = opener
        self._auth = auth

    async def RegisterRegion(
        self, request: pb.RegisterRegionRequest, context: Context
    ) -> pb.RegisterRegionResponse:
        """Registers memory."""
        session = self._auth.session(context)
        source = request.WhichOneof("source")
        if source is None:
            raise InvalidRequest("source", "missing; give memory_id or shm_path")
        work = self._sessions.register(
            session,
            request.memory_id if source == "memory_id" else request.shm_path,
            offset=request.offset_bytes,
            length=request.length_bytes,
            name=check_name(request.name),
        )
        region = await session.ops.run(work, "register region")
        return pb.RegisterRegionResponse(
            region=region.handle,
            length_bytes=region.length,
            rails=self._sessions.rails_of(region),
        )

    async def DeregisterRegion(
        self, request: pb.DeregisterRegionRequest, context: Context
    ) -> pb.DeregisterRegionResponse:
        """Revokes a region's grants and deregisters it."""
        session = self._auth.session(context)
        work = self._sessions.deregister(session, request.region)
        await session.ops.run(work, "deregister region")
        return pb.DeregisterRegionResponse()

    async def CreateGrant(
        self, request: pb.CreateGrantRequest, context: Context
    ) -> pb.CreateGrantResponse:
        """Gives permission on part of a region."""
        session = self._auth.session(context)
        region = session.region(request.region, "region")
        if request.expires_ms > EXPIRES_MAX_MS:
            raise InvalidRequest("expires_ms", f"{request.expires_ms} is above {EXPIRES_MAX_MS}")
        grant, descriptor, slots = self._owner.create_grant(
            region,
            offset=request.offset_bytes,
            length=request.length_bytes,
            rights=_rights(request.rights),
            imm_first=request.imm_first,
            imm_count=request.imm_count,
            expires_ms=request.expires_ms,
        )
        return pb.CreateGrantResponse(
            grant_id=grant.grant_id, descriptor=descriptor, counter_slots=slots
        )

    async def RevokeGrant(
        self, request: pb.RevokeGrantRequest, context: Context
    ) -> pb.RevokeGrantResponse:
        """Takes a grant back: a fence."""
        session = self._auth.session(context)
        if request.grant_id not in session.ended_grants:
            grant = session.grant(request.grant_id)
            await session.ops.run(self._owner.end_grants([grant]), "revoke grant")
        maps = self._owner.maps
        if maps.has(request.grant_id):
            await session.ops.run(maps.unmapped(request.grant_id), "wait for mappers")
        return pb.RevokeGrantResponse()

    async def FenceGrant(
        self, request: pb.FenceGrantRequest, context: Context
    ) -> pb.FenceGrantResponse:
        """Fences immediates of a grant that lives on."""
        session = self._auth.session(context)
        grant = _living(session, request.grant_id)
        imms = check_fence(grant, [(part.first, part.count) for part in request.imms])
        await session.ops.run(self._owner.fence_grant(grant, imms), "fence grant")
        return pb.FenceGrantResponse()

    async def FenceGrants(
        self, request: pb.FenceGrantsRequest, context: Context
    ) -> pb.FenceGrantsResponse:
        """Fences immediates of several grants that live on."""
        session = self._auth.session(context)
        _check_fences(request.fences)
        fences: dict[Grant, tuple[range, ...]] = {}
        failed: dict[int, TransferdError] = {}
        for i, one in enumerate(request.fences):
            try:
                grant = _living(session, one.grant_id)
            except TransferdError as error:
                failed[one.grant_id] = error
                continue
            imms = [(part.first, part.count) for part in one.imms]
            fences[grant] = check_fence(grant, imms, f"fences[{i}].imms")
        found = await session.ops.run(self._owner.fence_grants(fences), "fence grants")
        failed.update((grant.grant_id, error) for grant, error in found.items())
        ends = [failed.get(one.grant_id) for one in request.fences]
        return pb.FenceGrantsResponse(
            results=[
                pb.FenceResult(reason=end.reason, message=end.message) if end else pb.FenceResult()
                for end in ends
            ]
        )

    async def OpenDescriptors(
        self, request: pb.OpenDescriptorsRequest, context: Context
    ) -> pb.OpenDescriptorsResponse:
        """Opens descriptors of others at their owners."""
        session = self._auth.session(context)
        count = len(request.descriptors)
        if not 1 <= count <= DESCRIPTORS_MAX:
            raise InvalidRequest("descriptors", f"{count} of them; send 1 to {DESCRIPTORS_MAX}")
        work = self._opener.open(session, request.descriptors, "descriptors")
        opens = await session.ops.run(work, "open descriptors")
        return pb.OpenDescriptorsResponse(grants=[_opened(opened) for opened in opens])

    async def CloseDescriptor(
        self, request: pb.CloseDescriptorRequest, context: Context
    ) -> pb.CloseDescriptorResponse:
        """Gives an opened grant back."""
        session = self._auth.session(context)
        await session.ops.run(self._opener.close(session, request.handle), "close descriptor")
        return pb.CloseDescriptorResponse()


def _rights(rights: Any) -> int:
    """Turns the enum values of a request into bits."""
    bits = 0
    for i, right in enumerate(rights):
        if right not in _RIGHTS:
            raise InvalidRequest(
                f"rights[{i}]", f"{right} is no right; give RIGHT_WRITE, RIGHT_READ or RIGHT_MAP"
            )
        bits |= _RIGHTS[right]
    if not bits:
        raise InvalidRequest("rights", "missing; give RIGHT_WRITE, RIGHT_READ or both")
    return bits


def _living(session: Session, grant_id: int) -> Grant:
    """Finds a grant to be fenced; Conflict (GRANT_REVOKED): it has ended."""
    if grant_id in session.ended_grants:
        raise grant_over(grant_id)
    return session.grant(grant_id)


def _check_fences(fences: Sequence[pb.FenceGrantRequest]) -> None:
    """Checks how many there are, in all as many as of one grant, and that none is there twice."""
    if not 1 <= len(fences) <= IMM_RANGES_MAX:
        raise InvalidRequest("fences", f"{len(fences)} of them; send 1 to {IMM_RANGES_MAX}")
    ranges = sum(len(one.imms) for one in fences)
    if ranges > IMM_RANGES_MAX:
        raise InvalidRequest(
            "fences", f"{ranges} ranges of imms in all; send at most {IMM_RANGES_MAX}"
        )
    seen: set[int] = set()
    for i, one in enumerate(fences):
        if one.grant_id in seen:
            raise InvalidRequest(
                f"fences[{i}].grant_id", f"{one.grant_id} is there twice; put its imms together"
            )
        seen.add(one.grant_id)


def _opened(opened: Open) -> pb.OpenedGrant:
    keys = opened.grant.keys
    assert keys is not None
    return pb.OpenedGrant(
        handle=opened.handle,
        length_bytes=keys.length,
        rights=[right for right, bit in _OPENED_RIGHTS.items() if keys.rights & bit],
        imm_first=keys.imm_first,
        imm_count=keys.imm_count,
    )
