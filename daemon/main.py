# SPDX-License-Identifier: Apache-2.0
"""The daemon's commands: serve, check-config, certs; and demo, a process of the client's."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
from pathlib import Path

import click

CONFIG_OPTION = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="YAML file. Without it: development mode on the default socket.",
)


def _fail(message: str) -> int:
    for line in message.splitlines():
        click.echo(f"transferd: {line}", err=True)
    return 1


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="transferd")
def cli() -> None:
    """Moves memory between processes and hosts with one-sided writes: the daemon's commands."""


@cli.command()
@CONFIG_OPTION
def serve(config_path: Path | None) -> int:
    """Run the daemon in the foreground until SIGTERM."""
    from transferd.daemon import config as configuration

    try:
        config = configuration.load(config_path) if config_path else configuration.Config()
    except configuration.ConfigError as error:
        return _fail(str(error))
    return _serve(config)


def _serve(config: object) -> int:
    # The libraries below are large; a typo in the configuration is told without them.
    import uvloop

    from transferd.daemon import logs
    from transferd.daemon.config import Config

    assert isinstance(config, Config)
    faulthandler.enable()
    logs.set_up(config.log_level, config.log_format)
    try:
        from transferd.daemon import server
        from transferd.daemon.sockets import StartError
    except ImportError as error:
        return _fail(f"a part of the installation is missing ({error}); install transferd again")
    try:
        return uvloop.run(server.serve(config))
    except StartError as error:
        return _fail(str(error))


@cli.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
def check_config(file: Path) -> int:
    """Check a configuration FILE without starting anything."""
    from transferd.daemon import config as configuration

    try:
        config = configuration.load(file)
    except configuration.ConfigError as error:
        return _fail(str(error))
    click.echo(f"{file}: correct")
    if config.tls is None:
        click.echo("no tls section: development mode, this host only")
    return 0


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="host", show_default=True, help="Base name of the files.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    help="Name or address that peers use for the host; may be repeated. Default: this host.",
)
def certs(directory: Path, name: str, hosts: tuple[str, ...]) -> int:
    """Make development certificates in DIRECTORY: a CA (once) and a certificate for one host.

    Run it again with another --name and --host for each further host, then copy NAME.crt, NAME.key
    and ca.crt there.
    """
    from transferd.daemon import certs as certificates

    if not name or name == "ca" or os.sep in name:
        return _fail(f"--name {name!r} cannot be used; choose another, as in --name host1")
    try:
        paths = certificates.make(
            directory, name, hosts or (socket.gethostname(), "localhost", "127.0.0.1")
        )
    except FileExistsError as error:
        return _fail(f"{error} exists; choose another --name, or remove it first")
    except (OSError, ValueError) as error:
        return _fail(f"cannot make certificates in {directory}: {error}")
    cert, key, ca = paths
    click.echo(f"tls:\n  cert: {cert.absolute()}\n  key: {key.absolute()}\n  ca: {ca.absolute()}")
    return 0


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> int:
    """Two daemons and their clients: weights, or KV caches, moved and checked."""
    # A process of its own, which takes this one's place, Ctrl-C and all: the daemon's package never
    # imports the client's.
    os.execv(sys.executable, [sys.executable, "-m", "transferd.client.demo.main", *arguments])


def main() -> int:
    """Runs the command line; returns the exit status."""
    try:
        status = cli.main(standalone_mode=False, prog_name="transferd")
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
