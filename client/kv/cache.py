# SPDX-License-Identifier: Apache-2.0
"""A rank's cache: its layout, and the regions that it lies in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transferd.kv.layout import Layout, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transferd.client.memory import Region


class Cache:
    """A layout over regions of one Client.

    Attributes:
        layout: What is where.
        regions: Those that the layout names.
        tails: Of a decoder: where tails go, one slot of ``layout.tail_bytes`` each; host memory.
        device: Whether some of it is GPU memory.
    """

    __slots__ = ("device", "layout", "regions", "tails")

    def __init__(
        self, layout: Layout, regions: Mapping[str, Region], tails: Region | None = None
    ) -> None:
        """Takes the regions; they stay open as long as the cache is used.

        Args:
            layout: Of this rank.
            regions: By the names that the layout has; each at least as long as it says.
            tails: Region for tails; None: a decoder makes one.

        Raises:
            InvalidRequest: LAYOUT: a region is missing or too short; the message names it.
        """
        if not isinstance(layout, Layout):
            refuse(f"layout is a transferd.kv.Layout, not {type(layout).__name__}")
        for name, length in layout.regions.items():
            region = regions.get(name)
            if region is None:
                refuse(f"the layout has a region {name!r}, which is not among {sorted(regions)}")
            if region.length < length:
                refuse(f"region {name!r} has {region.length} bytes, the layout {length}")
        if tails is not None and tails.source is not None:
            refuse("the region of tails is host memory, not GPU memory")
        if tails is not None and tails.length < layout.tail_bytes:
            refuse(
                f"the region of tails has {tails.length} bytes, a tail alone {layout.tail_bytes}"
            )
        self.layout = layout
        self.regions = {name: regions[name] for name in layout.regions}
        self.tails = tails
        self.device = any(region.source is not None for region in self.regions.values())
