# SPDX-License-Identifier: Apache-2.0
"""Which pages the jobs of a paged write take; it imports nothing of transferd, peers use it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Indices = NDArray[np.int32]
    Tables = list[tuple[Indices, Indices]]  # of source and destination pages, job after job

TABLES_MIN = 16
SEED = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """Jobs of pages that are taken at random from a working set.

    Attributes:
        page: Bytes of a page.
        pages: Of a job.
        set_bytes: Of memory, on either side.
    """

    page: int
    pages: int
    set_bytes: int

    @property
    def job_bytes(self) -> int:
        """What a job moves."""
        return self.page * self.pages

    @property
    def name(self) -> str:
        """For people."""
        if self.pages == 1:
            return f"write {size_name(self.page)}"
        sizes = f"{size_name(self.page)} x {self.pages:,}"
        return f"paged {sizes}, working set {size_name(self.set_bytes)}"

    def millions(self, gbps: float) -> float:
        """Tells a rate in millions of pages a second."""
        return gbps / 8e-3 / self.page

    def tables(self) -> Tables:
        """Makes tables of source and destination pages for job after job.

        All pages of the set in random order, cut into jobs; as often as jobs enough need. Both
        sides take the same pages in another order, and none beside the one before it.
        """
        random = np.random.default_rng(SEED)
        slots = self.set_bytes // self.page
        jobs = slots // self.pages
        made: Tables = []
        for _ in range(-(-TABLES_MIN // jobs)):
            order = random.permutation(slots).astype(np.int32)
            for chunk in np.split(order[: jobs * self.pages], jobs):
                made.append((apart(random, chunk), apart(random, chunk)))
        return made


def apart(random: np.random.Generator, pages: Indices) -> Indices:
    """Shuffles pages until none follows the one that lies before it in memory."""
    mixed = random.permutation(pages)
    while (beside := np.flatnonzero(np.diff(mixed) == 1)).size:
        others = random.integers(mixed.size, size=beside.size)
        for one, other in zip(beside, others, strict=True):
            mixed[[one, other]] = mixed[[other, one]]
    return mixed


def size_name(size: int) -> str:
    """Writes a size with its unit."""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
