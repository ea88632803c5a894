# SPDX-License-Identifier: Apache-2.0
"""Calls to another daemon: transferd.peer.v1 as its client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from transferd.daemon.descriptor import PeerKey
from transferd.daemon.errors import (
    Internal,
    InvalidRequest,
    PeerLost,
    TransferdError,
    from_rpc,
)
from transferd.daemon.plane import ADDRESS_MAX, CHANNELS_MAX, RegionKey
from transferd.daemon.wire import GrantKeys, HelloReply, Refusal, check_protocols
from transferd.peer.v1 import peer_pb2 as pb
from transferd.peer.v1 import peer_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transferd.daemon.plane import Landed
    from transferd.daemon.wire import GrantFence, Half, Hello, Loss

OPTIONS = [
    # Channels otherwise share connections by address, with the back-off of the daemon that was
    # there before.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # In fact how long connecting may take. With less, a daemon that is busy for a moment while it
    # is first called back would be taken for deaf. Calls have bounds of their own.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]


class GrpcLink:
    """A channel to one daemon, for the time of one relation."""

    def __init__(
        self,
        own: PeerKey,
        address: str,
        credentials: grpc.ChannelCredentials | None,
        call_s: float,
        on_failure: Callable[[TransferdError], None],
    ) -> None:
        """Takes what every call needs.

        Args:
            own: Identity of this daemon.
            address: host:port of the other.
            credentials: None in development mode.
            call_s: Bound of a call.
            on_failure: Told of each failed call.
        """
        self._own = own
        self._address = address
        self._credentials = credentials
        self._call_s = call_s
        self._on_failure = on_failure
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._closed = False

    def _open(self) -> Any:
        """Makes the channel on first use: most inbound relations never call back."""
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._address, OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(self._address, self._credentials, OPTIONS)
            self._stub = peer_pb2_grpc.PeerServiceStub(self._channel)
        return self._stub

    async def _call(self, name: str, request: Any, timeout_s: float | None = None) -> Any:
        """Makes one call, bounded; raises a TransferdError."""
        what = f"{name} at {self._address}"
        if self._closed:
            raise PeerLost(f"{what}: the peer was lost")
        try:
            return await getattr(self._open(), name)(request, timeout=timeout_s or self._call_s)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc(error, what)
        except asyncio.CancelledError:
            # grpc cancels the calls of a channel that is closed; whoever waits here was not
            # cancelled.
            if not self._closed:
                raise
            failure = PeerLost(f"{what}: the peer was lost")
        self._on_failure(failure)
        raise failure

    async def hello(self, hello: Hello, callee: PeerKey) -> HelloReply:
        """Introduces this daemon."""
        reply = await self._call(
            "Hello",
            pb.HelloRequest(
                daemon_id=hello.key.daemon_id,
                boot_epoch=hello.key.boot_epoch,
                address=hello.address,
                rail_protocols=hello.protocols,
                heartbeat_token=hello.token,
                heartbeat_port=hello.port,
                callee_epoch=callee.boot_epoch,
                callee_id=callee.daemon_id,
            ),
        )
        if len(reply.heartbeat_token) != 16 or not 0 < reply.heartbeat_port < 65_536:
            raise Internal(f"{self._address} answered Hello with a token or port that is none")
        try:
            check_protocols(reply.rail_protocols)
        except InvalidRequest as error:
            raise Internal(f"{self._address} answered Hello: {error.message}") from None
        return HelloReply(
            PeerKey(reply.daemon_id, reply.boot_epoch),
            tuple(reply.rail_protocols),
            reply.heartbeat_token,
            reply.heartbeat_port,
        )

    def _me(self) -> dict[str, bytes]:
        return {"daemon_id": self._own.daemon_id, "boot_epoch": self._own.boot_epoch}

    async def connect(self, callee_epoch: bytes, halves: Sequence[Half]) -> list[bytes]:
        """Has the callee make its halves."""
        reply = await self._call(
            "Connect",
            pb.ConnectRequest(
                **self._me(),
                callee_epoch=callee_epoch,
                connections=[
                    pb.HalfConnection(
                        connection_id=half.connection_id,
                        callee_rail=half.callee_rail,
                        protocol=half.protocol,
                        address=half.address,
                    )
                    for half in halves
                ],
            ),
        )
        addresses = list(reply.addresses)
        if len(addresses) != len(halves):
            raise Internal(
                f"{self._address} answered {len(addresses)} of {len(halves)} connections"
            )
        for address in addresses:
            if len(address) > ADDRESS_MAX:
                raise Internal(
                    f"{self._address} answered Connect with an address of {len(address)} bytes"
                )
        return addresses

    async def disconnect(self, connection_ids: Sequence[int]) -> list[Landed | None]:
        """Has the callee destroy its halves; tells what has landed by each, if known."""
        reply = await self._call(
            "Disconnect", pb.DisconnectRequest(**self._me(), connection_ids=connection_ids)
        )
        if len(reply.landed) != len(connection_ids):
            return [None] * len(connection_ids)
        return [read_landed(row) for row in reply.landed]

    async def open_grants(self, descriptors: Sequence[bytes]) -> list[GrantKeys | Refusal]:
        """Opens grants."""
        reply = await self._call(
            "OpenGrants", pb.OpenGrantsRequest(**self._me(), descriptors=descriptors)
        )
        return [_grant_result(result) for result in reply.results]

    async def release_grants(self, grant_ids: Sequence[int], *, abandoned: bool) -> None:
        """Gives opens back."""
        await self._call(
            "ReleaseGrants",
            pb.ReleaseGrantsRequest(**self._me(), grant_ids=grant_ids, abandoned=abandoned),
        )

    async def revoke_grants(self, grant_ids: Sequence[int], timeout_s: float) -> None:
        """Owner to opener; returns when nothing is in flight on them."""
        request = pb.RevokeGrantsRequest(**self._me(), grant_ids=grant_ids)
        await self._call("RevokeGrants", request, timeout_s)

    async def fence_grants(self, fences: Sequence[GrantFence], timeout_s: float) -> set[int]:
        """Owner to opener; returns when nothing submitted before on these imms is in flight."""
        rows = [
            pb.GrantFence(
                grant_id=fence.grant_id,
                imms=[pb.ImmRange(first=imms.start, count=len(imms)) for imms in fence.imms],
            )
            for fence in fences
        ]
        await self._call("FenceGrants", pb.FenceGrantsRequest(**self._me(), fences=rows), timeout_s)
        return set()  # streams copy within a host

    async def report_loss(self, number: int, losses: Sequence[Loss]) -> None:
        """Writer to receiver."""
        rows = [
            pb.Loss(grant_id=loss.grant_id, imm=loss.imm, count=loss.count, units=loss.units)
            for loss in losses
        ]
        request = pb.ReportLossRequest(**self._me(), losses=rows, number=number)
        await self._call("ReportLoss", request)

    async def aclose(self) -> None:
        """Ends the link; calls in flight fail with PeerLost."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()


def read_landed(row: pb.Landed) -> Landed | None:
    """Reads what has landed by one connection; what cannot be is as good as unknown."""
    landed = (row.immediates, *row.further)
    return landed if row.HasField("immediates") and len(landed) <= CHANNELS_MAX else None


def _grant_result(result: Any) -> GrantKeys | Refusal:
    """Reads one answer of OpenGrants."""
    if result.WhichOneof("result") != "keys":
        refusal = result.refusal
        return Refusal(refusal.reason or "GRANT_REVOKED", refusal.message)
    keys = result.keys
    return GrantKeys(
        grant_id=keys.grant_id,
        length=keys.length_bytes,
        rights=keys.rights,
        imm_first=keys.imm_first,
        imm_count=keys.imm_count,
        name_space=keys.name_space,
        rails=tuple(RegionKey(rail.key, rail.address) for rail in keys.rails),
        expires_ms=keys.expires_ms,
        isolation=keys.isolation,
        device=keys.device,
    )
