# SPDX-License-Identifier: Apache-2.0
"""The picture of a sweep: rate, and latency, by size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transferd.client import errors
from transferd.client.ctl import render

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from transferd.client.ctl.bench.report import Report, Row

HOW = "--plot needs matplotlib: pip install 'transferd[bench]', or pip install matplotlib"


def check() -> None:
    """Checks, before anything is measured, that a picture can be made.

    Raises:
        Unavailable: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise errors.Unavailable(HOW, reason="NO_MATPLOTLIB") from None


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows into lines: all that differs but the size, in the order measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.size_bytes:
            words = [row.operation, f"batch {row.batch}" if row.batch > 1 and not row.shape else ""]
            to_many = row.initiators if row.scheme == "pairs" else 1
            words += [row.shape, f"{row.initiators} to {to_many}" if row.initiators > 1 else ""]
            found.setdefault(", ".join(filter(None, words)), []).append(row)
    return {name: sorted(line, key=lambda row: row.size_bytes) for name, line in found.items()}


def draw(report: Report) -> Figure:
    """Draws the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    rate, latency = figure.subplots(2, 1, sharex=True)
    for number, (name, rows) in enumerate(series(report.rows).items()):
        sizes = [row.size_bytes for row in rows]
        colour = f"C{number % 10}"
        rate.plot(sizes, [row.gbit_per_s for row in rows], "o-", color=colour, label=name)
        for figure_name, style in (("p50", "o-"), ("p99", "^--")):
            times = [getattr(row.latency_us, figure_name) for row in rows]
            latency.plot(sizes, times, style, color=colour, label=f"{name}, {figure_name}")
    rate.set_ylabel("Gbit/s")
    rate.set_ylim(bottom=0)
    latency.set_ylabel("latency of a batch, us")
    latency.set_yscale("log")
    latency.set_xlabel("size of each operation")
    for axes in (rate, latency):
        _finish(axes, sorted({row.size_bytes for row in report.rows if row.size_bytes}))
    figure.suptitle(_title(report))
    return figure


def _finish(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [render.bytes_text(size) for size in sizes], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")


def _title(report: Report) -> str:
    there = report.target.host if report.target is not None else "?"
    paths = dict.fromkeys(str(path) for row in report.rows for path in row.paths)
    return (
        f"transferctl bench, {report.initiator.host} to {there}: {'; '.join(paths)}\n"
        f"transferd {report.initiator.transferd}, {report.started}"
    )


def save(report: Report, path: Path) -> None:
    """Writes the picture.

    Raises:
        Unavailable: The file cannot be written.
    """
    try:
        draw(report).savefig(path, format="png", dpi=120)
    except OSError as error:
        raise errors.Unavailable(f"--plot {path}: {error.strerror or error}") from None
