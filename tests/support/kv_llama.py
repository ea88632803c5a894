# SPDX-License-Identifier: Apache-2.0
"""A Llama of any size in torch, with random weights, over a paged KV cache.

The cache is one tensor of shape (layers, pages, 2, page tokens, KV heads, head size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from transferd import kv

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP, REGION = "0", "cache"
TAIL = 4  # bytes: the first token
POSITIONS = 4096


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a model, by default those of 8 billion parameters, and of a cache."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14_336
    vocabulary: int = 32_000
    dtype: str = "bfloat16"
    pages: int = 1024
    page_tokens: int = 16

    @property
    def torch_dtype(self) -> Any:
        """Of weights and cache."""
        return getattr(torch, self.dtype)

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Of the cache's tensor."""
        return (self.layers, self.pages, 2, self.page_tokens, self.kv_heads, self.head_dim)

    @property
    def item_bytes(self) -> int:
        """Keys, or values, of one head and token."""
        return self.head_dim * int(self.torch_dtype.itemsize)

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in a layer."""
        return 2 * self.kv_heads * self.item_bytes

    @property
    def layer_weights(self) -> int:
        """Numbers that a token meets in a layer."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    def prefill_flops(self, requests: int, tokens: int) -> int:
        """Operations of a prefill, without embedding and head."""
        scores = 2 * tokens * tokens * self.heads * self.head_dim  # causal: half of 4
        return self.layers * requests * (2 * self.layer_weights * tokens + scores)

    def layout(self) -> kv.Layout:
        """Describes the cache."""
        token = self.token_bytes // 2
        page = self.page_tokens * 2 * token

        def half(name: str, number: int) -> kv.Component:
            first = number * self.page_tokens * token
            return kv.Component(
                name=name,
                dtype=self.dtype,
                head_bytes=self.item_bytes,
                heads_total=self.kv_heads,
                first_head=0,
                heads=self.kv_heads,
                places=tuple(
                    kv.Place(REGION, layer * self.pages * page + first)
                    for layer in range(self.layers)
                ),
                page_stride=page,
                token_stride=token,
                head_stride=self.item_bytes,
            )

        group = kv.Group(
            name=GROUP,
            page_tokens=self.page_tokens,
            num_pages=self.pages,
            layers=tuple(range(self.layers)),
            components=(half("k", 0), half("v", 1)),
        )
        return kv.Layout(
            model="random llama",
            layers_total=self.layers,
            regions={REGION: self.layers * self.pages * page},
            groups=(group,),
            tail_bytes=TAIL,
        )


class _Layer(NamedTuple):
    qkv: Any
    out: Any
    gate_up: Any
    down: Any


class Llama:
    """The model. All norms have the weight 1.

    Attributes:
        shape: Its sizes.
    """

    def __init__(self, shape: LlamaShape, device: Any, seed: int = 1) -> None:
        """Makes weights, on devices of one kind the same for the same seed."""
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)

        def weight(rows: int, columns: int) -> Any:
            made = torch.empty((rows, columns), dtype=shape.torch_dtype, device=device)
            return made.normal_(0, columns**-0.5, generator=generator)

        width = shape.heads * shape.head_dim
        self._layers = [
            _Layer(
                weight(width + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
                weight(shape.hidden, width),
                weight(2 * shape.mlp, shape.hidden),
                weight(shape.hidden, shape.mlp),
            )
            for _ in range(shape.layers)
        ]
        self._embedding = weight(shape.vocabulary, shape.hidden)
        self._head = weight(shape.vocabulary, shape.hidden)
        half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        angles = torch.outer(torch.arange(POSITIONS, device=device), 10_000.0**-half)
        self._rope = tuple(f(angles)[:, None].to(shape.torch_dtype) for f in (torch.cos, torch.sin))

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(int(w.nbytes) for w in self._weights())

    def checksum(self) -> int:
        """Sums the bits of all weights up."""
        return sum(int(w.view(torch.int16).sum(dtype=torch.int64)) for w in self._weights())

    def _weights(self) -> list[Any]:
        return [w for layer in self._layers for w in layer] + [self._embedding, self._head]

    def prefill(self, tokens: Any, cache: Any, pages: Any, layer_done: Callable[[], None]) -> Any:
        """Computes prompts from their beginning.

        Args:
            tokens: Of shape (requests, tokens); whole pages.
            cache: Where keys and values go.
            pages: The pages of all prompts, one behind the other.
            layer_done: Called after each layer.

        Returns:
            What the last tokens have become, for :meth:`logits`.
        """
        shape = self.shape
        x = functional.embedding(tokens, self._embedding)
        for layer, kept in zip(self._layers, cache, strict=True):
            q, k, v = self._qkv(layer, x, 0)
            for number, made in enumerate((k, v)):
                kept[:, number].index_copy_(0, pages, made.reshape(-1, *shape.cache_shape[3:]))
            x = self._rest(layer, x, _attention(q, k, v, causal=True))
            layer_done()
        return x[:, -1]

    def decode(self, tokens: Any, position: int, cache: Any, tables: Any) -> Any:
        """Computes one token of each request; all have the same position.

        In float32, but for the cache: tokens do not depend on how libraries round.

        Args:
            tokens: Of shape (requests,).
            position: Theirs.
            cache: Keys and values before it, and of it.
            tables: Pages, of shape (requests, pages).

        Returns:
            As :meth:`prefill`.
        """
        page, slot = divmod(position, self.shape.page_tokens)
        x = functional.embedding(tokens, self._embedding)[:, None].float()
        for layer, kept in zip(self._layers, cache, strict=True):
            q, *made = self._qkv(layer, x, position)
            for number, new in enumerate(made):
                kept[tables[:, page], number, slot] = new[:, 0].to(kept.dtype)
            k, v = (kept[tables, n].flatten(1, 2)[:, : position + 1].float() for n in range(2))
            x = self._rest(layer, x, _attention(q, k, v, causal=False))
        return x[:, 0]

    def logits(self, hidden: Any) -> Any:
        """Tells how much each token of the vocabulary is the next one."""
        return _linear(self._norm(hidden), self._head)

    def generate(self, first: Any, position: int, cache: Any, tables: Any, count: int) -> Any:
        """Generates greedily behind the token at a position; of shape (requests, count)."""
        tokens = [first]
        for at in range(position, position + count):
            hidden = self.decode(tokens[-1], at, cache, tables)
            tokens.append(self.logits(hidden).argmax(-1))
        return torch.stack(tokens[1:], 1)

    def _norm(self, x: Any) -> Any:
        return functional.rms_norm(x, (self.shape.hidden,), eps=1e-5)

    def _qkv(self, layer: _Layer, x: Any, first: int) -> tuple[Any, Any, Any]:
        shape = self.shape
        made = _linear(self._norm(x), layer.qkv).unflatten(-1, (-1, shape.head_dim))
        q, k, v = made.split((shape.heads, shape.kv_heads, shape.kv_heads), 2)
        return self._turned(q, first), self._turned(k, first), v

    def _turned(self, x: Any, first: int) -> Any:
        """Applies the rotary embedding."""
        cos, sin = (table[first : first + x.shape[1]].to(x.dtype) for table in self._rope)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def _rest(self, layer: _Layer, x: Any, attended: Any) -> Any:
        x = x + _linear(attended, layer.out)
        gate, up = _linear(self._norm(x), layer.gate_up).chunk(2, -1)
        return x + _linear(functional.silu(gate) * up, layer.down)


def _linear(x: Any, weight: Any) -> Any:
    return functional.linear(x, weight.to(x.dtype))


def _attention(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
    """Of shape (requests, tokens, heads, head size), all of them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    made = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return made.transpose(1, 2).flatten(2)
