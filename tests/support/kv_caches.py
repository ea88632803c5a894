# SPDX-License-Identifier: Apache-2.0
"""KV caches in plain numpy arrays, laid out in many ways; and the paged write, as it is defined.

What a cache holds is read and written here by strided views of a whole layer, one for each
component: nothing of the planner's way of computing bytes is used.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from transferd.kv import Component, Group, Layout, PageTable, Place
from transferd.kv.plan import PagesJob

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """A component, whatever its place: name, bytes of an item, heads, tokens of an item."""

    name: str
    head_bytes: int
    heads_total: int
    item_tokens: int = 1


@dataclass(frozen=True)
class Family:
    """A group, whatever its place: name, layers of the model, components, window."""

    name: str
    layers: tuple[int, ...]
    kinds: tuple[Kind, ...]
    window_tokens: int = 0


@dataclass(frozen=True)
class Style:
    """How a cache is laid out.

    Attributes:
        order: Axes from the outermost on: L(ayer), P(age), T(oken), H(ead), C(omponent).
        joint: Components are an axis of one tensor, if they are alike; else each has its own.
        beside: Components that differ lie beside each other, within one element.
        apart: Each layer in a region of its own.
        backward: Layers and components are in the opposite order.
        padding: Bytes behind each element of the outermost axis.
    """

    order: str = "LPTHC"
    joint: bool = False
    beside: bool = False
    apart: bool = False
    backward: bool = False
    padding: int = 0


@dataclass
class Builder:
    """Lays a rank's groups out; regions grow as it goes."""

    style: Style
    regions: dict[str, int] = field(default_factory=dict)

    def take(self, region: str, length: int) -> int:
        begin = self.regions.get(region, 0)
        self.regions[region] = begin + length
        return begin

    def group(
        self,
        family: Family,
        layers: Sequence[int],
        heads: dict[str, tuple[int, int]],
        page_tokens: int,
        num_pages: int,
    ) -> Group:
        style = self.style
        shapes = {(k.head_bytes, heads[k.name][1], k.item_tokens) for k in family.kinds}
        counts = {(heads[k.name][1], k.item_tokens) for k in family.kinds}
        if style.joint and len(shapes) == 1:
            tensors = [(family.kinds, 1)]
        elif style.beside and len(counts) == 1:
            tensors = [(family.kinds, 0)]
        else:
            tensors = [((kind,), 0) for kind in family.kinds]
        found: dict[str, Component] = {}
        for kinds, is_axis in tensors:
            for component in self.tensor(
                family, layers, heads, (page_tokens, num_pages), kinds, bool(is_axis)
            ):
                found[component.name] = component
        return Group(
            name=family.name,
            page_tokens=page_tokens,
            num_pages=num_pages,
            layers=tuple(layers),
            components=tuple(found[kind.name] for kind in family.kinds),
            window_tokens=family.window_tokens,
        )

    def tensor(
        self,
        family: Family,
        layers: Sequence[int],
        heads: dict[str, tuple[int, int]],
        pages: tuple[int, int],
        kinds: tuple[Kind, ...],
        is_axis: bool,
    ) -> Iterable[Component]:
        """Places components in one tensor (with apart: one for each layer)."""
        order = -1 if self.style.backward else 1
        kinds = kinds[::order]
        first = kinds[0]
        sizes = {
            "L": 1 if self.style.apart else max(len(layers), 1),
            "P": pages[1],
            "T": pages[0] // first.item_tokens,
            "H": heads[first.name][1],
            "C": len(kinds) if is_axis else 1,
        }
        element = first.head_bytes if is_axis else sum(kind.head_bytes for kind in kinds)
        strides: dict[str, int] = {}
        step = element
        for axis in reversed(self.style.order):
            strides[axis] = step
            step *= sizes[axis]
            if axis == self.style.order[1]:
                step += self.style.padding
        name = f"{family.name}-{first.name}"
        if self.style.apart:
            starts = [(f"{name}-{layer}", self.take(f"{name}-{layer}", step)) for layer in layers]
        else:
            begin = self.take("all", step)
            starts = [("all", begin + strides["L"] * i) for i in range(len(layers))][::order]
        ahead = 0
        for number, kind in enumerate(kinds):
            offset = strides["C"] * number if is_axis else ahead
            ahead += kind.head_bytes
            yield Component(
                name=kind.name,
                dtype=f"bytes{kind.head_bytes}",
                head_bytes=kind.head_bytes,
                heads_total=kind.heads_total,
                first_head=heads[kind.name][0],
                heads=heads[kind.name][1],
                item_tokens=kind.item_tokens,
                places=tuple(Place(region, start + offset) for region, start in starts),
                page_stride=strides["P"],
                token_stride=strides["T"],
                head_stride=strides["H"],
            )


def lay_out(
    families: Sequence[Family],
    style: Style,
    layers: Sequence[int],
    share: tuple[int, int],
    pages: dict[str, tuple[int, int]],
    layers_total: int,
) -> Layout:
    """Makes the layout of a rank.

    Args:
        families: Of the model.
        style: How it is laid out.
        layers: That the rank holds.
        share: Its part of the heads: which one of how many; where there are fewer heads than parts
            several ranks hold the same.
        pages: Tokens of a page and number of pages, by group.
        layers_total: Of the model.
    """
    builder = Builder(style)
    groups = []
    for family in families:
        mine = [layer for layer in family.layers if layer in layers]
        heads = {k.name: part_of(k.heads_total, *share) for k in family.kinds}
        groups.append(builder.group(family, mine, heads, *pages[family.name]))
    regions = {name: length + 5 for name, length in builder.regions.items()} or {"all": 1}
    return Layout(
        model="m",
        layers_total=layers_total,
        regions=regions,
        groups=tuple(groups),
    )


def part_of(heads: int, number: int, parts: int) -> tuple[int, int]:
    """Tells the heads that one of several ranks holds: first and how many."""
    if parts >= heads:
        return number * heads // parts, 1
    first, end = number * heads // parts, (number + 1) * heads // parts
    return first, end - first


@dataclass(eq=False)
class Cache:
    """A rank's memory.

    Attributes:
        layout: How it is used.
        memory: By region.
        written: How often each byte was written.
    """

    layout: Layout
    memory: dict[str, Bytes]
    written: dict[str, Bytes]

    @classmethod
    def of(cls, layout: Layout, random: np.random.Generator) -> "Cache":
        sizes = layout.regions
        memory = {n: random.integers(0, 256, size, dtype=np.uint8) for n, size in sizes.items()}
        return cls(layout, memory, {n: np.zeros(size, np.uint8) for n, size in sizes.items()})

    def view(self, group: Group, component: Component, layer: int, written: bool = False) -> Bytes:
        """Shows a layer as pages, items, heads, bytes."""
        place = component.places[group.layers.index(layer)]
        memory = (self.written if written else self.memory)[place.region]
        return np.lib.stride_tricks.as_strided(
            memory[place.offset :],
            shape=(
                group.num_pages,
                group.page_tokens // component.item_tokens,
                component.heads,
                component.head_bytes,
            ),
            strides=(component.page_stride, component.token_stride, component.head_stride, 1),
        )


def write_pages(job: PagesJob, source: Cache, target: Cache) -> int:
    """Does a paged write as client/README.md defines it, and tells what it counts."""
    p = job.pattern
    src, dst = source.memory[p.src_region], target.memory[p.dst_region]
    for src_page, dst_page in zip(job.src_pages.tolist(), job.dst_pages.tolist(), strict=True):
        begin = p.src_offset + src_page * p.src_stride
        end = p.dst_offset + dst_page * p.dst_stride
        assert 0 <= begin <= len(src) - p.page_bytes
        assert 0 <= end <= len(dst) - p.page_bytes
        dst[end : end + p.page_bytes] = src[begin : begin + p.page_bytes]
        target.written[p.dst_region][end : end + p.page_bytes] += 1
    return len(job.src_pages)


@dataclass(eq=False)
class Content:
    """What a request's caches hold: for each (group, component, layer) items, heads, bytes."""

    tokens: int
    arrays: dict[tuple[str, str, int], Bytes]

    @classmethod
    def of(cls, families: Sequence[Family], tokens: int, random: np.random.Generator) -> "Content":
        arrays = {}
        for family in families:
            for kind, layer in itertools.product(family.kinds, family.layers):
                items = -(-tokens // kind.item_tokens)
                shape = (items, kind.heads_total, kind.head_bytes)
                arrays[family.name, kind.name, layer] = random.integers(
                    0, 256, shape, dtype=np.uint8
                )
        return cls(tokens, arrays)

    def put(self, cache: Cache, tables: dict[str, PageTable], tokens: range) -> None:
        """Writes a rank's part of what is computed with these tokens, item by item."""
        for group, component, layer in parts(cache.layout):
            array = self.arrays[group.name, component.name, layer]
            view = cache.view(group, component, layer)
            own = slice(component.first_head, component.first_head + component.heads)
            per = component.item_tokens
            end = len(array) if tokens.stop == self.tokens else tokens.stop // per
            for item in range(tokens.start // per, end):
                page, slot = where(group, component, tables[group.name], item)
                if page is not None:
                    view[page, slot] = array[item, own]


def parts(layout: Layout) -> Iterable[tuple[Group, Component, int]]:
    """Lists all that a rank holds."""
    for group in layout.groups:
        for component, layer in itertools.product(group.components, group.layers):
            yield group, component, layer


def where(
    group: Group, component: Component, table: PageTable, item: int
) -> tuple[int | None, int]:
    """Finds the page and the slot of an item; None where the table does not have it."""
    entry, token = divmod(item * component.item_tokens, group.page_tokens)
    number = entry - table.first
    if not 0 <= number < len(table):
        return None, 0
    return int(table.numbers[number]), token // component.item_tokens


def full_table(layout: Layout, group: str, tokens: int, random: np.random.Generator) -> PageTable:
    """Makes a block table of a whole request."""
    found = layout.group(group)
    assert found is not None
    count = -(-tokens // found.page_tokens)
    return PageTable(random.permutation(found.num_pages)[:count])


def room(families: Sequence[Family], page_tokens: dict[str, int], tokens: int) -> dict:
    """Chooses how many pages a cache has: a few more than a request takes."""
    return {f.name: (page_tokens[f.name], -(-tokens // page_tokens[f.name]) + 2) for f in families}
