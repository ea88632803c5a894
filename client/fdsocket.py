# SPDX-License-Identifier: Apache-2.0
"""The fd socket of a session: file descriptors go over it, and its end is the session's end.

A thread reads it, so that the daemon's death is noticed at once whatever else the process does.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from transferd.client import errors
from transferd.v1 import attach_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PACKET_BYTES = 65_536
MAX_FDS = 16
SUFFIX = ".fd"


def _receive(sock: socket.socket) -> tuple[attach_pb2.FdResponse | None, list[int]]:
    """Receives one packet; None at the end of the connection. The fds are the caller's."""
    fds = array.array("i")
    data, ancillary, flags, _ = sock.recvmsg(
        PACKET_BYTES, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        return None, list(fds)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise errors.Internal("the daemon sent a packet that is too long for the fd socket")
    return attach_pb2.FdResponse.FromString(data), list(fds)


def close_all(fds: Sequence[int] | array.array[int]) -> None:
    """Closes fds."""
    for fd in fds:
        os.close(fd)


class FdSocket:
    """The connection. Safe to use from several threads once started."""

    def __init__(self, path: str, timeout_s: float) -> None:
        """Connects.

        Args:
            path: Of the fd socket.
            timeout_s: Bound of each exchange.

        Raises:
            OSError: Nobody listens there.
        """
        self.path = path
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # guards sending, _next_id, _pending, _ended
        self._pending: dict[int, Future[tuple[attach_pb2.FdResponse, list[int]]]] = {}
        self._next_id = 1
        self._ended: errors.Unavailable | None = None
        self._thread: threading.Thread | None = None
        self._on_end: Callable[[errors.Unavailable], None] | None = None
        self._on_revoked: Callable[[Iterable[int]], None] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            # A blocking connect with a bound of the kernel's waits while many others attach;
            # settimeout() would have it fail at once then.
            whole_s, part_s = divmod(timeout_s, 1)
            self._socket.setsockopt(
                socket.SOL_SOCKET,
                socket.SO_SNDTIMEO,
                struct.pack("@ll", int(whole_s), int(part_s * 1e6)),
            )
            self._socket.connect(path)
            self._socket.settimeout(timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def attach(
        self, request: attach_pb2.AttachRequest
    ) -> tuple[attach_pb2.AttachResponse, list[int]]:
        """Opens the session; the first exchange, before :meth:`start`.

        Returns:
            The answer, and the fds of segment, doorbell and events, which are the caller's.

        Raises:
            TransferdError: The daemon refused, or is gone.
        """
        message = attach_pb2.FdRequest(request_id=self._next_id, attach=request)
        self._next_id += 1
        try:
            self._socket.send(message.SerializeToString())
            response, fds = _receive(self._socket)
        except OSError as error:
            raise self._gone(f"it did not answer ({error})") from None
        if response is None:
            raise self._gone("it closed the connection")
        if response.WhichOneof("body") == "error":
            close_all(fds)
            raise errors.from_fd_error(response.error.reason, response.error.message)
        if response.WhichOneof("body") != "attach" or len(fds) != 3:
            close_all(fds)
            raise errors.Internal(
                f"the daemon at {self.path} answered an attach with something else"
            )
        return response.attach, fds

    def start(
        self,
        on_end: Callable[[errors.Unavailable], None],
        on_revoked: Callable[[Iterable[int]], None] | None = None,
    ) -> None:
        """Starts the reader.

        Args:
            on_end: Called once, from the reader's thread, when the connection has ended.
            on_revoked: Called from there with the numbers of mappings that are to be given back.
        """
        self._on_end = on_end
        self._on_revoked = on_revoked
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, name="transferd-fd", daemon=True)
        self._thread.start()

    def request(
        self, message: attach_pb2.FdRequest, fds: Sequence[int] = ()
    ) -> attach_pb2.FdResponse:
        """As :meth:`exchange`, for answers without fds."""
        response, received = self.exchange(message, fds)
        close_all(received)
        return response

    def exchange(
        self, message: attach_pb2.FdRequest, fds: Sequence[int] = ()
    ) -> tuple[attach_pb2.FdResponse, list[int]]:
        """Asks and waits for the answer.

        Args:
            message: Without its id.
            fds: Sent along; they stay the caller's.

        Returns:
            The answer, and the fds that came with it, which are the caller's.

        Raises:
            TransferdError: The daemon refused, is gone, or took too long.
        """
        future: Future[tuple[attach_pb2.FdResponse, list[int]]] = Future()
        with self._lock:
            if self._ended is not None:
                raise self._ended
            message.request_id = self._next_id
            self._next_id += 1
            self._pending[message.request_id] = future
            try:
                socket.send_fds(self._socket, [message.SerializeToString()], list(fds))
            except OSError as error:
                del self._pending[message.request_id]
                raise self._gone(f"sending failed ({error})") from None
        try:
            response, received = future.result(self._timeout_s)
        except TimeoutError:
            with self._lock:
                self._pending.pop(message.request_id, None)
            if future.done() and future.exception() is None:  # in this very moment
                close_all(future.result()[1])
            raise errors.WaitTimeout(
                f"the daemon at {self.path} did not answer within {self._timeout_s:g} s"
            ) from None
        if response.WhichOneof("body") == "error":
            close_all(received)
            raise errors.from_fd_error(response.error.reason, response.error.message)
        return response, received

    def _read(self) -> None:
        """Hands answers out until the connection ends. Runs in its own thread."""
        end = self._gone("it died or closed the connection")
        while True:
            try:
                response, fds = _receive(self._socket)
            except (OSError, errors.TransferdError):
                break
            if response is None:
                break
            body = response.WhichOneof("body")
            if body == "map_revoked":
                close_all(fds)
                if self._on_revoked is not None:
                    self._on_revoked(response.map_revoked.map_ids)
                continue
            if body == "session_ended":
                close_all(fds)
                told = response.session_ended
                end = errors.Unavailable(
                    f"the daemon ended the session: {told.message}", reason=told.reason
                )
                continue
            with self._lock:
                future = self._pending.pop(response.request_id, None)
                if future is not None:
                    future.set_result((response, fds))
            if future is None:
                close_all(fds)
        self._finish(end)

    def _finish(self, end: errors.Unavailable) -> None:
        with self._lock:
            self._ended = end
            pending = list(self._pending.values())
            self._pending.clear()
        for future in pending:
            future.set_exception(end)
        if self._on_end is not None:
            self._on_end(end)

    def _gone(self, why: str) -> errors.Unavailable:
        return errors.Unavailable(
            f"the daemon at {self.path.removesuffix(SUFFIX)} is gone: {why}", reason="DAEMON_GONE"
        )

    def close(self) -> None:
        """Ends the connection and its reader. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._socket.close()

    def orphan(self) -> None:
        """Drops the connection in a forked child, without a word to the daemon."""
        self._socket.close()
