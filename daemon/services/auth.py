# SPDX-License-Identifier: Apache-2.0
"""Which session a call belongs to: the token in its metadata."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transferd.daemon.errors import Unauthenticated

if TYPE_CHECKING:
    import grpc.aio

    from transferd.daemon.session import Session, SessionTable

SCHEME = "Bearer "


class Authenticator:
    """Finds the session of a call that came by one socket."""

    def __init__(self, table: SessionTable, listener: str) -> None:
        """Takes the sessions, and the name of the socket that tokens must belong to."""
        self._table = table
        self.listener = listener

    def session(self, context: grpc.aio.ServicerContext[Any, Any]) -> Session:
        """Finds the session, and renews its lease.

        Raises:
            Unauthenticated: No token, or one of no living session.
        """
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                text = value if isinstance(value, str) else value.decode("ascii", "replace")
                if text.startswith(SCHEME):
                    return self._table.by_token(
                        text.removeprefix(SCHEME), self.listener, time.monotonic_ns()
                    )
        raise Unauthenticated(
            "the call carries no token; send the session's as metadata "
            '"authorization: Bearer <hex>"',
            reason="TOKEN_MISSING",
        )
