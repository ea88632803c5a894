# SPDX-License-Identifier: Apache-2.0
"""What the engines of ``transferd demo kv`` share: sizes, layout, pages, the cord to the driver."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

import numpy as np

from transferd.client.child import answer
from transferd.client.demo.llama import Config, Llama
from transferd.kv import Cache, Component, Group, Layout, Place
from transferd.kv.router import prefix_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    import transferd

CONFIG = Config()
CHUNK = 32  # tokens of a prefill step: whole pages, so that reused beginnings are computed alike
TAIL_BYTES = 4  # the first token
GROUP = "all"
READY_S = 20.0


def layout_of(config: Config) -> Layout:
    """Describes a cache of ``config.cache_shape`` in a region "cache"."""
    head = config.head_dim * 4
    token = config.kv_heads * head
    page = config.page_tokens * token
    half = config.pages * page

    def component(name: str, number: int) -> Component:
        return Component(
            name=name,
            dtype="float32",
            head_bytes=head,
            heads_total=config.kv_heads,
            first_head=0,
            heads=config.kv_heads,
            places=tuple(Place("cache", (2 * n + number) * half) for n in range(config.layers)),
            page_stride=page,
            token_stride=token,
            head_stride=head,
        )

    group = Group(
        name=GROUP,
        page_tokens=config.page_tokens,
        num_pages=config.pages,
        layers=tuple(range(config.layers)),
        components=(component("k", 0), component("v", 1)),
    )
    return Layout(
        model=f"numpy llama, seed {config.seed}",
        layers_total=config.layers,
        regions={"cache": 2 * config.layers * half},
        groups=(group,),
        tail_bytes=TAIL_BYTES,
    )


class Pages:
    """The free pages of a cache; several requests may hold one."""

    def __init__(self, count: int) -> None:
        """Begins with all of them free."""
        self._free = deque(range(count))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """How many are."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Takes some; None: there are not so many."""
        if count > len(self._free):
            return None
        taken = [self._free.popleft() for _ in range(count)]
        self.hold(taken)
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """Keeps pages from being taken until they are dropped once more."""
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Lets go of pages; those that nobody holds are free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)


class Prefixes:
    """Beginnings of prompts that are in the cache, by whole chunks; the oldest go first."""

    def __init__(self, pages: Pages) -> None:
        """Begins without any."""
        self._pages = pages
        self._chunks: OrderedDict[int, list[int]] = OrderedDict()

    def find(self, prompt: Sequence[int]) -> list[int]:
        """Finds the pages of a prompt's beginning, and holds them.

        The last token is never among them: it has to be computed, for the one that follows.
        """
        found: list[int] = []
        for value in prefix_hashes(prompt[:-1], CHUNK):
            chunk = self._chunks.get(value)
            if chunk is None:
                break
            self._chunks.move_to_end(value)
            found += chunk
        self._pages.hold(found)
        return found

    def keep(self, prompt: Sequence[int], pages: Sequence[int]) -> None:
        """Remembers the whole chunks of a prompt that is computed."""
        each = CHUNK // CONFIG.page_tokens
        for number, value in enumerate(prefix_hashes(prompt, CHUNK)):
            if value not in self._chunks:
                self._chunks[value] = list(pages[number * each : (number + 1) * each])
                self._pages.hold(self._chunks[value])

    def forget(self) -> bool:
        """Drops the chunk that was not used for longest; False: there is none."""
        if not self._chunks:
            return False
        self._pages.drop(self._chunks.popitem(last=False)[1])
        return True


class Engine:
    """A model whose cache is a region of a Client.

    Attributes:
        model: With the cache.
        cache: As transferd.kv has it.
        pages: That are free.
    """

    def __init__(self, client: transferd.Client) -> None:
        """Takes the memory."""
        layout = layout_of(CONFIG)
        region = client.alloc(layout.regions["cache"], name="kv cache")
        self.model = Llama(CONFIG, region.numpy("float32").reshape(CONFIG.cache_shape))
        self.cache = Cache(layout, {"cache": region})
        self.pages = Pages(CONFIG.pages)

    def close(self) -> None:
        """Lets go of the memory, so that the region can be closed."""
        self.model.cache = np.empty(CONFIG.cache_shape, dtype=np.float32)


class Inbox:
    """The driver's commands, one line of JSON each. Its end is a command, ``end``."""

    def __init__(self) -> None:
        """Starts the thread that reads them."""
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def _read(self) -> None:
        # Not sys.stdin itself, whose lock a process cannot end without.
        with os.fdopen(os.dup(sys.stdin.fileno())) as lines:
            for line in lines:
                self._queue.put(json.loads(line))
        self._queue.put({"do": "end"})

    def take(self, wait_s: float) -> list[dict[str, Any]]:
        """Takes the commands that are there; waits a while for the first."""
        found = []
        try:
            found.append(self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait())
            while True:
                found.append(self._queue.get_nowait())
        except queue.Empty:
            return found


def pages_for(tokens: int) -> int:
    """How many pages some tokens take."""
    return -(-tokens // CONFIG.page_tokens)


def table(pages: Sequence[int]) -> NDArray[np.int64]:
    """Makes a page table."""
    return np.array(pages, dtype=np.int64)


def tell(event: str, **values: Any) -> None:
    """Tells the driver what happened."""
    answer(event=event, **values)
