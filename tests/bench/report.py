# SPDX-License-Identifier: Apache-2.0
"""Rows, and how they are printed and written."""

from __future__ import annotations

import json
import operator
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

OPERATORS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, slots=True)
class Row:
    """One bar.

    Attributes:
        bar: What was measured, for people.
        value: The result, a median where there were several.
        unit: Of value and limit.
        op: How they compare.
        limit: The bar itself.
        note: Spread, parts and neighbours of the value; printed, not written.
    """

    bar: str
    value: float
    unit: str
    op: Literal[">=", "<="]
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the bar is met."""
        return bool(OPERATORS[self.op](self.value, self.limit))


@dataclass(slots=True)
class Report:
    """What one run found.

    Attributes:
        name: Of the run, as on the command line.
        rows: The bars.
        skipped: What was not measured, with the reason.
        beside: Figures that no bar asks for: (what, value and unit).
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    beside: list[tuple[str, str]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes the JSON that programs read."""
        rows: list[dict[str, Any]] = [
            {
                "bar": row.bar,
                "value": round(row.value, 4),
                "unit": row.unit,
                "op": row.op,
                "limit": round(row.limit, 4),
                "ok": row.ok,
            }
            for row in self.rows
        ]
        content = {
            "name": self.name,
            "machine": machine(),
            "rows": rows,
            "skipped": [{"what": what, "why": why} for what, why in self.skipped],
            "beside": [{"what": what, "value": value} for what, value in self.beside],
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def print(self, console: Console) -> None:
        """Prints the tables that people read."""
        table = Table("BAR", "VALUE", "LIMIT", "OK", "NOTE", title=f"{self.name}: {machine()}")
        for row in self.rows:
            ok = "[green]yes[/]" if row.ok else "[red]NO[/]"
            value = f"{row.value:,.3g}" if abs(row.value) < 100 else f"{row.value:,.0f}"
            unit = f" {row.unit}" if row.unit else ""
            table.add_row(row.bar, value + unit, f"{row.op} {row.limit:,.3g}{unit}", ok, row.note)
        for what, why in self.skipped:
            table.add_row(what, "-", "-", "-", f"not measured: {why}", style="dim")
        console.print(table)
        if self.beside:
            beside = Table("BESIDE", "VALUE")
            for line in self.beside:
                beside.add_row(*line)
            console.print(beside)


def machine() -> str:
    """Describes this machine in a line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} x {model}, {pages >> 30} GiB, Linux {platform.release()}"
