# SPDX-License-Identifier: Apache-2.0
"""TransferdConnector: what vLLM loads. Each hook is handed to one of the two halves."""

from __future__ import annotations

import base64
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from transferd import kv
from transferd.kv.vllm.config import Options, all_layouts, rank_of
from transferd.kv.vllm.layouts import layout_of
from transferd.kv.vllm.metrics import TransferdPromMetrics, TransferdStats
from transferd.kv.vllm.rank import RankSide
from transferd.kv.vllm.scheduler import SchedulerSide
from transferd.kv.vllm.windows import windows_of
from transferd.kv.vllm.work import Work

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)


@dataclass
class TransferdMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not there for mypy
    """What the scheduler tells the workers with a step."""

    work: Work = field(default_factory=Work)


@dataclass
class TransferdHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """A worker's address, for the scheduler."""

    address: bytes


@dataclass
class TransferdAddresses(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """New addresses of workers whose daemon was away, by their number; for the scheduler."""

    ranks: dict[int, bytes]

    def aggregate(self, other: TransferdAddresses) -> TransferdAddresses:
        """Adds those of other workers."""
        return TransferdAddresses({**self.ranks, **other.ranks})


class TransferdConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """KV caches by transferd, pushed layer by layer while they are computed.

    ``kv_connector_extra_config``: :class:`transferd.kv.vllm.config.Options`.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = vllm_config.kv_transfer_config
        self._options = Options.read(settings.kv_connector_extra_config)
        self._scheduler: SchedulerSide | None = None
        self._rank: RankSide | None = None
        self._addresses: list[bytes] = []  # of all ranks
        self._invalid: set[int] = set()
        self._on_device = False
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                sends=settings.is_kv_producer,
                receives=settings.is_kv_consumer,
                deadline_s=self._options.deadline_s,
                slots=self._options.slots,
                windows=windows_of(kv_cache_config),
            )

    # ---- class ----

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers tell of themselves by a hook, which a graph of the whole model would skip."""
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferdStats:
        """Makes counts of what they were handed on as."""
        return TransferdStats(data=data) if data is not None else TransferdStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TransferdPromMetrics:
        """Makes the metrics of an engine."""
        return TransferdPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- scheduler ----

    def _decide(self) -> SchedulerSide:
        assert self._scheduler is not None, "a hook of the scheduler, called in a worker"
        return self._scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], TransferdHandshake]
    ) -> None:
        """Makes the engine's address of those of its ranks."""
        self._addresses = [metadata[rank].address for rank in sorted(metadata)]
        self._announce()

    def _announce(self) -> None:
        self._decide().address = kv.join(self._addresses)
        if self._options.address_file:
            _write(Path(self._options.address_file), base64.b64encode(self._decide().address))

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tells what comes from a prefiller."""
        return self._decide().matched(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """A request's own blocks come, of all groups."""
        found: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Notes the blocks of a request."""
        self._decide().allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> TransferdMetadata:
        """Makes what the workers are told."""
        return TransferdMetadata(self._decide().work(scheduler_output))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Holds blocks until they are read."""
        return self._decide().finished(request)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, without the hybrid memory allocator."""
        return self._decide().finished(request)

    def update_connector_output(self, connector_output: Any) -> None:
        """Hears what the workers are through with, and who has a new address."""
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, TransferdAddresses) and self._addresses:
            for number, address in found.ranks.items():
                self._addresses[number] = address
            try:
                self._announce()
            except OSError as error:  # requests that have their address of answers go on
                logger.error("transferd: the address file is not up to date: %s", error)
        self._decide().ended(
            connector_output.finished_sending or (), connector_output.finished_recving or ()
        )

    def has_pending_push_work(self) -> bool:
        """Has the engine go on asking its workers."""
        return self._decide().busy

    # ---- worker ----

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Registers the caches, in place, and begins to talk."""
        settings = self._vllm_config.kv_transfer_config
        facts = rank_of(self._vllm_config, kv_caches, self._options)
        caches = layout_of(kv_caches, self._kv_cache_config, facts)
        layouts, number = all_layouts(self._vllm_config, caches.layout)
        self._rank = RankSide(
            self._options,
            caches,
            name=f"{settings.engine_id}/{number}",
            sends=settings.is_kv_producer,
            receives=settings.is_kv_consumer,
            layouts=layouts,
            number=number,
        )
        self._on_device = any(tensor.is_cuda for tensor in kv_caches.values())

    def get_handshake_metadata(self) -> TransferdHandshake | None:
        """Tells this rank's address, if it is a prefiller's."""
        address = self._rank.address if self._rank is not None else b""
        return TransferdHandshake(address) if address else None

    def _stream(self) -> Any:
        if not self._on_device:
            return None
        import torch

        return torch.cuda.current_stream()

    def handle_preemptions(self, kv_connector_metadata: TransferdMetadata) -> None:
        """Has nobody read blocks that the step is about to write to."""
        if self._rank is not None:
            self._rank.work.preempt(kv_connector_metadata.work)

    def bind_connector_metadata(self, connector_metadata: TransferdMetadata) -> None:
        """Begins a step: loads are asked for, and pushes armed, before the model runs."""
        super().bind_connector_metadata(connector_metadata)
        if self._rank is not None:
            self._rank.renew()
            self._rank.work.preempt(connector_metadata.work)
            self._rank.work.ask(connector_metadata.work)
            self._rank.work.begin(connector_metadata.work)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads were asked for when the step began."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests are computed once all of theirs is here."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Has a layer pushed."""
        if self._rank is not None:
            self._rank.work.layer_done(layer_name, self._stream())

    def wait_for_save(self) -> None:
        """Ends a step; pushes go on."""
        if self._rank is not None:
            self._rank.work.end(self._stream())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Tells what has come, failed, or been read."""
        if self._rank is None:
            return KVConnectorTransferResults()
        results = self._rank.work.results()
        # By blocks where that is unambiguous: then what is here of a request's own prefix is kept.
        # Where a window has gone on, entries of all requests name the same block.
        groups = self._rank.work.caches.layout.groups
        by_block = len(self._kv_cache_config.kv_cache_groups) == 1 and not groups[0].window_tokens
        self._invalid = results.blocks if by_block else set()
        return KVConnectorTransferResults(
            finished_sending=results.sent,
            finished_recving=results.received,
            failed_recving=set() if by_block else results.failed,
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Tells which blocks did not come."""
        found, self._invalid = self._invalid, set()
        return found

    def build_connector_worker_meta(self) -> TransferdAddresses | None:
        """Tells the scheduler a new address."""
        if self._rank is None or not (address := self._rank.changed_address()):
            return None
        return TransferdAddresses({self._rank.number: address})

    def get_kv_connector_stats(self) -> TransferdStats | None:
        """Takes the counts since the last time."""
        data = self._rank.stats.take() if self._rank is not None else None
        return TransferdStats(data=data) if data is not None else None

    def shutdown(self) -> None:
        """Ends all that this half has begun."""
        rank, self._rank = self._rank, None
        if rank is not None:
            rank.close()


def _write(path: Path, data: bytes) -> None:
    """Replaces a file at once."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.replace(path)
