# SPDX-License-Identifier: Apache-2.0
"""Whether slices and steps fit the layouts of two ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from transferd.kv.layout import Slice, refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.kv.layout import Component, Group, Layout


def everything(src: Layout, dst: Layout) -> tuple[Slice, ...]:
    """Lists all that two layouts of one fingerprint both hold."""
    found = []
    for group in dst.groups:
        other = src.group(group.name)
        layers = set(other.layers) & set(group.layers) if other is not None else set()
        for component in group.components:
            there = other.component(component.name) if other is not None else None
            if there is None or not layers:
                continue
            first = max(component.first_head, there.first_head)
            last = min(component.first_head + component.heads, there.first_head + there.heads)
            if first < last:
                found.append(
                    Slice(
                        group=group.name,
                        component=component.name,
                        first_head=first,
                        heads=last - first,
                        layers=tuple(sorted(layers)),
                    )
                )
    return tuple(found)


def check_slices(parts: Sequence[Slice], src: Layout, dst: Layout) -> None:
    """Refuses slices that one of two layouts does not hold, and what is asked for twice.

    Raises:
        InvalidRequest: LAYOUT.
    """
    taken: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
    for part in parts:
        for layout, whose in ((src, "prefiller"), (dst, "decoder")):
            group = layout.group(part.group)
            component = group.component(part.component) if group is not None else None
            if group is None or component is None:
                refuse(f"the {whose} has no {part.component} in a group {part.group}")
            _check_slice(part, group, component, whose)
        for layer in part.layers:
            heads = taken.setdefault((part.group, part.component, layer), [])
            heads.append((part.first_head, part.first_head + part.heads))
    for (name, component_name, layer), heads in taken.items():
        heads.sort()
        for (_, end), (begin, _) in itertools.pairwise(heads):
            if begin < end:
                refuse(
                    f"head {begin} of {component_name} in layer {layer} of group {name} is asked "
                    "for twice"
                )


def _check_slice(part: Slice, group: Group, component: Component, whose: str) -> None:
    first, last = part.first_head, part.first_head + part.heads - 1
    held = component.first_head + component.heads - 1
    if first < component.first_head or last > held:
        refuse(
            f"heads of {part.component} in group {part.group}: {first} to {last} are asked for, "
            f"the {whose} holds {component.first_head} to {held}"
        )
    missing = set(part.layers) - set(group.layers)
    if missing:
        refuse(f"layer {min(missing)} of group {part.group} is asked for, the {whose} has it not")


def check_steps(steps: Sequence[Sequence[int]] | None, dst: Layout) -> tuple[tuple[int, ...], ...]:
    """Takes steps: all layers of the decoder's rank, each once.

    Raises:
        InvalidRequest: LAYOUT.
    """
    layers = dst.layers
    if steps is None:
        return tuple((layer,) for layer in layers)
    ordered = tuple(tuple(step) for step in steps)
    named = [layer for step in ordered for layer in step]
    if sorted(named) != list(layers):
        twice = {layer for layer, times in Counter(named).items() if times > 1}
        missing, unknown = set(layers) - set(named), set(named) - set(layers)
        refuse(
            "steps have each layer of the decoder's rank once: "
            + "; ".join(
                f"{what} {sorted(which)[:8]}"
                for what, which in (("missing", missing), ("unknown", unknown), ("twice", twice))
                if which
            )
        )
    return ordered
