# SPDX-License-Identifier: Apache-2.0
"""The messages of a pair: checked values on this side, protobuf on the wire.

:func:`decode` is the only way in. What it gives is within the bounds of :mod:`.bounds`; whether it
fits the pair's state is for the state machines.
"""

from __future__ import annotations

import enum
import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

from transferd.kv.protocol import bounds
from transferd.kv.v1 import protocol_pb2 as wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class BadMessageError(ValueError):
    """A message from the other side is not one; the text names the field and the value."""


class Reason(enum.IntEnum):
    """Why a Hello is refused, or a transfer has failed, as the prefiller says it."""

    FINGERPRINT = wire.REASON_FINGERPRINT
    DRAINING = wire.REASON_DRAINING
    BUSY = wire.REASON_BUSY
    BAD_REQUEST = wire.REASON_BAD_REQUEST
    CONFLICT = wire.REASON_CONFLICT
    DUPLICATE = wire.REASON_DUPLICATE
    RELEASED = wire.REASON_RELEASED
    ABORTED = wire.REASON_ABORTED
    DEADLINE = wire.REASON_DEADLINE
    WRITE = wire.REASON_WRITE
    TOO_SHORT = wire.REASON_TOO_SHORT


@dataclass(frozen=True, slots=True)
class Hello:
    """A decoder rank presents itself. Fields as in protocol.proto."""

    decoder: bytes
    epoch: int
    token: bytes
    mailbox: bytes
    grants: tuple[tuple[str, bytes], ...]
    imm_first: int
    imm_count: int
    stages: int
    fingerprint: bytes
    layout: bytes
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Request:
    """A decoder rank wants pages. Equal ones are the same request, said again."""

    transfer: int
    low: int
    request_id: bytes
    first_token: int
    tokens: int
    groups: tuple[bytes, ...]
    imm: int
    tail_offset: int
    deadline_ms: int
    readers: int

    @property
    def end(self) -> int:
        """The token behind the last one."""
        return self.first_token + self.tokens


@dataclass(frozen=True, slots=True)
class Cancel:
    """The decoder takes a transfer back."""

    transfer: int


@dataclass(frozen=True, slots=True)
class Decline:
    """The decoder wants nothing of a request."""

    request_id: bytes
    readers: int


@dataclass(frozen=True, slots=True)
class Ask:
    """How does a transfer stand?"""

    transfer: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Is anybody there?"""

    number: int
    low: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The pair is made."""

    token: bytes
    boot: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """The pair is not made."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """No write of the transfer is under way, and none will be."""

    transfer: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The same, and the prefiller ended it."""

    transfer: int
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Pushed:
    """All of the transfer was acknowledged."""

    transfer: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to Ping."""

    number: int
    draining: bool


@dataclass(frozen=True, slots=True)
class Bye:
    """A prefiller takes no new requests; a decoder leaves."""


Message = (
    Hello
    | Request
    | Cancel
    | Decline
    | Ask
    | Ping
    | Welcome
    | Refused
    | Cancelled
    | Failed
    | Pushed
    | Pong
    | Bye
)


# ---- checks ----


def _number(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise BadMessageError(f"{name} is from {low} to {high}, not {value}")
    return value


def _bytes(name: str, value: bytes, low: int, high: int) -> bytes:
    if not low <= len(value) <= high:
        raise BadMessageError(f"{name} has from {low} to {high} bytes, not {len(value)}")
    return value


def _token(name: str, value: bytes) -> bytes:
    return _bytes(name, value, bounds.TOKEN_BYTES, bounds.TOKEN_BYTES)


def _transfer(body: Any) -> int:
    return _number("transfer", body.transfer, 1, bounds.NUMBER_MAX)


def _reason(body: Any) -> Reason:
    try:
        return Reason(body.reason)
    except ValueError:
        raise BadMessageError(f"reason {body.reason} is not known") from None


def clip(text: str) -> str:
    """Shortens a text to what a detail may have."""
    return text.encode(errors="replace")[: bounds.DETAIL_BYTES_MAX].decode(errors="ignore")


def _detail(body: Any) -> str:
    _bytes("detail", body.detail.encode(), 0, bounds.DETAIL_BYTES_MAX)
    return str(body.detail)


def pages_of(indices: bytes) -> array[int]:
    """Reads page indices: 32 bits each, little-endian."""
    pages = array("I")
    pages.frombytes(indices)
    if sys.byteorder == "big":
        pages.byteswap()
    return pages


def check_pages(groups: Sequence[bytes], limits: Sequence[int]) -> None:
    """Checks the pages of a request.

    Args:
        groups: Indices of each group's pages, as in :class:`Request`.
        limits: Pages that the cache has, of each group.

    Raises:
        BadMessageError: Names group and index of what is out of range or listed twice.
    """
    if len(groups) != len(limits):
        raise BadMessageError(f"{len(groups)} groups of pages; the layout has {len(limits)}")
    for i, (indices, limit) in enumerate(zip(groups, limits, strict=True)):
        if len(indices) % 4:
            raise BadMessageError(f"groups[{i}] has {len(indices)} bytes; an index has 4")
        pages = pages_of(indices)
        if pages and max(pages) >= limit:
            raise BadMessageError(
                f"groups[{i}]: page {max(pages)} is out of range; the cache has {limit}"
            )
        if len(set(pages)) != len(pages):
            seen: set[int] = set()
            twice = next(page for page in pages if page in seen or seen.add(page))  # type: ignore[func-returns-value]
            raise BadMessageError(f"groups[{i}]: page {twice} is listed twice")


# ---- in ----


def _hello(body: Any) -> Hello:
    _number("grants", len(body.grants), 1, bounds.GRANTS_MAX)
    grants = []
    for grant in body.grants:
        _bytes("region", grant.region.encode(), 1, bounds.REGION_NAME_BYTES_MAX)
        _bytes("descriptor", grant.descriptor, 1, bounds.DESCRIPTOR_BYTES_MAX)
        grants.append((grant.region, grant.descriptor))
    if len({name for name, _ in grants}) != len(grants):
        raise BadMessageError("grants: a region is named twice")
    first = _number("imm_first", body.imm_first, 0, bounds.IMM_COUNT - 1)
    return Hello(
        decoder=_token("decoder", body.decoder),
        epoch=_number("epoch", body.epoch, 1, bounds.NUMBER_MAX),
        token=_token("token", body.token),
        mailbox=_bytes("mailbox", body.mailbox, 1, bounds.DESCRIPTOR_BYTES_MAX),
        grants=tuple(grants),
        imm_first=first,
        imm_count=_number("imm_count", body.imm_count, 1, bounds.IMM_COUNT - first),
        stages=_number("stages", body.stages, 1, bounds.STAGES_MAX),
        fingerprint=_bytes("fingerprint", body.fingerprint, 1, bounds.FINGERPRINT_BYTES_MAX),
        layout=_bytes("layout", body.layout, 0, bounds.LAYOUT_BYTES_MAX),
        timeout_ms=_number("timeout_ms", body.timeout_ms, 1, bounds.TIMEOUT_MAX_MS),
    )


def check_readers(message: Request | Decline) -> None:
    """Checks which prefill is meant, and how many want it.

    Raises:
        BadMessageError: Names the field and the value.
    """
    _bytes("request_id", message.request_id, 1, bounds.REQUEST_ID_BYTES_MAX)
    _number("readers", message.readers, 1, bounds.READERS_MAX)


def check_request(request: Request) -> None:
    """Checks all but the page indices themselves.

    Raises:
        BadMessageError: Names the field and the value.
    """
    _number("transfer", request.transfer, 1, bounds.NUMBER_MAX)
    _number("low", request.low, max(1, request.transfer - bounds.WINDOW + 1), request.transfer)
    check_readers(request)
    _number("first_token", request.first_token, 0, bounds.TOKENS_MAX)
    _number("tokens", request.tokens, 1, bounds.TOKENS_MAX)
    _number("groups", len(request.groups), 0, bounds.GROUPS_MAX)
    pages = sum(len(indices) for indices in request.groups) // 4
    _number("pages in all", pages, 0, bounds.PAGES_MAX)
    _number("imm", request.imm, 0, bounds.IMM_COUNT - 1)
    _number("tail_offset", request.tail_offset, 0, bounds.NUMBER_MAX)
    _number("deadline_ms", request.deadline_ms, 1, bounds.DEADLINE_MAX_MS)


def _request(body: Any) -> Request:
    request = Request(
        transfer=body.transfer,
        low=body.low,
        request_id=body.request_id,
        first_token=body.first_token,
        tokens=body.tokens,
        groups=tuple(group.indices for group in body.groups),
        imm=body.imm,
        tail_offset=body.tail_offset,
        deadline_ms=body.deadline_ms,
        readers=body.readers,
    )
    check_request(request)
    return request


def _decline(body: Any) -> Decline:
    decline = Decline(body.request_id, body.readers)
    check_readers(decline)
    return decline


def _ping(body: Any) -> Ping:
    return Ping(
        number=_number("number", body.number, 1, bounds.NUMBER_MAX),
        low=_number("low", body.low, 1, bounds.NUMBER_MAX),
    )


_READERS: Final[dict[str, Callable[[Any], Message]]] = {
    "hello": _hello,
    "request": _request,
    "cancel": lambda body: Cancel(_transfer(body)),
    "decline": _decline,
    "ask": lambda body: Ask(_transfer(body)),
    "ping": _ping,
    "welcome": lambda body: Welcome(_token("token", body.token), _token("boot", body.boot)),
    "refused": lambda body: Refused(_reason(body), _detail(body)),
    "cancelled": lambda body: Cancelled(_transfer(body)),
    "failed": lambda body: Failed(_transfer(body), _reason(body), _detail(body)),
    "pushed": lambda body: Pushed(_transfer(body)),
    "pong": lambda body: Pong(
        _number("number", body.number, 1, bounds.NUMBER_MAX), bool(body.draining)
    ),
    "bye": lambda body: Bye(),
}


def decode(data: bytes) -> Message:
    """Reads a message.

    Raises:
        BadMessageError: It is none, or a field is out of its bounds.
    """
    message = wire.Message()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise BadMessageError(f"{len(data)} bytes are no message") from None
    kind = message.WhichOneof("body")
    if kind is None:
        raise BadMessageError("a message of no known kind")
    return _READERS[kind](getattr(message, kind))


# ---- out ----


def _write_hello(hello: Hello, body: Any) -> None:
    for name in Hello.__slots__:
        if name != "grants":
            setattr(body, name, getattr(hello, name))
    for region, descriptor in hello.grants:
        body.grants.add(region=region, descriptor=descriptor)


def _write_request(request: Request, body: Any) -> None:
    for name in Request.__slots__:
        if name != "groups":
            setattr(body, name, getattr(request, name))
    for indices in request.groups:
        body.groups.add(indices=indices)


def encode(message: Message) -> bytes:
    """Writes a message."""
    out = wire.Message()
    body = getattr(out, type(message).__name__.lower())
    body.SetInParent()  # also where all fields are zero
    if isinstance(message, Hello):
        _write_hello(message, body)
    elif isinstance(message, Request):
        _write_request(message, body)
    else:
        for name in message.__slots__:
            setattr(body, name, getattr(message, name))
    return out.SerializeToString()
