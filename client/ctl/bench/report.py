# SPDX-License-Identifier: Apache-2.0
"""The report of a benchmark, as ``--json`` writes it."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from transferd.client.ctl.bench.machine import Machine, Plain

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = 1
NS_PER_US = 1000
P999_SAMPLES = 1000


class Spread(Plain):
    """How times are spread, in microseconds.

    Attributes:
        count: Of the times; percentiles of few lie near their maximum.
    """

    count: int
    mean: float
    p50: float
    p99: float
    p999: float
    max: float


def spread(times_ns: Sequence[int]) -> Spread:
    """Sums up times in ns; at least one."""
    # One value alone has no quantiles; twice the same has, and they are it. They are those of whole
    # numbers: between fractions, a quantile may come out above the largest.
    values = list(times_ns) if len(times_ns) > 1 else [*times_ns] * 2
    cuts = statistics.quantiles(values, n=1000, method="inclusive")
    return Spread(
        count=len(times_ns),
        mean=statistics.fmean(times_ns) / NS_PER_US,
        p50=cuts[499] / NS_PER_US,
        p99=cuts[989] / NS_PER_US,
        p999=cuts[998] / NS_PER_US,
        max=max(times_ns) / NS_PER_US,
    )


def jain(rates: Sequence[float]) -> float:
    """Tells how alike rates are, by Jain's index: 1: all the same; 1 / n: one has everything."""
    squares = sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if squares else 1.0


FLAGS = ("staged", "packed", "emulated")


class Path(Plain):
    """What jobs really used."""

    provider: str
    rails: int
    staged: bool
    packed: bool
    emulated: bool = False

    def __str__(self) -> str:
        """Says it in a line."""
        words = [self.provider or "none", f"{self.rails} rail{'' if self.rails == 1 else 's'}"]
        return ", ".join(words + [word for word in FLAGS if getattr(self, word)])


class Row(Plain):
    """One step of the sweep.

    Attributes:
        operation: write, pages, read, scatter, imm.
        size_bytes: Of each operation.
        batch: Operations submitted together.
        scheme: pairs, many-to-one.
        initiators: Processes that submitted.
        in_flight: Batches of each, in the rate phase.
        slots: Places that the batches of each went to in turn.
        shape: Preset; empty: none.
        shape_pages: Pages that the preset has; ``batch`` is what the memory holds of them.
        batches: Of all initiators, in the rate phase of the figures below.
        seconds: From the first submission of any to the last end.
        gbit_per_s: Payload.
        gbyte_per_s: The same.
        operations_per_s: Writes, pages, reads, targets or immediates.
        hosts: That did this step together, at one target.
        all_gbit_per_s: Of all of them.
        all_operations_per_s: The same.
        each_operations_per_s: Of each initiator here.
        jain: Of these, 1.0: each had the same.
        repeats_gbit_per_s: Of each rate phase; the row is the median one.
        latency_us: Of a batch, one at a time: from the call that submits it until its end is known.
        prep_us: Making the description of its jobs, before that.
        post_us: The call alone.
        transfer_us: After the call.
        register_ms: Making and registering the memory, at the slowest initiator.
        target_register_ms: The same at the target.
        open_ms: Opening the target's memory.
        paths: All that the jobs used.
        batches_in_all: Of all phases; what was counted at the target is their operations.
        compared_bytes: Found to be as they ought to be, after the step.
    """

    operation: str
    size_bytes: int
    batch: int
    scheme: str
    initiators: int
    in_flight: int
    slots: int
    shape: str
    shape_pages: int
    batches: int
    seconds: float
    gbit_per_s: float
    gbyte_per_s: float
    operations_per_s: float
    hosts: int
    all_gbit_per_s: float
    all_operations_per_s: float
    each_operations_per_s: list[float]
    jain: float
    repeats_gbit_per_s: list[float]
    latency_us: Spread
    prep_us: Spread
    post_us: Spread
    transfer_us: Spread
    register_ms: float
    target_register_ms: float
    open_ms: float
    paths: list[Path]
    batches_in_all: int
    compared_bytes: int


class Report(Plain):
    """The whole.

    Attributes:
        schema_version: Of this form.
        started: ISO 8601, UTC.
        parameters: As given or by default.
        complete: Whether all steps were measured.
        error: Why not; empty where they were.
        notes: What a reader of the figures has to know.
    """

    schema_version: int
    started: str
    parameters: dict[str, Any]
    initiator: Machine
    target: Machine | None
    complete: bool
    error: str
    notes: list[str]
    rows: list[Row]


def path_notes(
    rows: Sequence[Row], initiator: Machine, target: Machine, *, meant: bool
) -> list[str]:
    """Says where jobs did not go the way that one would think.

    Args:
        rows: What was measured.
        initiator: One end.
        target: The other.
        meant: Whether both ends were put on one daemon on purpose.
    """
    notes = []
    daemon = initiator.daemon
    paths = {str(path): path for row in rows for path in row.paths}
    providers = {path.provider for path in paths.values()}
    if "local" in providers and not meant:
        notes.append(
            "both ends are on one daemon, which copies in memory: no NIC was measured; run "
            "`transferctl bench --serve` on another host"
        )
    if any(path.emulated for path in paths.values()):
        notes.append("writes were emulated: a device has no RDMA write, and processors copied")
    if any(path.staged for path in paths.values()):
        notes.append("jobs were staged through memory of the daemon: the NIC cannot reach theirs")
    meant_provider = daemon.provider.split()[0] if daemon is not None and daemon.provider else ""
    others = providers - {"local", "", meant_provider}
    if meant_provider and others:
        notes.append(
            f"jobs went by {', '.join(sorted(others))}, and this daemon's provider is "
            f"{meant_provider}: `transferctl rails --why` tells why"
        )
    most = max((path.rails for path in paths.values()), default=0)
    if daemon is not None and providers - {"local", ""} and most < len(daemon.rails):
        notes.append(f"jobs used {most} of the {len(daemon.rails)} rails that are up here")
    mixed = {
        "; ".join(map(str, row.paths)) for row in rows if len({p.provider for p in row.paths}) > 1
    }
    notes += [f"jobs of one size went several ways: {ways}" for ways in sorted(mixed)]
    told: dict[str, list[str]] = {}
    for end, found in (("this host", daemon), (target.host, target.daemon)):
        for warning in found.warnings if found is not None else ():
            told.setdefault(warning, []).append(end)
    return notes + [f"daemon of {', '.join(ends)}: {warning}" for warning, ends in told.items()]
