# SPDX-License-Identifier: Apache-2.0
"""The gRPC servers: which services are offered where."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from transferd.daemon.config import split_host_port
from transferd.daemon.services.interceptor import ErrorMapper
from transferd.daemon.sockets import StartError, numeric_address
from transferd.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    mailbox_pb2,
    mailbox_pb2_grpc,
    region_pb2,
    region_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

OPTIONS = [
    # Otherwise two daemons may share a port, and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_receive_message_length", 16 << 20),
]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

CLIENT_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (session_pb2, "SessionService"),
        (region_pb2, "RegionService"),
        (transfer_pb2, "TransferService"),
        (mailbox_pb2, "MailboxService"),
    )
)
ADMIN_NAME = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


@dataclass(frozen=True, slots=True)
class ClientServices:
    """What one tenant's socket offers."""

    session: session_pb2_grpc.SessionServiceServicer
    region: region_pb2_grpc.RegionServiceServicer
    transfer: transfer_pb2_grpc.TransferServiceServicer
    mailbox: mailbox_pb2_grpc.MailboxServiceServicer


@dataclass(slots=True)
class Listener:
    """One gRPC server with its health."""

    server: grpc.aio.Server
    health: health.aio.HealthServicer
    names: list[str] = field(default_factory=list)

    async def set_serving(self, *, serving: bool) -> None:
        """Tells health checks."""
        for name in ["", *self.names]:
            await self.health.set(name, SERVING if serving else NOT_SERVING)

    async def start(self) -> None:
        """Begins to serve."""
        await self.server.start()
        await self.set_serving(serving=True)

    async def stop(self, grace_s: float) -> None:
        """Ends; calls in flight get a moment."""
        await self.server.stop(grace_s)


def make_listener(clients: ClientServices | None, admin: Any) -> Listener:
    """Makes a server for clients, operators, or both; with health and reflection."""
    server = grpc.aio.server(interceptors=[ErrorMapper()], options=OPTIONS)
    listener = Listener(server, health.aio.HealthServicer())
    if clients is not None:
        session_pb2_grpc.add_SessionServiceServicer_to_server(clients.session, server)
        region_pb2_grpc.add_RegionServiceServicer_to_server(clients.region, server)
        transfer_pb2_grpc.add_TransferServiceServicer_to_server(clients.transfer, server)
        mailbox_pb2_grpc.add_MailboxServiceServicer_to_server(clients.mailbox, server)
        listener.names += CLIENT_NAMES
    if admin is not None:
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        listener.names.append(ADMIN_NAME)
    health_pb2_grpc.add_HealthServicer_to_server(listener.health, server)
    reflection.enable_server_reflection(
        [*listener.names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    return listener


def make_peer_server(servicer: Any, add: Any) -> grpc.aio.Server:
    """Makes the server for other daemons: no reflection, nothing else on it."""
    server = grpc.aio.server(interceptors=[ErrorMapper()], options=OPTIONS)
    add(servicer, server)
    return server


@contextlib.contextmanager
def _umask(mode: int) -> Iterator[None]:
    """New files get no more than `mode`."""
    old = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(old)


def bind_unix(server: grpc.aio.Server, path: Path, mode: int) -> None:
    """Binds a server to a Unix socket; nothing may be there."""
    try:
        with _umask(mode):
            server.add_insecure_port(f"unix://{path}")
    except RuntimeError as error:
        raise StartError(
            f"listen: cannot bind {path} ({_first_line(error)}); choose another socket"
        ) from None


def bind_tcp(
    server: grpc.aio.Server, key: str, address: str, credentials: grpc.ServerCredentials | None
) -> None:
    """Binds a server to a TCP port."""
    host, port = split_host_port(address)
    _, numeric = numeric_address(key, host, port)
    target = f"[{numeric}]:{port}" if ":" in numeric else f"{numeric}:{port}"
    try:
        if credentials is None:
            server.add_insecure_port(target)
        else:
            server.add_secure_port(target, credentials)
    except RuntimeError as error:
        raise StartError(
            f"{key}: cannot bind {address} ({_first_line(error)}); choose another address"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["unknown"])[0]


async def set_all_serving(listeners: Sequence[Listener], *, serving: bool) -> None:
    """Tells the health checks of several servers."""
    for listener in listeners:
        await listener.set_serving(serving=serving)
