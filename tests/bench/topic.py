# SPDX-License-Identifier: Apache-2.0
"""What a topic of :mod:`bench.bars` is given: ``def rows(run: Run) -> list[Row]``."""

from __future__ import annotations

import importlib
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.report import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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


def guarded(run: Run, name: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """Measures; what raises is a bar that is missed, and the others are measured."""
    try:
        return measure()
    except Exception as error:
        run.options.console.print(traceback.format_exc(), markup=False, highlight=False)
        return [Row(f"{name}: measured", 0, "", ">=", 1, repr(error))]


def measure_all(run: Run, topics: Mapping[str, str]) -> None:
    """Measures topics into the report.

    Args:
        run: How, and where to.
        topics: Name of each step: the module of bench whose ``rows(run)`` measures it.
    """
    for name, module in topics.items():
        with run.options.step(name) as wanted:
            if wanted:

                def rows(module: str = module) -> list[Row]:
                    measured: list[Row] = importlib.import_module(f"bench.{module}").rows(run)
                    return measured

                run.report.rows += guarded(run, name, rows)
