# SPDX-License-Identifier: Apache-2.0
"""Letters: messages cut to the size of a mailbox's slots, and put together again, within bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from transferd.kv.protocol import bounds
from transferd.kv.protocol.messages import BadMessageError
from transferd.kv.v1 import protocol_pb2 as wire

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

# What a letter needs beside its payload: two tokens of 16 bytes, three numbers, six tags, a length.
OVERHEAD_BYTES = 64
PAYLOAD_BYTES_MAX = bounds.LETTER_BYTES_MAX - OVERHEAD_BYTES
MESSAGE_BYTES_MAX = bounds.FRAGMENTS_MAX * PAYLOAD_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Letter:
    """What a mailbox gives. Fields as in protocol.proto, checked."""

    to: bytes
    sender: bytes
    number: int
    index: int
    count: int
    payload: bytes


def cut(data: bytes, *, to: bytes = b"", sender: bytes = b"", number: int = 0) -> tuple[bytes, ...]:
    """Cuts a message into letters.

    Args:
        data: The message; at most MESSAGE_BYTES_MAX.
        to: The receiver's token; empty for Hello.
        sender: The decoder, for Hello.
        number: By which the parts find together again, if there are several.

    Returns:
        Letters, each of at most LETTER_BYTES_MAX; to be sent in any order.

    Raises:
        BadMessageError: It is too long.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise BadMessageError(f"a message has {len(data)} bytes; at most {MESSAGE_BYTES_MAX}")
    if len(data) <= PAYLOAD_BYTES_MAX:
        return (wire.Letter(to=to, sender=sender, payload=data).SerializeToString(),)
    parts = [data[i : i + PAYLOAD_BYTES_MAX] for i in range(0, len(data), PAYLOAD_BYTES_MAX)]
    return tuple(
        wire.Letter(
            to=to, sender=sender, number=number, index=i, count=len(parts), payload=part
        ).SerializeToString()
        for i, part in enumerate(parts)
    )


def read(data: bytes) -> Letter:
    """Reads a letter.

    Raises:
        BadMessageError: It is none.
    """
    letter = wire.Letter()
    try:
        letter.ParseFromString(data)
    except DecodeError:
        raise BadMessageError(f"{len(data)} bytes are no letter") from None
    count = letter.count or 1
    if count > bounds.FRAGMENTS_MAX or letter.index >= count:
        raise BadMessageError(f"part {letter.index} of {count}; at most {bounds.FRAGMENTS_MAX}")
    for name, value in (("to", letter.to), ("sender", letter.sender)):
        if value and len(value) != bounds.TOKEN_BYTES:
            raise BadMessageError(f"{name} has {len(value)} bytes, not {bounds.TOKEN_BYTES}")
    if bool(letter.to) == bool(letter.sender):
        raise BadMessageError("a letter has either to or sender")
    if len(letter.payload) > bounds.LETTER_BYTES_MAX:
        raise BadMessageError(f"a part has {len(letter.payload)} bytes")
    if count > 1 and not 1 <= letter.number <= bounds.NUMBER_MAX:
        raise BadMessageError(f"parts of message {letter.number}")
    return Letter(letter.to, letter.sender, letter.number, letter.index, count, letter.payload)


@dataclass(slots=True)
class _Partial:
    """Parts of a message that are here."""

    count: int
    until: float
    size: int = 0
    parts: dict[int, bytes] = field(default_factory=dict)


class Partials:
    """Messages of which parts are missing.

    Args:
        limit: How many messages at once.
        size: How many bytes of all of them.
        partial_s: How long one may take.
    """

    def __init__(self, limit: int, size: int, partial_s: float) -> None:
        self._limit = limit
        self._size = size
        self._partial_s = partial_s
        self._held = 0
        self._partials: dict[Hashable, _Partial] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._partials)

    def fits(self, key: Hashable, letter: Letter) -> bool:
        """Tells whether there is room for a part of a message."""
        new = key not in self._partials
        return (
            len(self._partials) + new <= self._limit
            and self._held + len(letter.payload) <= self._size
        )

    def add(self, now: float, key: Hashable, letter: Letter) -> bytes | None:
        """Takes a part; the caller has seen that it fits.

        Args:
            now: Monotonic time.
            key: By which the parts of a message find together.
            letter: The part. One that is here already is ignored.

        Returns:
            The message, once all parts are here; it is forgotten then.

        Raises:
            BadMessageError: The parts do not agree on how many they are; all are dropped.
        """
        partial = self._partials.get(key)
        if partial is None:
            partial = self._partials[key] = _Partial(letter.count, now + self._partial_s)
        if partial.count != letter.count:
            self.drop(key)
            raise BadMessageError(f"parts of {letter.count} and of {partial.count}")
        if letter.index not in partial.parts:
            partial.parts[letter.index] = letter.payload
            partial.size += len(letter.payload)
            self._held += len(letter.payload)
        if len(partial.parts) < partial.count:
            return None
        self.drop(key)
        return b"".join(partial.parts[i] for i in range(partial.count))

    def drop(self, key: Hashable) -> None:
        """Forgets a message, if parts of it are here."""
        partial = self._partials.pop(key, None)
        if partial is not None:
            self._held -= partial.size

    def drop_oldest(self) -> bool:
        """Makes room; False: there is nothing to drop."""
        if not self._partials:
            return False
        self.drop(next(iter(self._partials)))
        return True

    def expire(self, now: float) -> Iterator[Hashable]:
        """Forgets what has taken too long, and tells it."""
        while self._partials:
            key, partial = next(iter(self._partials.items()))
            if partial.until > now:
                return
            self.drop(key)
            yield key

    def due(self) -> float | None:
        """When the oldest one will have taken too long."""
        for partial in self._partials.values():
            return partial.until
        return None
