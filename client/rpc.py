# SPDX-License-Identifier: Apache-2.0
"""The gRPC side of a session: one channel, the token on every call, errors as the SDK's own.

A synchronous channel on purpose, also below the asyncio face, which calls it from a small executor:
several event loops in one process disturb each other in grpc.aio, and nothing here is called per
transfer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import grpc

from transferd.client import errors
from transferd.v1 import (
    admin_pb2_grpc,
    mailbox_pb2_grpc,
    region_pb2_grpc,
    session_pb2_grpc,
    transfer_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_ADDRESS = "unix:///run/transferd/transferd.sock"
ADDRESS_VARIABLE = "TRANSFERD_SOCKET"

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    # Of our own, so that the back-off of a channel to a daemon that was away does not delay the
    # next Client.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
)


def resolve_address(address: str | None) -> str:
    """Tells which daemon is meant.

    Args:
        address: ``unix:///path``, a plain path, or ``host:port``; None: TRANSFERD_SOCKET or the
            default.

    Returns:
        A gRPC target.
    """
    chosen = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    return f"unix://{os.path.abspath(chosen)}" if chosen.startswith(("/", ".")) else chosen


def socket_path(address: str) -> str | None:
    """Tells the path of a Unix socket address; None for any other."""
    if not address.startswith("unix:"):
        return None
    path = address.removeprefix("unix:")
    return path.removeprefix("//") if path.startswith("//") else path


class Control:
    """Calls to the daemon. Safe to use from several threads."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Makes the channel; nothing is sent yet.

        Args:
            address: gRPC target.
            timeout_s: Bound of each call that gives none of its own.
        """
        self.address = address
        self.timeout_s = timeout_s
        self.orphaned = False  # in a forked child
        self._metadata: tuple[tuple[str, str], ...] = ()
        self.channel = grpc.insecure_channel(address, options=_OPTIONS)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        self.regions = region_pb2_grpc.RegionServiceStub(self.channel)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(self.channel)
        self.mailboxes = mailbox_pb2_grpc.MailboxServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    def use_token(self, token: str) -> None:
        """Puts the hex form of a session's token on every later call."""
        self._metadata = (("authorization", f"Bearer {token}"),)

    def call(self, method: Callable[..., Any], request: Any, timeout_s: float | None = None) -> Any:
        """Makes one call.

        Args:
            method: Of one of the stubs.
            request: Its message.
            timeout_s: Bound; None: the one given at construction.

        Returns:
            The response message.

        Raises:
            TransferdError: What the daemon answered, or that it did not.
        """
        if self.orphaned:
            raise forked()
        try:
            return method(
                request,
                timeout=self.timeout_s if timeout_s is None else timeout_s,
                metadata=self._metadata,
            )
        except grpc.RpcError as error:
            raise errors.from_rpc(error, self.address) from None
        except ValueError as error:  # the channel was closed
            raise errors.Unavailable(f"the Client is closed ({error})", reason="CLOSED") from None

    def close(self) -> None:
        """Closes the channel. Idempotent."""
        self.channel.close()


def forked() -> errors.Unavailable:
    """Makes the error for a child that uses its parent's Client."""
    return errors.Unavailable(
        "this Client belongs to the parent process; make a new one after fork", reason="FORKED"
    )
