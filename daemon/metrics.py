# SPDX-License-Identifier: Apache-2.0
"""Metrics transferd_*: read from the tables and the data plane's counts when they are scraped."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from transferd.daemon.peer import PathCount, count_paths
from transferd.daemon.plane import PlaneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transferd.daemon.lanes import Lanes
    from transferd.daemon.opens import Opener
    from transferd.daemon.owner import Owner
    from transferd.daemon.peers import Peers
    from transferd.daemon.plane import Plane
    from transferd.daemon.services.admin import Facts
    from transferd.daemon.sessions import Sessions
    from transferd.daemon.staging import Staging


class Snapshot:
    """Reads everything at once, on the event loop."""

    def __init__(
        self,
        version: str,
        facts: Facts,
        plane: Plane,
        sessions: Sessions,
        owner: Owner,
        opener: Opener,
        peers: Peers,
        lanes: Lanes,
        staging: Staging,
    ) -> None:
        self._version = version
        self._facts = facts
        self._plane = plane
        self._sessions = sessions
        self._owner = owner
        self._opener = opener
        self._peers = peers
        self._lanes = lanes
        self._staging = staging

    def take(self) -> list[Metric]:
        """Makes the metric families of one scrape."""
        return [
            *self._daemon(),
            *self._of_sessions(),
            *self._of_peers(),
            *self._of_rails(),
            *self._of_gpus(),
        ]

    def _daemon(self) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "transferd_info", "Always 1; what runs.", labels=["version", "provider", "tls"]
        )
        info.add_metric([self._version, self._facts.provider, str(self._facts.tls).lower()], 1)
        yield info
        choice = self._facts.rails
        fallback = GaugeMetricFamily(
            "transferd_fallback",
            "1 where the provider is not the one that this host's NICs are made for.",
            labels=["provider"],
        )
        fallback.add_metric([choice.provider], bool(choice.fallback))
        yield fallback
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = CounterMetricFamily("transferd_cpu_seconds", "CPU time of the daemon.")
        cpu.add_metric([], usage.ru_utime + usage.ru_stime)
        yield cpu

    def _of_sessions(self) -> Iterable[Metric]:
        count = GaugeMetricFamily(
            "transferd_sessions", "Sessions, by tenant and state.", labels=["tenant", "state"]
        )
        regions = GaugeMetricFamily("transferd_regions", "Regions, by tenant.", labels=["tenant"])
        registered = GaugeMetricFamily(
            "transferd_registered_bytes", "Registered memory, by tenant.", labels=["tenant"]
        )
        jobs = GaugeMetricFamily(
            "transferd_jobs_in_flight", "Jobs in flight, by tenant.", labels=["tenant"]
        )
        by_state: dict[tuple[str, str], int] = {}
        in_flight: dict[str, int] = {}
        tenants = {}
        for session in self._sessions.table:
            name = session.tenant.name
            tenants[name] = session.tenant
            by_state[name, session.state] = by_state.get((name, session.state), 0) + 1
            try:
                flying = (
                    self._plane.session_stat(session.handle).jobs_in_flight if session.handle else 0
                )
            except PlaneError:
                flying = 0
            in_flight[name] = in_flight.get(name, 0) + flying
        for (name, state), number in by_state.items():
            count.add_metric([name, state.lower()], number)
        for name, tenant in tenants.items():
            regions.add_metric([name], tenant.used["regions"])
            registered.add_metric([name], tenant.used["registered_bytes"])
            jobs.add_metric([name], in_flight[name])
        grants = GaugeMetricFamily("transferd_grants", "Grants of sessions here.")
        grants.add_metric([], len(self._owner.grants))
        opens = GaugeMetricFamily("transferd_opens", "Grants that sessions here have opened.")
        opens.add_metric([], len(self._opener))
        mappings = GaugeMetricFamily(
            "transferd_mappings", "Grants on GPU memory that sessions here have mapped."
        )
        mappings.add_metric([], len(self._owner.maps))
        return count, regions, registered, jobs, grants, opens, mappings

    def _of_peers(self) -> Iterable[Metric]:
        peers = GaugeMetricFamily("transferd_peers", "Peers, by state.", labels=["state"])
        by_state: dict[str, int] = {}
        for peer in self._peers.table:
            by_state[peer.state.lower()] = by_state.get(peer.state.lower(), 0) + 1
        for state, number in by_state.items():
            peers.add_metric([state], number)
        losses = CounterMetricFamily("transferd_peer_losses", "Times that a peer was lost.")
        losses.add_metric([], sum(self._peers.table.losses.values()))
        connections = GaugeMetricFamily(
            "transferd_connections", "Fabric connections, by direction.", labels=["direction"]
        )
        incoming = sum(len(peer.incoming) for peer in self._peers.all())
        connections.add_metric(["outgoing"], len(self._lanes.paths))
        connections.add_metric(["incoming"], incoming)
        return peers, losses, connections

    def _of_rails(self) -> Iterable[Metric]:
        labels = ["rail", "provider"]
        up = GaugeMetricFamily("transferd_rail_up", "Whether a rail is usable.", labels=labels)
        sent = CounterMetricFamily(
            "transferd_rail_sent_bytes", "Bytes written and acknowledged.", labels=labels
        )
        writes = CounterMetricFamily(
            "transferd_rail_writes", "Writes posted and acknowledged.", labels=labels
        )
        imms = CounterMetricFamily(
            "transferd_rail_imms_received", "Immediates received.", labels=labels
        )
        errors = CounterMetricFamily(
            "transferd_rail_errors", "Errors reported by the provider.", labels=labels
        )
        stalls = CounterMetricFamily(
            "transferd_rail_credit_stalls",
            "Times that a connection began to wait for room in its peer's queue of immediates.",
            labels=labels,
        )
        floods = CounterMetricFamily(
            "transferd_rail_credit_floods",
            "Connections cut off because their peer posted more immediates than it was granted.",
            labels=labels,
        )
        paths = GaugeMetricFamily(
            "transferd_rail_paths", "Paths to peers by a rail.", labels=[*labels, "state"]
        )
        counts = count_paths(self._peers.all())
        for number, rail in enumerate(self._plane.rail_stats()):
            key = [rail.name, rail.provider]
            for state, count in counts.get(number, PathCount())._asdict().items():
                paths.add_metric([*key, state], count)
            up.add_metric(key, rail.up)
            sent.add_metric(key, rail.bytes_sent)
            writes.add_metric(key, rail.writes_sent)
            imms.add_metric(key, rail.imms_received)
            errors.add_metric(key, rail.errors)
            stalls.add_metric(key, rail.credit_stalls)
            floods.add_metric(key, rail.credit_floods)
        return up, paths, sent, writes, imms, errors, stalls, floods

    def _of_gpus(self) -> Iterable[Metric]:
        up = GaugeMetricFamily(
            "transferd_gpu_helper_up", "Whether a GPU's helper can copy.", labels=["gpu"]
        )
        restarts = CounterMetricFamily(
            "transferd_gpu_helper_restarts",
            "Helpers of a GPU that were started after the first.",
            labels=["gpu"],
        )
        labels = ["gpu", "direction"]
        copies = CounterMetricFamily(
            "transferd_gpu_copies", "Copies between a GPU and pinned host memory.", labels=labels
        )
        moved = CounterMetricFamily("transferd_gpu_copied_bytes", "Bytes of those.", labels=labels)
        failed = CounterMetricFamily(
            "transferd_gpu_copies_failed", "Copies that failed.", labels=["gpu"]
        )
        refused = CounterMetricFamily(
            "transferd_gpu_memory_failures",
            "Times that a copy needed memory of a GPU that no helper could open.",
            labels=["gpu"],
        )
        for name, failures in self._staging.failures.items():
            refused.add_metric([name], failures.count)
        for gpu in self._staging:
            stat = self._staging.stat(gpu)
            up.add_metric([gpu.name], gpu.state == "READY")
            restarts.add_metric([gpu.name], max(0, gpu.starts - 1))
            copies.add_metric([gpu.name, "to_host"], stat.copies_out)
            copies.add_metric([gpu.name, "to_gpu"], stat.copies_in)
            moved.add_metric([gpu.name, "to_host"], stat.bytes_out)
            moved.add_metric([gpu.name, "to_gpu"], stat.bytes_in)
            failed.add_metric([gpu.name], stat.failed)
        return up, restarts, copies, moved, failed, refused


class SnapshotCollector(Collector):
    """Gives prometheus_client what a snapshot holds."""

    def __init__(self, take: Callable[[], list[Metric]]) -> None:
        """Takes the function that makes a snapshot, called from the scrape's thread."""
        self._take = take

    def collect(self) -> Iterable[Metric]:
        """Reads all metrics."""
        return self._take()

    def describe(self) -> Iterable[Metric]:
        """Names nothing beforehand: registering must not read the daemon."""
        return []
