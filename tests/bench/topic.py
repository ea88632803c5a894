# SPDX-License-Identifier: Apache-2.0
"""What a topic of :mod:`bench.bars.speed` is given: ``def rows(run: Run) -> list[Row]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.options import Options
    from bench.quiet import Gate
    from bench.report import Report


@dataclass(frozen=True, slots=True)
class Run:
    """How to measure, and where to say what is no row.

    Attributes:
        options: Of the command line.
        report: Of the whole run; a topic adds to it by the methods only.
    """

    options: Options
    report: Report

    @property
    def quick(self) -> bool:
        """Whether rough figures are enough."""
        return self.options.quick

    @property
    def turns(self) -> int:
        """How often things that are compared are measured in turn."""
        return self.options.turns

    @property
    def gate(self) -> Gate:
        """Wait for it before anything is timed."""
        return self.options.gate

    def scaled(self, count: int) -> int:
        """Tells how many repetitions to make of a full run's."""
        return self.options.scaled(count)

    def skip(self, what: str, why: str) -> None:
        """Says of a row that it was not measured, and why."""
        self.report.skipped.append((what, why))

    def beside(self, what: str, value: str) -> None:
        """Says a figure, with its unit, that no bar asks for."""
        self.report.beside.append((what, value))
