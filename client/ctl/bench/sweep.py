# SPDX-License-Identifier: Apache-2.0
"""The steps of a sweep: what the options ask for, cut to what the memory holds."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from transferd.client.ctl import render
from transferd.client.ctl.bench.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    ParamType: TypeAlias = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic in later versions only

OPERATIONS = ("write", "pages", "read", "scatter", "imm")
WITH_CHECKSUM = frozenset({"write", "pages", "scatter"})
PAIRS = "pairs"
MANY_TO_ONE = "many-to-one"
INITIATORS_MAX = 64
PREPARED_MAX = 65_536  # operations of a worker, each of which is an object or two
BATCH_MAX = 262_144
SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MEMORY_SHARE = 0.8  # of what the host has available


def parse_size(text: str) -> int:
    """Reads "4K", "64MiB" or "17": powers of 1,024.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size, as in 4K, 1M or 4096")
    return int(match[1]) * SUFFIXES[match[2]]


class SizeType(ParamType):
    """A size above 0 on the command line."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """As click asks."""
        if isinstance(value, int):
            return value
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not 0 < size <= SUFFIXES["T"]:
            self.fail(f"{value!r} is not from 1 byte to 1T", param, ctx)
        return size


class ListType(ParamType):
    """Values with commas between, none twice."""

    def __init__(self, each: ParamType) -> None:
        self.each = each
        self.name = f"{each.name},…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """As click asks."""
        if isinstance(value, tuple):
            return value
        return tuple(
            dict.fromkeys(self.each(word.strip(), param, ctx) for word in value.split(","))
        )


class SizesType(ParamType):
    """Sizes on the command line: "4K-64M" doubles, commas list."""

    name = "sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """As click asks."""
        if isinstance(value, tuple):
            return value
        size = SizeType()
        found: list[int] = []
        for word in value.split(","):
            first, dash, last = word.partition("-")
            lowest = size(first, param, ctx)
            highest = size(last, param, ctx) if dash else lowest
            if highest < lowest:
                self.fail(f"{word!r} goes down: write {last}-{first}", param, ctx)
            found += doubling(lowest, highest)
        return tuple(dict.fromkeys(found))


def doubling(first: int, last: int) -> tuple[int, ...]:
    """Lists first, its doubles, and last."""
    sizes = [first]
    while sizes[-1] * 2 < last:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if first == last else (*sizes, last)


@dataclass(frozen=True, slots=True)
class Settings:
    """What all steps of a run have alike.

    Attributes:
        seconds: Of each phase of a step; iterations, where they are given, come before it.
        iterations: Batches of each phase; 0: as many as the seconds hold.
        warm_up: Batches before it.
        repeats: Rate phases; the row is the median one.
        in_flight: Batches of an initiator in the rate phase.
        memory: Bytes of each side.
        working_set: Bytes of an initiator that the rate phase goes through.
        priority: Of the jobs.
        checksum: Whether the jobs ask for one.
        seed: Of the pattern.
    """

    seconds: float
    iterations: int
    warm_up: int
    repeats: int
    in_flight: int
    memory: int
    working_set: int
    priority: str
    checksum: bool
    seed: int


@dataclass(frozen=True, slots=True)
class Step:
    """What is measured in one row.

    Attributes:
        number: In the sweep.
        operation: Of OPERATIONS.
        size: Bytes of each operation.
        batch: Operations submitted together; of a paged write its pages, of a scatter its targets.
        scheme: PAIRS or MANY_TO_ONE.
        initiators: Processes that submit.
        slots: Places that the batches of an initiator go to in turn.
        shape: Name of the preset; empty: none.
        shape_pages: What the preset asks for, where the memory holds less.
    """

    number: int
    operation: str
    size: int
    batch: int
    scheme: str
    initiators: int
    slots: int
    shape: str = ""
    shape_pages: int = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of a batch."""
        return self.size * self.batch

    @property
    def length(self) -> int:
        """Bytes that each initiator uses at each end; never none, as grants are of memory."""
        return max(1, self.slot_bytes * self.slots)

    def plain(self) -> dict[str, Any]:
        """Makes plain data of it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the options ask for."""

    operations: Sequence[str]
    sizes: Sequence[int]
    batches: Sequence[int]
    schemes: Sequence[tuple[str, int]]
    shapes: Sequence[Shape] = ()


def plan(asked: Asked, settings: Settings, available: int) -> tuple[list[Step], list[str]]:
    """Lists the steps.

    Args:
        asked: What is asked for.
        settings: Of the run.
        available: Bytes of memory that are free on this host.

    Returns:
        The steps, and a sentence for whatever the memory does not hold.
    """
    steps: list[Step] = []
    notes: list[str] = []
    limit, why = _limit(settings.memory, available)
    for scheme, initiators in asked.schemes:
        each = limit // initiators
        cut: list[str] = []
        for operation, size, batch in _figures(asked):
            slots = _slots(size, batch, each, settings)
            if slots:
                steps.append(Step(len(steps), operation, size, batch, scheme, initiators, slots))
                notes += _working_set_note(steps[-1], settings.working_set)
            else:
                cut.append(_figure_text(size, batch))
        for shape in asked.shapes:
            step = _shaped(len(steps), shape, scheme, initiators, each)
            if step is None:
                cut.append(f"{shape.name} ({render.bytes_text(shape.page_bytes)} a page)")
            else:
                steps.append(step)
        if cut:
            notes.append(
                f"left out with {initiators} initiators: {', '.join(dict.fromkeys(cut))}: more than"
                f" the {render.bytes_text(each)} of each; {why}"
            )
    return steps, list(dict.fromkeys(notes))


def _limit(memory: int, available: int) -> tuple[int, str]:
    """Tells how much memory may be used on this host, and what would change that."""
    if memory <= available * MEMORY_SHARE:
        return memory, "--memory sets it"
    return int(available * MEMORY_SHARE), (
        f"this host has {render.bytes_text(available)} available: free some"
    )


def _figures(asked: Asked) -> Iterator[tuple[str, int, int]]:
    for operation, batch in itertools.product(asked.operations, asked.batches):
        for size in (0,) if operation == "imm" else asked.sizes:
            yield operation, size, batch


def _figure_text(size: int, batch: int) -> str:
    return f"{batch} x {render.bytes_text(size)}" if batch > 1 else render.bytes_text(size)


def _slots(size: int, batch: int, memory: int, settings: Settings) -> int:
    """Tells how many batches have a place of their own; 0: not even one."""
    slot_bytes = size * batch
    if not slot_bytes:
        return settings.in_flight
    wanted = max(settings.in_flight, settings.working_set // slot_bytes)
    return min(wanted, memory // slot_bytes, max(1, PREPARED_MAX // batch))


def _working_set_note(step: Step, wanted: int) -> list[str]:
    """Says that a step goes through less memory than was asked for."""
    if not step.size or step.length > wanted - step.slot_bytes:
        return []
    why = f"{PREPARED_MAX:,} operations are prepared"
    if step.slots < PREPARED_MAX // step.batch:
        why = "--memory holds no more"
    figure = _figure_text(step.size, step.batch)
    return [
        f"{figure}: the working set is {render.bytes_text(step.length)}, not "
        f"{render.bytes_text(wanted)}: {why}"
    ]


def _shaped(number: int, shape: Shape, scheme: str, initiators: int, memory: int) -> Step | None:
    """Makes the step of a preset, with as many of its pages as the memory holds."""
    pages = min(shape.pages, memory // shape.page_bytes, BATCH_MAX)
    if not pages:
        return None
    slots = max(1, min(2, memory // (pages * shape.page_bytes)))
    return Step(
        number,
        "pages",
        shape.page_bytes,
        pages,
        scheme,
        initiators,
        slots,
        shape.name,
        shape.pages,
    )


def shapes_named(names: Sequence[str]) -> list[Shape]:
    """Finds presets."""
    return [SHAPES[name] for name in names]


def memory_available() -> int:
    """Tells the bytes of memory that this host can still give, by the kernel's own estimate."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
