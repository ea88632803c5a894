# SPDX-License-Identifier: Apache-2.0
"""The command ``transferctl bench``: its two sides, its outputs."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
from datetime import UTC, datetime
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
from transferd.client.ctl.bench.options import HELP, with_options
from transferd.client.ctl.bench.report import SCHEMA, Report, Row, path_notes
from transferd.client.ctl.bench.runner import Runner, step_text
from transferd.client.ctl.bench.sweep import (
    MANY_TO_ONE,
    PAIRS,
    WITH_CHECKSUM,
    Asked,
    Settings,
    Step,
    memory_available,
    plan,
    shapes_named,
)
from transferd.client.ctl.bench.target import Target
from transferd.client.rpc import resolve_address

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BESIDE = "transferd.client.ctl.bench.beside"
INTERRUPTED = 130
BOTH_ENDS = {"serve", "to", "loopback", "memory"}
TARGETS_OWN = {"listen", "once", "initiators"}


@click.command("bench", help=HELP, short_help="Measures transfers to another host, or on this one.")
@with_options
@click.pass_context
def bench_command(context: click.Context, /, address: str | None, **options: Any) -> None:
    """As HELP says."""
    try:
        _check(context, options)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
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
    """Ends the command once; a second Ctrl-C does not disturb its cleaning up, which is bounded."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
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
            progress.update(task, description=step_text(step))

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
