# SPDX-License-Identifier: Apache-2.0
"""The options of ``transferctl bench``, and its help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from transferd.client.ctl import render
from transferd.client.ctl.bench.link import DEFAULT_PORT, split_host_port
from transferd.client.ctl.bench.shapes import SHAPES
from transferd.client.ctl.bench.sweep import (
    INITIATORS_MAX,
    OPERATIONS,
    ListType,
    ParamType,
    SizesType,
    SizeType,
)
from transferd.client.ctl.bench.target import GUESTS_MAX
from transferd.client.ctl.bench.work import SAMPLES_MAX
from transferd.client.rpc import ADDRESS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

COUNTS = ListType(click.IntRange(1, INITIATORS_MAX))
BATCHES = ListType(click.IntRange(1, 4096))


class HostPortType(ParamType):
    """HOST:PORT on the command line."""

    name = "host:port"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """As click asks."""
        if isinstance(value, tuple):
            return value
        try:
            return split_host_port(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class SecondsType(click.FloatRange):
    """A range of seconds, which nan is in no more than other numbers outside."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As click asks."""
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds


FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
OPTIONS: tuple[Callable[[Any], Any], ...] = (
    # The two ends.
    click.option("--serve", is_flag=True, help="Be the target, until Ctrl-C."),
    click.option(
        "--to",
        metavar="WHERE",
        help="Be the initiator, to the HOST:PORT or the token that --serve has printed, or to the "
        "socket of another daemon of this host.",
    ),
    click.option("--loopback", is_flag=True, help="Be both, on one daemon: no NIC is used."),
    click.option(
        "--socket",
        "address",
        metavar="ADDRESS",
        help=f"This end's daemon. Default: {ADDRESS_VARIABLE}.",
    ),
    # What to measure.
    click.option(
        "--op",
        "operations",
        metavar="OP,…",
        type=ListType(click.Choice(OPERATIONS)),
        default="write",
        show_default=True,
        help=f"Operations: {', '.join(OPERATIONS)}.",
    ),
    click.option(
        "--sizes",
        metavar="SIZES",
        type=SizesType(),
        default="4K-64M",
        show_default=True,
        help="Bytes of each operation: 4K-64M doubles from the one to the other, 4K,1M lists.",
    ),
    click.option(
        "--batch",
        "batches",
        metavar="N,…",
        type=BATCHES,
        default="1",
        show_default=True,
        help="Operations submitted together: pages of a paged write, targets of a scatter.",
    ),
    click.option(
        "--shape",
        "shapes",
        metavar="NAME,…",
        type=ListType(click.Choice(list(SHAPES))),
        help="KV cache pages of a model, instead of --op and --sizes: "
        + "; ".join(
            f"{s.name} ({s.about}: {s.pages:,} x {render.bytes_text(s.page_bytes)})"
            for s in SHAPES.values()
        )
        + ". As many pages as --memory holds.",
    ),
    click.option(
        "--pairs",
        metavar="N,…",
        type=COUNTS,
        help="Initiating processes, each to a session of its own at the target. Default: 1.",
    ),
    click.option(
        "--many-to-one",
        metavar="N,…",
        type=COUNTS,
        help="Initiating processes, all to one session there.",
    ),
    click.option(
        "--in-flight",
        type=click.IntRange(1, 256),
        default=8,
        show_default=True,
        help="Batches of each process, while the rate is measured.",
    ),
    click.option(
        "--priority", type=click.Choice(["bulk", "latency"]), default="bulk", show_default=True
    ),
    click.option(
        "--checksum", is_flag=True, help="Jobs have the receiving daemon check a CRC-32C."
    ),
    # How long.
    click.option(
        "--seconds",
        type=SecondsType(0.01, 3600),
        default=0.5,
        show_default=True,
        help="Of each phase: latency with one batch at a time, then rate.",
    ),
    click.option(
        "--iterations",
        type=click.IntRange(1, 10_000_000),
        default=None,
        help="Batches of each phase of each process, instead of --seconds; for latency at most "
        f"{SAMPLES_MAX:,}.",
    ),
    click.option(
        "--warm-up",
        type=click.IntRange(0, 1_000_000),
        default=10,
        show_default=True,
        help="Batches before that.",
    ),
    click.option(
        "--repeat",
        type=click.IntRange(1, 1000),
        default=1,
        show_default=True,
        help="Rate phases; the median one is shown, --json has all.",
    ),
    # Memory.
    click.option(
        "--memory",
        type=SizeType(),
        default="256M",
        show_default=True,
        help="Bytes that each side may use, all its processes together.",
    ),
    click.option(
        "--working-set",
        type=SizeType(),
        help="Bytes that each process goes through in turn, so that caches do not help. "
        "Default: what is in flight.",
    ),
    click.option("--seed", type=click.IntRange(0, 1 << 62), help="Of the data. Default: random."),
    # What comes out.
    click.option(
        "--expect",
        metavar="PROVIDER",
        help="Fail unless all jobs go this way, as in verbs, libfabric, tcp or local.",
    ),
    click.option("--json", "json_file", type=FILE, help="Write the report there; -: stdout."),
    click.option("--plot", "plot_file", type=FILE, help="Write a picture (PNG) there."),
    # Of --serve.
    click.option(
        "--listen",
        type=HostPortType(),
        help=f"With --serve: where initiators ask for the token. Default: port {DEFAULT_PORT} of "
        "the address that other daemons know.",
    ),
    click.option("--once", is_flag=True, help="With --serve: end when the initiators have left."),
    click.option(
        "--initiators",
        type=click.IntRange(1, GUESTS_MAX),
        default=1,
        show_default=True,
        help="With --serve: hosts that begin each step together.",
    ),
)


# \b keeps click from joining the lines.
HELP = """Measures transfers through this host's daemon, and checks what landed.

\b
On one host:         transferctl bench --serve
On the other:        transferctl bench --to host1:7473   (as the first has printed)
On this host alone:  transferctl bench --loopback

For each size there is a latency phase with one batch at a time, and a rate phase with several in
flight. A batch's latency runs from the call that submits it until its end is known here, the
acknowledgement of the far side included: POST and TRANSFER are its parts, PREP (making the
description of its jobs) comes before. After each step the target compares every byte and count with
what was sent. Ctrl-C ends it with what was measured until then.

While --serve runs, whoever reaches its port may write into the memory that it lends for the
purpose, and nowhere else.
"""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command its options."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
