# SPDX-License-Identifier: Apache-2.0
"""What two sides have to agree on, whatever their pages, strides and ranks are."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from transferd.kv.layout import refuse

if TYPE_CHECKING:
    from transferd.kv.layout import Layout

SHOWN_MAX = 4


def facts(layout: Layout) -> dict[str, str | int]:
    """Lists what both sides agree on, by a name for people."""
    found: dict[str, str | int] = {
        "model": layout.model,
        "layers in all": layout.layers_total,
        "bytes of the tail": layout.tail_bytes,
    }
    for group in layout.groups:
        of = "" if len(layout.groups) == 1 else f" in group {group.name}"
        found[f"group {group.name}"] = "present"
        found[f"window_tokens of group {group.name}"] = group.window_tokens
        for component in group.components:
            name = f"{component.name}{of}"
            found[f"dtype of {name}"] = component.dtype
            found[f"head_bytes of {name}"] = component.head_bytes
            found[f"heads_total of {name}"] = component.heads_total
            found[f"item_tokens of {name}"] = component.item_tokens
    return found


def fingerprint(layout: Layout) -> str:
    """Makes a short text that is equal where all facts are."""
    text = json.dumps(facts(layout), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def differences(
    one: Layout, other: Layout, sides: tuple[str, str] = ("here", "there")
) -> list[str]:
    """Tells what two layouts do not agree on, as "dtype of k: float16 here, bfloat16 there"."""
    left, right = facts(one), facts(other)
    return [
        f"{name}: {left.get(name, 'none')} {sides[0]}, {right.get(name, 'none')} {sides[1]}"
        for name in {**left, **right}
        if left.get(name) != right.get(name)
    ]


def check_alike(one: Layout, other: Layout, sides: tuple[str, str] = ("here", "there")) -> None:
    """Refuses two layouts that do not agree.

    Raises:
        InvalidRequest: FINGERPRINT; the message has the first differences.
    """
    found = differences(one, other, sides)
    if found:
        more = f"; and {len(found) - SHOWN_MAX} more" if len(found) > SHOWN_MAX else ""
        refuse(f"caches differ: {'; '.join(found[:SHOWN_MAX])}{more}", "FINGERPRINT")
