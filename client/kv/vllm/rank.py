# SPDX-License-Identifier: Apache-2.0
"""One worker's session with its daemon, and all that lives in it."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import transferd
from transferd import kv
from transferd.client.errors import TransferdError
from transferd.kv.vllm.stats import Stats
from transferd.kv.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.kv.vllm.config import Options
    from transferd.kv.vllm.layouts import Caches

logger = logging.getLogger(__name__)

NAME_BYTES = 64
RETRY_S = 1.0  # at least, between two looks for a daemon that has gone
SPARE = 256  # counters, besides those of transfers


class Attached(NamedTuple):
    """A session with the daemon, and what lives in it.

    Attributes:
        stack: Closes all of it.
        prefiller: None: the engine is none.
        decoder: None: the engine is none.
    """

    stack: contextlib.ExitStack
    prefiller: kv.Prefiller | None
    decoder: kv.Decoder | None

    @property
    def over(self) -> bool:
        """Whether the daemon is gone, and all with it."""
        return any(rank.over for rank in (self.prefiller, self.decoder) if rank is not None)

    @property
    def address(self) -> bytes:
        """For decoders; empty if it is no prefiller."""
        return self.prefiller.address if self.prefiller is not None else b""


class RankSide:
    """Registers a rank's caches and makes its prefiller and decoder; anew when the daemon has died.

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
        number: Of this rank among the engine's.
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
        self.number = number
        self._options = options
        self._caches = caches
        self._name = name.encode()[:NAME_BYTES].decode(errors="ignore")
        self._sends, self._receives = sends, receives
        self._layouts = layouts
        self._refused = ""  # why the daemon was not there, when we looked last
        self._next_at = 0.0
        self._changed = False
        self._attached = self._attach()
        self.stats = Stats(token_bytes(caches))
        self.work = WorkerSide(caches, self._attached.prefiller, self._attached.decoder, self.stats)

    @property
    def address(self) -> bytes:
        """For decoders; empty if it is no prefiller."""
        return self._attached.address

    def renew(self) -> None:
        """Goes on with a new session, if the daemon was gone and is there again; between two steps.

        Only then: nobody may write to host memory while it is adopted.
        """
        if not self._attached.over or time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + RETRY_S
        try:
            fresh = self._attach()
        except (TransferdError, OSError) as error:
            if str(error) != self._refused:
                self._refused = str(error)
                logger.warning("transferd: without the daemon: %s", error)
            return
        logger.warning("transferd: with the daemon again")
        self._refused = ""
        self.work.renew(fresh.prefiller, fresh.decoder)
        self._attached.stack.close()
        self._attached = fresh
        self._changed = True

    def changed_address(self) -> bytes:
        """Tells the address once after each time that it has changed; else nothing."""
        changed, self._changed = self._changed, False
        return self.address if changed else b""

    def close(self) -> None:
        """Ends what is under way, and the session."""
        self._attached.stack.close()

    def _attach(self) -> Attached:
        options, caches = self._options, self._caches
        with contextlib.ExitStack() as stack:
            counters = options.slots * (options.stages + 1) + SPARE if self._receives else 0
            client = stack.enter_context(
                transferd.Client(options.socket or None, name=self._name, counters=counters)
            )
            regions = {
                region: client.register(_whole(tensor), name=region)
                for region, tensor in caches.storages.items()
            }
            cache = kv.Cache(caches.layout, regions)
            settings = kv.Settings(lease_s=options.lease_s, timeout_s=options.timeout_s)
            prefiller = decoder = None
            if self._sends:
                prefiller = stack.enter_context(
                    kv.Prefiller(client, cache, name=self._name, settings=settings)
                )
            if self._receives:
                decoder = stack.enter_context(
                    kv.Decoder(
                        client,
                        cache,
                        name=self._name,
                        stages=options.stages,
                        slots=options.slots,
                        layouts=self._layouts,
                        rank=self.number,
                        settings=settings,
                    )
                )
            return Attached(stack.pop_all(), prefiller, decoder)


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
