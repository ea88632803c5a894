# SPDX-License-Identifier: Apache-2.0
"""What one rank's KV cache looks like, by offset and stride: README.md, Layouts.

A :class:`Layout` that exists is valid: its values are within bounds, everything that it speaks of
lies in its regions, no two of its elements share a byte. So it may be made of what a peer says.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from transferd.client import errors
from transferd.kv.overlap import Box, find_overlap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Far above what models have; they bound what a peer can make us work through.
LAYERS_MAX = 4096
GROUPS_MAX = 64
COMPONENTS_MAX = 16
PLACES_MAX = 16_384
REGIONS_MAX = PLACES_MAX
NAME_MAX = 128
MODEL_MAX = 512
HEADS_MAX = 65_536
HEAD_BYTES_MAX = 1 << 30
PAGE_TOKENS_MAX = 1 << 24
PAGES_MAX = (1 << 32) - 1  # indices of pages have 32 bits
BYTES_MAX = 1 << 48
TAIL_MAX = 1 << 30


def refuse(message: str, reason: str = "LAYOUT") -> NoReturn:
    """Raises InvalidRequest."""
    raise errors.InvalidRequest(message, reason=reason)


def check_number(name: str, value: int, least: int, most: int) -> None:
    """Refuses what is no integer within the bounds."""
    if type(value) is not int or not least <= value <= most:
        refuse(f"{name} is a number from {least} to {most}, not {value!r}")


def check_name(what: str, value: str, most: int = NAME_MAX) -> None:
    """Refuses what is no short printable text."""
    if not isinstance(value, str) or not 1 <= len(value) <= most or not value.isprintable():
        refuse(f"{what} is a printable text of 1 to {most} characters, not {str(value)[:most]!r}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a component's first byte of one layer is.

    Attributes:
        region: Name of the region.
        offset: Bytes from the region's beginning to page 0, token 0, first head.
    """

    region: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One kind of tensor of the layers of a group: keys, values, a latent, scales.

    An item is what it holds of one head for ``item_tokens`` tokens, in ``head_bytes`` bytes without
    gaps. Item *i* of page *p* and of the rank's *h*-th head is ``page_stride * p +
    token_stride * i + head_stride * h`` behind the layer's place.

    Attributes:
        name: In the group.
        dtype: Of its numbers; and their packing, where an item is not in plain order.
        head_bytes: Of one item.
        heads_total: Heads in the whole model; 1 where there are none (MLA).
        first_head: The first that this rank holds.
        heads: How many it holds.
        places: For each layer of the group, in its order.
        page_stride: Bytes from a page to the next.
        token_stride: Bytes from an item to the next of its page.
        head_stride: Bytes from a head to the next.
        item_tokens: Tokens that an item is of; 1 but for what is kept for a group of tokens, or is
            packed by page.
    """

    name: str
    dtype: str
    head_bytes: int
    heads_total: int
    first_head: int
    heads: int
    places: tuple[Place, ...]
    page_stride: int
    token_stride: int
    head_stride: int
    item_tokens: int = 1

    def __post_init__(self) -> None:
        check_name("a component's name", self.name)
        name = f"of component {self.name}"
        check_name(f"dtype {name}", self.dtype)
        check_number(f"head_bytes {name}", self.head_bytes, 1, HEAD_BYTES_MAX)
        check_number(f"heads_total {name}", self.heads_total, 1, HEADS_MAX)
        check_number(f"heads {name}", self.heads, 1, self.heads_total)
        check_number(f"first_head {name}", self.first_head, 0, self.heads_total - self.heads)
        check_number(f"item_tokens {name}", self.item_tokens, 1, PAGE_TOKENS_MAX)
        for axis in ("page", "token", "head"):
            check_number(f"{axis}_stride {name}", getattr(self, f"{axis}_stride"), 1, BYTES_MAX)
        for place in self.places:
            check_number(f"an offset {name}", place.offset, 0, BYTES_MAX)

    def box(self, pages: int, page_tokens: int, offset: int) -> Box:
        """Tells the bytes of one layer."""
        return Box(
            offset,
            self.head_bytes,
            (
                (pages, self.page_stride),
                (page_tokens // self.item_tokens, self.token_stride),
                (self.heads, self.head_stride),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that share a block table.

    Attributes:
        name: In the layout.
        page_tokens: Tokens of a page.
        num_pages: Pages that the cache has for each layer.
        layers: Their numbers in the whole model, ascending; those that this rank holds.
        components: Kinds of tensors that each of the layers has.
        window_tokens: Of a request's end, those that are needed; 0: all of them.
    """

    name: str
    page_tokens: int
    num_pages: int
    layers: tuple[int, ...]
    components: tuple[Component, ...]
    window_tokens: int = 0

    def __post_init__(self) -> None:
        check_name("a group's name", self.name)
        name = f"of group {self.name}"
        check_number(f"page_tokens {name}", self.page_tokens, 1, PAGE_TOKENS_MAX)
        check_number(f"num_pages {name}", self.num_pages, 1, PAGES_MAX)
        check_number(f"window_tokens {name}", self.window_tokens, 0, 1 << 31)
        if len(self.layers) > LAYERS_MAX:
            refuse(f"group {self.name} has {len(self.layers)} layers, more than {LAYERS_MAX}")
        for layer in self.layers:
            check_number(f"a layer {name}", layer, 0, LAYERS_MAX - 1)
        for one, other in itertools.pairwise(self.layers):
            if one >= other:
                refuse(f"layers {name} are ascending: {other} follows {one}")
        self._check_components()

    def _check_components(self) -> None:
        if not 1 <= len(self.components) <= COMPONENTS_MAX:
            refuse(
                f"group {self.name} has 1 to {COMPONENTS_MAX} components, "
                f"not {len(self.components)}"
            )
        names = [component.name for component in self.components]
        for component in self.components:
            name = f"component {component.name} of group {self.name}"
            if names.count(component.name) > 1:
                refuse(f"{name} is there twice")
            if len(component.places) != len(self.layers):
                refuse(
                    f"{name} has {len(component.places)} places for the group's "
                    f"{len(self.layers)} layers"
                )
            if self.page_tokens % component.item_tokens:
                refuse(
                    f"{name}: item_tokens {component.item_tokens} does not divide "
                    f"page_tokens {self.page_tokens}"
                )

    def component(self, name: str) -> Component | None:
        """Finds a component."""
        return next((c for c in self.components if c.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The KV cache of one rank.

    Attributes:
        model: Names the weights and all else that makes caches alike: only equal ones exchange.
        layers_total: Layers of the whole model.
        regions: Length in bytes of each region, by name.
        groups: All of the model's, those of which this rank holds no layer as well.
        tail_bytes: What a request has besides its pages, sent last; 0: nothing.
    """

    model: str
    layers_total: int
    regions: Mapping[str, int]
    groups: tuple[Group, ...]
    tail_bytes: int = 0

    def __post_init__(self) -> None:
        check_name("model", self.model, MODEL_MAX)
        check_number("layers_total", self.layers_total, 1, LAYERS_MAX)
        check_number("tail_bytes", self.tail_bytes, 0, TAIL_MAX)
        if len(self.regions) > REGIONS_MAX:
            refuse(f"a layout has at most {REGIONS_MAX} regions, not {len(self.regions)}")
        for name, length in self.regions.items():
            check_name("a region's name", name)
            check_number(f"the length of region {name}", length, 1, BYTES_MAX)
        if not 1 <= len(self.groups) <= GROUPS_MAX:
            refuse(f"a layout has 1 to {GROUPS_MAX} groups, not {len(self.groups)}")
        places = sum(len(g.layers) * len(g.components) for g in self.groups)
        if places > PLACES_MAX:
            refuse(f"layers have {places} components in all, more than {PLACES_MAX}")
        names = [group.name for group in self.groups]
        for group in self.groups:
            if names.count(group.name) > 1:
                refuse(f"group {group.name} is there twice")
            if group.layers and group.layers[-1] >= self.layers_total:
                refuse(
                    f"group {group.name} has layer {group.layers[-1]}, the model "
                    f"{self.layers_total} layers"
                )
            self._check_places(group)

    def _check_places(self, group: Group) -> None:
        """Refuses what leaves its region or overlaps. Groups may lie over one another.

        They do in hybrid models: a page belongs to one group at a time.
        """
        boxes: dict[str, list[tuple[Box, str]]] = {}
        for component, layer, place in _placed(group):
            name = f"{component.name} of layer {layer} in group {group.name}"
            length = self.regions.get(place.region)
            if length is None:
                refuse(f"{name} is in region {place.region!r}, which the layout does not have")
            box = component.box(group.num_pages, group.page_tokens, place.offset)
            if box.end > length:
                refuse(f"{name} ends at byte {box.end}, region {place.region} at {length}")
            if not box.is_nested():
                refuse(
                    f"{name} overlaps itself: head_bytes {component.head_bytes}, strides "
                    f"{component.page_stride} (page), {component.token_stride} (token), "
                    f"{component.head_stride} (head)"
                )
            boxes.setdefault(place.region, []).append((box, name))
        for region, placed in boxes.items():
            found = find_overlap(placed)
            if found is not None:
                refuse(f"{found[0]} and {found[1]} overlap in region {region}")

    def group(self, name: str) -> Group | None:
        """Finds a group."""
        return next((g for g in self.groups if g.name == name), None)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that this rank holds, ascending."""
        return tuple(sorted({layer for group in self.groups for layer in group.layers}))


def _placed(group: Group) -> Iterator[tuple[Component, int, Place]]:
    for component in group.components:
        for layer, place in zip(group.layers, component.places, strict=True):
            yield component, layer, place


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a cache that one rank is to send to another.

    Attributes:
        group: Name.
        component: Name.
        first_head: Of the whole model's heads.
        heads: How many.
        layers: Numbers in the whole model, ascending.
    """

    group: str
    component: str
    first_head: int
    heads: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        check_name("a slice's group", self.group)
        check_name("a slice's component", self.component)
        check_number("first_head of a slice", self.first_head, 0, HEADS_MAX - 1)
        check_number("heads of a slice", self.heads, 1, HEADS_MAX)
        if len(self.layers) > LAYERS_MAX:
            refuse(f"a slice has {len(self.layers)} layers, more than {LAYERS_MAX}")
        for layer in self.layers:
            check_number("a layer of a slice", layer, 0, LAYERS_MAX - 1)
