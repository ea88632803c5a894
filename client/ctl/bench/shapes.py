# SPDX-License-Identifier: Apache-2.0
"""Page shapes of the KV caches of known models, as kvbench has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """The pages that prefill hands to decode.

    Attributes:
        name: Of the preset.
        about: One line for people.
        layers: Of the model.
        token_bytes: Of one token in one layer, on one rank.
        page_tokens: Tokens of a page.
        block_layers: Layers that lie together in one page: 1 for access by layer; those of a
            pipeline stage for access by block.
        requests: Handed over together.
        input_tokens: Of each.
    """

    name: str
    about: str
    layers: int
    token_bytes: int
    page_tokens: int
    block_layers: int = 1
    requests: int = 1
    input_tokens: int = 10_000

    @property
    def page_bytes(self) -> int:
        """Size of a page."""
        return self.page_tokens * self.block_layers * self.token_bytes

    @property
    def pages(self) -> int:
        """Number of pages."""
        tokens = self.input_tokens * self.requests * self.layers
        return -(-tokens // (self.page_tokens * self.block_layers))


# 512 latent and 64 rotary values a token, one byte each.
_R1 = {"layers": 61, "token_bytes": 576, "requests": 10}
# Keys and values of 8 heads of 128, two bytes each; 1 of the 8 heads on each of 8 ranks.
_LLAMA = 2 * 8 * 128 * 2

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("deepseek-r1-block", "PP16, by block", page_tokens=256, block_layers=4, **_R1),
        Shape("deepseek-r1-layer", "PP16, by layer", page_tokens=256, **_R1),
        Shape(
            "deepseek-r1-pp32",
            "PP32, by block, 100 requests",
            page_tokens=256,
            block_layers=2,
            **{**_R1, "requests": 100},
        ),
        Shape(
            "deepseek-r1-page512",
            "PP8, by block, pages of 512 tokens",
            page_tokens=512,
            block_layers=8,
            **_R1,
        ),
        Shape("llama-3.1-8b", "TP1, by layer, pages of 16 tokens", 32, _LLAMA, 16),
        Shape("llama-3.1-70b-tp8", "TP8, by layer, pages of 16 tokens", 80, _LLAMA // 8, 16),
        Shape("llama-3.1-405b-tp8", "TP8, by layer, pages of 16 tokens", 126, _LLAMA // 8, 16),
    )
}
