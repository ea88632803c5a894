# SPDX-License-Identifier: Apache-2.0
"""The fd socket: where clients attach. AF_UNIX, SOCK_SEQPACKET, one message a packet.

Everything that comes in is hostile until it is proven otherwise. Rules that keep it harmless:

* one packet is read at a time per connection, and the next only after the answer has been sent;
* every fd that comes with a packet is owned by a :class:`_Packet` and closed unless a request takes
  it;
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
from typing import TYPE_CHECKING

import structlog
from google.protobuf.message import DecodeError

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
    from pathlib import Path

    from transferd.daemon.plane import Plane, SessionFds
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

    def take(self) -> int:
        """Hands over the only fd.

        Raises:
            InvalidRequest: There is none, or more than one.
        """
        if len(self.fds) != 1:
            raise InvalidRequest(
                "fd", f"{len(self.fds)} fds came with the message; send exactly one"
            )
        return self.fds[0]

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
        raise InvalidRequest("fds", "more fds than the daemon can take; send at most one")
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
            raise InvalidRequest("body", "missing; send attach, mapped, share_memory or detach")
        if session is None:
            raise Unauthenticated("the first message must be attach", reason="NOT_ATTACHED")
        if kind == "share_memory":
            self._share(session, packet, response)
        elif kind == "mapped":
            session.check_open()
            self._server.plane.session_sealed(session.handle)
            response.mapped.SetInParent()
        else:
            self._detached = True
            response.detach.SetInParent()
            ended = self._server.sessions.end(session, clean=True, reason="DETACHED")
            await asyncio.wait([ended], timeout=DETACH_S)
        return self._send(response) and kind != "detach"

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
            return self._send(response, fds)
        finally:
            for fd in (fds.segment, fds.doorbell, fds.event):
                os.close(fd)

    def _share(self, session: Session, packet: _Packet, response: pb.FdResponse) -> None:
        memory = self._server.sessions.add_memory(session, packet.take())
        packet.fds.clear()  # the session owns it now
        response.share_memory.memory_id = memory.memory_id
        response.share_memory.size_bytes = memory.size

    # ---- answering ----

    def _send(self, response: pb.FdResponse, fds: SessionFds | None = None) -> bool:
        """Sends one packet without waiting; False if the client does not take it."""
        if self._closed:
            return False
        ancillary = []
        if fds is not None:
            rights = array.array("i", [fds.segment, fds.doorbell, fds.event])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
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
        self.tasks = TaskOwner("fdsocket")
        self._sock: socket.socket | None = None
        self._connections: set[Connection] = set()
        self._by_session: dict[int, Connection] = {}
        sessions.on_ending.append(self._session_ending)

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
