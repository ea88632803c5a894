# SPDX-License-Identifier: Apache-2.0
"""How the two ends of a benchmark speak: JSON in mailboxes; and how they find each other.

The target's mailbox is all that an initiator has to know. It is written as a *token*, to be copied
from one terminal to the other, or fetched from a port where the target tells it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import json
import os
import re
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

import transferd
from transferd.client import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd import Client, Job

Answer = TypeVar("Answer", bound=BaseModel)

PROTOCOL = 1
PREFIX = "tfb1:"
DEFAULT_PORT = 7473
SLOTS = 64
SLOT_BYTES = 8192
LOOK_S = 0.25  # a waiting end looks this often whether the other lives
ANSWER_S = 60.0
CONNECT_S = 5.0
PAUSE_S = 0.1
TOKEN_LINE_MAX = 16_384
# What an end that has died, or has ended its session, is told by.
GONE = (
    errors.PeerLost,
    errors.StaleDescriptor,
    errors.Conflict,
    errors.NotFound,
    errors.JobFailed,
)


def to_token(descriptor: bytes) -> str:
    """Writes a mailbox's descriptor for people to copy."""
    return PREFIX + base64.urlsafe_b64encode(descriptor).decode().rstrip("=")


def from_token(token: str) -> bytes:
    """Reads it again.

    Raises:
        InvalidRequest: It is none, or not whole.
    """
    text = token.strip().removeprefix(PREFIX)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise errors.InvalidRequest(f"the token was not copied whole ({error})") from None


def split_host_port(text: str) -> tuple[str, int]:
    """Reads "host:port" or "[::1]:port"; port 0: any that is free.

    Raises:
        ValueError: It is not of that form.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]/\s]+):(\d{1,5})", text)
    if match is None or int(match[2]) > 65_535:
        raise ValueError(f"{text!r} is not HOST:PORT, as in host1:{DEFAULT_PORT}")
    return match[1].strip("[]"), int(match[2])


def join_host_port(host: str, port: int) -> str:
    """Writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Tells whether a host means every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def reason(error: OSError) -> str:
    """Says an error in the system's words alone."""
    number = error.errno or 0  # below 0: of the name's resolution
    return os.strerror(number) if number > 0 else str(error.strerror or error)


class TokenPort:
    """A port that tells the token to whoever connects; a context manager.

    Attributes:
        address: HOST:PORT.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        """Listens.

        Raises:
            Unavailable: It cannot.
        """
        self._line = json.dumps({"bench": PROTOCOL, "token": token}).encode() + b"\n"
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise errors.Unavailable(
                f"cannot listen at {join_host_port(host, port)} ({reason(error)}): "
                "--listen HOST:PORT names another address"
            ) from None
        self.address = join_host_port(host, self._socket.getsockname()[1])
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="token", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or they gave up, or too many files are open just now
                self._closed.wait(PAUSE_S)
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(CONNECT_S)
                connection.sendall(self._line)

    def close(self) -> None:
        """Ends it. Idempotent."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._socket.close()
        self._thread.join()

    def __enter__(self) -> TokenPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fetch_token(host: str, port: int) -> str:
    """Asks a target's port for its token.

    Raises:
        Unavailable: Nothing answers there, or something else.
    """
    where = join_host_port(host, port)
    line = b""
    try:
        connection = socket.create_connection((host, port), CONNECT_S)
    except OSError as error:
        raise errors.Unavailable(
            f"nothing answers at {where} ({reason(error)}): is `transferctl bench --serve` running "
            "there, and the port open?"
        ) from None
    with connection, contextlib.suppress(OSError):  # whatever it is says nothing, or hangs up
        while not line.endswith(b"\n") and len(line) < TOKEN_LINE_MAX:
            part = connection.recv(TOKEN_LINE_MAX)
            if not part:
                break
            line += part
    try:
        told = json.loads(line)
        protocol, token = told["bench"], str(told["token"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise errors.Unavailable(
            f"what is at {where} is not `transferctl bench --serve`: --to takes the address that "
            "it prints"
        ) from None
    check_protocol(protocol, f"the target at {where}")
    return token


def check_protocol(protocol: object, who: str) -> None:
    """Checks that both ends speak alike.

    Raises:
        Conflict: They do not.
    """
    if protocol != PROTOCOL:
        raise errors.Conflict(
            f"{who} speaks version {protocol} of the benchmark's protocol, this end (transferd "
            f"{transferd.__version__}) version {PROTOCOL}: install the same transferd on both",
            reason="BENCH_VERSION",
        )


class Link:
    """The initiator's end."""

    def __init__(self, client: Client, target: bytes) -> None:
        """Makes its mailbox; nothing is sent yet.

        Args:
            client: Whose mailbox it is.
            target: Descriptor of the target's.
        """
        self._client = client
        self._target = target
        self._mailbox = client.mailbox(SLOTS, SLOT_BYTES)
        self._name = secrets.token_hex(8)
        self._number = 0
        self._ping: Job | None = None

    @property
    def reply_to(self) -> str:
        """Descriptor of its mailbox, for the target."""
        return base64.b64encode(self._mailbox.descriptor).decode()

    def ask(
        self, do: str, form: type[Answer], *, timeout_s: float | None = ANSWER_S, **values: Any
    ) -> Answer:
        """Asks for something and waits for the answer.

        Args:
            do: What.
            form: Of the answer.
            timeout_s: How long a target that lives may take; None: as long as it does.
            values: Of the message.

        Raises:
            PeerLost: The target is gone.
            Unavailable: It does not answer.
            TransferdError: What it says.
        """
        self._number += 1
        with told_gone("the target"):
            self._send(do=do, guest=self._name, number=self._number, **values).wait(ANSWER_S)
        for answer in self._answers(timeout_s, do):
            if answer.pop("number", None) == self._number:
                return _to_form(do, checked(answer, "target"), form)
        raise AssertionError("unreachable")

    def _send(self, **message: Any) -> Job:
        with told_gone("the target"):
            return self._client.send(self._target, json.dumps(message).encode())

    def _answers(self, timeout_s: float | None, do: str) -> Iterator[dict[str, Any]]:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                yield _to_plain(self._mailbox.receive(LOOK_S))
            except errors.WaitTimeout:
                self._look()
                if end is not None and time.monotonic() > end:
                    raise errors.Unavailable(
                        f"the target lives but has not answered {do!r} for {timeout_s:g} s"
                    ) from None

    def _look(self) -> None:
        """Raises if the target is gone: a message to it tells."""
        with told_gone("the target"):
            if self._ping is not None and self._ping.done():
                self._ping.wait(0)
                self._ping = None
            if self._ping is None:
                self._ping = self._send(do="ping", guest=self._name, number=0)

    def close(self) -> None:
        """Says goodbye if anybody listens. Idempotent."""
        with contextlib.suppress(errors.TransferdError):
            self._send(do="bye", guest=self._name, number=0).wait(LOOK_S)
        with contextlib.suppress(errors.TransferdError):
            self._mailbox.close()


def _to_plain(data: bytes) -> dict[str, Any]:
    """Reads a message; nothing of what is none."""
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _to_form(do: str, answer: dict[str, Any], form: type[Answer]) -> Answer:
    """Checks an answer.

    Raises:
        Internal: It is none.
    """
    try:
        return form.model_validate(answer)
    except ValueError:
        raise errors.Internal(
            f"the target's answer to {do!r} is not understood: {str(answer)[:200]}"
        ) from None


@contextlib.contextmanager
def told_gone(who: str) -> Iterator[None]:
    """Says in words of the benchmark that an end is gone."""
    try:
        yield
    except GONE as error:
        raise errors.PeerLost(f"{who} is gone: {error}") from error


_KINDS = {
    kind.__name__: kind
    for kind in (
        errors.AccessDenied,
        errors.Conflict,
        errors.Internal,
        errors.InvalidRequest,
        errors.NotFound,
        errors.PeerLost,
        errors.QuotaExceeded,
        errors.StaleDescriptor,
        errors.Unavailable,
        errors.WaitTimeout,
    )
}


def failed(error: errors.TransferdError) -> dict[str, str]:
    """Writes an error into an answer."""
    kind = next(
        name for name, cls in (*_KINDS.items(), ("Internal", object)) if isinstance(error, cls)
    )
    return {"failed": str(error), "kind": kind, "reason": error.reason}


def checked(answer: dict[str, Any], who: str) -> dict[str, Any]:
    """Passes an answer on, raises the error that it is."""
    if "failed" in answer:
        cls = _KINDS.get(str(answer.get("kind")), errors.Internal)
        raise cls(f"{who}: {answer['failed']}", reason=str(answer.get("reason", "")))
    return answer
