# SPDX-License-Identifier: Apache-2.0
"""One worker's session with its daemon, and all that lives in it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import transferd
from transferd import kv
from transferd.kv.vllm.stats import Stats
from transferd.kv.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.kv.vllm.config import Options
    from transferd.kv.vllm.layouts import Caches

NAME_BYTES = 64
SPARE = 256  # counters, besides those of transfers


class RankSide:
    """Registers a rank's caches and makes its prefiller and decoder.

    Host memory is adopted in place, a GPU's registered once.

    Args:
        options: Of the connector.
        caches: Of this rank.
        name: For people.
        sends: It may be a prefiller.
        receives: It may be a decoder.
        layouts: Of all ranks of the engine, in their order; None: there is one.
        number: Of this one among them.

    Attributes:
        work: What the steps of the engine are told to.
        stats: Counts.
        address: For decoders; empty if it is no prefiller.
    """

    def __init__(
        self,
        options: Options,
        caches: Caches,
        *,
        name: str,
        sends: bool,
        receives: bool,
        layouts: Sequence[kv.Layout] | None = None,
        number: int = 0,
    ) -> None:
        name = name.encode()[:NAME_BYTES].decode(errors="ignore")
        with contextlib.ExitStack() as stack:
            counters = options.slots * (options.stages + 1) + SPARE if receives else 0
            client = stack.enter_context(
                transferd.Client(options.socket or None, name=name, counters=counters)
            )
            regions = {
                region: client.register(_whole(tensor), name=region)
                for region, tensor in caches.storages.items()
            }
            cache = kv.Cache(caches.layout, regions)
            settings = kv.Settings(lease_s=options.lease_s, timeout_s=options.timeout_s)
            prefiller = decoder = None
            if sends:
                prefiller = stack.enter_context(
                    kv.Prefiller(client, cache, name=name, settings=settings)
                )
            if receives:
                decoder = stack.enter_context(
                    kv.Decoder(
                        client,
                        cache,
                        name=name,
                        stages=options.stages,
                        slots=options.slots,
                        layouts=layouts,
                        rank=number,
                        settings=settings,
                    )
                )
            self._stack = stack.pop_all()
        self.stats = Stats(token_bytes(caches))
        self.work = WorkerSide(caches, prefiller, decoder, self.stats)
        self.address: bytes = prefiller.address if prefiller is not None else b""

    def close(self) -> None:
        """Ends what is under way, and the session."""
        self._stack.close()


def token_bytes(caches: Caches) -> int:
    """Tells how much of this rank's cache a token takes."""
    return sum(
        len(group.layers) * c.heads * c.head_bytes // c.item_tokens
        for group in caches.layout.groups
        for c in group.components
    )


def _whole(tensor: Any) -> Any:
    """Makes a flat tensor of all bytes of a tensor's storage."""
    import torch

    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
