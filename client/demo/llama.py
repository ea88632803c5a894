# SPDX-License-Identifier: Apache-2.0
"""A Llama by numpy alone, tiny and with random weights, over a paged KV cache.

It stands for an inference engine where none is installed: grouped-query attention, rotary
embeddings, prefill in chunks, one page table a request. Greedy, so that two engines with the same
seed give the same tokens exactly when they have the same cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

EPS = np.float32(1e-5)
THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of the model and of its cache.

    Attributes:
        layers: Of the model.
        heads: Of queries.
        kv_heads: Of keys and values; a divisor of ``heads``.
        head_dim: Even, for the rotary embedding.
        vocabulary: Tokens that there are.
        pages: Of the cache.
        page_tokens: Tokens of one page.
        seed: Of the weights.
    """

    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    vocabulary: int = 512
    pages: int = 512
    page_tokens: int = 16
    seed: int = 1

    @property
    def width(self) -> int:
        """Of the hidden state."""
        return self.heads * self.head_dim

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Layer, key or value, page, token, head, element: what flash-attention calls NHD."""
        return (self.layers, 2, self.pages, self.page_tokens, self.kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of a layer; inputs are rows, so that ``x @ w`` applies one."""

    query: Array
    key: Array
    value: Array
    output: Array
    gate: Array
    up: Array
    down: Array


class Llama:
    """The model with a cache, which the caller owns.

    Attributes:
        config: Its sizes.
        cache: Array of ``config.cache_shape``, float32; may be memory of a region.
    """

    def __init__(self, config: Config, cache: Array) -> None:
        """Makes the weights.

        Raises:
            ValueError: The cache has another shape or type.
        """
        if cache.shape != config.cache_shape or cache.dtype != np.float32:
            raise ValueError(
                f"the cache is float32 of {config.cache_shape}, not {cache.dtype} of {cache.shape}"
            )
        self.config = config
        self.cache = cache
        random = np.random.default_rng(config.seed)
        width, inner = config.width, config.width * 2

        def matrix(rows: int, columns: int) -> Array:
            values = random.standard_normal((rows, columns), dtype=np.float32)
            return values / np.float32(np.sqrt(rows))

        kv_width = config.kv_heads * config.head_dim
        self._embedding = matrix(config.vocabulary, width) * np.float32(np.sqrt(config.vocabulary))
        self._layers = [
            _Layer(
                matrix(width, width),
                matrix(width, kv_width),
                matrix(width, kv_width),
                matrix(width, width),
                matrix(width, inner),
                matrix(width, inner),
                matrix(inner, width),
            )
            for _ in range(config.layers)
        ]
        self._head = matrix(width, config.vocabulary)
        half = config.head_dim // 2
        self._frequencies = (THETA ** (-np.arange(half) / half)).astype(np.float32)

    def forward(
        self,
        tokens: Sequence[int],
        position: int,
        pages: NDArray[np.int64],
        layer_done: Callable[[int], None] | None = None,
    ) -> int:
        """Computes some tokens of one request, and the token that follows them.

        Args:
            tokens: At least one.
            position: Of the first; those before it are in the cache.
            pages: The request's page table, from position 0 on.
            layer_done: Called once keys and values of a layer are in the cache.

        Returns:
            The most likely next token.
        """
        config = self.config
        count = len(tokens)
        places = position + np.arange(count)
        page, slot = pages[places // config.page_tokens], places % config.page_tokens
        angles = places[:, None].astype(np.float32) * self._frequencies
        rotation = np.cos(angles)[:, None], np.sin(angles)[:, None]
        mask = places[:, None] >= np.arange(position + count)[None]
        x = self._embedding[np.asarray(tokens)]
        for number, layer in enumerate(self._layers):
            normal = _normalise(x)
            shape = (count, config.kv_heads, config.head_dim)
            self.cache[number, 0, page, slot] = _rotate(
                (normal @ layer.key).reshape(shape), rotation
            )
            self.cache[number, 1, page, slot] = (normal @ layer.value).reshape(shape)
            if layer_done is not None:
                layer_done(number)
            query = _rotate((normal @ layer.query).reshape(count, config.heads, -1), rotation)
            x = x + self._attend(number, query, pages, mask) @ layer.output
            normal = _normalise(x)
            gate = normal @ layer.gate
            x = x + (gate / (1 + np.exp(-gate)) * (normal @ layer.up)) @ layer.down
        return int(np.argmax(_normalise(x[-1:]) @ self._head))

    def _attend(
        self, layer: int, query: Array, pages: NDArray[np.int64], mask: NDArray[np.bool_]
    ) -> Array:
        """Attends to all tokens up to each query's own, by way of the page table."""
        config = self.config
        length = mask.shape[1]
        used = pages[: -(-length // config.page_tokens)]
        kept = self.cache[layer][:, used].reshape(2, -1, config.kv_heads, config.head_dim)
        key, value = kept[:, :length].transpose(0, 2, 1, 3)
        count = len(query)
        grouped = query.reshape(count, config.kv_heads, -1, config.head_dim).transpose(1, 2, 0, 3)
        scores = grouped @ key[:, None].transpose(0, 1, 3, 2) / np.float32(np.sqrt(config.head_dim))
        scores = np.where(mask, scores, np.float32(-np.inf))
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = shares @ value[:, None]
        result: Array = mixed.transpose(2, 0, 1, 3).reshape(count, -1)
        return result


def _normalise(x: Array) -> Array:
    """Root mean square, without a weight: it is 1 in a model that was never trained."""
    result: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    return result


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotary embedding, of halves as in Llama's published code."""
    cos, sin = rotation
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
