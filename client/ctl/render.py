# SPDX-License-Identifier: Apache-2.0
"""How answers are shown: tables for people, plain JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from google.protobuf.message import Message

WIDTH_MAX = 1000
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: As shown.
        show: Makes the cell from a row, as :func:`to_plain` gave it.
        right: Whether it is a number.
    """

    title: str
    show: Callable[[dict[str, Any]], str]
    right: bool = False


def column(title: str, field: str) -> Column:
    """Shows a field as it is."""
    return Column(title, lambda row: str(row[field]))


def number(title: str, field: str) -> Column:
    """Shows a number."""
    return Column(title, lambda row: f"{row[field]:,}", right=True)


def size(title: str, field: str) -> Column:
    """Shows a number of bytes."""
    return Column(title, lambda row: bytes_text(row[field]), right=True)


def speed(title: str, field: str) -> Column:
    """Shows the speed of a link."""
    return Column(title, lambda row: speed_text(row[field]), right=True)


def age(title: str, field: str) -> Column:
    """Shows a duration in milliseconds."""
    return Column(title, lambda row: duration_text(row[field]), right=True)


def bytes_text(count: float) -> str:
    """Says a number of bytes in the unit that fits."""
    for unit in UNITS:
        if count < 1024 or unit == UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 100 or count == int(count) else f"{count:.1f} {unit}"


def speed_text(mbit_per_s: int) -> str:
    """Says the speed of a link in the unit that fits."""
    if not mbit_per_s:
        return "-"
    return f"{mbit_per_s / 1000:g} Gbit/s" if mbit_per_s >= 1000 else f"{mbit_per_s} Mbit/s"


def duration_text(milliseconds: float) -> str:
    """Says a duration in the unit that fits."""
    seconds = milliseconds / 1000
    if seconds < 1:
        return f"{milliseconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def to_plain(message: Message) -> dict[str, Any]:
    """Makes plain data of a message: every field, bytes as hex, enums by name."""
    return {
        field.name: _value(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
    }


def _value(field: Any, value: Any) -> Any:
    if field.is_repeated:
        return [_single(field, item) for item in value]
    return _single(field, value)


def _single(field: Any, value: Any) -> Any:
    if field.type == field.TYPE_MESSAGE:
        return to_plain(value)
    if field.type == field.TYPE_ENUM:
        found = field.enum_type.values_by_number.get(value)
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        return found.name.removeprefix(prefix) if found is not None else str(value)
    return value.hex() if isinstance(value, bytes) else value


def print_json(data: Any) -> None:
    """Prints data for programs."""
    print(json.dumps(data, indent=2))


def print_table(
    columns: Sequence[Column], rows: Iterable[dict[str, Any]], empty: str, console: Console
) -> None:
    """Prints rows for people.

    Args:
        columns: What to show.
        rows: Plain data.
        empty: Said where there are none.
        console: Where to.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for each in columns:
        table.add_column(each.title, justify="right" if each.right else "left", no_wrap=True)
    count = 0
    for row in rows:
        table.add_row(*(each.show(row) for each in columns))
        count += 1
    if count:
        _print_whole(table, console)
    else:
        console.print(empty)


def _print_whole(table: Table, console: Console) -> None:
    """Prints each row as a line, for eyes and for grep; the terminal breaks what is too long."""
    natural = Measurement.get(console, console.options.update(max_width=WIDTH_MAX), table)
    console.width = max(console.width, natural.maximum)
    console.print(table)


def print_fields(fields: Iterable[tuple[str, str]], console: Console) -> None:
    """Prints names and values below each other."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(no_wrap=True)
    for name, value in fields:
        table.add_row(name, value)
    _print_whole(table, console)


def make_console(*, error: bool = False) -> Console:
    """Makes a console that does not colour or interpret what daemons say."""
    return Console(stderr=error, highlight=False, markup=False, emoji=False)
