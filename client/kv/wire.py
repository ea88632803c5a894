# SPDX-License-Identifier: Apache-2.0
"""Layouts and slices as messages. What comes from a peer is checked as it is read."""

from __future__ import annotations

from transferd.kv.layout import (
    COMPONENTS_MAX,
    GROUPS_MAX,
    LAYERS_MAX,
    PLACES_MAX,
    REGIONS_MAX,
    Component,
    Group,
    Layout,
    Place,
    Slice,
    refuse,
)
from transferd.kv.v1 import layout_pb2 as pb


def layout_to_proto(layout: Layout) -> pb.Layout:
    """Makes the message of a layout."""
    numbers = {name: number for number, name in enumerate(layout.regions)}
    return pb.Layout(
        model=layout.model,
        layers_total=layout.layers_total,
        tail_bytes=layout.tail_bytes,
        regions=[pb.Region(name=n, length_bytes=length) for n, length in layout.regions.items()],
        groups=[_group_to_proto(group, numbers) for group in layout.groups],
    )


def _group_to_proto(group: Group, numbers: dict[str, int]) -> pb.Group:
    return pb.Group(
        name=group.name,
        page_tokens=group.page_tokens,
        num_pages=group.num_pages,
        window_tokens=group.window_tokens,
        layers=group.layers,
        components=[
            pb.Component(
                name=c.name,
                dtype=c.dtype,
                head_bytes=c.head_bytes,
                heads_total=c.heads_total,
                first_head=c.first_head,
                heads=c.heads,
                item_tokens=c.item_tokens,
                page_stride_bytes=c.page_stride,
                token_stride_bytes=c.token_stride,
                head_stride_bytes=c.head_stride,
                regions=[numbers[place.region] for place in c.places],
                offsets=[place.offset for place in c.places],
            )
            for c in group.components
        ],
    )


def layout_from_proto(message: pb.Layout) -> Layout:
    """Makes a layout of a peer's message.

    Raises:
        InvalidRequest: LAYOUT: it is none; the message says what is wrong with it.
    """
    _bound("regions", len(message.regions), REGIONS_MAX)
    _bound("groups", len(message.groups), GROUPS_MAX)
    regions = {region.name: region.length_bytes for region in message.regions}
    if len(regions) < len(message.regions):
        refuse("a layout has a region of one name twice")
    names = list(regions)
    for group in message.groups:
        _bound(f"components in group {group.name[:64]}", len(group.components), COMPONENTS_MAX)
        _bound(f"layers in group {group.name[:64]}", len(group.layers), LAYERS_MAX)
    places = sum(len(g.layers) * len(g.components) for g in message.groups)
    _bound("components of layers", places, PLACES_MAX)
    return Layout(
        model=message.model,
        layers_total=message.layers_total,
        tail_bytes=message.tail_bytes,
        regions=regions,
        groups=tuple(
            Group(
                name=group.name,
                page_tokens=group.page_tokens,
                num_pages=group.num_pages,
                window_tokens=group.window_tokens,
                layers=tuple(group.layers),
                components=tuple(
                    _component_from_proto(c, names, len(group.layers)) for c in group.components
                ),
            )
            for group in message.groups
        ),
    )


def _component_from_proto(message: pb.Component, names: list[str], layers: int) -> Component:
    name = message.name[:64]
    if not len(message.regions) == len(message.offsets) == layers:
        refuse(
            f"component {name} has {len(message.regions)} regions and {len(message.offsets)} "
            f"offsets for the group's {layers} layers"
        )
    for number in message.regions:
        if number >= len(names):
            refuse(f"component {name} is in region {number} of {len(names)}, counted from 0")
    return Component(
        name=message.name,
        dtype=message.dtype,
        head_bytes=message.head_bytes,
        heads_total=message.heads_total,
        first_head=message.first_head,
        heads=message.heads,
        item_tokens=message.item_tokens,
        page_stride=message.page_stride_bytes,
        token_stride=message.token_stride_bytes,
        head_stride=message.head_stride_bytes,
        places=tuple(
            Place(names[number], offset)
            for number, offset in zip(message.regions, message.offsets, strict=True)
        ),
    )


def slice_to_proto(part: Slice) -> pb.Slice:
    """Makes the message of a slice."""
    return pb.Slice(
        group=part.group,
        component=part.component,
        first_head=part.first_head,
        heads=part.heads,
        layers=part.layers,
    )


def slice_from_proto(message: pb.Slice) -> Slice:
    """Makes a slice of a peer's message; the planner checks it against the layouts.

    Raises:
        InvalidRequest: LAYOUT.
    """
    _bound("layers in a slice", len(message.layers), LAYERS_MAX)
    return Slice(
        group=message.group,
        component=message.component,
        first_head=message.first_head,
        heads=message.heads,
        layers=tuple(message.layers),
    )


def _bound(what: str, count: int, most: int) -> None:
    if count > most:
        refuse(f"there are at most {most} {what}, not {count}")
