# SPDX-License-Identifier: Apache-2.0
"""What one rank sends another: for a request, the paged writes and their counts.

A plan is made once for a pair of ranks (``planner.py``). For a request only indices are computed,
by numpy, once for all layers that repeat alike.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from transferd.client.operations import WritePages
from transferd.kv.layout import refuse
from transferd.kv.pages import PageTable, first_needed, take

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from transferd.client.memory import BaseRegion, RegionSlice
    from transferd.kv.layout import Group
    from transferd.kv.pages import Extent

    Indices = NDArray[np.uint32]

# A quarter of the pages that a session's arena holds by default (client/README.md, Bounds).
JOB_PIECES_MAX = 65_536
# Of steps that go together: with so many, what a job costs does not matter any more.
TOGETHER_PIECES_MAX = 4096
JOINS_KEPT = 1024  # ranges of steps, of a plan
INDEX_MAX = (1 << 32) - 1


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
        return base if self.adds is None else _repeated(base, self.adds)

    def largest(self, pages: int) -> int:
        """Tells the largest index that there can be, of so many pages."""
        within = 0 if self.adds is None else int(self.adds.max())
        return self.page_step * (pages - 1) + self.unit_step * (self.per_page - 1) + within


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


class Joined(NamedTuple):
    """A paged write of one step, or one of several steps that lie alike.

    Attributes:
        pattern: Of the one that lies first.
        src_starts: Where each begins, in strides from there; None: there is one.
        dst_starts: The same at the destination.
    """

    pattern: Pattern
    src_starts: Indices | None = None
    dst_starts: Indices | None = None


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
        self._joined: dict[tuple[int, int], tuple[Joined, ...]] = {}
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
        return tuple(self.pieces([group.units(extent) for group in self.groups]))

    def pieces(self, units: Sequence[range]) -> list[int]:
        """Counts the pieces of each step, of some units of each group."""
        counts: list[int] = (self._pieces @ np.array([*map(len, units)], dtype=np.int64)).tolist()
        return counts

    def joined(self, first: int, last: int) -> tuple[Joined, ...]:
        """Tells the paged writes of the steps from first up to last, as few as they can be."""
        found = self._joined.get((first, last))
        if found is None:
            if len(self._joined) >= JOINS_KEPT:
                self._joined.clear()
            found = self._joined[first, last] = tuple(self._join(self.patterns[first:last]))
        return found

    def _join(self, steps: Sequence[tuple[Pattern, ...]]) -> Iterator[Joined]:
        if len(steps) == 1:
            yield from map(Joined, steps[0])
            return
        alike: dict[Pattern, list[Pattern]] = {}
        for pattern in itertools.chain(*steps):
            within = pattern._replace(
                src_offset=pattern.src_offset % pattern.src_stride,
                dst_offset=pattern.dst_offset % pattern.dst_stride,
            )
            alike.setdefault(within, []).append(pattern)
        for members in alike.values():
            group = self.groups[members[0].group]
            sources = [one.src_offset // one.src_stride for one in members]
            targets = [one.dst_offset // one.dst_stride for one in members]
            if len(members) == 1 or not (
                self._reaches(members[0].src_template, group.src, sources)
                and self._reaches(members[0].dst_template, group.dst, targets)
            ):
                yield from map(Joined, members)
                continue
            yield Joined(
                members[0]._replace(
                    src_offset=min(one.src_offset for one in members),
                    dst_offset=min(one.dst_offset for one in members),
                ),
                np.array([at - min(sources) for at in sources], dtype=np.uint32),
                np.array([at - min(targets) for at in targets], dtype=np.uint32),
            )

    def _reaches(self, template: int, group: Group, starts: list[int]) -> bool:
        """Tells whether indices of 32 bits suffice for writes that begin at some strides."""
        largest = self.templates[template].largest(group.num_pages)
        return max(starts) - min(starts) + largest <= INDEX_MAX

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
        sending = self.sending(begin, end, src_pages)
        return tuple(
            tuple(map(sending.job, sending.writes(step, step + 1)))
            for step in range(len(self.plan.steps))
        )

    def sending(self, begin: int, end: int, src_pages: Mapping[str, PageTable]) -> Sending:
        """Begins :meth:`chunk`, whose jobs are made one by one: later ones take no memory yet.

        Raises:
            InvalidRequest: PAGES, CHUNK.
        """
        if not 0 <= begin <= end <= self.extent.tokens:
            refuse(
                f"a chunk is of tokens from 0 to {self.extent.tokens}, not {begin} to {end}",
                "CHUNK",
            )
        groups = self.plan.groups
        sent = tuple(self._complete(i, begin, end) for i in range(len(groups)))
        sources = tuple(
            _taken(src_pages, group.src_entries(units), group.src, "prefiller")
            for group, units in zip(groups, sent, strict=True)
        )
        targets = tuple(self._targets(i, units) for i, units in enumerate(sent))
        return Sending(self.plan, sent, (sources, targets))

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


class PagesWrite(NamedTuple):
    """A paged write that is still to be made.

    Attributes:
        joined: Which.
        pieces: Of it, those that this job has.
    """

    joined: Joined
    pieces: range


class Sending:
    """A chunk of a request on its way."""

    __slots__ = ("_expanded", "_pages", "_pieces", "_plan", "_units")

    def __init__(
        self,
        plan: Plan,
        units: tuple[range, ...],
        pages: tuple[tuple[Indices, ...], tuple[Indices, ...]],
    ) -> None:
        """Takes the units of each group, and their pages at the source and at the destination."""
        self._plan = plan
        self._units = units
        self._pages = pages
        self._pieces = plan.pieces(units)
        self._expanded: dict[tuple[int, int], Indices] = {}

    def together(self, first: int, last: int) -> int:
        """Tells up to which step, last at most, those from first on make jobs together."""
        pieces = self._pieces[first]
        for step in range(first + 1, last):
            pieces += self._pieces[step]
            if pieces > TOGETHER_PIECES_MAX:
                return step
        return last

    def writes(self, first: int, last: int) -> Iterator[PagesWrite]:
        """Tells the jobs of the steps from first up to last: as few as they can be."""
        for joined in self._plan.joined(first, last):
            adds = self._plan.templates[joined.pattern.src_template].adds
            count = len(self._units[joined.pattern.group]) * (1 if adds is None else len(adds))
            count *= 1 if joined.src_starts is None else len(joined.src_starts)
            for begin in range(0, count, JOB_PIECES_MAX):
                yield PagesWrite(joined, range(begin, min(begin + JOB_PIECES_MAX, count)))

    def job(self, write: PagesWrite) -> PagesJob:
        """Makes one of them."""
        (pattern, src_starts, dst_starts), pieces = write
        src = self._indices(0, pattern, pattern.src_template)
        dst = self._indices(1, pattern, pattern.dst_template)
        if src_starts is not None and dst_starts is not None:
            src, dst = _repeated(src, src_starts), _repeated(dst, dst_starts)
        if len(pieces) < len(src):
            part = slice(pieces.start, pieces.stop)
            src, dst = src[part], dst[part]
        return PagesJob(pattern, src, dst)

    def _indices(self, side: int, pattern: Pattern, template: int) -> Indices:
        found = self._expanded.get((side, template))
        if found is None:
            found = self._plan.templates[template].indices(
                self._pages[side][pattern.group], self._units[pattern.group]
            )
            self._expanded[side, template] = found
        return found


def _repeated(indices: Indices, starts: Indices) -> Indices:
    return (starts[:, None] + indices).ravel()


def _taken(tables: Mapping[str, PageTable], entries: range, group: Group, whose: str) -> Indices:
    table = tables.get(group.name)
    if table is None:
        if entries:
            refuse(f"the {whose}'s block table of group {group.name} is missing", "PAGES")
        table = PageTable(())
    return take(table, entries, group.num_pages, group.name, whose)
