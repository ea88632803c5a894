# SPDX-License-Identifier: Apache-2.0
"""Connectors that note when layers are written and asked for: what hand-overs are measured by.

Loaded by ``kv_connector_module_path`` under the names of the connectors that they are. The file
that KV_PROBE names gets a line for each forward pass: ``first`` before its first layer, ``last``
after its last one, with monotonic seconds.
"""

from __future__ import annotations

import os
import time
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector as Nixl

from transferd.kv.vllm.connector import TransferdConnector as Transferd

FILE = os.open(os.environ["KV_PROBE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(what: str) -> None:
    """Writes a line."""
    os.write(FILE, f"{what} {time.monotonic():.6f}\n".encode())


class Probe:
    """The notes; before a connector among the bases."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Learns the layers."""
        super().register_kv_caches(kv_caches)  # type: ignore[misc]
        ordered = sorted(kv_caches, key=lambda name: int(name.split(".")[2]))
        self._first_name, self._last_name = ordered[0], ordered[-1]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Before a layer."""
        if layer_name == self._first_name:
            note("first")
        super().wait_for_layer_load(layer_name)  # type: ignore[misc]

    def save_kv_layer(self, layer_name: str, *args: Any, **kwargs: Any) -> None:
        """After a layer."""
        if layer_name == self._last_name:
            note("last")
        super().save_kv_layer(layer_name, *args, **kwargs)  # type: ignore[misc]


class NixlConnector(Probe, Nixl):  # type: ignore[misc]
    """vLLM's own."""


class TransferdConnector(Probe, Transferd):
    """Ours."""
