# SPDX-License-Identifier: Apache-2.0
"""transferd.v1.SessionService."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from transferd.daemon.session import Origin, check_lease, check_name
from transferd.v1 import session_pb2 as pb
from transferd.v1 import session_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio

    from transferd.daemon.plane import Plane
    from transferd.daemon.policy import Tenant
    from transferd.daemon.services.auth import Authenticator
    from transferd.daemon.sessions import Sessions

    Context = grpc.aio.ServicerContext[Any, Any]


class SessionService(session_pb2_grpc.SessionServiceServicer):
    """Sessions of clients without the fd socket, and what any session asks of itself."""

    def __init__(
        self,
        sessions: Sessions,
        plane: Plane,
        tenant: Tenant,
        auth: Authenticator,
        boot_epoch: bytes,
    ) -> None:
        self._sessions = sessions
        self._plane = plane
        self._tenant = tenant
        self._auth = auth
        self._boot_epoch = boot_epoch

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Context
    ) -> pb.OpenSessionResponse:
        """Opens a session that lives on a lease."""
        self._tenant.check_lease()
        lease_ms = check_lease(request.lease_ms)
        origin = Origin(self._auth.listener, check_name(request.name), lease_ms=lease_ms)
        work = self._sessions.open(self._tenant, origin)
        session, fds = await self._sessions.tasks.run(work, "open session")
        # A client that is gone by now never learns the token: the lease ends the session.
        for fd in (fds.segment, fds.doorbell, fds.event):
            os.close(fd)
        return pb.OpenSessionResponse(
            session_id=session.session_id, token=session.token.hex(), lease_ms=lease_ms
        )

    async def RenewSession(
        self, request: pb.RenewSessionRequest, context: Context
    ) -> pb.RenewSessionResponse:
        """Renews the lease, as every call does."""
        session = self._auth.session(context)
        return pb.RenewSessionResponse(lease_ms=session.origin.lease_ms)

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        """Ends the calling session cleanly."""
        session = self._auth.session(context)
        ended = self._sessions.end(
            session, clean=True, reason="CLOSED", message="closed by its client"
        )
        await asyncio.shield(ended)
        return pb.CloseSessionResponse()

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        """Tells about the calling session."""
        session = self._auth.session(context)
        return pb.GetSessionResponse(
            session_id=session.session_id,
            name=session.origin.name,
            tenant=session.tenant.name,
            has_segment=session.origin.lease_ms == 0,
            jobs_in_flight=self._plane.session_stat(session.handle).jobs_in_flight,
            boot_epoch=self._boot_epoch,
        )
