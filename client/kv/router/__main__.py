# SPDX-License-Identifier: Apache-2.0
"""``python -m transferd.kv.router``: the router as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

import click

from transferd.client import errors
from transferd.kv.router.server import serve


@click.command("transferd.kv.router")
@click.option(
    "--listen", default="127.0.0.1:7480", show_default=True, help="host:port, or unix:///path"
)
@click.option(
    "--interval",
    type=click.FloatRange(0.05, 60),
    default=0.5,
    show_default=True,
    help="Engines tell their load at least this often, s.",
)
@click.option(
    "--lease",
    type=click.FloatRange(0.1, 600),
    default=2.0,
    show_default=True,
    help="Without a message for this long an engine is forgotten, s; above the interval.",
)
def command(listen: str, interval: float, lease: float) -> None:
    """Tells who has a prompt which prefiller and which decoder shall serve it.

    It keeps nothing: after a restart the engines register again.
    """
    if lease <= interval:
        raise click.UsageError(f"--lease is above --interval; got {lease:g} and {interval:g} s")
    try:
        asyncio.run(_run(listen, interval, lease))
    except errors.TransferdError as error:
        click.echo(f"transferd.kv.router: {error}", err=True)
        sys.exit(1)


async def _run(listen: str, interval_s: float, lease_s: float) -> None:
    task = asyncio.ensure_future(
        serve(listen, interval_s, lease_s, lambda at: click.echo(f"serving on {at}"))
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    command()
