# SPDX-License-Identifier: Apache-2.0
"""Opening a session: over shared memory where the fd socket is there, else over gRPC alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transferd.client import errors
from transferd.client.fdsocket import SUFFIX
from transferd.client.lease import LeaseSession
from transferd.client.ring import RingSession
from transferd.client.rpc import ADDRESS_VARIABLE, Control, resolve_address, socket_path

if TYPE_CHECKING:
    from transferd.client.session import Session

NAME_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to attach; the arguments of :class:`transferd.Client`."""

    address: str | None = None
    name: str = ""
    shared_memory: bool | None = None
    records: int = 0
    counters: int = 0
    spin_us: float = 200.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Checks the values."""
        if len(self.name.encode()) > NAME_BYTES:
            raise errors.InvalidRequest(f"name has at most {NAME_BYTES} bytes, not {self.name!r}")
        if not self.timeout_s > 0:
            raise errors.InvalidRequest(f"timeout_s is above 0, not {self.timeout_s!r}")
        for field in ("records", "counters"):
            value = getattr(self, field)
            if not 0 <= value < 1 << 32:
                raise errors.InvalidRequest(f"{field} is from 0 (default) on, not {value!r}")


def open_session(options: Options) -> Session:
    """Opens a session. Blocks for a few milliseconds.

    Raises:
        Unavailable: No daemon answers there.
        TransferdError: It refused.
    """
    address = resolve_address(options.address)
    path = socket_path(address)
    if options.shared_memory is True and path is None:
        raise errors.InvalidRequest(
            f"shared memory needs a daemon on this host, named by its Unix socket, not {address!r}"
        )
    control = Control(address, options.timeout_s)
    try:
        if path is not None and options.shared_memory is not False:
            session = _open_ring(control, path, options)
            if session is not None:
                return session
        return LeaseSession(control, name=options.name)
    except BaseException:
        control.close()
        raise


def _open_ring(control: Control, path: str, options: Options) -> Session | None:
    """Attaches by the fd socket; None where the daemon has none and gRPC alone will do."""
    try:
        return RingSession(
            control,
            path + SUFFIX,
            name=options.name or _process_name(),
            records=options.records,
            counters=options.counters,
            spin_us=options.spin_us,
        )
    except errors.TransferdError:
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.exists(path):
            if options.shared_memory is None:
                return None
            raise errors.Unavailable(f"the daemon has no fd socket at {path}{SUFFIX}") from None
        raise errors.Unavailable(
            f"no daemon answers at {path} ({error.strerror or error}): start one with "
            f"`transferd serve`, or name its socket in {ADDRESS_VARIABLE}",
            reason="DAEMON_GONE",
        ) from None


def _process_name() -> str:
    """The command's name, for people who look at sessions."""
    try:
        with open("/proc/self/comm", encoding="utf-8", errors="replace") as file:
            return f"{file.read().strip()}[{os.getpid()}]"[:NAME_BYTES]
    except OSError:
        return str(os.getpid())
