# SPDX-License-Identifier: Apache-2.0
"""Both sides of a prefill that is captured as one CUDA graph: the batch, its pages, what came.

A *place* computes: :class:`Cuda`, or :class:`support.kv_double.Double`, which is none.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from transferd import kv

from support.kv_llama import GROUP, REGION, Llama
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd import Client

    from support.kv_llama import LlamaShape

WAIT_S = 30.0


class Place(Protocol):
    """What computes.

    Attributes:
        device: Of tensors.
        stream: On which graphs run, for ``cuda_bump``.
    """

    device: Any
    stream: Any

    def memory(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
        """Makes a tensor of zeros; gives it, and what a Client registers."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Captures what a call computes; gives what has it computed on the stream."""

    def timed(
        self, before: Callable[[], None], measured: Callable[[], None]
    ) -> tuple[float, float]:
        """Computes two things one behind the other.

        Returns:
            Seconds of the second; and when it has ended, by ``time.monotonic``, or some
            microseconds before.
        """

    def settle(self) -> None:
        """Waits for what was to be computed; not for streams that wait for that."""


class Cuda:
    """A GPU."""

    def __init__(self, number: int = 0) -> None:
        self.device = torch.device("cuda", number)
        torch.cuda.set_device(self.device)
        self.stream: Any = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()  # graphs do not run at the same time
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def memory(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
        made = torch.zeros(shape, dtype=dtype, device=self.device)
        self.settle()
        return made, made

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self.settle()
        # thread_local: other threads, those of Clients, call the driver meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            call()

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                graph.replay()

        return replay

    def timed(
        self, before: Callable[[], None], measured: Callable[[], None]
    ) -> tuple[float, float]:
        begin, first, last = self._events
        self.settle()
        now = time.monotonic()
        begin.record(self.stream)  # the stream is idle: at once
        before()
        first.record(self.stream)
        measured()
        last.record(self.stream)
        last.synchronize()
        return first.elapsed_time(last) / 1e3, now + begin.elapsed_time(last) / 1e3

    def settle(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
        self.stream.synchronize()


class Side:
    """A model and its cache.

    Attributes:
        model: The model.
        cache: Its tensor.
        requests: How many there are in a batch.
        tokens: Of each prompt, whole pages.
        tables: For each of the batch, its pages: those of the prompt, and one for what comes then.
    """

    def __init__(self, place: Place, shape: LlamaShape, requests: int, tokens: int) -> None:
        self.place = place
        self.model = Llama(shape, place.device)
        self.cache, self._registrable = place.memory(shape.cache_shape, shape.torch_dtype)
        self.requests = requests
        self.tokens = tokens
        self.tables = self.take()

    @property
    def shape(self) -> LlamaShape:
        """Of model and cache."""
        return self.model.shape

    def registered(self, client: Client) -> kv.Cache:
        """Registers the cache with a Client."""
        return kv.Cache(self.shape.layout(), {REGION: client.register(self._registrable)})

    def take(self) -> Any:
        """Chooses other pages for a batch."""
        count = self.tokens // self.shape.page_tokens + 1
        order = torch.randperm(self.shape.pages)[: self.requests * count]
        self.tables = order.reshape(self.requests, count)
        return self.tables

    @property
    def prompt_pages(self) -> Any:
        """Those of the prompts, of shape (requests, pages)."""
        return self.tables[:, :-1]

    def digests(self) -> list[str]:
        """Hashes the pages of the prompts, by layer."""
        pages = self.prompt_pages.flatten().to(self.place.device)
        layers = (layer[pages].view(torch.uint8).cpu().numpy() for layer in self.cache)
        return [hashlib.sha256(layer).hexdigest() for layer in layers]

    def generate(self, first: list[int], count: int) -> list[list[int]]:
        """Generates greedily behind each prompt's first token."""
        device = self.place.device
        made = self.model.generate(
            torch.tensor(first, device=device),
            self.tokens,
            self.cache,
            self.tables.to(device),
            count,
        )
        return made.tolist()  # type: ignore[no-any-return]


class Prefills(Side):
    """That of a prefiller, whose step computes a batch in one graph."""

    def __init__(self, place: Place, shape: LlamaShape, requests: int, tokens: int) -> None:
        super().__init__(place, shape, requests, tokens)
        device = place.device
        self._prompts = torch.zeros((requests, tokens), dtype=torch.int64, device=device)
        self._pages = torch.zeros(self.prompt_pages.numel(), dtype=torch.int64, device=device)
        self._hidden = torch.zeros((requests, shape.hidden), dtype=shape.torch_dtype, device=device)
        self.renew()
        self._compute(lambda: None)  # what is loaded on first use is not captured
        self.first()
        self.plain = place.capture(lambda: self._compute(lambda: None))

    def _compute(self, layer_done: Callable[[], None]) -> None:
        self._hidden.copy_(self.model.prefill(self._prompts, self.cache, self._pages, layer_done))

    def renew(self) -> None:
        """Takes other prompts and pages for the next step."""
        self._prompts.random_(self.shape.vocabulary)
        self._pages.copy_(self.take()[:, :-1].flatten())
        self.place.settle()

    def first(self) -> list[int]:
        """Tells the token behind each prompt."""
        return self.model.logits(self._hidden).argmax(-1).tolist()  # type: ignore[no-any-return]


class PushedPrefills:
    """A prefiller rank over :class:`Prefills`, of one Client.

    Attributes:
        side: The model.
        rank: The prefiller.
    """

    def __init__(self, side: Prefills, client: Client) -> None:
        """Captures a graph whose layers count the rank's watcher up."""
        self.side = side
        place = side.place
        self.rank = kv.Prefiller(client, side.registered(client), "p")
        try:
            with client.watcher(device=True) as warm:  # loads the kernel
                warm.cuda_bump(place.stream)
                place.settle()
            watcher = self.rank.watcher()
            self._replay = place.capture(
                lambda: side._compute(lambda: watcher.cuda_bump(place.stream))
            )
            self.bumped()  # a graph's first run uploads it, which may wait for streams that wait
        except BaseException:
            self.rank.close()
            raise

    def bumped(self) -> tuple[float, float]:
        """A step of no request, behind one that is plain; tells as :meth:`Place.timed`."""
        with self.rank.step({}, device=True):
            return self.side.place.timed(self.side.plain, self._replay)

    def begin(self, ids: list[str]) -> None:
        """Has a batch of other requests; they may be asked for."""
        self.side.renew()
        for name, pages in zip(ids, self.side.prompt_pages, strict=True):
            self.rank.begin(name.encode(), {GROUP: pages.numpy()}, self.side.tokens)

    def step(self, ids: list[str]) -> tuple[float, float]:
        """Computes it, once all of it was asked for, as :meth:`bumped` does."""
        eventually(lambda: self.rank.transfers == len(ids), "all are asked for", WAIT_S)
        computed = {name.encode(): self.side.tokens for name in ids}
        with self.rank.step(computed, device=True):
            return self.side.place.timed(self.side.plain, self._replay)

    def finish(self, ids: list[str]) -> list[int]:
        """Sends the first tokens; tells them."""
        tokens = self.side.first()
        for name, token in zip(ids, tokens, strict=True):
            self.rank.finish(name.encode(), token.to_bytes(4, "little"))
        return tokens

    def release(self, ids: list[str]) -> None:
        """Waits until all of them are read."""
        left = {name.encode() for name in ids}
        while left:
            found = self.rank.released(WAIT_S)
            assert found, f"still held: {left}"
            assert all(why == "read" for _, why in found), found
            left -= {request for request, _ in found}

    def close(self) -> None:
        """Leaves."""
        self.rank.close()


class Decodes(Side):
    """That of a decoder, of one Client after the other.

    Attributes:
        rank: The decoder, once there is a Client.
    """

    rank: kv.Decoder

    def attach(self, client: Client) -> None:
        """Makes a decoder of a Client."""
        layers = self.shape.layers
        cache = self.registered(client)
        self.rank = kv.Decoder(client, cache, "d", stages=layers, slots=2 * self.requests)

    def ask(self, ids: list[str], address: bytes) -> list[kv.Transfer]:
        """Asks for the requests of a batch, into other pages than those before."""
        self.take()
        return [
            self.rank.request(name.encode(), address, {GROUP: pages.numpy()}, self.tokens)
            for name, pages in zip(ids, self.prompt_pages, strict=True)
        ]

    @staticmethod
    def landed(transfers: list[kv.Transfer], layers: int) -> float:
        """Waits until the first layers of all are there; tells when, by ``time.monotonic``."""
        for transfer in transfers:
            transfer.wait_layers(layers, WAIT_S)
        return time.monotonic()

    @staticmethod
    def first(transfers: list[kv.Transfer]) -> list[int]:
        """Waits for their ends; tells the tokens that came."""
        for transfer in transfers:
            transfer.wait(WAIT_S)
        return [int.from_bytes(transfer.tail, "little") for transfer in transfers]
