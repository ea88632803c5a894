# SPDX-License-Identifier: Apache-2.0
"""What a benchmark writes: bytes that both ends can compute, different at every place."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

BLOCK = 16
CHUNK = 1 << 20


class Pattern:
    """The keystream of AES-CTR: no place looks like another, and any can be computed alone.

    Each step has one of its own, so that what an earlier step left behind is no match.
    """

    def __init__(self, seed: int, step: int, initiator: int) -> None:
        """Chooses one.

        Args:
            seed: Of the run.
            step: Of the sweep.
            initiator: Which of them writes it.
        """
        self._key = hashlib.sha256(f"{seed}/{step}/{initiator}".encode()).digest()[:BLOCK]

    def at(self, offset: int, length: int) -> bytes:
        """Computes the bytes of a place."""
        block, skip = divmod(offset, BLOCK)
        cipher = Cipher(AES(self._key), CTR(block.to_bytes(BLOCK, "big")))
        return cipher.encryptor().update(bytes(skip + length))[skip:]

    def fill(self, view: memoryview) -> None:
        """Writes it to memory, from its beginning."""
        for first in range(0, len(view), CHUNK):
            last = min(first + CHUNK, len(view))
            view[first:last] = self.at(first, last - first)

    def difference(self, view: memoryview) -> tuple[int, int, int] | None:
        """Compares memory with it, from its beginning.

        Returns:
            Of the first byte that differs: where it is, what is there, what ought to be. None: all
            is as it ought to be.
        """
        for first in range(0, len(view), CHUNK):
            found = bytes(view[first : first + CHUNK])
            expected = self.at(first, len(found))
            if found != expected:
                pairs = enumerate(zip(found, expected, strict=True))
                at, (is_there, ought) = next((i, p) for i, p in pairs if p[0] != p[1])
                return first + at, is_there, ought
        return None
