# SPDX-License-Identifier: Apache-2.0
"""transferd.v1.MailboxService."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transferd.daemon.errors import InvalidRequest
from transferd.daemon.services.transfer import to_timeout_s
from transferd.v1 import mailbox_pb2 as pb
from transferd.v1 import mailbox_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio

    from transferd.daemon.mailboxes import Mailboxes
    from transferd.daemon.services.auth import Authenticator

    Context = grpc.aio.ServicerContext[Any, Any]

LIMIT_DEFAULT = 64
LIMIT_MAX = 256  # 2 MiB of messages


class MailboxService(mailbox_pb2_grpc.MailboxServiceServicer):
    """Mailboxes of the calling session."""

    def __init__(self, mailboxes: Mailboxes, auth: Authenticator) -> None:
        self._mailboxes = mailboxes
        self._auth = auth

    async def CreateMailbox(
        self, request: pb.CreateMailboxRequest, context: Context
    ) -> pb.CreateMailboxResponse:
        """Makes a mailbox."""
        session = self._auth.session(context)
        work = self._mailboxes.create(
            session, request.region, slots=request.slots, slot_bytes=request.slot_bytes
        )
        mailbox = await session.ops.run(work, "make mailbox")
        return pb.CreateMailboxResponse(
            mailbox=mailbox.number,
            descriptor=mailbox.descriptor,
            counter_slot=mailbox.counter,
            first=mailbox.first,
        )

    async def CloseMailbox(
        self, request: pb.CloseMailboxRequest, context: Context
    ) -> pb.CloseMailboxResponse:
        """Ends a mailbox: a fence."""
        session = self._auth.session(context)
        await session.ops.run(self._mailboxes.close(session, request.mailbox), "close mailbox")
        return pb.CloseMailboxResponse()

    async def ReceiveMessages(
        self, request: pb.ReceiveMessagesRequest, context: Context
    ) -> pb.ReceiveMessagesResponse:
        """Takes messages, waiting for the first up to a bound."""
        session = self._auth.session(context)
        if request.limit > LIMIT_MAX:
            raise InvalidRequest("limit", f"{request.limit} is above {LIMIT_MAX}")
        messages = await self._mailboxes.receive(
            session,
            request.mailbox,
            request.limit or LIMIT_DEFAULT,
            to_timeout_s(request.timeout_ms),
        )
        return pb.ReceiveMessagesResponse(messages=messages)
