# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks: ``python tests/bench/run.py NAME --json FILE``.

Prints a table, writes JSON, and ends with status 1 when a bar is missed.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import peers  # the path comes first
from bench.options import Options

BARS = Path(__file__).resolve().parent / "bars"


def names() -> list[str]:
    """Lists the benchmarks that there are."""
    return sorted(path.stem for path in BARS.glob("*.py") if path.stem != "__init__")


@click.command()
@click.argument("name", type=click.Choice(names()))
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the rows here.",
)
@click.option("--quick", is_flag=True, help="Shorter runs: rough figures.")
@click.option("--full", is_flag=True, help="Also what takes minutes (deploy/quickstart).")
@click.option("--only", multiple=True, metavar="WORD", help="Only steps whose name has this word.")
@click.option(
    "--install-peers", is_flag=True, help="Install other libraries to compare with first."
)
def main(
    name: str,
    json_path: Path | None,
    quick: bool,
    full: bool,
    only: tuple[str, ...],
    install_peers: bool,
) -> None:
    """Measures the bars of NAME on this machine."""
    progress = Console(stderr=True)
    if install_peers:
        try:
            with progress.status("installing NIXL and Mooncake into build/bench/peers …"):
                peers.install()
        except subprocess.CalledProcessError as error:
            raise click.ClickException(f"the peers cannot be installed: {error}") from None
    bars = importlib.import_module(f"bench.bars.{name}")
    report = bars.measure(Options(progress, quick=quick, full=full, only=only))
    report.print(Console())
    if json_path is not None:
        report.write(json_path)
        progress.print(f"written to {json_path}")
    sys.exit(0 if all(row.ok for row in report.rows) else 1)


if __name__ == "__main__":
    main()
