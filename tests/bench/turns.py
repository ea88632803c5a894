# SPDX-License-Identifier: Apache-2.0
"""Things that are compared are measured in turn, and divided turn by turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from bench.report import Row
from bench.stats import median, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.topic import Run

Key = TypeVar("Key")


def in_turn(
    run: Run, measured: dict[Key, Callable[[], float]], turns: int
) -> dict[Key, list[float]]:
    """Measures things in turn, every second time in reverse: none always follows another."""
    found: dict[Key, list[float]] = {name: [] for name in measured}
    order = list(measured.items())
    for _ in range(turns):
        run.gate.wait()
        for name, measure in order:
            found[name].append(measure())
        order.reverse()
    return found


def best(found: dict[str, list[float]], names: list[str]) -> str:
    """Chooses what to compare with: the best by medians."""
    return max(names, key=lambda name: median(found[name]))


def ratios(found: dict[str, list[float]], mine: str, theirs: str) -> list[float]:
    """Divides turn by turn."""
    return [a / b for a, b in zip(found[mine], found[theirs], strict=True)]


def ratio_row(bar: str, found: dict[str, list[float]], mine: str, theirs: str, limit: float) -> Row:
    """Makes a row of the ratios of each turn."""
    by_turn = ratios(found, mine, theirs)
    note = f"to {theirs}; {median(found[mine]):.1f} of {median(found[theirs]):.1f} Gbps; "
    return Row(bar, median(by_turn), "", ">=", limit, f"{note}ratios {spread(by_turn)}")
