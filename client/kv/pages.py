# SPDX-License-Identifier: Apache-2.0
"""A request's tokens, and the pages that its block tables say they are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transferd.kv.layout import check_number, refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from transferd.kv.layout import Group, Layout

TOKENS_MAX = 1 << 31


@dataclass(frozen=True, slots=True)
class Extent:
    """Which tokens of a request are transferred: those from first_token up to tokens.

    Attributes:
        tokens: Of the whole request, from its beginning.
        first_token: The decoder has those before it: whole pages of every group.
    """

    tokens: int
    first_token: int = 0

    def __post_init__(self) -> None:
        check_number("tokens", self.tokens, 1, TOKENS_MAX)
        check_number("first_token", self.first_token, 0, self.tokens)


def first_needed(group: Group, extent: Extent) -> int:
    """Tells the first token that a group needs of a request; behind its end, if it needs none."""
    if not group.window_tokens:
        return extent.first_token
    return max(extent.first_token, extent.tokens - group.window_tokens)


def needed(layout: Layout, extent: Extent) -> dict[str, range]:
    """Tells which entries of a rank's block tables a request needs, by group."""
    found = {}
    for group in layout.groups:
        first = first_needed(group, extent)
        any_of = bool(group.layers) and first < extent.tokens
        last = (extent.tokens - 1) // group.page_tokens
        found[group.name] = range(first // group.page_tokens, last + 1) if any_of else range(0)
    return found


class PageTable:
    """The block table of a request in one group, or a part of it.

    Attributes:
        first: Which entry of the request's whole table the first one is: it is of the tokens from
            ``first * page_tokens`` on.
        numbers: Pages, uint32.
    """

    __slots__ = ("first", "numbers")

    def __init__(self, numbers: Any, first: int = 0) -> None:
        check_number("the first entry of a block table", first, 0, TOKENS_MAX)
        self.first = first
        self.numbers = to_numbers(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"<PageTable of {len(self)} from {self.first}>"


def to_numbers(value: Any) -> NDArray[np.uint32]:
    """Reads page numbers: of an array, a tensor on the host, or a list.

    Raises:
        InvalidRequest: They are none.
    """
    numbers = np.asarray(value)
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and len(numbers)):
        refuse(
            f"a block table is a list of integers, not of {numbers.dtype} in "
            f"{numbers.ndim} dimensions",
            "PAGES",
        )
    if numbers.dtype == np.uint32:
        return np.ascontiguousarray(numbers)
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << 32:
        at = int(np.flatnonzero((numbers < 0) | (numbers >= 1 << 32))[0])
        refuse(f"page {numbers[at]} at index {at} of a block table is no page number", "PAGES")
    return np.ascontiguousarray(numbers, dtype=np.uint32)


def take(
    table: PageTable, entries: range, num_pages: int, group: str, whose: str
) -> NDArray[np.uint32]:
    """Takes entries of a block table, and checks them.

    Args:
        table: The table.
        entries: Of the request's whole table.
        num_pages: That there are.
        group: Its name, for errors.
        whose: Who has the cache, for errors.

    Raises:
        InvalidRequest: PAGES: an entry is missing, out of range, or there twice.
    """
    first = entries.start - table.first
    if entries and (first < 0 or entries.stop - table.first > len(table)):
        refuse(
            f"the {whose}'s block table of group {group} has entries {table.first} to "
            f"{table.first + len(table) - 1}, needed are {entries.start} to {entries.stop - 1}",
            "PAGES",
        )
    numbers = table.numbers[first : entries.stop - table.first] if entries else table.numbers[:0]
    if len(numbers) and int(numbers.max()) >= num_pages:
        at = int(np.argmax(numbers >= num_pages))
        refuse(
            f"page {numbers[at]} at index {entries.start + at} of group {group} is out of range: "
            f"the {whose} has {num_pages} pages",
            "PAGES",
        )
    ordered = np.sort(numbers)
    if (ordered[1:] == ordered[:-1]).any():
        page = ordered[1:][ordered[1:] == ordered[:-1]][0]
        one, other = np.flatnonzero(numbers == page)[:2] + entries.start
        refuse(
            f"page {page} is listed twice in group {group} of the {whose}: at indices {one} "
            f"and {other}",
            "PAGES",
        )
    return numbers
