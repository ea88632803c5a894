# SPDX-License-Identifier: Apache-2.0
"""The report for people: a table, and what one has to know to read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transferd.client.ctl import render
from transferd.client.ctl.bench.report import FLAGS, P999_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from transferd.client.ctl.bench.machine import Machine
    from transferd.client.ctl.bench.report import Report, Row

MODES = {"pairs": "{} to {}", "many-to-one": "{} to 1"}


def microseconds(value: float) -> str:
    """Says a time in the unit that fits."""
    if value < 1000:
        return f"{value:.1f} us"
    return f"{value / 1000:.2f} ms" if value < 1_000_000 else f"{value / 1_000_000:.2f} s"


def per_second(value: float) -> str:
    """Says a number of operations a second in the unit that fits."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1000:,.1f} k" if value < 10_000_000 else f"{value / 1_000_000:,.1f} M"


def scheme_text(row: dict[str, Any]) -> str:
    """Says who writes to whom."""
    count = row["initiators"]
    return MODES[row["scheme"]].format(count, count)


def batch_text(row: dict[str, Any]) -> str:
    """Says the batch, and of which preset it is."""
    return f"{row['batch']:,}" + (f" {row['shape']}" if row["shape"] else "")


def _time(title: str, field: str, figure: str) -> render.Column:
    return render.Column(title, lambda row: microseconds(row[field][figure]), right=True)


COLUMNS = (
    render.column("OPERATION", "operation"),
    render.Column("SIZE", lambda row: render.bytes_text(row["size_bytes"]), right=True),
    render.Column("BATCH", batch_text, right=True),
    render.Column("FROM", scheme_text),
    render.Column("Gbit/s", lambda row: f"{row['gbit_per_s']:.2f}", right=True),
    render.Column("GB/s", lambda row: f"{row['gbyte_per_s']:.3f}", right=True),
    render.Column("OPS/s", lambda row: per_second(row["operations_per_s"]), right=True),
    _time("P50", "latency_us", "p50"),
    _time("P99", "latency_us", "p99"),
    _time("P99.9", "latency_us", "p999"),
    _time("PREP", "prep_us", "p50"),
    _time("POST", "post_us", "p50"),
    _time("TRANSFER", "transfer_us", "p50"),
    render.Column("PATH", lambda row: "; ".join(map(path_text, row["paths"]))),
    render.Column("DATA", lambda row: "ok"),
)


FAIR = render.Column(
    "JAIN", lambda row: f"{row['jain']:.3f}" if row["initiators"] > 1 else "-", right=True
)
ALL = render.Column("ALL HOSTS", lambda row: all_text(row), right=True)
RATES_END = 7


def columns(report: Report) -> list[render.Column]:
    """Chooses the columns: those of several initiators only where there are some."""
    more = [FAIR] if any(row.initiators > 1 for row in report.rows) else []
    more += [ALL] if any(row.hosts > 1 for row in report.rows) else []
    return [*COLUMNS[:RATES_END], *more, *COLUMNS[RATES_END:]]


def all_text(row: dict[str, Any]) -> str:
    """Says the rate of all hosts that did a step together."""
    if row["size_bytes"]:
        return f"{row['hosts']}: {row['all_gbit_per_s']:.2f} Gbit/s"
    return f"{row['hosts']}: {per_second(row['all_operations_per_s'])} ops/s"


def path_text(path: dict[str, Any]) -> str:
    """Says what jobs used."""
    words = [path["provider"], f"{path['rails']} rail{'' if path['rails'] == 1 else 's'}"]
    return ", ".join(words + [word for word in FLAGS if path.get(word)])


def machine_text(machine: Machine) -> str:
    """Says a host and its daemon in a line."""
    words = [f"{machine.host}: {machine.cpus} x {machine.cpu}"]
    if machine.daemon is not None:
        words.append(f"transferd {machine.daemon.version}, {machine.daemon.provider}")
        words += [f"{r.name} {render.speed_text(r.speed_mbit_per_s)}" for r in machine.daemon.rails]
    else:
        words.append(f"transferd {machine.transferd}, its admin service does not answer")
    return ", ".join(words)


def memory_text(rows: Sequence[Row]) -> str:
    """Says what came before the first job of each step."""
    here, there, opening = (
        max(getattr(row, name) for row in rows)
        for name in ("register_ms", "target_register_ms", "open_ms")
    )
    return (
        f"registering took {here:.1f} ms at most here and {there:.1f} ms there, opening what is "
        f"there {opening:.1f} ms"
    )


def show(report: Report, console: Console) -> None:
    """Prints a report."""
    console.print(f"from {machine_text(report.initiator)}", soft_wrap=True)
    if report.target is not None:
        console.print(f"to   {machine_text(report.target)}", soft_wrap=True)
    rows = [row.model_dump() for row in report.rows]
    render.print_table(columns(report), rows, "nothing was measured", console)
    if report.rows:
        console.print(f"memory: {memory_text(report.rows)}", soft_wrap=True)
    few = [row.latency_us.count for row in report.rows if row.latency_us.count < P999_SAMPLES]
    if few:
        console.print(
            f"note: percentiles are of {min(few):,} batches where there are fewest; P99.9 of fewer "
            f"than {P999_SAMPLES:,} is near their maximum (--seconds, --iterations)",
            soft_wrap=True,
        )
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
