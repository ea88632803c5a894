# SPDX-License-Identifier: Apache-2.0
"""Memory for the tails of a prefiller, until they are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transferd.client.client import Client
    from transferd.client.memory import Region, RegionSlice

CHUNK = 256  # tails of one region


class Tails:
    """Slots of one size, in regions that are made as they are needed."""

    def __init__(self, client: Client, size: int) -> None:
        """Makes the first ones, if there are tails at all."""
        self._client = client
        self._size = size
        self._free: list[RegionSlice] = []
        self._regions: list[Region] = []
        if size:
            self._more()

    def _more(self) -> None:
        region = self._client.alloc(self._size * CHUNK, name="kv tails")
        self._regions.append(region)
        self._free += [region[at : at + self._size] for at in range(0, len(region), self._size)]

    def put(self, tail: bytes) -> RegionSlice:
        """Keeps a tail."""
        if not self._free:
            self._more()
        place = self._free.pop()
        place.view[:] = tail
        return place

    def give_back(self, place: RegionSlice) -> None:
        """Frees a slot that nobody reads any more."""
        self._free.append(place)

    def close(self) -> None:
        """Gives the memory back."""
        for region in self._regions:
            region.close()
