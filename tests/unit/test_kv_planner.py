# SPDX-License-Identifier: Apache-2.0
"""What plans look like: how far runs are merged, what is counted, when it is sent."""

from dataclasses import replace

import numpy as np
import pytest
from unit.test_kv_layout import EXAMPLES

import transferd
from transferd.kv import Component, Extent, Group, Layout, PageTable, Place, Plan, make_plan, needed
from transferd.kv.plan import JOB_PIECES_MAX, Pattern

cpu_layout, flash_layout = EXAMPLES["cpu_layout"], EXAMPLES["flash_layout"]


def hnd(layout: Layout) -> Layout:
    """Turns flash-attn's layout into HND."""

    def turned(group: Group, component: Component) -> Component:
        return replace(
            component,
            token_stride=component.head_bytes,
            head_stride=component.head_bytes * group.page_tokens,
        )

    (group,) = layout.groups
    components = tuple(turned(group, component) for component in group.components)
    return replace(layout, groups=(replace(group, components=components),))


def pieces(plan: Plan) -> tuple[int, int, int]:
    """Tells the number of paged writes of a step, the bytes of a piece, and pieces of a unit."""
    units = Extent(plan.groups[0].unit_tokens)
    first = plan.patterns[0]
    return len(first), first[0].page_bytes, plan.counts(units)[0]


PAGE = 16 * 2 * 64 * 2  # of one component: tokens, heads, numbers, bytes


@pytest.mark.parametrize(
    ("src", "dst", "expected"),
    [
        # The same layout: k and v of a page are one piece each.
        (flash_layout(8, 16, 2, 64, 3, 0, 1), flash_layout(9, 16, 2, 64, 3, 0, 1), (1, PAGE, 2)),
        (
            hnd(flash_layout(8, 16, 2, 64, 3, 0, 1)),
            hnd(flash_layout(8, 16, 2, 64, 3, 0, 1)),
            (1, PAGE, 2),
        ),
        # Heads split: in HND a piece for each head, but all that one side holds is one.
        (
            hnd(flash_layout(8, 16, 1, 64, 3, 1, 2)),
            hnd(flash_layout(8, 16, 2, 64, 3, 0, 1)),
            (1, PAGE // 2, 2),
        ),
        (flash_layout(8, 16, 1, 64, 3, 1, 2), flash_layout(8, 16, 2, 64, 3, 0, 1), (1, 128, 32)),
        # HND to NHD: tokens and heads are apart.
        (
            hnd(flash_layout(8, 16, 2, 64, 3, 0, 1)),
            flash_layout(8, 16, 2, 64, 3, 0, 1),
            (1, 128, 64),
        ),
        # Pages of 16 into pages of 32.
        (flash_layout(8, 16, 2, 64, 3, 0, 1), flash_layout(8, 32, 2, 64, 3, 0, 1), (1, PAGE, 2)),
        (
            cpu_layout(8, 2, 32, 16, 3, 0, 1),
            cpu_layout(8, 2, 32, 16, 3, 0, 1),
            (1, 2 * 32 * 2 * 16 * 4, 1),
        ),
        (
            cpu_layout(8, 2, 32, 16, 3, 0, 2),
            cpu_layout(8, 1, 32, 16, 3, 1, 4),
            (1, 32 * 2 * 16 * 4, 1),
        ),
    ],
    ids=["nhd", "hnd", "hnd-split", "nhd-split", "hnd-nhd", "pages", "cpu", "cpu-split"],
)
def test_runs_are_merged(src: Layout, dst: Layout, expected: tuple[int, int, int]) -> None:
    assert pieces(make_plan(src, dst)) == expected


def block_layout(layers: int, num_pages: int = 8, beside: bool = True) -> Layout:
    """Cross-layer blocks of an MLA model: latent and rotary part beside each other."""
    page = 4 * 72 * layers

    def component(name: str, size: int, ahead: int) -> Component:
        return Component(
            name=name,
            dtype="fp8",
            head_bytes=size,
            heads_total=1,
            first_head=0,
            heads=1,
            places=tuple(Place("kv", layer * 4 * 72 + ahead) for layer in range(layers)),
            page_stride=page,
            token_stride=72 if beside else size,
            head_stride=size,
        )

    parts = (component("c", 64, 0), component("pe", 8, 64 if beside else 4 * 64))
    group = Group(
        name="0",
        page_tokens=4,
        num_pages=num_pages,
        layers=tuple(range(layers)),
        components=parts,
    )
    return Layout(
        model="mla", layers_total=layers, regions={"kv": page * num_pages}, groups=(group,)
    )


def test_layers_of_a_step_are_one_piece_where_they_lie_together() -> None:
    src, dst = block_layout(6), block_layout(6, 9)
    assert pieces(make_plan(src, dst)) == (1, 4 * 72, 1)
    plan = make_plan(src, dst, steps=[(0, 1, 2), (3, 4, 5)])
    assert pieces(plan) == (1, 3 * 4 * 72, 1)
    assert plan.counts(Extent(13)) == (4, 4)
    assert pieces(make_plan(src, dst, steps=[range(6)])) == (1, 6 * 4 * 72, 1)


def test_components_of_different_sizes_are_writes_of_their_own() -> None:
    src, dst = block_layout(2), block_layout(2, beside=False)
    (latent, rotary) = sorted(make_plan(src, dst).patterns[0], key=lambda p: p.page_bytes)
    assert (latent.page_bytes, rotary.page_bytes) == (8, 64)
    assert make_plan(src, dst).counts(Extent(4)) == (8, 8)


def test_layers_with_equal_strides_share_their_indices() -> None:
    plan = make_plan(flash_layout(64, 16, 2, 64, 61, 0, 1), flash_layout(64, 16, 2, 64, 61, 0, 1))
    assert len(plan.templates) == 1
    pages = np.arange(64, dtype=np.uint32)
    tables = {"0": PageTable(pages)}
    chunk = plan.delivery(Extent(1024), tables).chunk(0, 1024, tables)
    assert len(chunk) == 61
    assert len({id(job.src_pages) for (job,) in chunk}) == 1
    assert chunk[0][0].src_pages.tolist() == [*range(128)]  # values follow keys at once


def test_indices_are_the_block_table_itself_where_a_page_is_one_piece() -> None:
    plan = make_plan(cpu_layout(8, 2, 32, 16, 3, 0, 1), cpu_layout(8, 2, 32, 16, 3, 0, 1))
    numbers = np.array([5, 1, 7], dtype=np.uint32)
    delivery = plan.delivery(Extent(96), {"0": PageTable(numbers)})
    (job,), *_ = delivery.chunk(32, 96, {"0": PageTable(numbers)})
    assert job.src_pages.base is numbers
    assert job.src_pages.tolist() == [1, 7]


def sent(plan: Plan, extent: Extent, cuts: list[int]) -> list[int]:
    """Tells, for each chunk, how many pieces the first step sends."""
    tables = {group.name: PageTable(np.arange(group.src.num_pages)) for group in plan.groups}
    targets = {group.name: PageTable(np.arange(group.dst.num_pages)) for group in plan.groups}
    delivery = plan.delivery(extent, targets)
    return [
        sum(len(job.src_pages) for job in delivery.chunk(begin, end, tables)[0])
        for begin, end in zip([0, *cuts], [*cuts, extent.tokens], strict=True)
    ]


def test_a_unit_is_sent_when_its_last_token_is_computed() -> None:
    plan = make_plan(block_layout(2), block_layout(2))
    assert plan.counts(Extent(14)) == (4, 4)
    assert sent(plan, Extent(14), [3, 4, 8, 13]) == [0, 1, 1, 1, 1]
    assert sent(plan, Extent(14), [14, 14]) == [4, 0, 0]
    assert plan.counts(Extent(14, 8)) == (2, 2)
    assert sent(plan, Extent(14, 8), [8, 12]) == [0, 1, 1]
    assert plan.counts(Extent(12, 12)) == (0, 0)
    assert needed(block_layout(2), Extent(14, 8)) == {"0": range(2, 4)}
    assert needed(block_layout(2), Extent(12, 12)) == {"0": range(0)}


def test_a_window_needs_its_last_pages() -> None:
    def windowed(tokens: int) -> Layout:
        layout = block_layout(1)
        return replace(layout, groups=(replace(layout.groups[0], window_tokens=tokens),))

    plan = make_plan(windowed(5), windowed(5))
    assert plan.counts(Extent(15)) == (2,)  # from token 10 on
    assert plan.counts(Extent(17)) == (2,)
    assert plan.counts(Extent(16)) == (2,)
    assert needed(windowed(5), Extent(17)) == {"0": range(3, 5)}
    assert sent(plan, Extent(17), [8, 16]) == [0, 1, 1]
    # A state: one of its tokens is needed, and the hit of a prefix need not end with a page of it.
    assert make_plan(windowed(1), windowed(1)).counts(Extent(7, 5)) == (1,)
    assert make_plan(windowed(1), windowed(1)).counts(Extent(7, 6)) == (1,)
    with pytest.raises(transferd.InvalidRequest, match="first_token 13 is within a page"):
        plan.counts(Extent(15, 13))


def test_a_rank_without_layers_of_a_step_sends_nothing_for_it() -> None:
    whole, stage = flash_layout(8, 16, 2, 64, 4, 0, 1), flash_layout(8, 16, 2, 64, 4, 0, 1)
    group = stage.groups[0]
    components = tuple(replace(c, places=c.places[2:]) for c in group.components)
    stage = replace(stage, groups=(replace(group, layers=(2, 3), components=components),))
    plan = make_plan(stage, whole, steps=[(0,), (1, 2), (3,)])
    assert plan.counts(Extent(16)) == (0, 2, 2)


def test_many_pieces_of_a_step_share_their_indices() -> None:
    src, dst = hnd(flash_layout(8, 16, 8, 64, 6, 0, 1)), flash_layout(8, 16, 8, 64, 6, 0, 1)
    src, dst = in_one_region(src), in_one_region(dst)
    plan = make_plan(src, dst, steps=[range(6)])
    assert [len(plan.patterns[0]), len(plan.templates)] == [12, 2]
    assert plan.counts(Extent(16)) == (6 * 2 * 16 * 8,)
    few = make_plan(src, dst, steps=[(0, 1, 2), (3, 4, 5)])
    assert [len(step) for step in few.patterns] == [1, 1]


def in_one_region(layout: Layout) -> Layout:
    """Puts the regions of layers one behind the other into one."""
    starts = {name: i * length for i, (name, length) in enumerate(layout.regions.items())}

    def moved(component: Component) -> Component:
        places = tuple(Place("all", starts[p.region] + p.offset) for p in component.places)
        return replace(component, places=places)

    (group,) = layout.groups
    group = replace(group, components=tuple(moved(c) for c in group.components))
    return replace(layout, groups=(group,), regions={"all": sum(layout.regions.values())})


def test_large_jobs_are_cut() -> None:
    src, dst = hnd(flash_layout(512, 16, 8, 64, 1, 0, 1)), flash_layout(512, 16, 8, 64, 1, 0, 1)
    plan = make_plan(src, dst)
    extent = Extent(512 * 16)
    tables = {"0": PageTable(np.arange(512))}
    (jobs,) = plan.delivery(extent, tables).chunk(0, extent.tokens, tables)
    assert [len(job.src_pages) for job in jobs] == [JOB_PIECES_MAX, JOB_PIECES_MAX]
    assert plan.counts(extent) == (2 * JOB_PIECES_MAX,)


def wide(offset: int, token_stride: int, num_pages: int, page_tokens: int = 2) -> Layout:
    """K and v of one byte a token, far from each other."""

    def component(name: str, begin: int) -> Component:
        return Component(
            name=name,
            dtype="uint8",
            head_bytes=1,
            heads_total=1,
            first_head=0,
            heads=1,
            places=(Place("r", begin),),
            page_stride=token_stride * page_tokens,
            token_stride=token_stride,
            head_stride=1,
        )

    group = Group(
        name="0",
        page_tokens=page_tokens,
        num_pages=num_pages,
        layers=(0,),
        components=(component("k", 0), component("v", offset)),
    )
    return Layout(model="m", layers_total=1, regions={"r": 1 << 45}, groups=(group,))


def test_indices_have_32_bits() -> None:
    """K and v have too little in common for one write; each by itself does."""
    far = wide((1 << 40) + 1, 1 << 16, 1 << 10)
    plan = make_plan(far, far)
    assert len(plan.patterns[0]) == 2
    assert [p.src_offset for p in plan.patterns[0]] == [0, (1 << 40) + 1]
    assert plan.counts(Extent(4)) == (8,)
    near = wide(1 << 40, 1 << 16, 1 << 10)
    (pattern,) = make_plan(near, near).patterns[0]
    assert pattern.src_stride == 1 << 16
    even = wide(1 << 40, 3, (1 << 31) + 1)
    plan = make_plan(even, even)  # each token by itself
    assert [(p.src_offset, p.src_stride) for p in plan.patterns[0]] == [
        (start + token, 6) for start in (0, 1 << 40) for token in (0, 3)
    ]
    assert plan.counts(Extent(4)) == (8,)
    with pytest.raises(transferd.InvalidRequest, match="common strides apart"):
        make_plan(even, wide(1 << 40, 3, 8, page_tokens=1))
    # 3 units of 1 stride a page: the last index is 3 * pages - 1.
    dst = wide(1 << 40, 3, 8, page_tokens=1)
    assert len(make_plan(wide(1 << 40, 3, 1_431_655_765, page_tokens=3), dst).patterns[0]) == 2
    with pytest.raises(transferd.InvalidRequest, match="common strides apart"):
        make_plan(wide(1 << 40, 3, 1_431_655_766, page_tokens=3), dst)
    many = wide(1 << 40, 3, (1 << 27) + 1, page_tokens=65)
    with pytest.raises(transferd.InvalidRequest, match="common strides apart"):
        make_plan(many, many)


def test_layouts_that_would_take_too_many_pieces() -> None:
    def fine(first: bool) -> Layout:
        component = Component(
            name="k",
            dtype="uint8",
            head_bytes=1,
            heads_total=1,
            first_head=0,
            heads=1,
            places=(Place("r", 0),),
            page_stride=1 << 20,
            token_stride=1 if first else 2,
            head_stride=1,
        )
        group = Group(
            name="0", page_tokens=1 << 17, num_pages=1, layers=(0,), components=(component,)
        )
        return Layout(model="m", layers_total=1, regions={"r": 1 << 20}, groups=(group,))

    assert pieces(make_plan(fine(True), fine(True)))[2] == 1
    with pytest.raises(
        transferd.InvalidRequest, match=r"131072 tokens of group 0 .* 131072 pieces a layer"
    ):
        make_plan(fine(True), fine(False))


def test_a_job_becomes_a_paged_write() -> None:
    plan = make_plan(cpu_layout(8, 2, 32, 16, 3, 0, 1), cpu_layout(8, 2, 32, 16, 3, 0, 1))
    tables = {"0": PageTable([3])}
    _, (job,), _ = plan.delivery(Extent(32), tables).chunk(0, 32, tables)
    region = object()
    write = job.operation({"cache": region}, {"cache": b"d"}, 7, priority="latency")  # type: ignore[dict-item]
    page = 2 * 32 * 2 * 16 * 4
    assert isinstance(job.pattern, Pattern)
    assert (write.src, write.dst, write.imm, write.priority) == (region, b"d", 7, "latency")
    assert (write.page_bytes, write.src_stride, write.dst_stride) == (page, page, page)
    assert (write.src_offset, write.dst_offset) == (8 * page, 8 * page)
