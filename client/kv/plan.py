# SPDX-License-Identifier: Apache-2.0
"""What one rank sends another: for a request, the paged writes and their counts.

A plan is made once for a pair of ranks (``planner.py``). For a request only indices are computed,
by numpy, once for all layers that repeat alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from transferd.client.operations import WritePages
from transferd.kv.layout import refuse
from transferd.kv.pages import PageTable, first_needed, take

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from transferd.client.memory import BaseRegion, RegionSlice
    from transferd.kv.layout import Group
    from transferd.kv.pages import Extent

    Indices = NDArray[np.uint32]

# A quarter of the pages that a session's arena holds by default (client/README.md, Bounds).
JOB_PIECES_MAX = 65_536


class Template(NamedTuple):
    """How indices of one side follow from its block table.

    Attributes:
        group: Index into the plan's groups.
        per_page: Units of a page.
        page_step: Strides from a page to the next.
        unit_step: From a unit to the next of its page.
        adds: Strides from a unit's beginning to each of its pieces; None: there is one, at 0.
    """

    group: int
    per_page: int
    page_step: int
    unit_step: int
    adds: Indices | None

    def indices(self, pages: Indices, units: range) -> Indices:
        """Expands pages, of which the first is the one that holds the first unit."""
        base = pages
        if self.page_step != 1:
            base = base * np.uint32(self.page_step)
        if self.per_page > 1:
            skipped = units.start % self.per_page
            within = np.arange(skipped, skipped + len(units), dtype=np.uint32)
            per_page = np.uint32(self.per_page)
            base = base[within // per_page] + within % per_page * np.uint32(self.unit_step)
        if self.adds is not None:
            base = (self.adds[:, None] + base).ravel()
        return base


class Pattern(NamedTuple):
    """One paged write of a step, but for its indices.

    Attributes:
        group: Index into the plan's groups.
        src_region: Name.
        dst_region: Name.
        page_bytes: Of one piece.
        src_offset: Bytes.
        dst_offset: Bytes.
        src_stride: Bytes that an index counts.
        dst_stride: Bytes that an index counts.
        src_template: Index into the plan's templates.
        dst_template: Index into the plan's templates.
    """

    group: int
    src_region: str
    dst_region: str
    page_bytes: int
    src_offset: int
    dst_offset: int
    src_stride: int
    dst_stride: int
    src_template: int
    dst_template: int


class PagesJob(NamedTuple):
    """A paged write, ready to be bound to memory; it counts ``len(src_pages)``.

    Attributes:
        pattern: All of it that does not change.
        src_pages: Indices.
        dst_pages: Indices.
    """

    pattern: Pattern
    src_pages: Indices
    dst_pages: Indices

    def operation(
        self,
        regions: Mapping[str, BaseRegion | RegionSlice],
        descriptors: Mapping[str, bytes],
        imm: int,
        **options: Any,
    ) -> WritePages:
        """Makes the member of a batch.

        Args:
            regions: Of the source, by name.
            descriptors: Of grants of the destination's whole regions, by name.
            imm: That counts it.
            **options: Of :class:`transferd.WritePages`: priority, deadline_s, stream, …
        """
        pattern = self.pattern
        return WritePages(
            src=regions[pattern.src_region],
            src_pages=self.src_pages,
            dst=descriptors[pattern.dst_region],
            dst_pages=self.dst_pages,
            page_bytes=pattern.page_bytes,
            imm=imm,
            src_stride=pattern.src_stride,
            dst_stride=pattern.dst_stride,
            src_offset=pattern.src_offset,
            dst_offset=pattern.dst_offset,
            **options,
        )


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What the two sides of a group have in common.

    Attributes:
        name: Of the group.
        unit_tokens: Tokens that are sent together: the largest number that divides both page sizes.
        src: The source's.
        dst: The destination's.
        used: Whether anything of it is sent.
    """

    name: str
    unit_tokens: int
    src: Group
    dst: Group
    used: bool

    def units(self, extent: Extent) -> range:
        """Tells the units that a request needs, counted from its first token.

        Raises:
            InvalidRequest: first_token is within a unit.
        """
        first, window = extent.first_token, self.dst.window_tokens
        begin = first_needed(self.dst, extent)
        if not self.used or begin >= extent.tokens:
            return range(0)
        # A window that begins behind first_token may begin anywhere: what is before it in its unit
        # is sent along.
        cut = begin == first and not (window and first == extent.tokens - window)
        if cut and first % self.unit_tokens:
            refuse(
                f"first_token {first} is within a page of group {self.name}: it has to be a "
                f"multiple of {self.unit_tokens} tokens",
                "FIRST_TOKEN",
            )
        return range(begin // self.unit_tokens, -(-extent.tokens // self.unit_tokens))

    def done(self, extent: Extent, computed: int) -> int:
        """Tells the first unit that is not complete when so many tokens are computed."""
        if computed >= extent.tokens:
            return -(-extent.tokens // self.unit_tokens)
        return computed // self.unit_tokens

    def src_entries(self, units: range) -> range:
        """Tells the entries of the source's block table that hold some units."""
        return _entries(units, self.src.page_tokens // self.unit_tokens)

    def dst_entries(self, units: range) -> range:
        """Tells the entries of the destination's block table that hold some units."""
        return _entries(units, self.dst.page_tokens // self.unit_tokens)


def _entries(units: range, per_page: int) -> range:
    if not units:
        return range(0)
    return range(units.start // per_page, (units.stop - 1) // per_page + 1)


class Plan:
    """What one rank sends another, for any request.

    Both sides make it of the same layouts, slices and steps, and get the same counts.

    Attributes:
        groups: Of both.
        steps: Layers that are sent together, in order; each may have none here.
        patterns: Of each step.
        templates: Of all patterns.
    """

    def __init__(
        self,
        groups: tuple[GroupPlan, ...],
        steps: tuple[tuple[int, ...], ...],
        patterns: tuple[tuple[Pattern, ...], ...],
        templates: tuple[Template, ...],
    ) -> None:
        self.groups = groups
        self.steps = steps
        self.patterns = patterns
        self.templates = templates
        self._pieces = np.zeros((len(steps), len(groups)), dtype=np.int64)
        for step, members in enumerate(patterns):
            for pattern in members:
                adds = templates[pattern.src_template].adds
                self._pieces[step, pattern.group] += 1 if adds is None else len(adds)

    def counts(self, extent: Extent) -> tuple[int, ...]:
        """Tells, for each step, what the receiver counts of a request, however it is cut.

        Raises:
            InvalidRequest: FIRST_TOKEN.
        """
        units = np.array([len(group.units(extent)) for group in self.groups], dtype=np.int64)
        return tuple((self._pieces @ units).tolist())

    def delivery(self, extent: Extent, dst_pages: Mapping[str, PageTable]) -> Delivery:
        """Begins a request.

        Raises:
            InvalidRequest: PAGES: of dst_pages one is missing, out of range, or there twice.
                FIRST_TOKEN: it is within a page.
        """
        return Delivery(self, extent, dst_pages)


class Delivery:
    """One request on its way by a plan.

    Attributes:
        plan: The plan.
        extent: The request's tokens.
    """

    __slots__ = ("_pages", "_units", "extent", "plan")

    def __init__(self, plan: Plan, extent: Extent, dst_pages: Mapping[str, PageTable]) -> None:
        self.plan = plan
        self.extent = extent
        self._units = tuple(group.units(extent) for group in plan.groups)
        self._pages = tuple(
            _taken(dst_pages, group.dst_entries(units), group.dst, "decoder")
            for group, units in zip(plan.groups, self._units, strict=True)
        )

    def chunk(
        self, begin: int, end: int, src_pages: Mapping[str, PageTable]
    ) -> tuple[tuple[PagesJob, ...], ...]:
        """Makes the jobs of what is complete once the tokens from begin up to end are computed.

        A unit is sent once, whole, with the chunk that has its last token; so chunks that follow
        each other from 0 to the last token send everything once.

        Args:
            begin: Tokens that were computed before, from the request's beginning.
            end: Tokens that are computed now.
            src_pages: Block tables of the source; they have the entries of these tokens, and of
                those before them that share a unit with them.

        Returns:
            For each step, its jobs; groups and steps without any have none.

        Raises:
            InvalidRequest: PAGES, CHUNK.
        """
        return tuple(self.steps(begin, end, src_pages))

    def steps(
        self, begin: int, end: int, src_pages: Mapping[str, PageTable]
    ) -> Iterator[tuple[PagesJob, ...]]:
        """Makes the jobs of :meth:`chunk` step by step: those of later steps take no memory yet.

        Raises:
            InvalidRequest: PAGES, CHUNK: before the first step.
        """
        if not 0 <= begin <= end <= self.extent.tokens:
            refuse(
                f"a chunk is of tokens from 0 to {self.extent.tokens}, not {begin} to {end}",
                "CHUNK",
            )
        plan = self.plan
        sent = tuple(self._complete(i, begin, end) for i in range(len(plan.groups)))
        sources = tuple(
            _taken(src_pages, group.src_entries(units), group.src, "prefiller")
            for group, units in zip(plan.groups, sent, strict=True)
        )
        targets = tuple(self._targets(i, units) for i, units in enumerate(sent))
        expanded: dict[tuple[int, bool], Indices] = {}

        def indices(template: int, side: tuple[Indices, ...], is_source: bool) -> Indices:
            found = expanded.get((template, is_source))
            if found is None:
                one = plan.templates[template]
                found = one.indices(side[one.group], sent[one.group])
                expanded[template, is_source] = found
            return found

        for patterns in plan.patterns:
            yield tuple(
                job
                for pattern in patterns
                if sent[pattern.group]
                for job in _cut(
                    pattern,
                    indices(pattern.src_template, sources, True),
                    indices(pattern.dst_template, targets, False),
                )
            )

    def _complete(self, group: int, begin: int, end: int) -> range:
        """Tells the units of a group that a chunk completes."""
        needed, of = self._units[group], self.plan.groups[group]
        first = max(needed.start, of.done(self.extent, begin))
        return range(first, max(first, min(needed.stop, of.done(self.extent, end))))

    def _targets(self, group: int, units: range) -> Indices:
        """Finds the destination's pages of some units."""
        of = self.plan.groups[group]
        entries, all_of = of.dst_entries(units), of.dst_entries(self._units[group])
        first = entries.start - all_of.start
        return self._pages[group][first : first + len(entries)]


def _taken(tables: Mapping[str, PageTable], entries: range, group: Group, whose: str) -> Indices:
    table = tables.get(group.name)
    if table is None:
        if entries:
            refuse(f"the {whose}'s block table of group {group.name} is missing", "PAGES")
        table = PageTable(())
    return take(table, entries, group.num_pages, group.name, whose)


def _cut(pattern: Pattern, src: Indices, dst: Indices) -> Iterator[PagesJob]:
    """Makes one job, or several where one would be too large."""
    if len(src) <= JOB_PIECES_MAX:
        yield PagesJob(pattern, src, dst)
        return
    for first in range(0, len(src), JOB_PIECES_MAX):
        last = first + JOB_PIECES_MAX
        yield PagesJob(pattern, src[first:last], dst[first:last])
