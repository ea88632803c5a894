# SPDX-License-Identifier: Apache-2.0
"""Engines of the tests of transferd.kv: the numpy Llama over a region, a page pool, both roles."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from transferd.client.demo.kvengine import TAIL_BYTES, layout_of
from transferd.client.demo.llama import Config, Llama
from transferd.kv.cache import Cache
from transferd.kv.decoder import Decoder
from transferd.kv.prefiller import Prefiller

if TYPE_CHECKING:
    from collections.abc import Sequence

    import transferd
    from transferd.kv.transfer import Transfer

TAIL = TAIL_BYTES
CONFIG = Config(
    layers=4, heads=4, kv_heads=2, head_dim=16, vocabulary=128, pages=128, page_tokens=8
)


class Engine:
    """A model over a region of a Client, with its free pages.

    With ``buffer``, memory of a GPU that is none, the region is of that.
    """

    def __init__(
        self, client: transferd.Client, config: Config = CONFIG, buffer: Any = None
    ) -> None:
        self.config = config
        self.layout = layout_of(config)
        length = self.layout.regions["cache"]
        self.region = client.alloc(length) if buffer is None else client.register(buffer)
        view = self.region.view if buffer is None else buffer.view[:length]
        cache = np.frombuffer(view, dtype=np.float32).reshape(config.cache_shape)
        self.model = Llama(config, cache)
        self.cache = Cache(self.layout, {"cache": self.region})
        self.free = list(range(config.pages))

    def take(self, tokens: int) -> Any:
        """Takes pages for some tokens."""
        count = -(-tokens // self.config.page_tokens)
        assert len(self.free) >= count, "no pages"
        taken, self.free = self.free[:count], self.free[count:]
        return np.array(taken)

    def give_back(self, pages: Any) -> None:
        """Gives pages back; they are the first to be taken again."""
        self.free = [*pages.tolist(), *self.free]

    def close(self) -> None:
        """Lets go of the memory."""
        self.model.cache = np.zeros(self.config.cache_shape, dtype=np.float32)


class PrefillEngine(Engine):
    """Computes prompts in chunks, and pushes them."""

    def __init__(
        self,
        client: transferd.Client,
        config: Config = CONFIG,
        name: str = "p",
        buffer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(client, config, buffer)
        self.rank = Prefiller(client, self.cache, name, **options)
        self.pages: dict[bytes, Any] = {}

    def begin(self, request_id: bytes, prompt: Sequence[int]) -> None:
        """Takes pages for a prompt."""
        pages = self.pages[request_id] = self.take(len(prompt))
        self.rank.begin(request_id, {"all": pages}, len(prompt))

    def chunk(self, request_id: bytes, prompt: Sequence[int], first: int, last: int) -> int:
        """Computes a part of a prompt; gives the token behind it."""
        with self.rank.step({request_id: last}) as step:
            return self.model.forward(
                prompt[first:last], first, self.pages[request_id], lambda _: step.layer_done()
            )

    def prefill(self, request_id: bytes, prompt: Sequence[int], chunk: int = 13) -> int:
        """Computes a prompt; gives the first token."""
        self.begin(request_id, prompt)
        token = 0
        for first in range(0, len(prompt), chunk):
            token = self.chunk(request_id, prompt, first, min(first + chunk, len(prompt)))
        self.rank.finish(request_id, token.to_bytes(TAIL, "little"))
        return token

    def collect(self, timeout_s: float | None = None) -> list[tuple[bytes, str]]:
        """Gives the pages of released requests back."""
        found = self.rank.released(timeout_s)
        for request_id, _ in found:
            self.give_back(self.pages.pop(request_id))
        return found


class DecodeEngine(Engine):
    """Generates out of pages that came."""

    numbers = itertools.count(1)

    def __init__(
        self,
        client: transferd.Client,
        config: Config = CONFIG,
        name: str = "d",
        buffer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(client, config, buffer)
        self.rank = Decoder(client, self.cache, name, **options)

    def ask(
        self, request_id: bytes, address: bytes, prompt: Sequence[int], room: int, **options: Any
    ) -> tuple[Transfer, Any]:
        """Asks for a prompt's pages; gives them, with room for more tokens."""
        pages = self.take(len(prompt) + room)
        transfer = self.rank.request(request_id, address, {"all": pages}, len(prompt), **options)
        return transfer, pages

    def generate(self, prompt: Sequence[int], pages: Any, first: int, count: int) -> list[int]:
        """Generates tokens behind a prompt whose pages are here."""
        tokens = [first]
        while len(tokens) < count:
            position = len(prompt) + len(tokens) - 1
            tokens.append(self.model.forward(tokens[-1:], position, pages))
        return tokens


def alone(prompt: Sequence[int], count: int, config: Config = CONFIG) -> list[int]:
    """What a single engine generates."""
    model = Llama(config, np.zeros(config.cache_shape, dtype=np.float32))
    pages = np.arange(config.pages)
    tokens = [model.forward(prompt, 0, pages)]
    while len(tokens) < count:
        tokens.append(model.forward(tokens[-1:], len(prompt) + len(tokens) - 1, pages))
    return tokens
