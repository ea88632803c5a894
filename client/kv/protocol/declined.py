# SPDX-License-Identifier: Apache-2.0
"""Which decoder ranks are known to read nothing of a prefill that has not begun."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Readers:
    """Who reads a prefill.

    Attributes:
        wanted: How many decoder ranks want it; 0: none has said.
        read: Those that have read it, or will not.
    """

    wanted: int = 0
    read: set[bytes] = field(default_factory=set)

    @property
    def through(self) -> bool:
        """Whether nobody will read it any more."""
        return 0 < self.wanted <= len(self.read)


class Declined:
    """Readers by the request's id. Bounded: what is oldest is forgotten first.

    Args:
        most: Decoder ranks of all ids together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._readers: dict[bytes, Readers] = {}  # oldest first

    def __len__(self) -> int:
        """Counts decoder ranks, those of each id."""
        return self._count

    def add(self, request_id: bytes, decoder: bytes, readers: int) -> None:
        """Notes that a decoder rank reads nothing, and how many were to read."""
        known = self._readers.setdefault(request_id, Readers())
        known.wanted = max(known.wanted, readers)
        self._count += decoder not in known.read
        known.read.add(decoder)
        while self._count > self._most:
            self.take(next(iter(self._readers)))

    def discard(self, request_id: bytes, decoder: bytes) -> None:
        """Forgets a decoder rank that asks after all."""
        known = self._readers.get(request_id)
        if known is not None and decoder in known.read:
            known.read.remove(decoder)
            self._count -= 1
            if not known.read:
                del self._readers[request_id]

    def take(self, request_id: bytes) -> Readers:
        """Takes out what is known, for the prefill that begins."""
        known = self._readers.pop(request_id, Readers())
        self._count -= len(known.read)
        return known
