# SPDX-License-Identifier: Apache-2.0
"""What the command line asks for, and progress."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.quiet import Gate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

TURNS, QUICK_TURNS = 15, 5
QUICK_DIVISOR = 5


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        console: For progress.
        quick: Fewer turns and shorter runs: shows that all works, and rough figures.
        full: Also what takes minutes.
        only: Words; steps whose names have none of them are left out. Empty: all steps.
        gate: Is waited for before anything is timed.
    """

    console: Console
    quick: bool = False
    full: bool = False
    only: tuple[str, ...] = field(default=())
    gate: Gate = field(default_factory=Gate)

    @property
    def turns(self) -> int:
        """How often things that are compared are measured in turn."""
        return QUICK_TURNS if self.quick else TURNS

    def scaled(self, count: int) -> int:
        """Tells how many repetitions to make of a full run's."""
        return max(1, count // QUICK_DIVISOR) if self.quick else count

    def wants(self, name: str) -> bool:
        """Tells whether a step is wanted."""
        return not self.only or any(word in name for word in self.only)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[bool]:
        """Shows a step's name while it runs, and how long it took.

        Yields:
            Whether it is wanted.
        """
        if not self.wants(name):
            yield False
            return
        begin = time.monotonic()
        with self.console.status(f"{name} …"):
            yield True
        self.console.print(f"{name}: {time.monotonic() - begin:.0f} s", style="dim")
