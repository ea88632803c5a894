# SPDX-License-Identifier: Apache-2.0
"""The connector's counts as vLLM logs them, and in its Prometheus metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from transferd.kv.vllm import stats

if TYPE_CHECKING:
    from transferd.kv.vllm.stats import Data

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class TransferdStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not there for the type check
    """Counts of an interval; ``data`` is that of :mod:`transferd.kv.vllm.stats`."""

    def reset(self) -> None:
        """Begins anew."""
        self.data = stats.empty()

    def aggregate(self, other: TransferdStats) -> TransferdStats:
        """Adds another interval, or another worker."""
        self.data = stats.add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Makes what the log shows."""
        return stats.summary(stats.add(stats.empty(), self.data))

    def is_empty(self) -> bool:
        """Tells whether nothing was counted."""
        return stats.is_empty(self.data)


class TransferdPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """``vllm:transferd_…``, with vLLM's labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._received = self._counter_cls(
            name="vllm:transferd_received",
            documentation="Transfers of KV caches to this engine that have ended.",
            labelnames=[*labelnames, "outcome"],
        )
        self._sent = self._counter_cls(
            name="vllm:transferd_sent",
            documentation="Requests computed for decoders whose blocks are free again.",
            labelnames=[*labelnames, "why"],
        )
        self._tokens = self._counter_cls(
            name="vllm:transferd_received_tokens",
            documentation="Tokens whose KV cache has come.",
            labelnames=labelnames,
        )
        self._bytes = self._counter_cls(
            name="vllm:transferd_received_bytes",
            documentation="Bytes of those tokens' KV cache.",
            labelnames=labelnames,
        )
        self._seconds = self._histogram_cls(
            name="vllm:transferd_seconds",
            documentation="Seconds from asking a prefiller until the KV cache is here; what the "
            "prefiller computes meanwhile is part of them.",
            buckets=BUCKETS_S,
            labelnames=labelnames,
        )

    def observe(self, transfer_stats_data: Data, engine_idx: int = 0) -> None:
        """Adds an interval."""
        data = stats.add(stats.empty(), transfer_stats_data)
        labels = self.per_engine_labelvalues[engine_idx]
        for outcome, count in data["received"].items():
            self._received.labels(*labels, outcome).inc(count)
        for why, count in data["sent"].items():
            self._sent.labels(*labels, why).inc(count)
        self._tokens.labels(*labels).inc(data["tokens"])
        self._bytes.labels(*labels).inc(data["bytes"])
        for seconds in data["seconds"]:
            self._seconds.labels(*labels).observe(seconds)
