# SPDX-License-Identifier: Apache-2.0
"""The command ``transferctl``."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any

import click
from grpc_health.v1 import health_pb2, health_pb2_grpc

from transferd import __version__
from transferd.client import errors
from transferd.client.ctl import render
from transferd.client.ctl.bench.command import bench_command
from transferd.client.ctl.render import Column, age, column, number, size, speed
from transferd.client.rpc import ADDRESS_VARIABLE, Control, resolve_address
from transferd.v1 import admin_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TIMEOUT_S = 10.0
PAGE_SIZE = 1000
SERVICES = ("", "SessionService", "RegionService", "TransferService", "AdminService")


def near_text(gpu: str, numa_node: int) -> str:
    """Says whose nearest rails these are."""
    if gpu:
        return f"GPU {gpu}"
    return f"NUMA node {numa_node}" if numa_node >= 0 else "host memory"


def paths_text(row: Any) -> str:
    """Says how many paths to peers a rail has, and how many of them cannot be used."""
    down = row["paths_down"]
    return f"{row['paths_up']} up" + (f", {down} down" if down else "")


def why_text(row: Any) -> str:
    """Says why a rail was chosen, what its provider chose on it, and what its packets carry."""
    parts = [row["why"], row["provider_why"].removesuffix(".")]
    if row["service_level"] or row["bulk_service_level"] or row["traffic_class"]:
        parts.append(
            f"service level {row['service_level']}, bulk {row['bulk_service_level']}; traffic "
            f"class {row['traffic_class']}"
        )
    return "; ".join(filter(None, parts))


# Where a NIC is, and how fast.
PLACE: Sequence[Column] = (
    Column("NUMA", lambda row: str(row["numa_node"]) if row["numa_node"] >= 0 else "-", right=True),
    Column("PCI", lambda row: row["pci_address"] or "-"),
    speed("SPEED", "speed_mbit_per_s"),
)
COLUMNS: dict[str, Sequence[Column]] = {
    "sessions": (
        column("SESSION", "session_id"),
        column("NAME", "name"),
        column("TENANT", "tenant"),
        Column("PID", lambda row: str(row["pid"] or "-"), right=True),
        column("STATE", "state"),
        number("WEIGHT", "weight"),
        number("REGIONS", "regions"),
        number("GRANTS", "grants"),
        number("OPENS", "opens"),
        number("IN FLIGHT", "jobs_in_flight"),
        number("ENDED", "jobs_ended"),
        number("FAILED", "jobs_failed"),
        size("SENT", "bytes_sent"),
        number("COUNTED", "imms_received"),
        age("AGE", "age_ms"),
    ),
    "regions": (
        column("SESSION", "session_id"),
        column("REGION", "region"),
        column("NAME", "name"),
        column("KIND", "kind"),
        size("LENGTH", "length_bytes"),
        number("GRANTS", "grants"),
        number("OPENERS", "openers"),
        number("MAPPED", "mappings"),
        column("STATE", "state"),
    ),
    "peers": (
        column("ADDRESS", "address"),
        Column("DAEMON", lambda row: row["daemon_id"][:12]),
        Column("EPOCH", lambda row: row["boot_epoch"][:12]),
        column("STATE", "state"),
        number("CONNECTIONS", "connections"),
        number("PATHS DOWN", "paths_down"),
        number("OPENED THERE", "opened_there"),
        number("OPENED HERE", "opened_here"),
        number("LOSSES", "losses"),
    ),
    "rails": (
        Column("RAIL", lambda row: f"{row['group']}.{row['rail']}"),
        column("NAME", "name"),
        column("PROVIDER", "provider"),
        column("STATE", "state"),
        Column("PATHS", paths_text),
        speed("SPEED", "speed_mbit_per_s"),
        size("SENT", "bytes_sent"),
        number("WRITES", "writes_sent"),
        number("COUNTED", "imms_received"),
        number("STALLS", "credit_stalls"),
        number("ERRORS", "errors"),
    ),
    "rails --why": (
        Column("RAIL", lambda row: f"{row['group']}.{row['rail']}"),
        column("NAME", "name"),
        column("PROVIDER", "provider"),
        column("STATE", "state"),
        *PLACE,
        Column("WHY", why_text),
    ),
    "unused": (
        column("NOT USED", "name"),
        Column("STATE", lambda row: row["state"] or "-"),
        *PLACE,
        column("WHY", "why"),
    ),
    "near": (
        Column("NEAREST TO", lambda row: near_text(row["gpu"], row["numa_node"])),
        Column("DISTANCE", lambda row: row["distance"] or "-"),
        Column("RAILS", lambda row: ", ".join(row["rails"])),
        column("WHY", "why"),
    ),
    "gpus": (
        column("GPU", "uuid"),
        Column("NAME", lambda row: row["name"] or "-"),
        column("HELPER", "state"),
        Column("PID", lambda row: str(row["pid"] or "-"), right=True),
        number("RESTARTS", "restarts"),
        number("MEMORIES", "memories"),
        size("TO HOST", "bytes_to_host"),
        size("TO GPU", "bytes_to_gpu"),
        number("FAILED", "failed"),
        Column("LAST ENDED", lambda row: row["reason"] or "-"),
    ),
    "jobs": (
        column("SESSION", "session_id"),
        column("JOB", "job_id"),
        column("OPERATION", "operation"),
        size("LENGTH", "length_bytes"),
        size("ACKNOWLEDGED", "acknowledged_bytes"),
        number("IMM", "imm"),
        column("PRIORITY", "priority"),
        column("STATUS", "status"),
        age("AGE", "age_ms"),
        column("PEER", "peer"),
    ),
}


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command --socket and --json, and a Control to the daemon."""

    @click.option(
        "--socket",
        "address",
        metavar="ADDRESS",
        help=f"The daemon's socket: unix:///path or a path. Default: {ADDRESS_VARIABLE}.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @functools.wraps(command)
    def wrapped(address: str | None, as_json: bool, **options: Any) -> None:
        control = Control(resolve_address(address), TIMEOUT_S)
        try:
            command(control, as_json, **options)
        finally:
            control.close()

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="transferctl")
def cli() -> None:
    """Looks into a running transferd, and measures it."""


@cli.command()
@common
def status(control: Control, as_json: bool) -> None:
    """The daemon as a whole."""
    answer = control.call(control.admin.GetStatus, admin_pb2.GetStatusRequest())
    plain = render.to_plain(answer)
    if as_json:
        render.print_json(plain)
        return
    console = render.make_console()
    render.print_fields(
        [
            ("state", plain["state"]),
            ("version", plain["version"]),
            ("provider", plain["provider"]),
            ("peer address", plain["peer_address"]),
            ("peers by", "mutual TLS" if plain["tls"] else "development mode, not authenticated"),
            ("daemon", plain["daemon_id"]),
            ("boot epoch", plain["boot_epoch"]),
            ("process", f"{plain['pid']}, up {render.duration_text(plain['uptime_ms'])}"),
            ("sessions", f"{plain['sessions']:,}"),
            (
                "regions",
                f"{plain['regions']:,} with {render.bytes_text(plain['registered_bytes'])}",
            ),
            ("peers", f"{plain['peers']:,}"),
            *(("warning", warning) for warning in plain["warnings"]),
        ],
        console,
    )


def _pages(control: Control, method: Any, request: Any, field: str) -> Iterator[Any]:
    """Yields the things of all pages."""
    while True:
        answer = control.call(method, request)
        yield from getattr(answer, field)
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token


def _show(name: str, things: Any, as_json: bool) -> None:
    rows = [render.to_plain(thing) for thing in things]
    if as_json:
        render.print_json(rows)
    else:
        render.print_table(COLUMNS[name], rows, f"no {name}", render.make_console())


@cli.command()
@common
def sessions(control: Control, as_json: bool) -> None:
    """Sessions, living and ending."""
    request = admin_pb2.ListSessionsRequest(page_size=PAGE_SIZE)
    _show("sessions", _pages(control, control.admin.ListSessions, request, "sessions"), as_json)


@cli.command()
@common
def regions(control: Control, as_json: bool) -> None:
    """Registered memory."""
    request = admin_pb2.ListRegionsRequest(page_size=PAGE_SIZE)
    _show("regions", _pages(control, control.admin.ListRegions, request, "regions"), as_json)


@cli.command()
@common
def peers(control: Control, as_json: bool) -> None:
    """Daemons that this one has to do with."""
    answer = control.call(control.admin.ListPeers, admin_pb2.ListPeersRequest())
    _show("peers", answer.peers, as_json)


@cli.command()
@click.option("--why", is_flag=True, help="Say why each NIC is used, or is not.")
@common
def rails(control: Control, as_json: bool, why: bool) -> None:
    """NIC endpoints."""
    answer = control.call(control.admin.ListRails, admin_pb2.ListRailsRequest())
    if not why:
        _show("rails", answer.rails, as_json)
        return
    plain = render.to_plain(answer)
    if as_json:
        render.print_json(plain)
        return
    console = render.make_console()
    console.print(plain["why"], soft_wrap=True)
    if plain["fallback"]:
        console.print(f"warning: {plain['fallback']}", soft_wrap=True)
    for name, field in (("rails --why", "rails"), ("unused", "unused"), ("near", "near")):
        if plain[field]:
            console.print()
            render.print_table(COLUMNS[name], plain[field], "", console)


@cli.command()
@common
def gpus(control: Control, as_json: bool) -> None:
    """GPUs whose memory is staged through host memory, and their helper processes."""
    answer = control.call(control.admin.ListGpus, admin_pb2.ListGpusRequest())
    _show("gpus", answer.gpus, as_json)


@cli.command()
@click.option("--session", type=click.IntRange(min=1), default=None, help="Only of this session.")
@common
def jobs(control: Control, as_json: bool, session: int | None) -> None:
    """Jobs in flight, oldest first."""
    request = admin_pb2.ListJobsRequest(session_id=session or 0)
    answer = control.call(control.admin.ListJobs, request)
    _show("jobs", answer.jobs, as_json)
    if answer.truncated and not as_json:
        click.echo("… and more", err=True)


@cli.command()
@common
def health(control: Control, as_json: bool) -> None:
    """Whether the daemon serves, by service; exit status 1 unless all do. Warnings on stderr."""
    stub: Any = health_pb2_grpc.HealthStub(control.channel)
    found: dict[str, str] = {}
    for service in SERVICES:
        name = f"transferd.v1.{service}" if service else ""
        try:
            answer = control.call(stub.Check, health_pb2.HealthCheckRequest(service=name))
            found[name] = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        except errors.NotFound:
            found[name] = "UNKNOWN"
    if as_json:
        render.print_json(found)
    else:
        render.print_fields(
            [(name or "daemon", state) for name, state in found.items()], render.make_console()
        )
    # Where AdminService has a socket of its own, they are told there and in the log.
    with contextlib.suppress(errors.TransferdError):
        status = control.call(control.admin.GetStatus, admin_pb2.GetStatusRequest())
        for warning in status.warnings:
            click.echo(f"warning: {warning}", err=True)
    if set(found.values()) != {"SERVING"}:
        sys.exit(1)


cli.add_command(bench_command)


def main() -> None:
    """Runs the command line; errors are one sentence and exit status 1."""
    try:
        cli(standalone_mode=True)
    except errors.TransferdError as error:
        click.echo(f"transferctl: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
