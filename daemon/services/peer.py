# SPDX-License-Identifier: Apache-2.0
"""transferd.peer.v1.PeerService: what other daemons ask; the transport authenticates them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transferd.daemon.config import split_host_port
from transferd.daemon.descriptor import PeerKey
from transferd.daemon.errors import InvalidRequest, StalePeer
from transferd.daemon.grant import IMM_RANGES_MAX, still_copied
from transferd.daemon.peer import TOKEN_BYTES
from transferd.daemon.wire import (
    BATCH_MAX,
    GrantFence,
    GrantKeys,
    Half,
    Hello,
    Loss,
    check_protocols,
)
from transferd.peer.v1 import peer_pb2 as pb
from transferd.peer.v1 import peer_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio

    from transferd.daemon.opens import Opener
    from transferd.daemon.owner import Owner
    from transferd.daemon.peer import Peer
    from transferd.daemon.peers import Peers
    from transferd.daemon.plane import Landed
    from transferd.daemon.wire import Refusal

    Context = grpc.aio.ServicerContext[Any, Any]

ID_BYTES = 16
CONNECTIONS_MAX = 64


class PeerService(peer_pb2_grpc.PeerServiceServicer):
    """Translates between protobuf and the owner's and opener's sides."""

    def __init__(self, peers: Peers, owner: Owner, opener: Opener) -> None:
        self._peers = peers
        self._owner = owner
        self._opener = opener

    def _caller(self, request: Any) -> Peer:
        return self._peers.caller(_key(request))

    async def Hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloResponse:
        """Introduces the caller."""
        key = _key(request)
        try:
            split_host_port(request.address)
        except ValueError as error:
            raise InvalidRequest("address", str(error)) from None
        if len(request.heartbeat_token) != TOKEN_BYTES:
            raise InvalidRequest("heartbeat_token", f"is not {TOKEN_BYTES} bytes")
        if not 0 < request.heartbeat_port < 65_536:
            raise InvalidRequest("heartbeat_port", f"{request.heartbeat_port} is no port")
        check_protocols(request.rail_protocols)
        hello = Hello(
            key=key,
            address=request.address,
            protocols=tuple(request.rail_protocols),
            token=request.heartbeat_token,
            port=request.heartbeat_port,
        )
        reply = await self._peers.tasks.run(
            self._peers.greeted(hello, PeerKey(request.callee_id, request.callee_epoch)), "greeted"
        )
        return pb.HelloResponse(
            daemon_id=reply.key.daemon_id,
            boot_epoch=reply.key.boot_epoch,
            rail_protocols=reply.protocols,
            heartbeat_token=reply.token,
            heartbeat_port=reply.port,
        )

    async def Connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectResponse:
        """Makes connections from the caller's rails to ours."""
        peer = self._caller(request)
        if request.callee_epoch != self._peers.own.boot_epoch:
            raise StalePeer("callee_epoch is not this daemon's; send Hello first")
        _count("connections", len(request.connections), CONNECTIONS_MAX)
        halves = [
            Half(half.connection_id, half.callee_rail, half.protocol, half.address)
            for half in request.connections
        ]
        addresses = await peer.tasks.run(self._owner.connect(peer, halves), "connect to us")
        return pb.ConnectResponse(addresses=addresses)

    async def Disconnect(
        self, request: pb.DisconnectRequest, context: Context
    ) -> pb.DisconnectResponse:
        """The caller has destroyed connections."""
        peer = self._caller(request)
        _count("connection_ids", len(request.connection_ids), BATCH_MAX)
        landed = await self._owner.disconnect(peer, request.connection_ids)
        return pb.DisconnectResponse(landed=[write_landed(row) for row in landed])

    async def OpenGrants(
        self, request: pb.OpenGrantsRequest, context: Context
    ) -> pb.OpenGrantsResponse:
        """Verifies descriptors and opens their grants for the caller."""
        peer = self._caller(request)
        _count("descriptors", len(request.descriptors), BATCH_MAX)
        results = self._owner.open_for(peer, request.descriptors)
        return pb.OpenGrantsResponse(results=[_result(result) for result in results])

    async def ReleaseGrants(
        self, request: pb.ReleaseGrantsRequest, context: Context
    ) -> pb.ReleaseGrantsResponse:
        """The caller uses grants no longer."""
        peer = self._caller(request)
        self._owner.release(peer, request.grant_ids, abandoned=request.abandoned)
        return pb.ReleaseGrantsResponse()

    async def RevokeGrants(
        self, request: pb.RevokeGrantsRequest, context: Context
    ) -> pb.RevokeGrantsResponse:
        """The caller takes its grants back."""
        key = _key(request)
        peer = self._peers.table.get(key)
        if peer is not None:
            await peer.tasks.run(self._opener.revoked(peer, request.grant_ids), "revoked")
        # What an ended relation still had in flight is quiet once it is buried.
        await self._peers.buried(key)
        return pb.RevokeGrantsResponse()

    async def FenceGrants(
        self, request: pb.FenceGrantsRequest, context: Context
    ) -> pb.FenceGrantsResponse:
        """The caller fences immediates of grants that live on."""
        key = _key(request)
        _count("fences", len(request.fences), BATCH_MAX)
        fences = []
        for i, row in enumerate(request.fences):
            _count(f"fences[{i}].imms", len(row.imms), IMM_RANGES_MAX)
            imms = tuple(range(part.first, part.first + part.count) for part in row.imms)
            fences.append(GrantFence(row.grant_id, imms))
        peer = self._peers.table.get(key)
        if peer is not None:
            copied = await peer.tasks.run(self._opener.fences.fenced(peer, fences), "fenced")
            for grant_id in copied:
                raise still_copied(grant_id)
        # What an ended relation still had in flight is quiet once it is buried.
        await self._peers.buried(key)
        return pb.FenceGrantsResponse()

    async def ReportLoss(
        self, request: pb.ReportLossRequest, context: Context
    ) -> pb.ReportLossResponse:
        """The caller tells of writes that will not land."""
        losses = [Loss(row.grant_id, row.imm, row.count, row.units) for row in request.losses]
        self._owner.report_loss(self._caller(request), request.number, losses)
        return pb.ReportLossResponse()


def _key(request: Any) -> PeerKey:
    """Reads who calls; InvalidRequest if that is no identity."""
    for field in ("daemon_id", "boot_epoch"):
        if len(getattr(request, field)) != ID_BYTES:
            raise InvalidRequest(field, f"is not {ID_BYTES} bytes")
    return PeerKey(request.daemon_id, request.boot_epoch)


def _count(field: str, count: int, limit: int) -> None:
    if not 1 <= count <= limit:
        raise InvalidRequest(field, f"{count} of them; send 1 to {limit}")


def write_landed(landed: Landed | None) -> pb.Landed:
    """Writes what has landed by one connection; :func:`transferd.daemon.peerclient.read_landed`."""
    if landed is None:
        return pb.Landed()
    return pb.Landed(immediates=landed[0], further=landed[1:])


def _result(result: GrantKeys | Refusal) -> pb.GrantResult:
    if not isinstance(result, GrantKeys):
        return pb.GrantResult(refusal=pb.GrantRefusal(reason=result.reason, message=result.message))
    return pb.GrantResult(
        keys=pb.GrantKeys(
            grant_id=result.grant_id,
            length_bytes=result.length,
            rights=result.rights,
            imm_first=result.imm_first,
            imm_count=result.imm_count,
            name_space=result.name_space,
            rails=[pb.RailKey(key=rail.key, address=rail.address) for rail in result.rails],
            expires_ms=result.expires_ms,
            isolation=result.isolation,
            device=result.device,
        )
    )
