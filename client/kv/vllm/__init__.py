# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV caches from prefillers to decoders: ``kv_connector_module_path`` names this package.

vLLM itself is imported only when :class:`TransferdConnector` is asked for. See ../README.md, vLLM.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TransferdConnector"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from transferd.kv.vllm.connector import TransferdConnector

        return TransferdConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
