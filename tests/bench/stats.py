# SPDX-License-Identifier: Apache-2.0
"""Medians, and the spread that goes with them."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

median = statistics.median


def percentile(values: Sequence[float], share: float) -> float:
    """Reads a percentile (0 to 100) off values in any order."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Tells the smallest, the middle and the largest value."""
    low, middle, high = min(values), median(values), max(values)
    return f"{low:.{digits}f} / {middle:.{digits}f} / {high:.{digits}f}"
