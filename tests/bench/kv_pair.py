# SPDX-License-Identifier: Apache-2.0
"""A decoder in this process and prefillers in others, by two daemons."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import transferd
from bench.kv_caches import GROUP, BenchCache
from transferd.kv import Decoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.kv_caches import CacheShape
    from transferd.kv import Transfer

WAIT_S = 60.0


class BenchDecoder:
    """A decoder without a model.

    Attributes:
        cache: Its cache.
        rank: The decoder.
    """

    def __init__(self, client: transferd.Client, shape: CacheShape, **options: Any) -> None:
        """Makes both; options are those of :class:`transferd.kv.Decoder`."""
        self.cache = BenchCache(client, shape, seed=2)
        self.rank = Decoder(client, self.cache.cache, "bench decoder", steps=shape.steps, **options)

    def ask(
        self, name: str, address: bytes, tokens: int, deadline_s: float = WAIT_S
    ) -> tuple[Transfer, Any]:
        """Asks for a request, into pages that are free."""
        pages = self.cache.take(tokens)
        return self.ask_into(name, address, tokens, pages, deadline_s), pages

    def ask_into(
        self, name: str, address: bytes, tokens: int, pages: Any, deadline_s: float = WAIT_S
    ) -> Transfer:
        """Asks for a request."""
        return self.rank.request(
            name.encode(), address, {GROUP: pages}, tokens, deadline_s=deadline_s
        )


@contextlib.contextmanager
def decoder(socket: str, shape: CacheShape, **options: Any) -> Iterator[BenchDecoder]:
    """Runs a decoder in this process."""
    with transferd.Client(socket) as client:
        made = BenchDecoder(client, shape, **options)
        try:
            with made.rank:
                yield made
        finally:
            made.cache.close()
