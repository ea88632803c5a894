# SPDX-License-Identifier: Apache-2.0
"""A daemon that is none: speaks transferd.peer.v1 as a test tells it, and answers as it likes."""

from __future__ import annotations

import secrets
import socket
import struct
import threading
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc

from transferd.client.demo.daemons import free_port
from transferd.daemon.descriptor import PeerKey, Sealer
from transferd.peer.v1 import peer_pb2 as pb
from transferd.peer.v1 import peer_pb2_grpc

from support.daemon import LOOPBACK

if TYPE_CHECKING:
    from types import TracebackType

    from support.daemon import DaemonProcess

CALL_S = 20.0
BEAT_S = 0.2
BEAT_MAGIC = 0x3154414542444654  # native/core/heartbeat.c


class StrangePeer(peer_pb2_grpc.PeerServiceServicer):
    """A peer of one daemon, without a data plane; a context manager.

    Attributes:
        key: Who it says that it is.
        hello: Its answer to Hello.
        addresses: Its answer to Connect; None: the addresses that it was asked with.
        connects: The requests for connections that it got.
        stub: Calls to the daemon.
    """

    def __init__(self, daemon: DaemonProcess) -> None:
        """Takes the daemon that it troubles."""
        status, rails = daemon.status(), daemon.rails()
        self.callee = PeerKey(status.daemon_id, status.boot_epoch)
        self.key = PeerKey(secrets.token_bytes(16), secrets.token_bytes(16))
        self.address = f"{LOOPBACK}:{free_port()}"
        self.protocols = [rail.protocol for rail in rails if rail.name != "local"]
        self.hello = pb.HelloResponse(
            daemon_id=self.key.daemon_id,
            boot_epoch=self.key.boot_epoch,
            rail_protocols=self.protocols,
            heartbeat_token=secrets.token_bytes(16),
            heartbeat_port=free_port(),
        )
        self.addresses: list[bytes] | None = None
        self.connects: list[pb.ConnectRequest] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        peer_pb2_grpc.add_PeerServiceServicer_to_server(self, self._server)
        host, _, port = daemon.peer_address.rpartition(":")
        self._beats_to = (host, int(port))
        self._token = b""  # what its heartbeats carry; empty until the daemon has told
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="heartbeats")
        self._channel = grpc.insecure_channel(daemon.peer_address)
        self.stub: Any = peer_pb2_grpc.PeerServiceStub(self._channel)

    def __enter__(self) -> StrangePeer:
        assert self._server.add_insecure_port(self.address)
        self._server.start()
        self._beats.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._beats.join()
        self._channel.close()
        self._server.stop(None).wait()

    def _beat(self) -> None:
        """Lives, however strange."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            while not self._stop.wait(BEAT_S):
                if self._token:
                    udp.sendto(struct.pack("=Q16s", BEAT_MAGIC, self._token), self._beats_to)

    @property
    def descriptor(self) -> bytes:
        """A descriptor that leads a daemon to it."""
        return Sealer(self.key, self.address, b"").seal(1)

    # ---- what it asks ----

    @property
    def me(self) -> dict[str, bytes]:
        """What each of its requests begins with."""
        return {"daemon_id": self.key.daemon_id, "boot_epoch": self.key.boot_epoch}

    def greet(self, **changes: Any) -> pb.HelloResponse:
        """Introduces itself, with some fields replaced."""
        fields: dict[str, Any] = {
            **self.me,
            "address": self.address,
            "rail_protocols": self.protocols,
            "heartbeat_token": self.hello.heartbeat_token,
            "heartbeat_port": self.hello.heartbeat_port,
            "callee_id": self.callee.daemon_id,
            "callee_epoch": self.callee.boot_epoch,
            **changes,
        }
        reply: pb.HelloResponse = self.stub.Hello(pb.HelloRequest(**fields), timeout=CALL_S)
        self._token = reply.heartbeat_token
        return reply

    def connect(self, *halves: pb.HalfConnection, **changes: Any) -> list[bytes]:
        """Asks for connections, with some fields of the request replaced."""
        fields: dict[str, Any] = {**self.me, "callee_epoch": self.callee.boot_epoch, **changes}
        request = pb.ConnectRequest(**fields, connections=halves)
        return list(self.stub.Connect(request, timeout=CALL_S).addresses)

    def half(self, number: int, address: bytes, rail: int = 0) -> pb.HalfConnection:
        """Makes half a connection in the words of its daemon."""
        return pb.HalfConnection(
            connection_id=number,
            callee_rail=rail,
            protocol=self.protocols[0],
            address=address,
        )

    # ---- what it answers ----

    def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloResponse:
        """Answers with `hello`."""
        self._token = request.heartbeat_token
        return self.hello

    def Connect(self, request: pb.ConnectRequest, context: Any) -> pb.ConnectResponse:
        """Answers with `addresses`."""
        self.connects.append(request)
        own = [half.address for half in request.connections]
        return pb.ConnectResponse(addresses=own if self.addresses is None else self.addresses)

    def Disconnect(self, request: pb.DisconnectRequest, context: Any) -> pb.DisconnectResponse:
        """Says nothing of what has landed."""
        return pb.DisconnectResponse()

    def OpenGrants(self, request: pb.OpenGrantsRequest, context: Any) -> pb.OpenGrantsResponse:
        """Grants a page to whoever asks."""
        keys = pb.GrantKeys(
            grant_id=1,
            length_bytes=4096,
            rights=1,
            imm_count=8,
            name_space=1,
            rails=[pb.RailKey(key=1, address=4096) for _ in self.protocols],
        )
        return pb.OpenGrantsResponse(
            results=[pb.GrantResult(keys=keys) for _ in request.descriptors]
        )

    def ReleaseGrants(
        self, request: pb.ReleaseGrantsRequest, context: Any
    ) -> pb.ReleaseGrantsResponse:
        """Agrees."""
        return pb.ReleaseGrantsResponse()

    def ReportLoss(self, request: pb.ReportLossRequest, context: Any) -> pb.ReportLossResponse:
        """Hears of it."""
        return pb.ReportLossResponse()
