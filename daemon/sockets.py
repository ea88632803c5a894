# SPDX-License-Identifier: Apache-2.0
"""The sockets that the daemon listens on: is the place free, and what to do if it is not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from typing import TYPE_CHECKING

from transferd.daemon.config import split_host_port

if TYPE_CHECKING:
    from pathlib import Path


class StartError(Exception):
    """The daemon cannot start; the message is one sentence that says what to do."""


class SocketPlace:
    """The right to a Unix socket's path, and to its fd socket, for as long as the daemon runs.

    A lock file beside the socket settles who comes first; only its holder may remove a stale
    socket.
    """

    def __init__(self, path: Path) -> None:
        """Takes the place.

        Raises:
            StartError: Somebody listens there, or it cannot be used.
        """
        self.path = path
        self.fd_path = path.with_name(path.name + ".fd")
        self._lock_path = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(
                f"listen: {path.parent} cannot be used for sockets ({error.strerror}); "
                "choose a directory that this user may write to"
            ) from None
        try:
            self._take()
        except BaseException:
            os.close(self._lock)
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"listen: another transferd runs at {self.path}; stop it or choose another socket"
            ) from None
        for path, kind in ((self.path, socket.SOCK_STREAM), (self.fd_path, socket.SOCK_SEQPACKET)):
            _remove_stale(path, kind)

    def release(self) -> None:
        """Removes what is left; idempotent."""
        if self._lock < 0:
            return
        for path in (self.path, self.fd_path, self._lock_path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        os.close(self._lock)
        self._lock = -1


def _remove_stale(path: Path, kind: int) -> None:
    """Removes a socket that nobody listens on any more."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartError(
            f"listen: {path} exists and is no socket; remove it or choose another path"
        )
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(os.fspath(path))
    if result in (0, errno.EAGAIN, errno.EPROTOTYPE):
        raise StartError(
            f"listen: another program listens on {path}; stop it or choose another socket"
        )
    path.unlink()


def check_port_free(key: str, address: str, kind: int) -> None:
    """Refuses a port that is taken, before a library hides why.

    Args:
        key: Configuration key, for the message.
        address: host:port.
        kind: SOCK_STREAM or SOCK_DGRAM.

    Raises:
        StartError: It is taken, or not an address of this host.
    """
    host, port = split_host_port(address)
    family, numeric = numeric_address(key, host, port)
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((numeric, port))
            if kind == socket.SOCK_STREAM and port:
                probe.listen(1)
        except OSError as error:
            raise StartError(port_message(key, address, error)) from None


def port_message(key: str, address: str, error: OSError) -> str:
    """Says why a port could not be bound, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"{key}: port {address} is taken by another program; stop it or choose another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{key}: {address} is not an address of this host; use one of its own"
    if error.errno == errno.EACCES:
        return f"{key}: this user may not bind {address}; choose a port above 1023"
    return f"{key}: cannot bind {address} ({error.strerror}); choose another address"


def numeric_address(key: str, host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Resolves a host to bind to; StartError if its name is unknown."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartError(
            f"{key}: {host} is unknown ({error.strerror}); use a name or address of this host"
        ) from None
    return info[0][0], str(info[0][4][0])
