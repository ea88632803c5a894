# SPDX-License-Identifier: Apache-2.0
"""Caches of the benchmarks of transferd.kv: no model, but pages that tell whose they are.

Every 8 bytes of a page are one number, made of its request, its layer and its place in the request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transferd.kv import Cache, Component, Group, Layout, Place

if TYPE_CHECKING:
    from numpy.typing import NDArray

    import transferd

    Words = NDArray[np.uint64]

GROUP, REGION = "all", "cache"
WORD = 8
CANARY = 0xA5A5A5A5A5A5A5A5


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One rank's cache of one kind of tensor.

    Attributes:
        layers: Of the model.
        page_tokens: Of a page.
        item_bytes: Of ``item_tokens`` tokens in one layer.
        pages: Of the cache, for each layer.
        block_layers: Layers that lie together in one page; the rest of the last block is empty.
        item_tokens: Of an item.
        tail_bytes: Of a request.
        apart: Each block of layers is in a region of its own.
    """

    layers: int
    page_tokens: int
    item_bytes: int
    pages: int
    block_layers: int = 1
    item_tokens: int = 1
    tail_bytes: int = 0
    apart: bool = False

    @property
    def page_bytes(self) -> int:
        """Of one page in one layer."""
        return self.page_tokens // self.item_tokens * self.item_bytes

    @property
    def region_bytes(self) -> int:
        """Of the whole cache."""
        return self._block_bytes * -(-self.layers // self.block_layers)

    @property
    def _block_bytes(self) -> int:
        return self.pages * self.block_layers * self.page_bytes

    @property
    def regions(self) -> dict[str, int]:
        """Their lengths."""
        if not self.apart:
            return {REGION: self.region_bytes}
        return {f"{REGION}{n}": self._block_bytes for n in range(len(self.steps))}

    def place(self, layer: int) -> Place:
        """Tells where page 0 of a layer is."""
        block, within = divmod(layer, self.block_layers)
        if self.apart:
            return Place(f"{REGION}{block}", within * self.page_bytes)
        return Place(REGION, block * self._block_bytes + within * self.page_bytes)

    def request_pages(self, tokens: int) -> int:
        """Tells the pages of a request, of each layer."""
        return -(-tokens // self.page_tokens)

    def request_bytes(self, tokens: int) -> int:
        """Tells what a request moves."""
        return self.request_pages(tokens) * self.layers * self.page_bytes

    @property
    def steps(self) -> list[tuple[int, ...]]:
        """The layers that are sent together: those of a block."""
        layers = range(self.layers)
        return [tuple(layers[n : n + self.block_layers]) for n in layers[:: self.block_layers]]

    @property
    def layout(self) -> Layout:
        """As transferd.kv describes it."""
        component = Component(
            name="latent",
            dtype="uint8",
            head_bytes=self.item_bytes,
            heads_total=1,
            first_head=0,
            heads=1,
            places=tuple(self.place(layer) for layer in range(self.layers)),
            page_stride=self.block_layers * self.page_bytes,
            token_stride=self.item_bytes,
            head_stride=self.item_bytes,
            item_tokens=self.item_tokens,
        )
        group = Group(
            name=GROUP,
            page_tokens=self.page_tokens,
            num_pages=self.pages,
            layers=tuple(range(self.layers)),
            components=(component,),
        )
        return Layout(
            model="bench",
            layers_total=self.layers,
            regions=self.regions,
            groups=(group,),
            tail_bytes=self.tail_bytes,
        )


class BenchCache:
    """Such a cache in memory of a Client.

    Attributes:
        shape: What it looks like.
        cache: As transferd.kv takes it.
        free: Pages that nobody has, in the order in which they are taken.
    """

    def __init__(self, client: transferd.Client, shape: CacheShape, seed: int = 0) -> None:
        """Allocates it, touches it, and shuffles its pages.

        Args:
            client: Whose memory it is.
            shape: Of it.
            seed: Of the order of the free pages.
        """
        self.shape = shape
        regions = {name: client.alloc(length) for name, length in shape.regions.items()}
        for region in regions.values():
            region.numpy()[:] = 0
        self.cache = Cache(shape.layout, regions)
        block = shape.block_layers
        blocks: list[Words] = [
            words
            for region in regions.values()
            for words in region.numpy("uint64").reshape(
                -1, shape.pages, block, shape.page_bytes // WORD
            )
        ]
        self._layers: list[Words] = [
            blocks[layer // block][:, layer % block] for layer in range(shape.layers)
        ]
        order = np.random.default_rng(seed).permutation(shape.pages)
        self.free: list[int] = order.tolist()

    def take(self, tokens: int) -> Any:
        """Takes the pages of a request."""
        count = self.shape.request_pages(tokens)
        if count > len(self.free):
            raise ValueError(f"{count} pages are wanted, {len(self.free)} are free")
        taken, self.free = self.free[:count], self.free[count:]
        return np.array(taken)

    def give_back(self, pages: Any) -> None:
        """Gives pages back; they are the first to be taken again."""
        self.free = [*pages.tolist(), *self.free]

    def fill(self, pages: Any, seed: int) -> None:
        """Writes what a prefill of a request computes."""
        for layer, words in enumerate(self._layers):
            words[pages] = contents(seed, layer, len(pages))[:, None]

    def holds(self, pages: Any, seed: int) -> bool:
        """Tells whether every byte of some pages is that of a request."""
        return all(
            bool((words[pages] == contents(seed, layer, len(pages))[:, None]).all())
            for layer, words in enumerate(self._layers)
        )

    def paint(self, pages: Any) -> None:
        """Fills pages with canaries."""
        for words in self._layers:
            words[pages] = CANARY

    def untouched(self, pages: Any) -> bool:
        """Tells whether all canaries are there."""
        return all(bool((words[pages] == CANARY).all()) for words in self._layers)

    def close(self) -> None:
        """Lets go of the memory."""
        self._layers = []


def contents(seed: int, layer: int, pages: int) -> Words:
    """Tells the number that each page of a layer consists of."""
    first = np.uint64(((seed & 0xFFFFFFFF) << 32) | (layer << 20))
    return np.arange(pages, dtype=np.uint64) + first
