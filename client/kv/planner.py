# SPDX-License-Identifier: Apache-2.0
"""Turns two layouts into a plan."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from transferd.kv.compare import check_slices, check_steps, everything
from transferd.kv.fingerprint import check_alike
from transferd.kv.layout import refuse
from transferd.kv.plan import INDEX_MAX, GroupPlan, Pattern, Plan, Template
from transferd.kv.runs import Loop, Outer, Run, make_run, merge

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transferd.kv.layout import Group, Layout, Slice
    from transferd.kv.plan import Indices

# A peer's layout must not cost us gigabytes: of one run; of what is put together into one write,
# where its indices cannot be shared with other layers; of all.
RUN_PIECES_MAX = 65_536
JOINED_PIECES_MAX = 1024
PLAN_PIECES_MAX = 1 << 22
UNROLLED_MAX = 64  # writes in place of one, where indices would need more than 32 bits


def make_plan(
    src: Layout,
    dst: Layout,
    wanted: Iterable[Slice] | None = None,
    steps: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Plans what one rank sends another.

    Args:
        src: The prefiller's rank.
        dst: The decoder's rank.
        wanted: What is to be sent; by default all that both hold.
        steps: Layers that are sent together: all of the decoder's, each once. By default one each.

    Raises:
        InvalidRequest: FINGERPRINT or LAYOUT: they do not fit; the message says in what.
    """
    check_alike(src, dst, ("at the prefiller", "at the decoder"))
    parts = everything(src, dst) if wanted is None else tuple(wanted)
    check_slices(parts, src, dst)
    ordered = check_steps(steps, dst)
    return _Planner(src, dst, parts, ordered).plan()


class _Planner:
    """What is at hand while a plan is made."""

    def __init__(
        self,
        src: Layout,
        dst: Layout,
        parts: tuple[Slice, ...],
        steps: tuple[tuple[int, ...], ...],
    ) -> None:
        self.steps = steps
        self.groups = tuple(_group_plan(group, src, parts) for group in dst.groups)
        self.parts = parts
        self.templates: dict[tuple[Any, ...], int] = {}
        self.made: list[Template] = []
        self.pieces = 0

    def plan(self) -> Plan:
        # Runs of each step and group, by where they are.
        step_of = {layer: i for i, layers in enumerate(self.steps) for layer in layers}
        found: list[dict[tuple[int, Outer], list[Run]]] = [{} for _ in self.steps]
        for i, group in enumerate(self.groups):
            for part in self.parts:
                if part.group == group.name:
                    for layer, outer, run in _runs_of(group, part):
                        found[step_of[layer]].setdefault((i, outer), []).append(run)
        patterns = tuple(
            tuple(
                pattern
                for (i, outer), runs in step.items()
                for pattern in self._patterns(i, outer, merge(runs))
            )
            for step in found
        )
        return Plan(self.groups, self.steps, patterns, tuple(self.made))

    def _patterns(self, group: int, outer: Outer, runs: list[Run]) -> Iterator[Pattern]:
        """Makes one paged write of the runs of one size; if that is too much, one of each."""
        for run in runs:
            if run.pieces > RUN_PIECES_MAX:
                refuse(
                    f"{self.groups[group].unit_tokens} tokens of group {self.groups[group].name} "
                    f"would be sent in {run.pieces} pieces a layer, more than {RUN_PIECES_MAX}: "
                    "their layouts are too different"
                )
        for size, of_size in itertools.groupby(sorted(runs, key=_size), key=_size):
            alike = list(of_size)
            pieces = sum(run.pieces for run in alike)
            joined = None
            if pieces <= JOINED_PIECES_MAX or len(alike) == 1:
                joined = self._pattern(group, outer, size, alike)
            if joined is not None:
                yield joined
                continue
            for run in alike:
                yield from self._alone(group, outer, run)

    def _alone(self, group: int, outer: Outer, run: Run) -> Iterator[Pattern]:
        """Makes one paged write of a run, or one of each of its turns."""
        pattern = self._pattern(group, outer, run.size, [run])
        if pattern is not None:
            yield pattern
            return
        if not run.loops or run.loops[0].times > UNROLLED_MAX:
            self._refuse_index(group, outer, run)
        first, *others = run.loops
        for turn in range(first.times):
            src, dst = run.src + turn * first.src_stride, run.dst + turn * first.dst_stride
            yield from self._alone(group, outer, Run(src, dst, run.size, tuple(others)))

    def _refuse_index(self, group: int, outer: Outer, run: Run) -> NoReturn:
        name = self.groups[group].name
        refuse(
            f"group {name}: pieces of {run.size} bytes in region {outer.src_region} of the "
            f"prefiller or {outer.dst_region} of the decoder are more than 2^32 common strides "
            f"apart (pages {outer.src_page} and {outer.dst_page} bytes): align them"
        )

    def _pattern(self, group: int, outer: Outer, size: int, runs: list[Run]) -> Pattern | None:
        src = self._side(group, False, outer, [(r.src, r.loops) for r in runs])
        dst = self._side(group, True, outer, [(r.dst, r.loops) for r in runs])
        if src is None or dst is None:
            return None
        return Pattern(
            group,
            outer.src_region,
            outer.dst_region,
            size,
            min(run.src for run in runs),
            min(run.dst for run in runs),
            src[0],
            dst[0],
            src[1],
            dst[1],
        )

    def _side(
        self,
        group: int,
        is_dst: bool,
        outer: Outer,
        starts: list[tuple[int, tuple[Loop, ...]]],
    ) -> tuple[int, int] | None:
        """Finds the stride, and the template, of one side; None: an index would not fit."""
        plan = self.groups[group]
        pages = plan.dst if is_dst else plan.src
        page = outer.dst_page if is_dst else outer.src_page
        unit = outer.dst_unit if is_dst else outer.src_unit
        base = min(start for start, _ in starts)
        shape = tuple(
            (start - base, tuple((loop.times, loop[2 if is_dst else 1]) for loop in loops))
            for start, loops in starts
        )
        steps = [page, unit, *(start for start, _ in shape)]
        steps += [stride for _, loops in shape for _, stride in loops]
        stride = math.gcd(*steps)
        reach = max(start + sum((n - 1) * s for n, s in loops) for start, loops in shape)
        per_page = pages.page_tokens // plan.unit_tokens
        if (page * (pages.num_pages - 1) + unit * (per_page - 1) + reach) // stride > INDEX_MAX:
            return None
        key = (group, per_page, page // stride, unit // stride, stride, shape)
        number = self.templates.get(key)
        if number is None:
            number = self.templates[key] = len(self.made)
            adds = self._adds(shape, stride)
            self.made.append(Template(group, per_page, page // stride, unit // stride, adds))
        return stride, number

    def _adds(
        self, shape: tuple[tuple[int, tuple[tuple[int, int], ...]], ...], stride: int
    ) -> Indices | None:
        if shape == ((0, ()),):
            return None
        parts = []
        for start, loops in shape:
            part = np.array([start // stride], dtype=np.int64)
            for count, step in loops:
                part = (part[:, None] + np.arange(count, dtype=np.int64) * (step // stride)).ravel()
            parts.append(part)
        adds = np.concatenate(parts).astype(np.uint32)
        self.pieces += len(adds)
        if self.pieces > PLAN_PIECES_MAX:
            refuse(f"the layouts need more than {PLAN_PIECES_MAX} different pieces")
        return adds


def _size(run: Run) -> int:
    return run.size


def _group_plan(dst: Group, layout: Layout, parts: tuple[Slice, ...]) -> GroupPlan:
    """Finds the common unit of a group; items, which divide both page sizes, divide it too."""
    src = layout.group(dst.name)
    assert src is not None  # the fingerprints are equal
    unit = math.gcd(src.page_tokens, dst.page_tokens)
    used = any(part.group == dst.name and part.layers for part in parts)
    return GroupPlan(dst.name, unit, src, dst, used)


def _runs_of(group: GroupPlan, part: Slice) -> Iterator[tuple[int, Outer, Run]]:
    """Makes the runs of a slice: one for each layer, not merged yet."""
    src, dst = group.src.component(part.component), group.dst.component(part.component)
    assert src is not None  # check_slices has seen them
    assert dst is not None
    items = group.unit_tokens // dst.item_tokens
    loops = (
        Loop(items, src.token_stride, dst.token_stride),
        Loop(part.heads, src.head_stride, dst.head_stride),
    )
    src_unit = items * src.token_stride if group.src.page_tokens > group.unit_tokens else 0
    dst_unit = items * dst.token_stride if group.dst.page_tokens > group.unit_tokens else 0
    src_ahead = (part.first_head - src.first_head) * src.head_stride
    dst_ahead = (part.first_head - dst.first_head) * dst.head_stride
    sources = dict(zip(group.src.layers, src.places, strict=True))
    targets = dict(zip(group.dst.layers, dst.places, strict=True))
    for layer in part.layers:
        here, there = sources[layer], targets[layer]
        yield (
            layer,
            Outer(here.region, there.region, src.page_stride, dst.page_stride, src_unit, dst_unit),
            make_run(here.offset + src_ahead, there.offset + dst_ahead, dst.head_bytes, loops),
        )
