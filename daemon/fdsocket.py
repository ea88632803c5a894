# SPDX-License-Identifier: Apache-2.0
"""The fd socket: where clients attach. AF_UNIX, SOCK_SEQPACKET, one message a packet.

Everything that comes in is hostile until it is proven otherwise. Rules that keep it harmless:

* one packet is read at a time per connection, and the next only after the answer has been sent;
* every fd that comes with a packet is owned by a :class:`_Packet` and closed unless a request takes
  it; one that takes any takes all;
* an answer that does not fit the socket's buffer ends the connection: a client that does not read
  cannot make the daemon remember;
* a connection that has not attached after a while is closed, and only so many may wait.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

import structlog
from google.protobuf.message import DecodeError

from transferd.daemon.cuda import Share
from transferd.daemon.errors import (
    Conflict,
    Internal,
    InvalidRequest,
    TransferdError,
    Unauthenticated,
)
from transferd.daemon.plane import ABI_VERSION
from transferd.daemon.session import Origin, Session, check_name
from transferd.daemon.tasks import TaskOwner
from transferd.v1 import attach_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transferd.daemon.plane import Plane
    from transferd.daemon.policy import Tenant
    from transferd.daemon.sessions import Sessions

log = structlog.get_logger("transferd.fdsocket")

PACKET_MAX = 4096
FDS_MAX = 16  # room to receive more than we take, so that they can be closed
ATTACH_S = 5.0
WAITING_MAX = 64  # connections that have not attached
BACKLOG = 128
ACCEPT_PAUSE_S = 0.1
DETACH_S = 2.0  # a detach is answered when nothing of the session is left, or after this
_FD_BYTES = array.array("i").itemsize
_UCRED = struct.Struct("3i")
MSG_CMSG_CLOEXEC = 0x40000000  # <bits/socket.h>; Python's socket has no name for it


class _Packet:
    """One packet with the fds that came along; whoever takes one owns it, the rest is closed."""

    def __init__(self, data: bytes, fds: list[int]) -> None:
        self.data = data
        self.fds = fds

    def only(self) -> int:
        """Gives the only fd; whoever takes it says so by :meth:`taken`.

        Raises:
            InvalidRequest: There is none, or more than one.
        """
        if len(self.fds) != 1:
            raise InvalidRequest(
                "fd", f"{len(self.fds)} fds came with the message; send exactly one"
            )
        return self.fds[0]

    def taken(self) -> None:
        """All fds are somebody else's now."""
        self.fds = []

    def close(self) -> None:
        """Closes what nobody took."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


def _receive(sock: socket.socket) -> _Packet:
    """Reads one packet without blocking.

    Returns:
        The packet; no bytes and no fds at the end of the connection.

    Raises:
        BlockingIOError: None waits.
        InvalidRequest: It is too long, or carries more fds than this daemon has room for.
    """
    data, ancillary, flags, _ = sock.recvmsg(
        PACKET_MAX, socket.CMSG_SPACE(FDS_MAX * _FD_BYTES), MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    packet = _Packet(data, list(fds))
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        packet.close()
        if flags & socket.MSG_TRUNC:
            raise InvalidRequest("packet", f"longer than {PACKET_MAX} bytes")
        raise InvalidRequest("fds", "more fds than the daemon can take; send at most 15")
    return packet


class Connection:
    """One client's connection, and the session that lives as long as it."""

    def __init__(self, server: FdServer, sock: socket.socket, pid: int, uid: int) -> None:
        self._server = server
        self._sock = sock
        self._pid = pid
        self._uid = uid
        self._loop = asyncio.get_running_loop()
        self._session: Session | None = None
        self._detached = False
        self._closed = False
        self._busy = False
        self._timer = self._loop.call_later(ATTACH_S, self._too_late)
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def attached(self) -> bool:
        """Whether it has a session."""
        return self._session is not None

    @property
    def session(self) -> Session | None:
        """Its session."""
        return self._session

    def _too_late(self) -> None:
        if not self.attached and not self._busy:
            self._refuse(
                0, Conflict(f"no attach message within {ATTACH_S} s", reason="ATTACH_TIMEOUT")
            )
            self.close()

    def _readable(self) -> None:
        try:
            packet = _receive(self._sock)
        except (BlockingIOError, InterruptedError):
            return
        except InvalidRequest as error:
            self._refuse(0, error)
            self.close()
            return
        except OSError:
            self.close()
            return
        if not packet.data:
            packet.close()  # an empty packet cannot be told from the end: both end the connection
            self.close()
            return
        # No further packet is read before this one is answered.
        self._loop.remove_reader(self._sock.fileno())
        self._busy = True
        self._server.tasks.background(self._serve(packet), "serve packet")

    async def _serve(self, packet: _Packet) -> None:
        """Answers one packet; runs to its end whatever happens to the connection."""
        request = pb.FdRequest()
        try:
            try:
                request.ParseFromString(packet.data)
            except DecodeError:
                raise InvalidRequest("packet", "no message of transferd.v1.FdRequest") from None
            keep = await self._handle(request, packet)
        except TransferdError as error:
            # A stranger gets one answer; a session survives a refused request, but not garbage.
            taken = self._refuse(request.request_id, error)
            keep = taken and self.attached and request.WhichOneof("body") is not None
        except Exception:
            log.exception("serving a packet", pid=self._pid)
            self._refuse(request.request_id, Internal("the daemon failed; its log says why"))
            keep = False
        finally:
            packet.close()
            self._busy = False
        if not keep:
            self.close()
        elif not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._readable)

    async def _handle(self, request: pb.FdRequest, packet: _Packet) -> bool:
        """Does what a packet asks; False: the connection ends."""
        kind = request.WhichOneof("body")
        response = pb.FdResponse(request_id=request.request_id)
        if kind == "attach":
            return await self._attach(request.attach, packet, response)
        session = self._session
        if kind is None:
            raise InvalidRequest("body", "missing, or of a later version than this daemon's")
        if session is None:
            raise Unauthenticated("the first message must be attach", reason="NOT_ATTACHED")
        fds: Sequence[int] = ()
        if kind == "share_memory":
            self._share(session, packet, response)
        elif kind == "share_cuda_memory":
            self._share_cuda(session, request.share_cuda_memory, packet, response)
        elif kind == "map":
            fds = self._map(session, request.map, response)
        elif kind == "unmap":
            self._server.maps.remove(session, request.unmap.map_id)
            response.unmap.SetInParent()
        elif kind == "mapped":
            session.check_open()
            self._server.plane.session_sealed(session.handle)
            response.mapped.SetInParent()
        else:
            self._detached = True
            response.detach.SetInParent()
            ended = self._server.sessions.end(session, clean=True, reason="DETACHED")
            await asyncio.wait([ended], timeout=DETACH_S)
        return self._send(response, fds) and kind != "detach"

    async def _attach(
        self, attach: pb.AttachRequest, packet: _Packet, response: pb.FdResponse
    ) -> bool:
        if self._session is not None:
            raise Conflict("this connection has a session already", reason="ALREADY_ATTACHED")
        # Not when it is accepted: closing a socket with a packet unread would reset it, and the
        # client would be told that instead of the reason.
        self._server.tenant.check_uid(self._uid)
        if packet.fds:
            raise InvalidRequest("fds", "attach takes none")
        if attach.abi_version != ABI_VERSION:
            raise InvalidRequest(
                "abi_version",
                f"{attach.abi_version} is not this daemon's {ABI_VERSION}; use a transferd "
                "package of its version",
                reason="ABI_MISMATCH",
            )
        origin = Origin(self._server.listener, check_name(attach.name), self._pid, self._uid)
        session, fds = await self._server.sessions.open(
            self._server.tenant,
            origin,
            record_count=attach.record_count,
            counter_count=attach.counter_count,
        )
        self._session = session
        self._timer.cancel()
        self._server.attached(session, self)
        if self._closed:  # the daemon stopped listening in the meantime
            self._server.sessions.end(session, clean=False, reason="CONNECTION_CLOSED")
        try:
            response.attach.session_id = session.session_id
            response.attach.token = session.token
            response.attach.segment_bytes = os.fstat(fds.segment).st_size
            return self._send(response, (fds.segment, fds.doorbell, fds.event))
        finally:
            for fd in (fds.segment, fds.doorbell, fds.event):
                os.close(fd)

    def _share(self, session: Session, packet: _Packet, response: pb.FdResponse) -> None:
        memory = self._server.sessions.add_memory(session, packet.only())
        packet.taken()
        response.share_memory.memory_id = memory.memory_id
        response.share_memory.size_bytes = memory.size

    def _share_cuda(
        self,
        session: Session,
        request: pb.ShareCudaMemoryRequest,
        packet: _Packet,
        response: pb.FdResponse,
    ) -> None:
        sessions = self._server.sessions
        chunk_bytes = tuple(request.chunk_bytes)
        if request.memory_id:
            rest = pb.ShareCudaMemoryRequest(memory_id=request.memory_id, chunk_bytes=chunk_bytes)
            if request != rest:
                raise InvalidRequest("memory_id", "with it only chunk_bytes may be given")
            memory = sessions.add_chunks(session, request.memory_id, chunk_bytes, packet.fds)
        else:
            share = Share(
                device_uuid=request.device_uuid,
                base=request.base,
                size=request.size_bytes,
                buffer_id=request.buffer_id,
                ipc_handle=request.ipc_handle,
                chunk_bytes=chunk_bytes,
                dmabuf=request.dmabuf,
                flush=request.flush,
            )
            memory = sessions.add_cuda_memory(session, share, packet.fds)
        packet.taken()
        response.share_memory.memory_id = memory.memory_id
        response.share_memory.size_bytes = memory.size
        response.share_memory.allocation = memory.allocation

    def _map(
        self, session: Session, request: pb.MapRequest, response: pb.FdResponse
    ) -> Sequence[int]:
        """Answers with the memory of a grant; returns the fds that go with the answer."""
        maps = self._server.maps
        if request.map_id and request.handle:
            raise InvalidRequest("map_id", "given with handle; give one of the two")
        if request.first_chunk and not request.map_id:
            raise InvalidRequest("first_chunk", "given without the map_id of its mapping")
        if request.map_id:
            mapping = maps.find(session, request.map_id)
        else:
            mapping = maps.add(session, request.handle, time.monotonic_ns())
        chunks = mapping.chunks(request.first_chunk)
        memory, grant, answer = mapping.memory, mapping.grant, response.map
        answer.map_id = mapping.map_id
        answer.device_uuid = memory.device_uuid
        answer.size_bytes = memory.size
        answer.offset_bytes = grant.region.offset + grant.offset
        answer.length_bytes = grant.length
        answer.owner_pid = grant.session.origin.pid
        answer.buffer_id = memory.buffer_id
        answer.allocation = memory.allocation
        if mapping.own_process:
            answer.own_process = True
            answer.base = memory.base
            return ()
        answer.ipc_handle = memory.ipc_handle
        answer.chunk_count = len(memory.chunk_bytes)
        answer.chunk_bytes.extend(memory.chunk_bytes[chunks])
        return memory.chunk_fds[chunks]

    # ---- answering ----

    def _send(self, response: pb.FdResponse, fds: Sequence[int] = ()) -> bool:
        """Sends one packet without waiting; False if the client does not take it."""
        if self._closed:
            return False
        ancillary = []
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            self._sock.sendmsg([response.SerializeToString()], ancillary, socket.MSG_NOSIGNAL)
        except OSError as error:
            log.info("client does not take its answer", pid=self._pid, error=error.strerror)
            return False
        return True

    def _refuse(self, request_id: int, error: TransferdError) -> bool:
        """Answers with an error; False if the client does not take it."""
        response = pb.FdResponse(request_id=request_id)
        response.error.reason = error.reason
        response.error.message = error.message
        return self._send(response)

    def map_revoked(self, map_ids: Sequence[int]) -> None:
        """Mappings of the session are wanted back: asks its client, who has to listen."""
        response = pb.FdResponse(map_revoked=pb.MapRevoked(map_ids=map_ids))
        if not self._send(response):
            self.close()

    def session_ending(self) -> None:
        """The daemon ends the session: tells the client, then closes."""
        session = self._session
        if session is None or self._detached or self._closed:
            return
        response = pb.FdResponse()
        response.session_ended.reason = session.end_reason
        response.session_ended.message = session.end_message
        self._send(response)
        self.close()

    def close(self) -> None:
        """Closes the connection, and with it the session; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._server.closed(self)
        if self._session is not None:
            self._server.sessions.end(
                self._session, clean=self._detached, reason="CONNECTION_CLOSED"
            )


class FdServer:
    """The fd socket of one tenant."""

    def __init__(
        self, path: Path, mode: int, listener: str, tenant: Tenant, sessions: Sessions, plane: Plane
    ) -> None:
        """Takes what its connections need.

        Args:
            path: Where to listen; nothing may be there.
            mode: Permission bits of the socket.
            listener: Name of the socket that sessions belong to.
            tenant: Whose policy applies.
            sessions: Where sessions are opened.
            plane: The data plane.
        """
        self._path = path
        self._mode = mode
        self.listener = listener
        self.tenant = tenant
        self.sessions = sessions
        self.plane = plane
        self.maps = sessions.maps
        self.tasks = TaskOwner("fdsocket")
        self._sock: socket.socket | None = None
        self._connections: set[Connection] = set()
        self._by_session: dict[int, Connection] = {}
        sessions.on_ending.append(self._session_ending)
        self.maps.on_revoked.append(self._map_revoked)

    def start(self) -> None:
        """Begins to listen; OSError if it cannot."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            old = os.umask(0o777 & ~self._mode)
            try:
                sock.bind(os.fspath(self._path))
            finally:
                os.umask(old)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._sock is not None
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no fds left: let some be closed first
            log.warning("cannot accept a client", error=error.strerror)
            self._pause()
            return
        sock.setblocking(False)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(raw)
        connection = Connection(self, sock, pid, uid)
        self._connections.add(connection)
        if sum(not other.attached for other in self._connections) > WAITING_MAX:
            log.warning("too many clients that do not attach", pid=pid)
            connection.close()

    def _pause(self) -> None:
        """Stops accepting for a moment."""
        loop = asyncio.get_running_loop()
        if self._sock is not None:
            loop.remove_reader(self._sock.fileno())
            loop.call_later(ACCEPT_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().add_reader(self._sock.fileno(), self._accept)

    def attached(self, session: Session, connection: Connection) -> None:
        """A connection has got its session."""
        self._by_session[session.session_id] = connection

    def closed(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if connection.session is not None:
            self._by_session.pop(connection.session.session_id, None)

    def _session_ending(self, session: Session) -> None:
        connection = self._by_session.get(session.session_id)
        if connection is not None:
            connection.session_ending()

    def _map_revoked(self, session: Session, map_ids: Sequence[int]) -> None:
        connection = self._by_session.get(session.session_id)
        if connection is not None:
            connection.map_revoked(map_ids)

    def stop_listening(self) -> None:
        """Takes no further clients; removes the socket's file."""
        sock, self._sock = self._sock, None
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    async def aclose(self) -> None:
        """Closes what is left."""
        self.stop_listening()
        for connection in list(self._connections):
            connection.close()
        await self.tasks.idle()
