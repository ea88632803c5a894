# SPDX-License-Identifier: Apache-2.0
"""Groups of layers that look at a window before a token: vLLM drops the blocks behind it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Window(NamedTuple):
    """What the layers of a group look at.

    Attributes:
        tokens: From a token backwards, itself among them.
        block: Tokens of a block.
    """

    tokens: int
    block: int

    def cuts(self, tokens: int) -> bool:
        """Tells whether the last of so many tokens cannot be computed again when all are here.

        VLLM has dropped by then the blocks that the token after it does not look at.
        """
        kept = tokens - self.tokens + 1  # the first token that the next one looks at
        return kept > 0 and kept % self.block == 0


def windows_of(config: Any) -> tuple[Window, ...]:
    """Finds them in vLLM's KVCacheConfig, among the groups that are transferred."""
    return tuple(
        Window(int(group.kv_cache_spec.sliding_window), int(group.kv_cache_spec.block_size))
        for group in config.kv_cache_groups
        if getattr(group, "enable_kv_transfer", True)
        and type(group.kv_cache_spec).__name__.startswith("SlidingWindow")
    )
