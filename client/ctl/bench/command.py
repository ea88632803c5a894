# SPDX-License-Identifier: Apache-2.0
"""The command ``transferctl bench``: its options, its two sides, its outputs."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from transferd.client import errors
from transferd.client.child import Child
from transferd.client.ctl import render
from transferd.client.ctl.bench import plot, show
from transferd.client.ctl.bench.link import (
    DEFAULT_PORT,
    PREFIX,
    TokenPort,
    checked,
    fetch_token,
    from_token,
    is_wildcard,
    join_host_port,
    split_host_port,
    to_token,
)
from transferd.client.ctl.bench.machine import machine
from transferd.client.ctl.bench.report import SCHEMA, Report, Row, path_notes
from transferd.client.ctl.bench.runner import Runner
from transferd.client.ctl.bench.shapes import SHAPES
from transferd.client.ctl.bench.sweep import (
    INITIATORS_MAX,
    MANY_TO_ONE,
    OPERATIONS,
    PAIRS,
    WITH_CHECKSUM,
    Asked,
    ListType,
    ParamType,
    Settings,
    SizesType,
    SizeType,
    Step,
    memory_available,
    plan,
    shapes_named,
)
from transferd.client.ctl.bench.target import GUESTS_MAX, Target
from transferd.client.ctl.bench.work import SAMPLES_MAX
from transferd.client.rpc import ADDRESS_VARIABLE, resolve_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BESIDE = "transferd.client.ctl.bench.beside"
INTERRUPTED = 130
BOTH_ENDS = {"serve", "to", "loopback", "memory"}
TARGETS_OWN = {"listen", "once", "initiators"}
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
        type=click.FloatRange(0.01, 3600),
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


@click.command("bench", help=HELP, short_help="Measures transfers to another host, or on this one.")
@with_options
@click.pass_context
def bench_command(context: click.Context, /, address: str | None, **options: Any) -> None:
    """As HELP says."""
    try:
        _check(context, options)
        signal.signal(signal.SIGTERM, _interrupt)
        own = resolve_address(address)
        if options["serve"]:
            _serve(own, options)
        else:
            _initiate(own, options)
    except KeyboardInterrupt:
        if not options["serve"]:
            click.echo("transferctl: interrupted", err=True)
        sys.exit(INTERRUPTED)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _check(context: click.Context, options: dict[str, Any]) -> None:
    """Refuses options that do not go together."""
    ends = [bool(options["serve"]), options["to"] is not None, options["loopback"]]
    if sum(ends) != 1:
        raise click.UsageError(
            "say which end this is: --serve, --to HOST:PORT (as --serve has printed), or "
            "--loopback for both"
        )
    for name in options.keys() - BOTH_ENDS:
        if _given(context, name) and (name in TARGETS_OWN) != options["serve"]:
            word = next(p.opts[0] for p in context.command.params if p.name == name)
            raise click.UsageError(
                f"{word} is for the other end, not for --serve"
                if options["serve"]
                else f"{word} goes with --serve"
            )
    if options["shapes"]:
        for name in ("operations", "sizes", "batches"):
            if _given(context, name):
                raise click.UsageError("--shape says operation, size and batch itself")
    if options["checksum"] and set(options["operations"]) - WITH_CHECKSUM:
        raise click.UsageError(f"--checksum goes with {', '.join(sorted(WITH_CHECKSUM))}")


# ---- the target ----


def _serve(address: str, options: dict[str, Any]) -> None:
    console = render.make_console()
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(
            Target(
                address,
                options["memory"],
                expected=options["initiators"],
                once=options["once"],
                on_event=lambda text: console.print(text, soft_wrap=True),
            )
        )
        token = to_token(target.descriptor)
        port = stack.enter_context(TokenPort(*_listen(target, options["listen"]), token))
        console.print(
            f"on the other host:                  transferctl bench --to {_known(target, port)}\n"
            f"or, where it cannot reach the port: transferctl bench --to {token}\n"
            "Ctrl-C ends this.",
            soft_wrap=True,
        )
        target.serve()


def _listen(target: Target, chosen: tuple[str, int] | None) -> tuple[str, int]:
    if chosen is not None:
        return chosen
    daemon = target.machine.daemon
    if daemon is None or not daemon.peer_address:
        raise errors.Unavailable(
            "the daemon does not tell this client its address: --listen HOST:PORT says where "
            "initiators can reach this host"
        )
    return split_host_port(daemon.peer_address)[0], DEFAULT_PORT


def _known(target: Target, port: TokenPort) -> str:
    """Says the port's address as others reach it: "any address" is none for them."""
    host, number = split_host_port(port.address)
    daemon = target.machine.daemon
    if is_wildcard(host) and daemon is not None and daemon.peer_address:
        host = split_host_port(daemon.peer_address)[0]
    return join_host_port(host, number)


@contextlib.contextmanager
def _target(address: str, options: dict[str, Any]) -> Iterator[bytes]:
    """Finds the target's mailbox, starting the target where it is on this host."""
    to = options["to"]
    if to is not None and to.startswith(PREFIX):
        yield from_token(to)
        return
    if to is not None and not to.startswith(("unix:", "/", ".")):
        try:
            where = split_host_port(to)
        except ValueError as error:
            raise click.BadParameter(
                f"{error}; nor is it a token ({PREFIX}…), nor a socket (/path)", param_hint="--to"
            ) from None
        yield from_token(fetch_token(*where))
        return
    there = resolve_address(to) if to is not None else address
    with Child(BESIDE, there, str(options["memory"]), own_group=True) as child:
        yield from_token(checked(child.read(), "target")["token"])


# ---- the initiator ----


def _initiate(address: str, options: dict[str, Any]) -> None:
    if options["plot_file"] is not None:
        plot.check()
    for file in (options["json_file"], options["plot_file"]):
        _check_file(file)
    settings = _settings(options)
    rows: list[Row] = []
    report = Report(
        schema_version=SCHEMA,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=_parameters(options, settings),
        initiator=machine(address),
        target=None,
        complete=False,
        error="",
        notes=[],
        rows=[],
    )
    failure: BaseException | None = None
    try:
        report = _measure(address, options, settings, report, rows)
    except (errors.TransferdError, KeyboardInterrupt) as error:
        failure = error
        told = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        known = getattr(error, "bench_report", report)
        report = known.model_copy(update={"error": told, "rows": rows})
    if rows:
        show.show(report, render.make_console(error=_to_stdout(options)))
    _write(report, options)
    if failure is not None:
        raise failure
    _check_expected(report, options["expect"])
    if not report.rows:
        raise errors.QuotaExceeded("nothing was measured: " + "; ".join(report.notes))


def _measure(
    address: str,
    options: dict[str, Any],
    settings: Settings,
    report: Report,
    rows: list[Row],
) -> Report:
    """Does the whole sweep; puts rows into the list as they come."""
    here = options["loopback"] or options["to"].startswith(("unix:", "/", "."))
    steps, notes = plan(_asked(options), settings, memory_available() // (2 if here else 1))
    console = render.make_console(error=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        _target(address, options) as target,
    ):
        task = progress.add_task("finding the target", total=len(steps))

        def begin(step: Step) -> None:
            progress.update(task, description=_step_text(step))

        with Runner(address, target, settings, begin) as runner:
            report = report.model_copy(update={"target": runner.target})
            try:
                for row in runner.rows(steps):
                    rows.append(row)
                    progress.advance(task)
            except BaseException as error:
                error.bench_report = report  # type: ignore[attr-defined]
                raise
            notes += runner.notes
    notes += path_notes(rows, report.initiator, runner.target, meant=here)
    notes += _shape_notes(rows)
    return report.model_copy(update={"complete": True, "rows": rows, "notes": notes})


def _step_text(step: Step) -> str:
    size = f" of {render.bytes_text(step.size)}" if step.size else ""
    many = f" x {step.batch:,}" if step.batch > 1 else ""
    return f"{step.operation}{size}{many}, {step.initiators} {step.scheme}"


def _shape_notes(rows: list[Row]) -> list[str]:
    return list(
        dict.fromkeys(
            f"{row.shape}: {row.batch:,} of its {row.shape_pages:,} pages, which is what --memory "
            f"holds (scale 1:{row.shape_pages / row.batch:.1f})"
            for row in rows
            if row.shape and row.batch < row.shape_pages
        )
    )


def _asked(options: dict[str, Any]) -> Asked:
    schemes = [(PAIRS, count) for count in options["pairs"] or ()]
    schemes += [(MANY_TO_ONE, count) for count in options["many_to_one"] or ()]
    chosen = schemes or [(PAIRS, 1)]
    if options["shapes"]:
        return Asked((), (), (), chosen, shapes_named(options["shapes"]))
    return Asked(options["operations"], options["sizes"], options["batches"], chosen)


def _settings(options: dict[str, Any]) -> Settings:
    seed = options["seed"]
    return Settings(
        seconds=options["seconds"],
        iterations=options["iterations"] or 0,
        warm_up=options["warm_up"],
        repeats=options["repeat"],
        in_flight=options["in_flight"],
        memory=options["memory"],
        working_set=options["working_set"] or 0,
        priority=options["priority"],
        checksum=options["checksum"],
        seed=secrets.randbits(32) if seed is None else seed,
    )


def _parameters(options: dict[str, Any], settings: Settings) -> dict[str, Any]:
    told = {name: value for name, value in options.items() if not name.endswith("_file")}
    to = "token" if str(options["to"]).startswith(PREFIX) else options["to"]
    del told["listen"], told["once"], told["initiators"], told["serve"]
    return {**told, "to": to, "seed": settings.seed}


# ---- what comes out ----


def _check_file(path: Path | None) -> None:
    """Finds out before anything is measured whether a file can be written."""
    if path is None or str(path) == "-":
        return
    try:
        path.open("ab").close()
    except OSError as error:
        raise errors.Unavailable(f"{path} cannot be written: {error.strerror or error}") from None


def _to_stdout(options: dict[str, Any]) -> bool:
    return options["json_file"] is not None and str(options["json_file"]) == "-"


def _write(report: Report, options: dict[str, Any]) -> None:
    path = options["json_file"]
    if _to_stdout(options):
        print(report.model_dump_json(indent=2))
    elif path is not None:
        try:
            path.write_text(report.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise errors.Unavailable(f"--json {path}: {error.strerror or error}") from None
    if options["plot_file"] is not None:
        plot.save(report, options["plot_file"])


def _check_expected(report: Report, expected: str | None) -> None:
    if expected is None:
        return
    others = {
        path.provider for row in report.rows for path in row.paths if path.provider != expected
    }
    if others:
        raise errors.Conflict(
            f"--expect {expected}: jobs went by {', '.join(sorted(others))}; `transferctl rails "
            "--why` tells why",
            reason="BENCH_PATH",
        )
