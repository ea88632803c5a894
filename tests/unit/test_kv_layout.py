# SPDX-License-Identifier: Apache-2.0
"""Layouts of KV caches: what is valid, what fits together, and how a misfit is told."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import transferd
from transferd.kv import (
    Component,
    Extent,
    Group,
    Layout,
    PageTable,
    Place,
    Slice,
    differences,
    fingerprint,
    make_plan,
    wire,
)
from transferd.kv.v1 import layout_pb2 as pb

from support import tree


def documented() -> dict[str, Any]:
    """Runs the examples of client/kv/README.md that define layouts."""
    text = (tree.ROOT / "client/kv/README.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "def " in block:
            exec(compile(block, "README.md", "exec"), names)
    return names


EXAMPLES = documented()


def latent(**changes: Any) -> Component:
    """A latent of 8 bytes a token, 4 tokens a page, 10 pages, in 2 layers."""
    values: dict[str, Any] = {
        "name": "kv",
        "dtype": "uint8",
        "head_bytes": 8,
        "heads_total": 1,
        "first_head": 0,
        "heads": 1,
        "places": (Place("r", 0), Place("r", 320)),
        "page_stride": 32,
        "token_stride": 8,
        "head_stride": 8,
    }
    return Component(**values | changes)


def group(*components: Component, **changes: Any) -> Group:
    values: dict[str, Any] = {
        "name": "full",
        "page_tokens": 4,
        "num_pages": 10,
        "layers": (0, 1),
        "components": components or (latent(),),
    }
    return Group(**values | changes)


def layout(*groups: Group, **changes: Any) -> Layout:
    values: dict[str, Any] = {
        "model": "m",
        "layers_total": 2,
        "regions": {"r": 640},
        "groups": groups or (group(),),
    }
    return Layout(**values | changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: latent(head_bytes=0),
            "head_bytes of component kv is a number from 1 to 1073741824, not 0",
        ),
        (lambda: latent(heads=2), "heads of component kv is a number from 1 to 1, not 2"),
        (
            lambda: latent(heads_total=4, heads=2, first_head=3),
            "first_head of component kv is a number from 0 to 2, not 3",
        ),
        (
            lambda: latent(page_stride=-32),
            "page_stride of component kv is a number from 1 to .*, not -32",
        ),
        (lambda: latent(token_stride=True), "token_stride .* not True"),
        (
            lambda: latent(dtype=""),
            "dtype of component kv is a printable text of 1 to 128 characters, not ''",
        ),
        (lambda: group(layers=(1, 0)), "layers of group full are ascending: 0 follows 1"),
        (lambda: group(layers=(0,)), "kv of group full has 2 places for the group's 1 layers"),
        (lambda: group(latent(item_tokens=3)), "item_tokens 3 does not divide page_tokens 4"),
        (lambda: group(latent(), latent()), "kv of group full is there twice"),
        (
            lambda: layout(regions={"r": 639}),
            "kv of layer 1 in group full ends at byte 640, region r at 639",
        ),
        (lambda: layout(regions={"s": 640}), "kv of layer 0 in group full is in region 'r', which"),
        (lambda: layout(layers_total=1), "group full has layer 1, the model 1 layers"),
        (lambda: layout(group(), group()), "group full is there twice"),
        (
            lambda: layout(group(latent(page_stride=24))),
            "kv of layer 0 in group full overlaps itself: head_bytes 8, strides 24 \\(page\\), 8",
        ),
        (
            lambda: layout(group(latent(places=(Place("r", 0), Place("r", 319))))),
            "kv of layer 0 .* and kv of layer 1 .* overlap in region r",
        ),
        (lambda: layout(model="x" * 513), "model is a printable text of 1 to 512 characters"),
    ],
)
def test_layouts_that_are_wrong(make: Any, message: str) -> None:
    with pytest.raises(transferd.InvalidRequest, match=message) as caught:
        make()
    assert caught.value.reason == "LAYOUT"


def test_layers_may_be_interleaved_but_not_overlap() -> None:
    """Two layers within each page, as cross-layer blocks have them."""
    within = latent(page_stride=64, places=(Place("r", 0), Place("r", 32)))
    layout(group(within))
    tokens = latent(page_stride=64, token_stride=16, places=(Place("r", 0), Place("r", 8)))
    layout(group(tokens))
    with pytest.raises(transferd.InvalidRequest, match=r"layer 0 .* and kv of layer 1 .* overlap"):
        layout(group(replace(tokens, places=(Place("r", 0), Place("r", 7)))))
    with pytest.raises(transferd.InvalidRequest, match=r"layer 0 .* and kv of layer 1 .* overlap"):
        layout(group(replace(within, places=(Place("r", 0), Place("r", 24)))))


def test_groups_may_lie_over_each_other() -> None:
    layout(group(), group(name="window", window_tokens=3))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (layout(model="n"), "model: m here, n there"),
        (layout(layers_total=3), "layers in all: 2 here, 3 there"),
        (layout(tail_bytes=4), "bytes of the tail: 0 here, 4 there"),
        (layout(group(latent(dtype="int8"))), "dtype of kv: uint8 here, int8 there"),
        (layout(group(latent(head_bytes=4))), "head_bytes of kv: 8 here, 4 there"),
        (layout(group(latent(heads_total=2))), "heads_total of kv: 1 here, 2 there"),
        (layout(group(window_tokens=2)), "window_tokens of group full: 0 here, 2 there"),
        (layout(group(latent(item_tokens=2))), "item_tokens of kv: 1 here, 2 there"),
    ],
)
def test_differences_are_named(other: Layout, message: str) -> None:
    assert differences(layout(), other) == [message]
    assert fingerprint(layout()) != fingerprint(other)
    there = message.replace(" here", " at the prefiller").replace(" there", " at the decoder")
    with pytest.raises(transferd.InvalidRequest, match=f"^caches differ: {there}$") as caught:
        make_plan(layout(), other)
    assert caught.value.reason == "FINGERPRINT"


def test_missing_groups_and_components_are_differences() -> None:
    other = layout(group(name="other"))
    assert "group full: present here, none there" in differences(layout(), other)
    renamed = layout(group(latent(name="x")))
    assert "dtype of kv: uint8 here, none there" in differences(layout(), renamed)
    with pytest.raises(transferd.InvalidRequest, match="and 4 more"):
        make_plan(layout(), renamed)


def test_pages_strides_and_ranks_make_no_difference() -> None:
    one = EXAMPLES["flash_layout"](8, 16, 2, 64, 4, 0, 2)
    other = EXAMPLES["flash_layout"](9, 32, 1, 64, 4, 3, 4)
    assert differences(one, other) == []
    assert fingerprint(one) == fingerprint(other)


def test_blocks_of_vllm_on_cpu_have_to_be_of_one_size() -> None:
    cpu = EXAMPLES["cpu_layout"]
    assert make_plan(cpu(8, 2, 32, 16, 4, 0, 1), cpu(9, 1, 32, 16, 4, 1, 2)).patterns
    with pytest.raises(
        transferd.InvalidRequest, match="item_tokens of kv: 32 at the prefiller, 64"
    ):
        make_plan(cpu(8, 2, 32, 16, 4, 0, 1), cpu(8, 2, 64, 16, 4, 0, 1))


def part(**changes: Any) -> Slice:
    values: dict[str, Any] = {
        "group": "0",
        "component": "k",
        "first_head": 2,
        "heads": 1,
        "layers": (0, 1),
    }
    return Slice(**values | changes)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([part(group="1")], "the prefiller has no k in a group 1"),
        ([part(component="x")], "the prefiller has no x in a group 0"),
        (
            [part(first_head=1, heads=2)],
            "heads of k in group 0: 1 to 2 are asked for, the prefiller holds 2 to 3",
        ),
        (
            [part(heads=3)],
            "heads of k in group 0: 2 to 4 are asked for, the prefiller holds 2 to 3",
        ),
        ([part(layers=(0, 7))], "layer 7 of group 0 is asked for, the prefiller has it not"),
        (
            [part(heads=2), part(first_head=3, layers=(1,))],
            "head 3 of k in layer 1 of group 0 is asked for twice",
        ),
    ],
)
def test_slices_that_do_not_fit(wanted: list[Slice], message: str) -> None:
    flash = EXAMPLES["flash_layout"]
    with pytest.raises(transferd.InvalidRequest, match=message) as caught:
        make_plan(flash(8, 16, 2, 64, 2, 1, 2), flash(8, 16, 4, 64, 2, 0, 1), wanted)
    assert caught.value.reason == "LAYOUT"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([[0]], r"missing \[1\]"),
        ([[0, 1], [1]], r"twice \[1\]"),
        ([[0, 1, 2]], r"unknown \[2\]"),
    ],
)
def test_steps_have_each_layer_once(steps: list[list[int]], message: str) -> None:
    with pytest.raises(transferd.InvalidRequest, match=message):
        make_plan(layout(), layout(), steps=steps)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.regions.add(name="r", length_bytes=1), "a region of one name twice"),
        (
            lambda m: m.groups[0].components[0].regions.append(0),
            "kv has 3 regions and 2 offsets for the group's 2 layers",
        ),
        (lambda m: m.groups[0].components[0].regions.__setitem__(0, 1), "kv is in region 1 of 1"),
        (
            lambda m: m.groups[0].layers.extend(range(2, 5000)),
            "at most 4096 layers in group full, not 5000",
        ),
        (lambda m: m.groups.extend([pb.Group()] * 64), "at most 64 groups, not 65"),
        (
            lambda m: m.groups[0].components.extend([pb.Component()] * 16),
            "at most 16 components in group full, not 17",
        ),
        (
            lambda m: m.groups[0].components[0].ClearField("item_tokens"),
            "item_tokens of component kv is a number from 1 to .*, not 0",
        ),
        (
            lambda m: setattr(m.groups[0], "num_pages", 1 << 31),
            "ends at byte 68719476736, region r at 640",
        ),
    ],
)
def test_messages_that_are_wrong(damage: Any, message: str) -> None:
    sent = wire.layout_to_proto(layout())
    assert wire.layout_from_proto(sent) == layout()
    damage(sent)
    with pytest.raises(transferd.InvalidRequest, match=message):
        wire.layout_from_proto(sent)


def test_slices_go_over_the_wire() -> None:
    assert wire.slice_from_proto(wire.slice_to_proto(part())) == part()
    with pytest.raises(transferd.InvalidRequest, match=r"heads of a slice .* not 0"):
        wire.slice_from_proto(pb.Slice(group="0", component="k"))


@pytest.mark.parametrize(
    ("tokens", "first_token", "pages", "message"),
    [
        (
            40,
            0,
            [1, 2, 10, 4, 5, 6, 7, 8, 9, 0],
            "page 10 at index 2 of group full is out of range: the decoder has 10 pages",
        ),
        (
            20,
            0,
            [1, 2, 3, 2, 4],
            "page 2 is listed twice in group full of the decoder: at indices 1 and 3",
        ),
        (20, 0, [1, 2, 3, 4], "block table of group full has entries 0 to 3, needed are 0 to 4"),
        (20, 0, [1.5, 2.5], "a block table is a list of integers, not of float64 in 1 dimensions"),
        (20, 0, [1, -2], "page -2 at index 1 of a block table is no page number"),
        (
            20,
            6,
            [1, 2, 3, 4, 5],
            "first_token 6 is within a page of group full: it has to be a multiple of 4 tokens",
        ),
        (20, 21, [], "first_token is a number from 0 to 20, not 21"),
        (0, 0, [], "tokens is a number from 1 to"),
    ],
)
def test_requests_that_are_wrong(
    tokens: int, first_token: int, pages: list[Any], message: str
) -> None:
    plan = make_plan(layout(), layout())
    with pytest.raises(transferd.InvalidRequest, match=message):
        plan.delivery(Extent(tokens, first_token), {"full": PageTable(pages)})


def test_pages_that_are_not_needed_are_not_looked_at() -> None:
    plan = make_plan(layout(), layout())
    delivery = plan.delivery(Extent(20, 16), {"full": PageTable([0, 0, 0, 99, 5])})
    (job,), _ = delivery.chunk(0, 20, {"full": PageTable([3], first=4)})
    assert (job.src_pages.tolist(), job.dst_pages.tolist()) == ([3], [5])
    with pytest.raises(transferd.InvalidRequest, match="prefiller's block table of group full has"):
        delivery.chunk(0, 20, {"full": PageTable([3], first=5)})
    with pytest.raises(transferd.InvalidRequest, match="of group full is missing"):
        delivery.chunk(0, 20, {})
    with pytest.raises(transferd.InvalidRequest, match="tokens from 0 to 20, not 4 to 21"):
        delivery.chunk(4, 21, {"full": PageTable([3], first=4)})


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint32, np.uint64])
def test_page_numbers_of_any_width(kind: type) -> None:
    numbers = PageTable(np.array([7, 0, 9, 1], dtype=kind)[::2]).numbers
    assert numbers.dtype == np.uint32
    assert numbers.tolist() == [7, 9]
